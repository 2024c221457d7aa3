"""Statistics of a model equal plain formulas on the inputs that hooks of our own captured."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.calibration import collect
from lrbo.calibration.collect import (
    Calibration,
    CalibrationSettings,
    CalibrationWarning,
    calibrate,
)
from lrbo.calibration.statistics import GRADIENT_STATISTICS, TABLE_STATISTICS, Statistic
from lrbo.errors import StatisticsError
from lrbo.models.blockwise import BlockwiseBody
from lrbo.models.model_map import map_model
from lrbo.models.specs import ModelMap
from tests.support import reference
from tests.support.reference import Matrix
from tests.support.tiny import build, token_ids

TOLERANCE = {
    # Same inputs to the bit (the reference runs the same batches), float64 sums; relative to
    # the trace of the covariance, or to the largest entry.
    "same batches": 1e-12,
    # Llama's norms round to float32 inside (6e-8), and other batch sizes round otherwise.
    "other batches": 1e-6,
}

ALL = frozenset(Statistic) - TABLE_STATISTICS  # of layers in blocks
OF_INPUTS = ALL - GRADIENT_STATISTICS
WINDOWS, TOKENS = 7, 12


def gathered(
    model: PreTrainedModel, windows: Tensor, needs: Collection[Statistic], **settings: Any
) -> Calibration:
    """Calibrate and keep everything; gradients are taken on all windows."""
    with_defaults = CalibrationSettings(**{"gradient_share": 1.0, **settings})
    return Calibration.gather(
        calibrate(BlockwiseBody(model), map_model(model), windows, needs, with_defaults)
    )


def captured_inputs(
    model: PreTrainedModel, names: Sequence[str], windows: Tensor, batch_windows: int
) -> dict[str, Matrix]:
    """Run the whole model and keep what each layer read: ``(windows, tokens, features)``."""
    captured: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:

        def keep(module: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
            captured[name].append(inputs[0].detach().clone().double())

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in windows.split(batch_windows):
            model(batch)
    for handle in handles:
        handle.remove()
    shape = (*windows.shape, -1)
    return {name: torch.cat(parts).reshape(shape).numpy() for name, parts in captured.items()}


def assert_inputs(
    actual: Calibration,
    layers: ModelMap,
    inputs: dict[str, Matrix],
    count: int,
    tolerance: float,
) -> None:
    """Compare every layer with the plain formulas; windows are dealt out to ``count`` groups."""
    assert set(actual.statistics) == set(layers.sites)
    assert set(inputs) == {spec.name for spec in layers.compressible}
    for spec in layers.compressible:
        windows = inputs[spec.name]
        features = windows.shape[-1]
        rows = windows.reshape(-1, features)
        groups = [windows[first::count].reshape(-1, features) for first in range(count)]
        expected = {
            Statistic.INPUT_MEAN: reference.mean(rows),
            Statistic.INPUT_MAGNITUDE: reference.mean(abs(rows)),
            Statistic.INPUT_COVARIANCE: reference.covariance(rows),
            Statistic.POOLED_INPUT_COVARIANCE: reference.pooled_covariance(groups),
        }
        unit = np.trace(expected[Statistic.INPUT_COVARIANCE])
        for statistic, tensor in actual.of(spec).items():
            assert tensor.dtype == torch.float64
            assert tensor.device.type == "cpu"
            difference = np.abs(tensor.numpy() - expected[statistic]).max()
            assert difference <= tolerance * unit, (spec.name, statistic)


def all_inputs(
    model: PreTrainedModel, layers: ModelMap, windows: Tensor, batch_windows: int
) -> dict[str, Matrix]:
    """Capture what every layer reads, not only the one that stands for its site."""
    return captured_inputs(
        model, [spec.name for spec in layers.compressible], windows, batch_windows
    )


@pytest.fixture
def windows() -> Tensor:
    return token_ids(WINDOWS, TOKENS)


@pytest.mark.parametrize(
    ("groups", "count"),
    [(1, 1), (3, 3), (7, 7), (32, 7)],  # at most one group per window
)
def test_statistics_equal_the_plain_formulas(
    model: PreTrainedModel, layers: ModelMap, windows: Tensor, groups: int, count: int
) -> None:
    actual = gathered(model, windows, OF_INPUTS, groups=groups, batch_windows=7)
    assert all(set(statistics) == OF_INPUTS for statistics in actual.statistics.values())
    inputs = all_inputs(model, layers, windows, 7)
    assert_inputs(actual, layers, inputs, count, TOLERANCE["other batches"])


@pytest.mark.parametrize("batch_windows", [1, 3, 7, 100])
def test_batch_size_changes_nothing(
    model: PreTrainedModel, layers: ModelMap, windows: Tensor, batch_windows: int
) -> None:
    actual = gathered(model, windows, OF_INPUTS, groups=3, batch_windows=batch_windows)
    inputs = all_inputs(model, layers, windows, 2)
    assert_inputs(actual, layers, inputs, 3, TOLERANCE["other batches"])


@pytest.mark.parametrize("case", ["gpt2", "opt", "phi", "gpt_neox", "phi3", "qwen2"])
def test_other_families(case: str, windows: Tensor) -> None:
    model = build(case).double()
    layers = map_model(model)
    actual = gathered(model, windows, OF_INPUTS, groups=1, batch_windows=4)
    inputs = all_inputs(model, layers, windows, 4)
    assert_inputs(actual, layers, inputs, 1, TOLERANCE["same batches"])


def test_hidden_states_in_files_give_the_same_bits(model: PreTrainedModel, windows: Tensor) -> None:
    one = gathered(model, windows, ALL, memory_gib=2.0).statistics
    other = gathered(model, windows, ALL, memory_gib=0.0).statistics
    assert one.keys() == other.keys()
    assert len(one) == 14  # layers; a site has the name of its first one
    for owner, statistics in one.items():
        assert statistics.keys() == other[owner].keys()
        for statistic, tensor in statistics.items():
            assert torch.equal(tensor, other[owner][statistic]), (owner, statistic)


@pytest.mark.parametrize(
    ("needs", "brings"),
    [
        ({Statistic.INPUT_MAGNITUDE}, set[Statistic]()),
        ({Statistic.INPUT_COVARIANCE}, {Statistic.INPUT_MEAN}),
        ({Statistic.POOLED_INPUT_COVARIANCE}, {Statistic.INPUT_MEAN}),
        ({Statistic.INPUT_MEAN}, {Statistic.INPUT_COVARIANCE}),
        (
            {Statistic.INPUT_MAGNITUDE, Statistic.INPUT_MEAN, Statistic.POOLED_INPUT_COVARIANCE},
            set[Statistic](),
        ),
    ],
)
def test_only_what_is_asked_for_is_gathered(
    model: PreTrainedModel,
    layers: ModelMap,
    windows: Tensor,
    needs: set[Statistic],
    brings: set[Statistic],
) -> None:
    actual = gathered(model, windows, needs, groups=3, batch_windows=2)
    assert all(set(statistics) == needs | brings for statistics in actual.statistics.values())
    inputs = all_inputs(model, layers, windows, 2)
    assert_inputs(actual, layers, inputs, 3, TOLERANCE["other batches"])


@pytest.mark.parametrize("need", sorted(GRADIENT_STATISTICS & ALL))
def test_gradients_alone_are_gathered_for_layers_and_not_for_sites(
    model: PreTrainedModel, layers: ModelMap, windows: Tensor, need: Statistic
) -> None:
    actual = gathered(model, windows, {need})
    assert set(actual.statistics) == {spec.name for spec in layers.compressible}
    together = gathered(model, windows, ALL - {Statistic.POOLED_INPUT_COVARIANCE})
    for spec in layers.compressible:
        assert set(actual.of(spec)) == {need}
        assert torch.equal(actual.of(spec)[need], together.of(spec)[need])


# --- the pass ------------------------------------------------------------------------------------


def test_nothing_needed_means_no_pass(
    model: PreTrainedModel, layers: ModelMap, windows: Tensor
) -> None:
    advanced: list[int] = []
    parts = calibrate(
        BlockwiseBody(model), layers, windows, (), CalibrationSettings(), on_block=advanced.append
    )
    assert list(parts) == []
    assert advanced == []


@pytest.mark.parametrize(
    ("needs", "passes"),
    [(OF_INPUTS, 1), (ALL, 2), (GRADIENT_STATISTICS, 2)],
)
def test_blocks_are_handed_out_as_they_are_done_there_and_back(
    model: PreTrainedModel,
    layers: ModelMap,
    windows: Tensor,
    needs: frozenset[Statistic],
    passes: int,
) -> None:
    advanced: list[int] = []
    body = BlockwiseBody(model)
    parts = list(
        calibrate(
            body,
            layers,
            windows,
            needs,
            CalibrationSettings(gradient_share=1),
            on_block=advanced.append,
        )
    )
    assert advanced == [1] * (passes * len(body))
    there = [sorted({s.site for s in layers.compressible if s.block == i}) for i in range(2)]
    back = [sorted(s.name for s in layers.compressible if s.block == i) for i in (1, 0)]
    expected = (there if needs & OF_INPUTS else []) + (back if needs & GRADIENT_STATISTICS else [])
    assert [sorted(part) for part in parts] == expected


def test_the_head_is_run_for_gradients_only(model: PreTrainedModel, windows: Tensor) -> None:
    ran = []
    model.lm_head.register_forward_pre_hook(lambda *_: ran.append("head"))
    gathered(model, windows, OF_INPUTS)
    assert ran == []
    gathered(model, windows, ALL)
    assert len(ran) == 2  # seven windows are two batches


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
    )


@pytest.mark.parametrize("fails_in", [None, "forward", "backward"])
def test_hooks_are_removed_also_after_an_exception(
    model: PreTrainedModel, windows: Tensor, fails_in: str | None
) -> None:
    counts: list[int] = []

    class Watching(nn.SiLU):
        """An activation that counts hooks, and may be interrupted."""

        def forward(self, x: Tensor) -> Tensor:
            counts.append(hooks_of(model))
            if fails_in == ("backward" if torch.is_grad_enabled() else "forward"):
                raise KeyboardInterrupt
            return super().forward(x)

    model.model.layers[0].mlp.act_fn = Watching()
    before = hooks_of(model)
    if fails_in:
        with pytest.raises(KeyboardInterrupt):
            gathered(model, windows, ALL)
    else:
        gathered(model, windows, ALL)
        assert before + 7 in counts  # the layers of a block, on the way back
    assert counts[0] == before + 4  # the sites of a block: so there was something to remove
    assert hooks_of(model) == before


def test_the_model_is_left_as_it_was(model: PreTrainedModel, windows: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forwards = {name: module.forward for name, module in model.named_modules()}
    gathered(model, windows, ALL)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert forwards == {name: module.forward for name, module in model.named_modules()}


@pytest.mark.parametrize("needs", [ALL, {Statistic.INPUT_COVARIANCE}, {Statistic.INPUT_MAGNITUDE}])
def test_non_finite_activations_are_refused_naming_the_first_site(
    model: PreTrainedModel, windows: Tensor, needs: set[Statistic]
) -> None:
    model.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] = float("nan")
    with pytest.raises(StatisticsError) as caught:
        gathered(model, windows, needs, groups=3)
    message = str(caught.value)
    assert message.startswith("model.layers.0.mlp.down_proj: ")
    assert "non-finite" in message
    assert f"{WINDOWS * TOKENS} tokens" in message
    assert "model.dtype" in message


class Skips(nn.Module):
    """A block's MLP that leaves its layers out."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (OF_INPUTS, r"^model\.layers\.1\.mlp\.gate_proj: inputs came for 0 of 84 "),
        (GRADIENT_STATISTICS, r"^model\.layers\.1\.mlp\.gate_proj: gradients came for 0 of 84 "),
    ],
)
def test_a_layer_that_the_model_does_not_run_is_refused_by_name(
    model: PreTrainedModel, windows: Tensor, needs: frozenset[Statistic], message: str
) -> None:
    model.model.layers[1].mlp = Skips(model.model.layers[1].mlp)
    with pytest.raises(StatisticsError, match=message):
        gathered(model, windows, needs)


