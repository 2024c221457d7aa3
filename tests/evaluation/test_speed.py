"""Speeds are compared with counts of multiply-adds, and timed runs give the logits of a model."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lrbo.cli import main
from lrbo.evaluation import timing
from lrbo.evaluation.timing import (
    Run,
    TimingSettings,
    decode,
    dense_twin,
    measure_kinds,
    measure_speed,
    prefill,
)
from lrbo.layers.modules import low_rank_layers
from lrbo.models.model_map import map_model
from lrbo.pipeline.in_memory import factorize
from tests.checkpoints.test_export import EVERY, Compressed, Forms
from tests.evaluation.test_latency import clock
from tests.support import forks
from tests.support.commands import Ran
from tests.support.tiny import build, token_ids

__all__ = ["clock"]  # a fixture
TOLERANCE = {
    "one by one": 1e-5,  # float32 products of other shapes, relative to logits of about one
    "ratio": 1e-12,  # sums of whole numbers, divided once
}
CPU = torch.device("cpu")
SETTINGS = TimingSettings(prompts=(5, 9), batch=2, steps=3, repeats=4, warmup=1)
in_every_form = pytest.mark.parametrize("forms", EVERY, ids="+".join)


def parameters_in(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


some_cases = pytest.mark.parametrize("case", ["llama_tied", "gpt2"])


@in_every_form
@some_cases
def test_a_twin_is_dense_and_shares_every_other_weight(case: str, forms: Forms) -> None:
    model = Compressed(case, forms=forms).model
    layers = low_rank_layers(model)
    before = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    twin = dense_twin(model)
    assert layers
    assert low_rank_layers(model) == layers
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == before
    assert not low_rank_layers(twin)
    for name, layer in layers.items():
        dense = twin.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        assert dense.weight.shape == layer.dense_weight().shape
        assert (dense.bias is None) == (layer.bias is None)
    inside = tuple(f"{name}." for name in layers)
    shared = {n: t.data_ptr() for n, t in twin.named_parameters() if not n.startswith(inside)}
    assert shared == {n: address for n, address in before.items() if not n.startswith(inside)}
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    sizes = [one.get_memory_footprint(return_buffers=False) for one in (twin, model)]
    assert sizes[0] - sizes[1] == 4 * sum(
        parameters_in(twin.get_submodule(name)) - parameters_in(layer)
        for name, layer in layers.items()
    )


@pytest.mark.parametrize("compiled", [False, True])
@in_every_form
@some_cases
def test_what_is_timed_gives_the_logits_of_the_model(
    case: str, forms: Forms, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if compiled: another cache, and the same functions, which take long to compile."""
    monkeypatch.setattr(torch, "compile", lambda body, **_: body)
    model = Compressed(case, forms=forms).model
    ids, steps = token_ids(2, 9), 3
    with torch.inference_mode():
        logits = model(ids).logits
        last_logits: Any = prefill(model, ids, compiled=compiled).run()
        torch.testing.assert_close(last_logits, logits[:, -1], rtol=0, atol=TOLERANCE["one by one"])
        added = decode(model, ids, steps, compiled=compiled)
        for _ in range(2):  # every timing begins with the same cache
            added.prepare()
            outputs: Any = added.run()
            torch.testing.assert_close(
                torch.cat(outputs, 1), logits[:, -steps:], rtol=0, atol=TOLERANCE["one by one"]
            )


@in_every_form
@pytest.mark.usefixtures("clock")
def test_speeds_are_those_of_the_multiply_adds(forms: Forms) -> None:
    model = Compressed("llama_tied", forms=forms).model
    twin = dense_twin(model)
    head = model.get_output_embeddings().weight.numel()
    layers = [
        sum(parameters_in(m) for m in one.modules() if isinstance(m, nn.Linear)) - head
        for one in (model, twin)
    ]
    runs = []
    speeds = measure_speed(model, twin, SETTINGS, on_run=lambda: runs.append("timed"))
    assert [(one.step, one.prompt) for one in speeds] == [
        ("prefill", 5), ("decode", 5), ("prefill", 9), ("decode", 9),
    ]  # fmt: skip
    assert len(runs) == len(speeds)
    for one in speeds:
        tokens = one.prompt if one.step == "prefill" else SETTINGS.steps
        heads = 1 if one.step == "prefill" else SETTINGS.steps
        mine, dense = (SETTINGS.batch * (tokens * count + heads * head) for count in layers)
        total = SETTINGS.batch * tokens
        assert one.tokens_per_second == pytest.approx(total / mine, rel=TOLERANCE["ratio"])
        assert one.dense_tokens_per_second == pytest.approx(total / dense, rel=TOLERANCE["ratio"])
        assert one.speedup == pytest.approx(dense / mine, rel=TOLERANCE["ratio"])
        assert one.error == 0
    for kind in measure_kinds(model, twin, SETTINGS):
        assert kind.speedup == pytest.approx(1 / kind.keep_ratio, rel=TOLERANCE["ratio"])
        rows = SETTINGS.batch * max(SETTINGS.prompts)
        names = [name for name in low_rank_layers(model) if name.endswith(kind.kind)]
        assert kind.layers == len(names)
        assert kind.ms == 1e3 * rows * sum(parameters_in(model.get_submodule(n)) for n in names)


