"""Time a checkpoint and its dense architecture, and measure what memory they take."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrbo import checks, export
from lrbo.commands.tables import console, print_table, record, table
from lrbo.errors import CheckpointError, ConfigError, ModelError
from lrbo.evaluation.limits import Limits
from lrbo.loading import resolve_device, resolve_dtype
from lrbo.model import dtype_name
from lrbo.peak_memory import peak_memory_bytes
from lrbo.progress import Reporter
from lrbo.schema import BenchmarkConfig
from lrbo.speed import (
    KindSpeed,
    Speed,
    SpeedSettings,
    dense_twin,
    measure_kinds,
    measure_speed,
    weight_bytes,
)

log = logging.getLogger(__name__)

MIB = 2**20


def run(chosen: BenchmarkConfig, reporter: Reporter) -> dict[str, Any]:
    """Time a checkpoint and its dense architecture, and measure what memory they take.

    Raises:
        ConfigError: If a value cannot work, the folder is no checkpoint, the model cannot read
            prompts of that length, or the device does not exist here.
        CheckpointError: If the weights cannot be opened.
    """
    problems = checks.check(chosen)
    if not problems:
        try:
            limits = Limits.of(export.load_config(chosen.checkpoint), chosen.checkpoint)
            problems += limits.of_prompt("prompts", max(chosen.prompts), chosen.steps)
        except CheckpointError as error:
            problems.append(str(error))
    device = None
    try:
        device = resolve_device(chosen.device, "device")
    except ConfigError as error:
        problems += error.problems
    if problems or device is None:
        raise ConfigError(problems)
    dtype = resolve_dtype(chosen.dtype, device)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    folder = Path(chosen.checkpoint)
    with reporter.waiting("Loading the model"):
        model = export.load(folder, dtype=dtype, device=device)
        twin = dense_twin(model)
    settings = SpeedSettings(
        tuple(chosen.prompts), chosen.batch, chosen.steps, chosen.repeats, chosen.warmup
    )
    speeds: list[Speed] = []
    kinds: list[KindSpeed] = []
    count = (1 + chosen.compile) * 2 * len(settings.prompts) + 1
    with reporter.step("Benchmark", count, "timings") as advance:
        done = partial(advance, 1)
        speeds += measure_speed(model, twin, settings, on_run=done)
        failure = None
        if chosen.compile:
            try:
                speeds += measure_speed(model, twin, settings, compiled=True, on_run=done)
            except Exception as error:  # of a compiler, on which the rest does not depend
                failure = f"{type(error).__name__}: {error}".splitlines()[0]
                log.warning("torch.compile failed, so nothing is compiled: %s", failure)
        kinds += measure_kinds(model, twin, settings)
        advance(1)
    # lrbo_text.safetensors beside them holds no weights
    files = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    found: dict[str, Any] = {
        "checkpoint": str(folder),
        "device": str(device),
        "dtype": dtype_name(dtype),
        "threads": torch.get_num_threads(),
        "batch": settings.batch,
        "steps": settings.steps,
        "compile_error": failure,
        "speeds": [asdict(one) for one in speeds],
        "kinds": [asdict(one) for one in kinds],
        "weights_bytes": {"checkpoint": weight_bytes(model), "dense": weight_bytes(twin)},
        "file_bytes": files,
        "peak_bytes": None,
    }
    del model, twin
    if chosen.memory:
        with reporter.waiting("Measuring memory"):
            try:
                found["peak_bytes"] = {
                    name: peak_memory_bytes(
                        folder, settings, found["dtype"], str(device), dense=name == "dense"
                    )
                    for name in ("checkpoint", "dense")
                }
            except ModelError as error:  # what was timed is not lost for it
                log.warning("No peak memory: %s", error)
    _print(found, speeds, kinds)
    if chosen.record is not None:
        record(Path(chosen.record), found)
    return found


def _print(found: Mapping[str, Any], speeds: list[Speed], kinds: list[KindSpeed]) -> None:
    """Print what was measured as three tables."""
    threads = f", {found['threads']} threads" if found["device"] == "cpu" else ""
    title = f"{found['checkpoint']}, {found['dtype']} on {found['device']}{threads}"
    times = table("tokens per second", "prompt", "dense", "checkpoint", "times faster")
    for one in speeds:
        times.add_row(
            f"{one.step}, compiled" if one.compiled else one.step,
            f"{one.prompt:,}",
            f"{one.dense_tokens_per_second:,.1f}",
            f"{one.tokens_per_second:,.1f}",
            f"{one.speedup:.2f} +- {one.error:.2f}",
        )
    print_table(title, times, [])
    layers = table("kind", "layers", "kept", "dense ms", "ms", "times faster")
    for kind in kinds:
        layers.add_row(
            kind.kind,
            str(kind.layers),
            f"{kind.keep_ratio:.1%}",
            f"{kind.dense_ms:.2f}",
            f"{kind.ms:.2f}",
            f"{kind.speedup:.2f} +- {kind.error:.2f}",
        )
    longest = max(one.prompt for one in speeds)
    print_table(f"Low-rank layers of each kind, one after another, prompt {longest:,}", layers, [])
    sizes = table("MiB", "dense", "checkpoint", "ratio")
    rows = {"weights in memory": found["weights_bytes"], "peak memory": found["peak_bytes"]}
    for name, row in rows.items():
        if row is not None:
            mine, other = row["checkpoint"], row["dense"]
            sizes.add_row(name, f"{other / MIB:,.1f}", f"{mine / MIB:,.1f}", f"{mine / other:.3f}")
    sizes.add_row("files of weights", "", f"{found['file_bytes'] / MIB:,.1f}", "")
    print_table(f"Sizes; batch {found['batch']}", sizes, [])
    console().print()
