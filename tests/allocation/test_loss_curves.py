"""Measured losses equal whole forward passes of changed models; predictions follow them."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import lrbo
from lrbo.allocation import loss_curves
from lrbo.allocation.allocate import Allocation
from lrbo.allocation.apply import on_device
from lrbo.allocation.loss_calibration import LossCalibration, Measurement, sensitivity_file
from lrbo.allocation.loss_curves import SensitivitySettings, measure_losses, points_of
from lrbo.errors import NonFiniteError
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.prepared import BasedWeight, UnitFactors
from lrbo.factorization.rounding import round_nearest
from lrbo.layers.forms import Quantized
from lrbo.layers.modules import replace_module
from lrbo.layers.options import DENSE, Budget, Menu, Option
from lrbo.models.blockwise import BlockwiseBody, Scratch
from lrbo.models.model_map import map_model
from lrbo.models.specs import LayerSpec, ModelMap
from lrbo.pipeline.search_space import menus_of
from lrbo.tasks.causal_lm import CausalLM
from tests.support.fakes import make_curves, make_layers, make_problem
from tests.support.tiny import build, token_ids

TOLERANCES = {
    "divergence": 1e-5,  # logits in float32, relative; and a floor for differences of those
}
FAMILIES = ["llama_untied", "gpt2", "opt", "gpt_neox", "phi3"]


def plain_factors(layers: ModelMap, model: PreTrainedModel) -> dict[str, LowRankFactors]:
    """Factor every layer by its weight alone, with a made-up curve."""
    actual = {}
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
        actual[spec.name] = LowRankFactors(u * s, vh, tail, offset=bias, loss=loss)
    return actual


def spread(
    layers: Sequence[LayerSpec],
    factors: dict[str, LowRankFactors],
    settings: SensitivitySettings,
) -> list[tuple[LayerSpec, Option]]:
    """Return the points of layers that may be factored or dense."""
    return points_of(layers, factors, make_problem(layers=layers).menus, settings)


def rank_of(point: Measurement) -> int:
    (rank,) = Option.parse(point.option).level
    return rank


def slow_divergence(case: str, name: str, weight: Tensor, ids: Tensor) -> float:
    """Build the model anew with another weight, score whole rows of logits in float64."""
    dense, changed = build(case), build(case)
    spec = map_model(changed).by_name[name]
    bias = changed.get_submodule(name).bias
    layer = torch.nn.Linear(spec.in_features, spec.out_features, bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
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
    points = spread(layers.compressible, factors, settings)
    actual = measure_losses(
        BlockwiseBody(model), points, factors, windows, settings, task=CausalLM()
    )
    kinds = {spec.kind for spec in layers.compressible}
    assert [(m.layer, m.option) for m in actual] == [(s.name, str(option)) for s, option in points]
    assert len(actual) == 4 * len(kinds)
    used = windows[[0, 2]]  # two of five, evenly
    for point in actual[:: max(len(actual) // 8, 1)]:
        own, rank = factors[point.layer], rank_of(point)
        product = own.left[:, :rank] @ own.right[:rank]
        expected = slow_divergence(case, point.layer, product, used)
        assert point.measured == pytest.approx(
            expected, rel=50 * TOLERANCES["divergence"], abs=TOLERANCES["divergence"]
        )
        assert point.measured > 0
        assert point.kind == layers.by_name[point.layer].kind
        assert point.predicted == float(own.loss[rank])
    assert_unchanged(model, before)


def test_measured_losses_of_integers_are_those_of_whole_models_with_their_weights() -> None:
    case, family = "llama_untied", Option("int2", (16,))
    model = build(case)
    layers = map_model(model)
    low_rank = plain_factors(layers, model)
    prepared, weights = {}, {}
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.v_proj"):
        weight = model.get_submodule(name).weight.double()
        (rounded,) = round_nearest(weight, [(Quantized(2), 16)], dtype=torch.float32)
        own = BasedWeight(rounded, low_rank[name])
        prepared[name] = UnitFactors(low_rank[name], {family: own})
        weights[name] = rounded.weight(torch.float32)
    menus = make_problem(layers=layers.compressible, forms=("int2",)).menus
    settings, windows = SensitivitySettings(windows=2), token_ids(2, 12)
    points = points_of(layers.compressible, prepared, menus, settings)
    actual = measure_losses(
        BlockwiseBody(model), points, prepared, windows, settings, task=CausalLM()
    )
    assert {m.layer: m.option for m in actual} == dict.fromkeys(weights, "int2 16 0")
    for point in actual:
        expected = slow_divergence(case, point.layer, weights[point.layer], windows)
        assert expected > 10 * TOLERANCES["divergence"]
        assert point.measured == pytest.approx(expected, rel=50 * TOLERANCES["divergence"])
        assert point.predicted == float(low_rank[point.layer].loss[0])


@pytest.mark.filterwarnings("ignore::lrbo.calibration.collect.CalibrationWarning")
def test_tables_and_whole_parts_are_measured_as_models_that_have_them() -> None:
    """With a tied table of groups or of a rank, an MLP of fewer neurons, and none at all."""
    include = ["blocks", "embedding"]
    forms = ["pivoted", "frequency_groups", "neurons", "skip"]
    model, windows = build("llama_tied"), token_ids(3, 12)
    calibration = lrbo.calibrate(model, token_ids(8, 16), include=include, progress=False)
    made = lrbo.factorize(model, calibration, forms=forms, include=include, progress=False)
    layers = made.layers.compressible
    menus = menus_of(layers, forms, made.method, torch.float32)
    settings = SensitivitySettings(layers_per_kind=1, ranks=2, windows=3)
    points = points_of(layers, made.factors, menus, settings)
    ranks = {name: {s.family: 99 for s in menu.sections[:-1]} for name, menu in menus.items()}
    prepared = on_device(model, made.factors, ranks)
    measured = measure_losses(
        BlockwiseBody(model), points, prepared, windows, settings, task=CausalLM(), layers=layers
    )
    own = [m for m in measured if m.kind == "embed_tokens" or not m.option.startswith("pivoted")]
    assert [m.option.split(" ")[0] for m in own if m.kind == "embed_tokens"] == [
        *["frequency_groups"] * 2, *["pivoted"] * 2,
    ]  # fmt: skip
    parts = [(m.kind, m.option.split(" ")[0]) for m in own if m.kind != "embed_tokens"]
    assert parts == [("o_proj", "skip"), *[("down_proj", "neurons")] * 2, ("down_proj", "skip")]
    with torch.no_grad():
        dense = model(windows).logits.double().log_softmax(-1)
    for point in own:
        option, spec = Option.parse(point.option), made.layers.by_name[point.layer]
        names = {s.name for s in layers if spec.block is not None and s.closing == spec.name}
        options = {s.name: option if s.name in {*names, spec.name} else DENSE for s in layers}
        allocation = Allocation(options, {}, Budget("parameters", 10**9))
        with torch.no_grad(), made.compressed(model, allocation):
            other = model(windows).logits.double().log_softmax(-1)
        divergence = (dense.exp() * (dense - other)).sum(-1)
        if spec.block is None:  # the last token of a window predicts none
            divergence = divergence[:, :-1]
        assert point.measured == pytest.approx(float(divergence.mean()), rel=1e-3, abs=1e-6)
        menu = menus[point.layer].with_losses(
            [made.factors[point.layer].losses(s) for s in menus[point.layer].sections[:-1]]
        )
        assert menu.losses is not None
        assert point.predicted == pytest.approx(menu.losses[menu.index(option)], rel=1e-6)


def test_memory_on_disk_and_the_size_of_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama_untied")
    layers = map_model(model)
    factors = plain_factors(layers, model)
    settings = SensitivitySettings(layers_per_kind=1, ranks=1, windows=2)
    reported: list[int] = []
    points = spread(layers.compressible, factors, settings)
    arguments = (points, factors, token_ids(2, 12), settings)
    first = measure_losses(BlockwiseBody(model), *arguments, task=CausalLM())
    monkeypatch.setattr(loss_curves, "Scratch", lambda: Scratch(0))
    task = CausalLM(chunk_tokens=5)
    second = measure_losses(BlockwiseBody(model), *arguments, task=task, on_point=reported.append)
    assert reported == [1] * len(first)
    assert [(m.layer, m.option) for m in second] == [(m.layer, m.option) for m in first]
    for one, other in zip(first, second, strict=True):
        # Chunks of another size round float32 sums of about 1e-6 otherwise.
        assert other.measured == pytest.approx(one.measured, rel=0.01)


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
    settings = SensitivitySettings(layers_per_kind=2, ranks=1, windows=4)
    points, arguments = spread(layers.compressible, factors, settings), (token_ids(4, 24), settings)
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
    true = measure_losses(BlockwiseBody(exact), points, small, *arguments, task=CausalLM())
    halved = {name: f.to(dtype=torch.bfloat16) for name, f in small.items()}
    actual = measure_losses(BlockwiseBody(rough), points, halved, *arguments, task=CausalLM())
    rounding = [rounded_divergence(rough, m.layer, halved[m.layer], arguments[0]) for m in actual]
    assert max(m.measured for m in true) < 0.1 * min(rounding)
    # Without the subtraction each would be about its rounding.
    assert sum(m.measured for m in actual) < 0.3 * sum(rounding)


@pytest.mark.parametrize("broken_part", ["the layer", "the factors"])
def test_after_an_error_the_model_is_what_it_was(
    broken_part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama_untied")
    before = state_of(model)
    layers = map_model(model)
    factors = plain_factors(layers, model)
    name = "model.layers.1.mlp.down_proj"
    settings = SensitivitySettings(layers_per_kind=2, ranks=1, windows=1)
    broken = factors[name]
    if broken_part == "the layer":
        low, made = torch.nn.Linear(3, 3), LowRankFactors.trial_module  # whose block fails
        monkeypatch.setattr(
            LowRankFactors,
            "trial_module",
            lambda self, *given: low if self is broken else made(self, *given),
        )
        expected: type[Exception] = RuntimeError
    else:
        infinite = torch.full_like(broken.left, math.inf)
        factors[name] = LowRankFactors(infinite, broken.right, broken.tail, loss=broken.loss)
        expected = NonFiniteError
    points = spread(layers.compressible, factors, settings)
    with pytest.raises(expected) as caught:
        measure_losses(
            BlockwiseBody(model), points, factors, token_ids(1, 8), settings, task=CausalLM()
        )
    if expected is NonFiniteError:
        assert f"{name} as rank {broken.max_rank // 2}: " in str(caught.value)
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
    points = spread(layers, factors, settings)
    assert len(points) == len({(spec.name, option) for spec, option in points})
    assert {option.form for _, option in points} <= {"factored"}
    for kind in ("q_proj", "o_proj"):
        measured_blocks = {spec.block for spec, _ in points if spec.kind == kind}
        assert len(measured_blocks) == min(layers_per_kind, blocks)
        # One in each of as many equal parts of the depth.
        count = len(measured_blocks)
        parts = {(2 * block + 1) * count // (2 * blocks) for block in measured_blocks}
        assert parts == set(range(count))
        most = factors[f"layers.0.{kind}"].max_rank
        for block in measured_blocks:
            own = [o.level[0] for spec, o in points if (spec.kind, spec.block) == (kind, block)]
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
    points = spread(layers, factors, SensitivitySettings(4, 1, 1))
    assert [spec.block for spec, _ in points] == [0, 2, 3]


def test_integers_are_tried_without_a_rank_and_low_ranks_in_the_first_form() -> None:
    layers = make_layers(1, {"q_proj": (32, 32)})
    factors = {spec.name: factors_of(spec) for spec in layers}

    def tried(*forms: str) -> list[str]:
        menus = make_problem(layers=layers, forms=forms, group_sizes=(16, 32)).menus
        points = points_of(layers, factors, menus, SensitivitySettings(1, 3, 1))
        return [str(option) for _, option in points]

    integers = ["int4 16 0", "int4 32 0", "int2_sym 16 0", "int2_sym 32 0"]
    assert tried("int4", "int2_sym") == integers
    low_rank = ["pivoted 8", "pivoted 16", "pivoted 24"]
    assert tried("int4", "pivoted", "factored", "int2_sym") == integers + low_rank


# --- calibration -------------------------------------------------------------------------------


def measurements(kind: str, pairs: list[tuple[float, float]]) -> list[Measurement]:
    return [
        Measurement(f"{kind}.{i}", kind, f"pivoted {i}", p, m) for i, (p, m) in enumerate(pairs)
    ]


def calibration(points: list[Measurement]) -> LossCalibration:
    return LossCalibration(tuple(points))


def test_the_correlation_is_that_of_ranks() -> None:
    rising = [(p, p**3 + 1.0) for p in (0.1, 0.5, 0.2, 0.9)]
    assert calibration(measurements("q", rising)).rank_correlation == pytest.approx(1.0)
    falling = [(p, 1 / p) for p, _ in rising]
    assert calibration(measurements("q", falling)).rank_correlation == pytest.approx(-1.0)
    for nothing in ([], [(0.5, 1.0)], [(0.5, 1.0), (0.5, 2.0)]):
        assert math.isnan(calibration(measurements("q", nothing)).rank_correlation)


def test_losses_of_tables_and_whole_parts_are_scaled_by_what_was_measured() -> None:
    forms = ("factored", "frequency_groups", "neurons")
    table = LayerSpec("embed", "embed", None, 40, 16, False, "embed", "head", is_lookup=True)
    inside = LayerSpec("down", "down", 0, 16, 16, False, "down", closing="down", neurons=16)
    menus = {}
    for unit in (table, inside):
        menu = Menu.of(unit, forms, bias=False, itemsize=2)
        losses = [np.linspace(0.9, 0.1, len(s.levels)) for s in menu.sections[:-1]]
        menus[unit.name] = menu.with_losses(losses)
    known = [
        Measurement("embed", "embed", "frequency_groups 8 4", 0.1, 0.2),
        Measurement("embed", "embed", "frequency_groups 8 9", 0.01, 0.08),
        Measurement("embed", "embed", "factored 3", 0.1, 0.0),  # says nothing of a ratio
        Measurement("down", "down", "neurons 3", 0.1, 0.3),
        Measurement("down", "down", "factored 3", 0.1, 0.7),
    ]
    corrected = calibration(known).corrected(menus)
    expected = {("embed", "frequency_groups"): 4.0, ("down", "neurons"): 3.0}
    for name, menu in menus.items():
        assert menu.losses is not None
        for index in range(len(menu)):
            ratio = expected.get((name, menu.option(index).form), 1.0)
            assert corrected[name].losses[index] == pytest.approx(ratio * menu.losses[index])


@pytest.mark.parametrize(
    "pairs", [[(0.1, 0.1 + 0.2), (1e-9, 3e-7), (0.0, -1e-12)], [(0.1, 0.2)], []]
)
def test_what_is_saved_comes_back_to_the_last_bit(
    pairs: list[tuple[float, float]], tmp_path: Path
) -> None:
    actual = calibration([*measurements("q_proj", pairs), *measurements("o", pairs[:1])])
    file = sensitivity_file(tmp_path)
    actual.save(file)
    assert LossCalibration.load(file) == actual

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
