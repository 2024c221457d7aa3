"""Measured losses equal whole forward passes of changed models; predictions follow them."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.blockwise import BlockwiseBody
from lrbo.compression import replace_module
from lrbo.errors import NonFiniteError
from lrbo.loss_calibration import SLOPES, LossCalibration, Measurement, sensitivity_file
from lrbo.model import map_model
from lrbo.nested import LowRankFactors
from lrbo.sensitivity import SensitivitySettings, measure_losses
from lrbo.specs import LayerSpec, ModelMap
from tests.fakes import make_curves, make_layers
from tests.tiny import build, token_ids

TOLERANCES = {
    "divergence": 1e-5,  # logits in float32, relative; and a floor for differences of those
    "law": 1e-9,  # least squares of exact points in float64
}
FAMILIES = ["llama_untied", "gpt2", "opt", "gpt_neox", "phi3"]


def plain_factors(layers: ModelMap, model: PreTrainedModel) -> dict[str, LowRankFactors]:
    """Factor every layer by its weight alone, with a made-up curve."""
    found = {}
    curves = make_curves(layers.compressible, seed=1)
    for spec in layers.compressible:
        module = model.get_submodule(spec.name)
        weight = module.weight.detach()
        if weight.shape != (spec.out_features, spec.in_features):
            weight = weight.T  # GPT-2 keeps it the other way round
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        tail = torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)]).double()
        bias = None if module.bias is None else module.bias.detach()
        loss = torch.from_numpy(curves[spec.name])
        found[spec.name] = LowRankFactors(u * s, vh, tail, offset=bias, loss=loss)
    return found


def curves_of(factors: dict[str, LowRankFactors]) -> dict[str, np.ndarray]:
    return {name: found.loss.numpy() for name, found in factors.items()}


def slow_divergence(case: str, name: str, rank: int, ids: Tensor) -> float:
    """Build the model anew, multiply one layer out, score whole rows of logits in float64."""
    dense, changed = build(case), build(case)
    spec = map_model(changed).by_name[name]
    factors = plain_factors(map_model(changed), changed)[name]
    product = factors.left[:, :rank] @ factors.right[:rank]
    layer = torch.nn.Linear(spec.in_features, spec.out_features, bias=factors.offset is not None)
    with torch.no_grad():
        layer.weight.copy_(product)
        if factors.offset is not None:
            layer.bias.copy_(factors.offset)
    replace_module(changed, name, layer)
    total, rows = 0.0, 0
    with torch.no_grad():
        for window in ids:
            one, other = (m(window[None]).logits[0].double().numpy() for m in (dense, changed))
            for a, b in zip(one, other, strict=True):
                p = np.exp(a - a.max()) / np.exp(a - a.max()).sum()
                q = np.exp(b - b.max()) / np.exp(b - b.max()).sum()
                total += float((p * (np.log(p) - np.log(q))).sum())
                rows += 1
    return total / rows


def state_of(model: PreTrainedModel) -> tuple[list[str], dict[str, Tensor]]:
    modules = [
        f"{name} {type(module).__name__} {id(module)}" for name, module in model.named_modules()
    ]
    return modules, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: PreTrainedModel, before: tuple[list[str], dict[str, Tensor]]) -> None:
    modules, tensors = state_of(model)
    assert modules == before[0]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before[1].items())


# --- measuring ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAMILIES)
def test_measured_losses_are_those_of_whole_models_with_one_layer_replaced(case: str) -> None:
    model = build(case)
    before = state_of(model)
    layers = map_model(model)
    factors = plain_factors(layers, model)
    settings = SensitivitySettings(layers_per_kind=2, ranks=2, windows=2)
    windows = token_ids(5, 12)
    found = measure_losses(
        BlockwiseBody(model), layers, factors, curves_of(factors), windows, settings
    )
    kinds = {spec.kind for spec in layers.compressible}
    assert {(m.layer, m.rank) for m in found} == {
        (spec.name, rank) for spec, rank in settings.points(layers.compressible, factors)
    }
    assert len(found) == 4 * len(kinds)
    used = windows[[0, 2]]  # two of five, evenly
    for point in found[:: max(len(found) // 8, 1)]:
        expected = slow_divergence(case, point.layer, point.rank, used)
        assert point.measured == pytest.approx(
            expected, rel=50 * TOLERANCES["divergence"], abs=TOLERANCES["divergence"]
        )
        assert point.measured > 0
        assert point.kind == layers.by_name[point.layer].kind
        assert point.predicted == float(factors[point.layer].loss[point.rank])
    assert_unchanged(model, before)


def test_memory_on_disk_and_the_size_of_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama_untied")
    layers = map_model(model)
    factors = plain_factors(layers, model)
    settings = SensitivitySettings(layers_per_kind=1, ranks=1, windows=2)
    told: list[int] = []
    arguments = (layers, factors, curves_of(factors), token_ids(2, 12), settings)
    first = measure_losses(BlockwiseBody(model), *arguments)
    monkeypatch.setattr("lrbo.sensitivity.CHUNK_TOKENS", 5)
    again = measure_losses(BlockwiseBody(model), *arguments, memory_gib=0.0, on_point=told.append)
    assert told == [1] * len(first)
    assert [(m.layer, m.rank) for m in again] == [(m.layer, m.rank) for m in first]
    for one, other in zip(first, again, strict=True):
        assert other.measured == pytest.approx(one.measured, rel=TOLERANCES["divergence"])


def rounded_divergence(
    model: PreTrainedModel, name: str, factors: LowRankFactors, ids: Tensor
) -> float:
    """Return what it costs to run a layer as its factors of full rank, with whole models."""

    def log_probabilities() -> Tensor:
        with torch.no_grad():
            return model(ids).logits.double().log_softmax(-1)

    dense = log_probabilities()
    before = replace_module(model, name, factors.at_rank(factors.max_rank))
    other = log_probabilities()
    replace_module(model, name, before)
    return float((dense.exp() * (dense - other)).sum(-1).mean())


def test_rounding_of_half_precision_is_not_taken_for_loss() -> None:
    """Cuts so small that bfloat16 drowns them: what is left is far below what rounding costs."""
    exact = build("llama_untied")
    layers = map_model(exact)
    factors = plain_factors(layers, exact)
    arguments = (token_ids(4, 24), SensitivitySettings(layers_per_kind=2, ranks=1, windows=4))
    curves = curves_of(factors)
    # The last direction alone is cut, and it is made a thousandth of what it was.
    small = {}
    for name, f in factors.items():
        scale = torch.ones(f.max_rank)
        scale[f.max_rank // 2 :] = 1e-3
        small[name] = LowRankFactors(f.left * scale, f.right, f.tail, f.offset, loss=f.loss)
    for name, f in small.items():
        with torch.no_grad():
            exact.get_submodule(name).weight.copy_(f.left @ f.right)
    rough = copy.deepcopy(exact).bfloat16()
    true = measure_losses(BlockwiseBody(exact), layers, small, curves, *arguments)
    halved = {name: f.to(dtype=torch.bfloat16) for name, f in small.items()}
    found = measure_losses(BlockwiseBody(rough), layers, halved, curves, *arguments)
    rounding = [rounded_divergence(rough, m.layer, halved[m.layer], arguments[0]) for m in found]
    assert max(m.measured for m in true) < 0.1 * min(rounding)
    # Without the subtraction each would be about its rounding.
    assert sum(m.measured for m in found) < 0.3 * sum(rounding)


@pytest.mark.parametrize("place", ["the layer", "the factors"])
def test_after_an_error_the_model_is_what_it_was(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama_untied")
    before = state_of(model)
    layers = map_model(model)
    factors = plain_factors(layers, model)
    name = "model.layers.1.mlp.down_proj"
    settings = SensitivitySettings(layers_per_kind=2, ranks=1, windows=1)
    broken = factors[name]
    if place == "the layer":
        low, at = torch.nn.Linear(3, 3), LowRankFactors.at_rank  # the block that runs it fails
        monkeypatch.setattr(
            LowRankFactors, "at_rank", lambda self, rank: low if self is broken else at(self, rank)
        )
        expected: type[Exception] = RuntimeError
    else:
        infinite = torch.full_like(broken.left, math.inf)
        factors[name] = LowRankFactors(infinite, broken.right, broken.tail, loss=broken.loss)
        expected = NonFiniteError
    with pytest.raises(expected) as caught:
        measure_losses(
            BlockwiseBody(model), layers, factors, curves_of(factors), token_ids(1, 8), settings
        )
    if expected is NonFiniteError:
        assert f"{name} at rank {broken.max_rank // 2}: " in str(caught.value)
        assert "overflows in torch.float32" in str(caught.value)
    assert_unchanged(model, before)


# --- points ------------------------------------------------------------------------------------


@given(
    st.integers(1, 12),
    st.integers(0, 6),
    st.integers(1, 5),
    st.integers(1, 30),
)
def test_points_are_evenly_spread_over_depth_and_ranks(
    blocks: int, layers_per_kind: int, ranks: int, size: int
) -> None:
    layers = make_layers(blocks, {"q_proj": (size, 30), "o_proj": (30, 30)})
    factors = {spec.name: factors_of(spec) for spec in layers}
    settings = SensitivitySettings(layers_per_kind, ranks, 1)
    points = settings.points(layers, factors)
    assert len(points) == len({(spec.name, rank) for spec, rank in points})
    for kind in ("q_proj", "o_proj"):
        chosen = {spec.block for spec, _ in points if spec.kind == kind}
        assert len(chosen) == min(layers_per_kind, blocks)
        # One in each of as many equal parts of the depth.
        parts = {block * len(chosen) // blocks for block in chosen}
        assert parts == set(range(len(chosen)))
        most = factors[f"layers.0.{kind}"].max_rank
        for block in chosen:
            own = [rank for spec, rank in points if (spec.kind, spec.block) == (kind, block)]
            assert own == sorted(own)
            assert all(1 <= rank <= most for rank in own)
            if most > 2 * ranks:
                assert len(own) == ranks
                gaps = np.diff([0, *own, most])
                assert gaps.max() - gaps.min() <= 1


def factors_of(spec: LayerSpec) -> LowRankFactors:
    """Return factors that hold nothing but their shape."""
    rank = min(spec.out_features, spec.in_features)
    left, right = torch.zeros(spec.out_features, rank), torch.zeros(rank, spec.in_features)
    return LowRankFactors(left, right, torch.zeros(rank + 1, dtype=torch.float64))


def test_layers_without_factors_are_not_tried() -> None:
    layers = make_layers(4, {"q_proj": (9, 9)})
    factors = {spec.name: factors_of(spec) for spec in layers if spec.block != 1}
    points = SensitivitySettings(4, 1, 1).points(layers, factors)
    assert [spec.block for spec, _ in points] == [0, 2, 3]


# --- calibration -------------------------------------------------------------------------------


def measurements(kind: str, pairs: list[tuple[float, float]]) -> list[Measurement]:
    return [Measurement(f"{kind}.{i}", kind, i, p, m) for i, (p, m) in enumerate(pairs)]


@given(
    st.floats(-4, 4),
    st.floats(*SLOPES),
    st.lists(st.floats(1e-6, 10), min_size=2, max_size=9, unique=True),
)
def test_an_exact_power_law_is_recovered(
    intercept: float, slope: float, predicted: list[float]
) -> None:
    logs = np.log(predicted)
    if np.ptp(logs) < 0.1:  # too close together to say anything about a slope
        return
    pairs = [(p, math.exp(intercept) * p**slope) for p in predicted]
    # Nothing else may disturb it: points that say nothing, and another kind.
    noise = measurements("q_proj", [(0.0, 1.0), (1.0, 0.0), (0.5, -1e-9)])
    other = measurements("o_proj", [(1.0, 3.0)])
    found = LossCalibration.fit([*measurements("q_proj", pairs), *noise, *other])
    assert found.fits["q_proj"] == pytest.approx((intercept, slope), abs=1e5 * TOLERANCES["law"])
    curve = np.sort(predicted)[::-1]
    expected = [math.exp(intercept) * p**slope for p in curve]
    np.testing.assert_allclose(found.apply("q_proj", curve), expected, rtol=1e-4)
    assert found.fits["o_proj"] == (pytest.approx(math.log(3.0)), 1.0)
    assert found.fits.keys() == {"q_proj", "o_proj"}


@given(st.lists(st.tuples(st.floats(1e-6, 10), st.floats(1e-6, 10)), min_size=1, max_size=9))
def test_slopes_are_clamped_and_no_curve_rises(pairs: list[tuple[float, float]]) -> None:
    found = LossCalibration.fit(measurements("q_proj", pairs))
    intercept, slope = found.fits["q_proj"]
    assert SLOPES[0] <= slope <= SLOPES[1]
    # Whatever the slope, the line passes through the centre of the points.
    x, y = np.log(np.array(pairs)).T
    assert intercept + slope * x.mean() == pytest.approx(y.mean(), abs=1e4 * TOLERANCES["law"])
    for spec in make_layers():
        curve = make_curves([spec], seed=3)[spec.name]
        after = found.apply("q_proj", curve)
        assert (np.diff(after) <= 0).all()
        assert (after >= 0).all()
        assert after[-1] == 0.0
        assert after.dtype == np.float64


def test_least_squares_is_what_numpy_finds() -> None:
    generator = np.random.default_rng(0)
    x = generator.uniform(-6, 1, 12)
    y = 0.3 + 1.1 * x + 0.1 * generator.normal(size=12)
    found = LossCalibration.fit(
        measurements("q_proj", list(zip(np.exp(x), np.exp(y), strict=True)))
    )
    slope, intercept = np.polyfit(x, y, 1)
    assert found.fits["q_proj"] == pytest.approx((intercept, slope), rel=1e-9)


def test_rounding_below_zero_or_upwards_is_flattened() -> None:
    found = LossCalibration({"q_proj": (0.0, 0.5)}, ())
    curve = np.array([1.0, 0.25, 1e-9, 3e-9, -1e-12, 0.0])
    after = found.apply("q_proj", curve)
    assert np.isfinite(after).all()
    assert (np.diff(after) <= 0).all()
    assert list(after[:2]) == [1.0, 0.5]


def test_a_kind_that_was_not_measured_is_taken_as_predicted() -> None:
    silent = measurements("q_proj", [(0.0, 1.0), (1.0, 0.0)])
    curve = np.array([1.0, 0.5, 0.0])
    for found in (LossCalibration({}, ()), LossCalibration.fit(silent)):
        assert np.array_equal(found.apply("q_proj", curve), curve)


def test_the_correlation_is_that_of_ranks() -> None:
    rising = [(p, p**3 + 1.0) for p in (0.1, 0.5, 0.2, 0.9)]
    assert LossCalibration.fit(measurements("q", rising)).rank_correlation == pytest.approx(1.0)
    falling = [(p, 1 / p) for p, _ in rising]
    assert LossCalibration.fit(measurements("q", falling)).rank_correlation == pytest.approx(-1.0)
    for nothing in ([], [(0.5, 1.0)], [(0.5, 1.0), (0.5, 2.0)]):
        assert math.isnan(LossCalibration.fit(measurements("q", nothing)).rank_correlation)


@pytest.mark.parametrize(
    "pairs", [[(0.1, 0.1 + 0.2), (1e-9, 3e-7), (0.0, -1e-12)], [(0.1, 0.2)], []]
)
def test_what_is_saved_comes_back_to_the_last_bit(
    pairs: list[tuple[float, float]], tmp_path: Path
) -> None:
    found = LossCalibration.fit([*measurements("q_proj", pairs), *measurements("o", pairs[:1])])
    file = sensitivity_file(tmp_path)
    found.save(file)
    assert LossCalibration.load(file) == found

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
