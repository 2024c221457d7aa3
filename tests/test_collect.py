"""Statistics of a model equal plain formulas on the inputs that hooks of our own captured."""

from collections.abc import Sequence
from pathlib import Path

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
    CalibrationFile,
    calibrate,
    calibration_fingerprint,
    group_of_window,
    save_calibration,
)
from lrbo.errors import StatisticsError
from lrbo.factorization.base import Statistic
from lrbo.model import ModelMap, map_model
from tests import reference
from tests.reference import Matrix
from tests.tiny import build, token_ids

TOLERANCE = {
    # Same inputs to the bit (the reference runs the same batches), float64 sums; relative to
    # the trace of the covariance.
    "same batches": 1e-12,
    # Llama's norms round to float32 inside (6e-8), and other batch sizes round otherwise.
    "other batches": 1e-6,
}

ALL = frozenset(Statistic)
WINDOWS, TOKENS = 7, 12


def captured_inputs(
    model: PreTrainedModel, names: Sequence[str], windows: Tensor, batch_windows: int
) -> dict[str, Matrix]:
    """Run the whole model and keep what each layer read: ``(windows, tokens, features)``."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:

        def keep(module: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
            kept[name].append(inputs[0].detach().clone().double())

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in windows.split(batch_windows):
            model(batch)
    for handle in handles:
        handle.remove()
    shape = (*windows.shape, -1)
    return {name: torch.cat(parts).reshape(shape).numpy() for name, parts in kept.items()}


def assert_statistics(
    found: Calibration, inputs: dict[str, Matrix], count: int, tolerance: float
) -> None:
    """Compare every site with the plain formulas; windows are dealt out to ``count`` groups."""
    assert set(found.sites) == set(inputs)
    for site, windows in inputs.items():
        features = windows.shape[-1]
        rows = windows.reshape(-1, features)
        groups = [windows[first::count].reshape(-1, features) for first in range(count)]
        expected = {
            Statistic.INPUT_MEAN: reference.mean(rows),
            Statistic.INPUT_COVARIANCE: reference.covariance(rows),
            Statistic.POOLED_INPUT_COVARIANCE: reference.pooled_covariance(groups),
        }
        unit = np.trace(expected[Statistic.INPUT_COVARIANCE])
        for statistic, tensor in found.at(site).items():
            assert tensor.dtype == torch.float64
            difference = np.abs(tensor.numpy() - expected[statistic]).max()
            assert difference <= tolerance * unit, (site, statistic)


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
    found = calibrate(model, layers, windows, ALL, groups=groups, batch_windows=2)
    inputs = captured_inputs(model, layers.sites, windows, batch_windows=2)
    assert (found.tokens, found.groups) == (WINDOWS * TOKENS, count)
    assert all(set(statistics) == ALL for statistics in found.sites.values())
    assert_statistics(found, inputs, count, TOLERANCE["same batches"])


@pytest.mark.parametrize("batch_windows", [1, 3, 7, 100])
def test_batch_size_changes_nothing(
    model: PreTrainedModel, layers: ModelMap, windows: Tensor, batch_windows: int
) -> None:
    found = calibrate(model, layers, windows, ALL, groups=3, batch_windows=batch_windows)
    inputs = captured_inputs(model, layers.sites, windows, batch_windows=2)
    assert_statistics(found, inputs, 3, TOLERANCE["other batches"])


@pytest.mark.parametrize("case", ["gpt2", "opt", "phi", "gpt_neox", "phi3"])
def test_other_families(case: str, windows: Tensor) -> None:
    model = build(case).double()
    layers = map_model(model)
    found = calibrate(model, layers, windows, ALL, groups=3, batch_windows=4)
    # Of every layer, not only of the one that stands for its site.
    names = [spec.name for spec in layers.compressible]
    inputs = captured_inputs(model, names, windows, batch_windows=4)
    for spec in layers.compressible:
        one = Calibration({spec.name: found.sites[spec.site]}, found.tokens, found.groups)
        assert_statistics(one, {spec.name: inputs[spec.name]}, 3, TOLERANCE["same batches"])


@pytest.mark.parametrize(
    ("needs", "given"),
    [
        ({Statistic.INPUT_COVARIANCE}, {Statistic.INPUT_COVARIANCE, Statistic.INPUT_MEAN}),
        (
            {Statistic.POOLED_INPUT_COVARIANCE},
            {Statistic.POOLED_INPUT_COVARIANCE, Statistic.INPUT_MEAN},
        ),
    ],
)
def test_only_what_is_asked_for_is_gathered(
    model: PreTrainedModel,
    layers: ModelMap,
    windows: Tensor,
    needs: set[Statistic],
    given: set[Statistic],
) -> None:
    found = calibrate(model, layers, windows, needs, groups=3, batch_windows=2)
    assert all(set(statistics) == given for statistics in found.sites.values())
    inputs = captured_inputs(model, layers.sites, windows, batch_windows=2)
    assert_statistics(found, inputs, 3, TOLERANCE["same batches"])


def test_nothing_needed_means_no_pass(
    model: PreTrainedModel, layers: ModelMap, windows: Tensor
) -> None:
    told: list[int] = []
    found = calibrate(model, layers, windows, (), on_tokens=told.append)
    assert (found.sites, found.tokens, told) == ({}, 0, [])


def test_progress_adds_up_to_all_tokens(
    model: PreTrainedModel, layers: ModelMap, windows: Tensor
) -> None:
    told: list[int] = []
    calibrate(model, layers, windows, ALL, batch_windows=3, on_tokens=told.append)
    assert told == [3 * TOKENS, 3 * TOKENS, TOKENS]


def test_the_head_is_not_run(model: PreTrainedModel, layers: ModelMap, windows: Tensor) -> None:
    ran = []
    model.lm_head.register_forward_pre_hook(lambda *_: ran.append("head"))
    calibrate(model, layers, windows, ALL)
    assert ran == []
    model(windows[:1])
    assert ran == ["head"]  # so the hook would have told


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
    )


def test_hooks_are_removed(model: PreTrainedModel, layers: ModelMap, windows: Tensor) -> None:
    before = hooks_of(model)
    counts = []
    calibrate(model, layers, windows, ALL, on_tokens=lambda _: counts.append(hooks_of(model)))
    assert counts[0] == before + len(layers.sites)  # so there was something to remove
    assert hooks_of(model) == before


def test_hooks_are_removed_after_an_exception(
    model: PreTrainedModel, layers: ModelMap, windows: Tensor
) -> None:
    before = hooks_of(model)

    def stop(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, layers, windows, ALL, on_tokens=stop)
    assert hooks_of(model) == before


def test_the_model_is_left_as_it_was(
    model: PreTrainedModel, layers: ModelMap, windows: Tensor
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, layers, windows, ALL)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("needs", [ALL, {Statistic.INPUT_COVARIANCE}, {Statistic.INPUT_MEAN}])
def test_non_finite_activations_are_refused_naming_the_first_site(
    model: PreTrainedModel, layers: ModelMap, windows: Tensor, needs: set[Statistic]
) -> None:
    model.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] = float("nan")
    with pytest.raises(StatisticsError) as caught:
        calibrate(model, layers, windows, needs, groups=3)
    message = str(caught.value)
    assert message.startswith("model.layers.0.mlp.down_proj: ")
    assert "non-finite" in message
    assert f"{WINDOWS * TOKENS} tokens" in message
    assert "model.dtype" in message


def test_a_site_that_the_model_does_not_run_is_refused_by_name(
    model: PreTrainedModel, layers: ModelMap, windows: Tensor
) -> None:
    class Skips(nn.Module):
        """A block that leaves its MLP out."""

        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (
                mlp.gate_proj,
                mlp.up_proj,
                mlp.down_proj,
            )

        def forward(self, x: Tensor) -> Tensor:
            return x

    model.model.layers[1].mlp = Skips(model.model.layers[1].mlp)
    with pytest.raises(StatisticsError, match=r"^model\.layers\.1\.mlp\.gate_proj: .* 0 of 84 "):
        calibrate(model, layers, windows, ALL)


def test_an_unknown_site_is_refused_by_name() -> None:
    with pytest.raises(StatisticsError, match=r"model\.layers\.9\.mlp"):
        Calibration().at("model.layers.9.mlp")


# --- groups ------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 40))
def test_windows_are_dealt_out_evenly_from_first_to_last(windows: int, groups: int) -> None:
    membership = group_of_window(windows, groups)
    assert len(membership) == windows
    # Texts lie one behind the other: any run of windows must reach as many groups as it can.
    for start in range(0, windows - len(set(membership)) + 1):
        assert len(set(membership[start : start + len(set(membership))])) == min(groups, windows)
    sizes = [membership.count(group) for group in range(min(groups, windows))]
    assert sum(sizes) == windows
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 9))
def test_spans_cut_batches_at_the_borders_of_groups(
    windows: int, groups: int, batch_windows: int
) -> None:
    membership = sorted(group_of_window(windows, groups))
    seen: list[int] = []
    closed: list[list[int]] = [[]]
    for first in range(0, windows, batch_windows):
        count = min(batch_windows, windows - first)
        for start, stop, closes in collect._spans(membership, first, count):
            part = list(range(first + start, first + stop))
            seen += part
            closed[-1] += part
            if closes:
                closed.append([])
    assert seen == list(range(windows))  # every window once, in order
    assert closed.pop() == []  # the last group was closed
    expected = [
        [w for w in range(windows) if membership[w] == group] for group in range(len(closed))
    ]
    assert closed == expected


# --- file --------------------------------------------------------------------------------------


def test_save_and_load_give_equal_bits(
    model: PreTrainedModel, layers: ModelMap, windows: Tensor, tmp_path: Path
) -> None:
    found = calibrate(model, layers, windows, ALL, groups=3)
    path = tmp_path / "folder" / "calibration.safetensors"
    save_calibration(path, found, "fingerprint")
    again = CalibrationFile(path, "fingerprint")
    assert (again.tokens, again.groups) == (WINDOWS * TOKENS, 3)
    assert len(found.sites) == 8
    for site, statistics in found.sites.items():
        loaded = again.at(site)
        assert loaded.keys() == statistics.keys()
        for statistic in statistics:
            assert torch.equal(loaded[statistic], statistics[statistic]), (site, statistic)
    with pytest.raises(StatisticsError, match="lm_head"):
        again.at("lm_head")


def test_covariances_are_stored_as_half(tmp_path: Path) -> None:
    matrix = torch.ones(60, 60, dtype=torch.float64)
    path = tmp_path / "file"
    save_calibration(path, Calibration({"site": {Statistic.INPUT_COVARIANCE: matrix}}), "f")
    assert path.stat().st_size < 0.6 * matrix.numel() * 8


@given(st.integers(1, 40), st.integers(0, 1000))
def test_packing_gives_back_every_symmetric_matrix(features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    packed = collect._pack(matrix)
    assert packed.numel() == features * (features + 1) // 2
    assert torch.equal(collect._unpack(packed), matrix)


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration"
    save_calibration(path, Calibration(), "made-with-this")
    with pytest.raises(StatisticsError, match=r"made-with-this, expected wanted-that"):
        CalibrationFile(path, "wanted-that")


def test_fingerprint_knows_everything_that_decides_the_statistics() -> None:
    windows = token_ids(4, 6)
    other = windows.clone()
    other[3, 5] += 1
    base = {"groups": 2, "dtype": torch.float32}
    everything = [
        calibration_fingerprint("model", windows, ALL, **base),
        calibration_fingerprint("other model", windows, ALL, **base),
        calibration_fingerprint("model", other, ALL, **base),
        calibration_fingerprint("model", windows.reshape(6, 4), ALL, **base),
        calibration_fingerprint("model", windows, {Statistic.INPUT_MEAN}, **base),
        calibration_fingerprint("model", windows, ALL, groups=3, dtype=torch.float32),
        calibration_fingerprint("model", windows, ALL, groups=2, dtype=torch.bfloat16),
    ]
    assert len(set(everything)) == len(everything)
    for needs in (sorted(ALL), sorted(ALL, reverse=True)):
        assert calibration_fingerprint("model", windows, needs, **base) == everything[0]
