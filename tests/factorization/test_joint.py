"""Neurons and skipped parts: their order, losses and refits against plain linear algebra."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.cache import factor_model
from lrbo.factorization.joint import (
    NEURONS,
    RIDGE,
    SKIP,
    Skipped,
    Thinned,
    prepare_joint,
    removal_order,
)
from lrbo.factorization.prepared import UnitFactors, prepared_of
from lrbo.factorization.registry import method_named
from lrbo.layers.joint import SkippedLinear, ThinLinear
from lrbo.layers.low_rank import linear_of
from lrbo.layers.options import Menu, Option
from lrbo.models.model_map import map_model
from lrbo.models.specs import LayerSpec
from tests.support import reference
from tests.support.methods import RandomStatistics
from tests.support.tiny import build

TOLERANCE = {
    "float64": 1e-7,  # relative: 1e-9 of the mean diagonal is added, for what was never active
    "float32": 1e-4,  # relative: the same, of a refit that is kept in single precision
}
OUT, NEURONS_OF, HIDDEN = 6, 12, 5
CPU = torch.device("cpu")


def some_statistics(seed: int = 0) -> dict[Statistic, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, slopes = draw(80, NEURONS_OF) @ draw(NEURONS_OF, NEURONS_OF), draw(40, OUT)
    return {
        Statistic.INPUT_MEAN: rows.mean(0) + 1,
        Statistic.INPUT_COVARIANCE: torch.cov(rows.T, correction=0),
        Statistic.OUTPUT_GRADIENT: slopes.T @ slopes / len(slopes),
    }


def mlp(*, bias: bool = False) -> tuple[list[LayerSpec], list[nn.Linear]]:
    """Return a layer with two outputs per neuron, as of Phi-3, and the one that reads them."""
    generator = torch.Generator().manual_seed(1)
    specs = [
        replace(spec, closing="down", neurons=NEURONS_OF)
        for spec in (
            LayerSpec("up", "up", 0, 2 * NEURONS_OF, HIDDEN, bias, "up"),
            LayerSpec("down", "down", 0, OUT, NEURONS_OF, bias, "down"),
        )
    ]
    layers = []
    for spec in specs:
        shape = spec.out_features, spec.in_features
        weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
        offset = torch.randn(shape[0], generator=generator, dtype=torch.float64)
        layers.append(linear_of(weight, offset if bias else None))
    return specs, layers


def prepared(
    *, bias: bool = False, statistics: dict[Statistic, Tensor] | None = None
) -> tuple[list[nn.Linear], list[Thinned], list[Skipped]]:
    """Return the layers of an MLP, and what each can become."""
    specs, layers = mlp(bias=bias)
    statistics = some_statistics() if statistics is None else statistics
    made = prepare_joint(("neurons", "skip"), specs, layers[1], statistics, CPU)
    units = [
        UnitFactors(None, {}, made[spec.name]).bound(dense)
        for spec, dense in zip(specs, layers, strict=True)
    ]
    thin = [unit.joint[NEURONS] for unit in units]
    skipped = [unit.joint[SKIP] for unit in units]
    assert all(isinstance(each, Thinned) for each in thin)
    return layers, thin, skipped  # type: ignore[return-value]


def moment_of(statistics: dict[Statistic, Tensor], *, centred: bool) -> np.ndarray:
    mean, moment = statistics[Statistic.INPUT_MEAN], statistics[Statistic.INPUT_COVARIANCE]
    moment = moment if centred else moment + mean.outer(mean)
    return (moment + RIDGE * torch.diag(moment.diagonal())).numpy()


def refitted(weight: np.ndarray, moment: np.ndarray, taken: list[int]) -> np.ndarray:
    """Return the weight of least error that reads some inputs, zero elsewhere."""
    best = np.zeros_like(weight)
    if taken:
        own = moment[np.ix_(taken, taken)]
        best[:, taken] = np.linalg.solve(own, moment[taken] @ weight.T).T
    return best


def loss_of(
    weight: np.ndarray, gradient: np.ndarray, moment: np.ndarray, taken: list[int]
) -> float:
    change = weight - refitted(weight, moment, taken)
    return float(np.trace(gradient @ change @ moment @ change.T)) / 2


def test_neurons_go_one_by_one_always_the_cheapest_of_those_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is gathered before matrices are corrected."""
    statistics, (_, layers) = some_statistics(), mlp()
    weight = layers[1].weight.double()
    gradient = statistics[Statistic.OUTPUT_GRADIENT]
    moment = torch.from_numpy(moment_of(statistics, centred=False))
    importance, precision = weight.T @ gradient @ weight, torch.linalg.inv(moment)
    left, expected = list(range(NEURONS_OF)), []
    while left:
        matrices = weight.numpy(), gradient.numpy(), moment.numpy()
        costs = [loss_of(*matrices, [each for each in left if each != one]) for one in left]
        expected.append(left.pop(int(np.argmin(costs))))
    for panel in (1, 5, 32):
        monkeypatch.setattr("lrbo.factorization.joint.PANEL", panel)
        assert removal_order(importance.clone(), precision.clone()).tolist() == expected