def test_a_kind_is_what_the_search_calls_so() -> None:
    """GPT-2 has a ``c_proj`` in attention and a wider one in its MLP."""
    model = build("gpt2")
    kinds = [spec.kind for spec in map_model(model).compressible]
    factorization = factorize(model, None, "svd", progress=False)
    factorization.compress_(model, factorization.uniform(0.5))
    timed = measure_kinds(model, dense_twin(model), SETTINGS)
    assert {one.kind: one.layers for one in timed} == {kind: kinds.count(kind) for kind in kinds}


def test_preparing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, prepared = 0.0, 0

    def made(takes: float) -> Run:
        def prepare() -> None:
            nonlocal now, prepared
            now, prepared = now + 100, prepared + 1

        def run() -> None:
            nonlocal now
            now += takes

        return Run(run, prepare)

    runs = iter([made(1), made(3)] * 2)  # compressed and dense, of a prefill and of decoding
    monkeypatch.setattr(timing, "prefill", lambda *_, **__: next(runs))
    monkeypatch.setattr(timing, "decode", lambda *_, **__: next(runs))
    model = Compressed("llama_tied").model
    settings = replace(SETTINGS, prompts=(5,))
    monkeypatch.setattr(timing, "perf_counter", lambda: now)
    for one in measure_speed(model, dense_twin(model), settings):
        assert (one.speedup, one.error) == (3, 0)
    assert prepared == 4 * (settings.warmup + settings.repeats)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Compressed("llama_tied").save(tmp_path / "model")
    return tmp_path / "model"


QUICK = ["prompts=[4]", "steps=2", "repeats=3", "warmup=0", "device=cpu", "dtype=float32"]


def benchmarked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *overrides: str
) -> tuple[dict[str, Any], str]:
    """Run the command; return its JSON and all that it printed."""
    main(["benchmark", f"checkpoint={folder}", f"studies={tmp_path}", *QUICK, *overrides,
          "output=json"])  # fmt: skip
    ran = capsys.readouterr()
    result: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    return result, ran.out + ran.err


def test_the_command_says_and_keeps_what_it_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, output = benchmarked(folder, tmp_path, capsys, "memory=false")
    assert [(s["step"], s["prompt"], s["compiled"]) for s in result["speeds"]] == [
        ("prefill", 4, False), ("decode", 4, False),
    ]  # fmt: skip
    assert {kind["kind"] for kind in result["kinds"]} <= {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert result["file_bytes"] == (folder / "model.safetensors").stat().st_size
    assert result["weights_bytes"]["checkpoint"] < result["weights_bytes"]["dense"]
    assert result["peak_bytes"] is None
    for shown in ("prefill", "decode", "times faster", "weights in memory"):
        assert shown in output
    (line,) = (tmp_path / "benchmarks.jsonl").read_text().splitlines()
    assert json.loads(line)["speeds"] == result["speeds"]


def test_a_device_that_is_not_there_is_named_with_all_else_that_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", "checkpoint=nowhere", "device=cuda:97", "batch=0",
              f"studies={tmp_path}"])  # fmt: skip
    message = capsys.readouterr().err
    for key in ("checkpoint='nowhere': expected a folder", "device='cuda:97'", "batch=0"):
        assert key in message


def test_what_fails_beside_leaves_the_times(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here\nand so on")

    monkeypatch.setattr(torch, "compile", broken)
    ended = subprocess.CompletedProcess([], 1, "", "MemoryError")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    result, output = benchmarked(folder, tmp_path, capsys, "compile=true")
    assert len(result["speeds"]) == 2
    assert result["compile_error"] == "RuntimeError: no compiler here"
    assert "torch.compile failed" in output
    assert "No peak memory" in output


@pytest.mark.slow
@pytest.mark.usefixtures("one_block")
def test_compiled_and_with_memory(tmp_path: Path) -> None:
    """In a process of its own: the shape checks of the tests cannot be compiled."""
    Compressed("one block").save(tmp_path / "model")
    command = ["benchmark", "checkpoint=model", "compile=true"]
    command += [f"studies={tmp_path}", *QUICK, "output=json"]
    here = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # else processes that import torch
    process = forks.start_lrbo(command, tmp_path, here)
    ran = Ran(*forks.ended(process, tmp_path, seconds=300))
    assert ran.status == 0, ran.err
    result = ran.json
    assert result["compile_error"] is None
    assert [s["compiled"] for s in result["speeds"]] == [False, False, True, True]
    assert min(result["peak_bytes"].values()) > 2**20