def test_a_layer_that_was_not_seen_has_no_statistics(layers: ModelMap) -> None:
    """It is up to the method whether that is an error: a plain SVD needs none."""
    assert Calibration().of(layers.compressible[3]) == {}


def test_too_few_tokens_for_a_covariance_are_announced_before_the_pass(
    model: PreTrainedModel, layers: ModelMap
) -> None:
    widest = max(spec.in_features for spec in layers.compressible)
    enough = token_ids(1, widest + 1)
    parts = calibrate(BlockwiseBody(model), layers, enough[:, 1:], OF_INPUTS, CalibrationSettings())
    with pytest.warns(CalibrationWarning, match=rf"^{widest} calibration tokens .* {widest} feat"):
        next(parts)
    gathered(model, enough, OF_INPUTS)  # a warning would be an error
    gathered(model, enough[:, 1:], {Statistic.INPUT_MAGNITUDE})  # which holds no covariance


# --- groups ------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 9))
def test_batches_are_cut_at_the_borders_of_groups(
    windows: int, groups: int, batch_windows: int
) -> None:
    membership = sorted(window % groups for window in range(windows))
    position = 0
    closed: list[list[int]] = [[]]
    for batch in collect.batches_of(0, windows, batch_windows):
        sizes, closes_last = collect._groups_in(membership, batch)
        for index, size in enumerate(sizes):
            closed[-1] += range(position, position + size)
            position += size
            if closes_last or index + 1 < len(sizes):
                closed.append([])
        assert position == batch.stop
    assert closed.pop() == []  # the last group was closed
    expected = [
        [w for w in range(windows) if membership[w] == group] for group in range(len(closed))
    ]
    assert closed == expected