@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_is_that_of_the_refit_and_no_weights_do_better(bias: bool) -> None:
    layers, (up, down), _ = prepared(bias=bias)
    statistics = some_statistics()
    weight = layers[1].weight.double().numpy()
    gradient = reference.shrunk(statistics[Statistic.OUTPUT_GRADIENT].numpy(), 0.01)
    moment = moment_of(statistics, centred=bias)
    order = down.order.tolist()
    assert up.order.tolist() == order
    assert sorted(order) == list(range(NEURONS_OF))
    assert not up.loss.any()
    assert bool((down.loss.diff() <= 0).all())
    for count in range(NEURONS_OF + 1):
        expected = loss_of(weight, gradient, moment, order[:count])
        scale = float(down.loss[0])
        assert float(down.loss[count]) == pytest.approx(
            expected, rel=TOLERANCE["float64"], abs=TOLERANCE["float64"] * scale
        )
    for count in range(1, NEURONS_OF + 1):
        thin = down.module(Option("neurons", (count,)), torch.float64)
        assert isinstance(thin, ThinLinear)
        best = refitted(weight, moment, order[:count])[:, order[:count]]
        size = np.abs(best).max()
        assert np.abs(thin.weight.numpy() - best).max() <= TOLERANCE["float32"] * size
        if bias:  # the mean output stays
            mean = statistics[Statistic.INPUT_MEAN]
            expected_mean = layers[1](mean)
            actual = thin(mean[order[:count]])
            limit = TOLERANCE["float32"] * float(expected_mean.abs().max())
            assert float((actual - expected_mean).abs().max()) <= limit
        else:
            assert thin.bias is None


@pytest.mark.parametrize("bias", [False, True])
def test_other_layers_keep_their_rows_of_the_neurons(bias: bool) -> None:
    layers, (up, _), _ = prepared(bias=bias)
    thin = up.module(Option("neurons", (4,)))
    rows = up.order[:4].tolist() + [NEURONS_OF + each for each in up.order[:4].tolist()]
    assert torch.equal(thin.weight, layers[0].weight[rows])
    if bias:
        assert torch.equal(thin.bias, layers[0].bias[rows])
    with pytest.raises(ValueError, match=r"13 neurons are outside 1\.\.12"):
        up.module(Option("neurons", (13,)))


@pytest.mark.parametrize("bias", [False, True])
def test_a_skipped_part_gives_its_mean_output_and_costs_its_variance(bias: bool) -> None:
    layers, _, (up, down) = prepared(bias=bias)
    statistics = some_statistics()
    weight = layers[1].weight.double()
    gradient = reference.shrunk(statistics[Statistic.OUTPUT_GRADIENT].numpy(), 0.01)
    spread = (weight @ statistics[Statistic.INPUT_COVARIANCE] @ weight.T).numpy()
    expected = float(np.trace(gradient @ spread)) / 2
    assert float(down.loss) == pytest.approx(expected, rel=TOLERANCE["float64"])
    assert not up.loss.any()
    module, x = down.module(Option("skip")), torch.ones(2, 3, NEURONS_OF, dtype=torch.float64)
    assert isinstance(module, SkippedLinear)
    mean = layers[1](statistics[Statistic.INPUT_MEAN]).expand(2, 3, OUT)
    torch.testing.assert_close(module(x), mean, rtol=TOLERANCE["float32"], atol=1e-6)
    assert not module.dense_weight().any()
    assert up.module(Option("skip"))(torch.ones(2, 3, HIDDEN)).shape == (2, 3, 0)


