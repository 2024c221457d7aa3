"""How a refit runs: batches, files, interruptions, blocks one at a time, and what it refuses."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lrbo.calibration.collect import Calibration
from lrbo.calibration.statistics import Statistic
from lrbo.errors import DataError, StatisticsError
from lrbo.factorization.prediction import PREDICTION_SHRINKAGE, shrunk
from lrbo.layers.options import Option
from lrbo.models import blockwise
from lrbo.models.blockwise import BlockwiseBody
from lrbo.models.model_map import map_model
from lrbo.refit.sequential import Refit, RefitSettings, output_metric, refit
from tests.support.allocations import decided
from tests.support.refits import (
    WIDTH,
    allocation,
    assert_untouched,
    old_factors,
    one_thread,
    same_bits,
    snapshot,
)
from tests.support.tiny import CASES, build, token_ids

__all__ = ["one_thread"]  # a fixture


def test_batches_and_files_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files: list[object] = []

    def counted(**options: Any) -> Any:
        files.append(options)
        return tempfile.TemporaryFile(**options)

    monkeypatch.setattr(blockwise, "TemporaryFile", counted)
    model, layers = build("qwen2"), map_model(build("qwen2"))
    given = (model, layers, allocation(layers), old_factors(model, layers), token_ids(9, WIDTH))
    first = refit(*given, RefitSettings())
    assert not files
    second = refit(*given, RefitSettings(memory_bytes=10_000))
    assert same_bits(first, second)
    assert len(files) >= 2
    assert not list(tmp_path.iterdir())
    for batch_windows in (1, 100):
        other = refit(*given, RefitSettings(batch_windows=batch_windows))
        for row, same in zip(first.report, other.report, strict=True):
            assert row.fitted_after == pytest.approx(same.fitted_after, rel=1e-3)


def test_no_pass_runs_an_attention_again_whose_inputs_are_known() -> None:
    model, layers = build("llama_untied"), map_model(build("llama_untied"))
    plan, old = allocation(layers), old_factors(model, layers)
    begun: list[int] = []
    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda *_, index=index: begun.append(index))
    refit(model, layers, plan, old, token_ids(9, WIDTH), RefitSettings(batch_windows=9))
    fitting_and_judging = 2
    # Once in the dense model, for the inputs of q, k and v, and for those of o.
    assert begun == [index for index in (0, 1) for _ in range(3 * fitting_and_judging)]


def test_the_same_call_gives_the_same_bits() -> None:
    model, layers = build("llama_biased"), map_model(build("llama_biased"))
    old = old_factors(model, layers, centred=True)
    given = (model, layers, allocation(layers), old, token_ids(9, WIDTH))
    first = refit(*given)
    assert same_bits(first, refit(*given))
    # Every form of a rank is the same function.
    pivoted = allocation(layers, form="pivoted")
    assert same_bits(first, refit(model, layers, pivoted, *given[3:]))


def test_an_interrupted_refit_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, layers = build("llama_untied"), map_model(build("llama_untied"))
    before, modules = snapshot(model), list(model.modules())
    stop_at = layers.compressible[9].name  # in the middle of the second block

    def stop(name: str) -> None:
        if name == stop_at:
            raise KeyboardInterrupt

    settings = RefitSettings(memory_bytes=0)
    old = old_factors(model, layers)
    with pytest.raises(KeyboardInterrupt):
        refit(model, layers, allocation(layers), old, token_ids(9, 12), settings, on_layer=stop)
    assert_untouched(model, before)
    assert all(was is now for was, now in zip(modules, model.modules(), strict=True))
    assert not list(tmp_path.iterdir())


def test_one_block_of_weights_at_a_time_is_enough() -> None:
    whole = build("llama_untied")
    layers, model = map_model(whole), build("llama_untied")
    old, windows = old_factors(whole, layers), token_ids(9, WIDTH)
    blocks = model.model.layers

    @contextmanager
    def open_block(index: int) -> Iterator[nn.Module]:
        blocks[index].load_state_dict(whole.model.layers[index].state_dict(), assign=True)
        yield blocks[index]
        blocks[index].to("meta")

    blocks.to("meta")
    body = BlockwiseBody(model, open_block)
    result = refit(model, layers, allocation(layers), old, windows, body=body)
    assert same_bits(result, refit(whole, layers, allocation(layers), old, windows))


@pytest.mark.parametrize("case", CASES)
def test_every_family_is_refit_in_half_precision(case: str) -> None:
    model = build(case).bfloat16()
    layers = map_model(model)
    old = old_factors(model, layers)
    result = refit(model, layers, allocation(layers), old, token_ids(9, WIDTH))
    assert set(result.factors) == {spec.name for spec in layers.compressible}
    assert all(f.left.dtype == torch.float32 for f in result.factors.values())
    assert sum(row.accepted for row in result.report) >= len(result.report) // 2
    assert next(model.parameters()).dtype == torch.bfloat16


def test_nothing_compressed_is_nothing_to_do() -> None:
    model, layers = build("opt"), map_model(build("opt"))
    dense = decided(layers.compressible, {})
    assert refit(model, layers, dense, {}, token_ids(1, 4)) == Refit({}, ())


def test_what_cannot_be_refit_is_refused() -> None:
    model, layers = build("llama_untied"), map_model(build("llama_untied"))
    old, windows = old_factors(model, layers), token_ids(9, WIDTH)
    plan = allocation(layers)
    name = layers.compressible[0].name
    with pytest.raises(
        KeyError, match=r"1 of 14 layers with a rank .* have no factors for it: .*q_proj"
    ):
        refit(model, layers, plan, {k: v for k, v in old.items() if k != name}, windows)
    other = decided([layers.by_name["lm_head"]], {"lm_head": Option("factored", (3,))})
    with pytest.raises(KeyError, match=r"are in no block of the model .*: lm_head"):
        refit(model, layers, other, old, windows)
    with pytest.raises(KeyError, match=r"4 of 14 layers .* have no factors for it: .*k_proj"):
        refit(model, layers, allocation(layers, rank=12), old, windows)
    with pytest.raises(DataError, match=r"has 1 windows and holds 1 back"):
        refit(model, layers, plan, old, windows[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blend": 1.5}, r"blend=1\.5: expected a number from 0 to 1"),
        ({"blend": float("nan")}, "blend=nan: expected a number from 0 to 1"),
        ({"feedback": -0.1}, r"feedback=-0\.1: expected a number from 0 on"),
        ({"ridge": float("inf")}, "ridge=inf: expected a number from 0 on"),
        ({"held_back": 1.0}, r"held_back=1\.0: expected a number from 0 on and below 1"),
        ({"held_back": -0.1}, r"held_back=-0\.1: expected a number from 0 on and below 1"),
        ({"batch_windows": 0}, "batch_windows=0: expected at least 1"),
        ({"memory_bytes": -1}, "memory_bytes=-1: expected at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        RefitSettings(**settings)


def test_an_overflow_names_the_site() -> None:
    model, layers = build("llama_untied"), map_model(build("llama_untied"))
    before = snapshot(model)
    old = old_factors(model, layers)
    name = "model.layers.1.mlp.gate_proj"
    old[name].left[3, 2] = torch.inf
    with pytest.raises(StatisticsError, match=r"block 1: input of mlp.down_proj and its target"):
        refit(model, layers, allocation(layers, dense=("up_proj",)), old, token_ids(9, WIDTH))
    assert_untouched(model, before)


def test_the_metric_of_errors_is_the_gradient_moment_with_its_spectrum_flattened() -> None:
    layers = map_model(build("llama_untied"))
    spec = layers.compressible[0]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, spec.out_features, generator=generator, dtype=torch.float64)
    moment = rows.T @ rows / 40
    statistics = Calibration({spec.name: {Statistic.OUTPUT_GRADIENT: moment}})
    expected = shrunk(moment, PREDICTION_SHRINKAGE)
    whole, half, none = (output_metric(layers, statistics, power) for power in (1.0, 0.5, 0.0))
    torch.testing.assert_close(whole(spec.name), expected)
    root = half(spec.name)
    assert root is not None
    torch.testing.assert_close(root @ root, expected)
    torch.testing.assert_close(root, root.T)
    assert none(spec.name) is None
    other = layers.compressible[1].name  # of which no gradient was gathered
    assert whole(other) is None