def test_neurons_that_are_never_active_cost_nothing_and_go_first() -> None:
    statistics = some_statistics()
    covariance = statistics[Statistic.INPUT_COVARIANCE]
    covariance[[3, 7]] = 0
    covariance[:, [3, 7]] = 0
    statistics[Statistic.INPUT_MEAN][[3, 7]] = 0
    _, (_, down), _ = prepared(statistics=statistics)
    assert {*down.order[-2:].tolist()} == {3, 7}
    assert float(down.loss[-3]) <= 1e-6 * float(down.loss[0])
    still = {name: torch.zeros_like(each) for name, each in statistics.items()}
    _, (_, down), (_, skipped) = prepared(statistics=still)
    assert not down.loss.any()
    assert not skipped.loss.any()


def test_missing_statistics_are_refused_by_name() -> None:
    specs, layers = mlp()
    with pytest.raises(StatisticsError, match="skip need the statistics covariance, mean"):
        prepare_joint(("skip",), specs, layers[1], {Statistic.OUTPUT_GRADIENT: torch.eye(OUT)}, CPU)


@pytest.mark.parametrize("case", ["llama_biased", "phi", "gpt2"])
def test_every_layer_of_a_model_has_its_part_and_comes_back_from_its_tensors(case: str) -> None:
    model = build(case)
    layers, forms = map_model(model), ("pivoted", "neurons", "skip")
    parts = factor_model(
        model, layers, method_named("svd"), RandomStatistics(), joint=("neurons", "skip")
    )
    made = {name: each for part in parts for name, each in part.items()}
    assert len(made) == len(layers.compressible)
    for spec in layers.compressible:
        unit = made[spec.name]
        assert isinstance(unit, UnitFactors)
        assert set(unit.joint) == ({NEURONS, SKIP} if spec.neurons else {SKIP})
        menu = Menu.of(spec, forms, bias=True, itemsize=4)
        losses = [unit.losses(section) for section in menu.sections[:-1]]
        known = menu.with_losses([each for each in losses if each is not None])
        ends = spec.closing == spec.name
        for option in (Option("skip"), *([Option("neurons", (1,))] if spec.neurons else [])):
            assert known.losses is not None
            assert bool(known.losses[known.index(option)]) == ends
        again = prepared_of(unit.tensors())
        assert isinstance(again, UnitFactors)
        dense = model.get_submodule(spec.name)
        for family, own in unit.joint.items():
            option = family.at(5) if family == NEURONS else family
            one, other = (
                each.bound(dense).stored(spec.name, option, torch.float32) for each in (unit, again)
            )
            assert type(one) is type(other)
            for name, tensor in one.state_dict().items():
                assert torch.equal(tensor, other.state_dict()[name])
            part = unit.only({family: 5}, torch.float32, CPU)
            assert part is not None
            assert list(part.joint) == [family]
            moved = part.bound(dense).trial_module(spec.name, option, 7, {})
            for name, tensor in one.state_dict().items():
                torch.testing.assert_close(moved.state_dict()[name], tensor)
            with pytest.raises(ValueError, match="bind it first"):
                replace(own, dense=None).module(option)


def test_tensors_that_do_not_fit_each_other_are_refused() -> None:
    _, (_, down), (_, skipped) = prepared()
    tensors = down.tensors()
    with pytest.raises(ValueError, match=r"root has shape \(11, 12\), expected \(12, 12\)"):
        Thinned.of_tensors(tensors | {"root": tensors["root"][1:]})
    with pytest.raises(ValueError, match=r"loss has shape \(2,\), expected \(1,\)"):
        Skipped.of_tensors(skipped.tensors() | {"loss": torch.zeros(2)})
