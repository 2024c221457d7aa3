"""Time a checkpoint and its dense architecture, and measure what memory they take."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrbo.checkpoints import export
from lrbo.config.schema import BenchmarkConfig
from lrbo.errors import CheckpointError, Collecting, ConfigError, ModelError
from lrbo.evaluation import timing
from lrbo.evaluation.memory import peak_memory_bytes
from lrbo.files.tables import Table, columns
from lrbo.models.devices import dtype_name, resolve_device, resolve_dtype
from lrbo.models.limits import Limits
from lrbo.pipeline import checks
from lrbo.progress import PlainConsole, Reporter
from lrbo.reports.record import record
from lrbo.reports.terminal import print_table

log = logging.getLogger(__name__)

MIB = 2**20


def run(config: BenchmarkConfig, reporter: Reporter) -> dict[str, Any]:
    """Time a checkpoint and its dense architecture, and measure what memory they take.

    Raises:
        ConfigError: Listing every problem of values, checkpoint, device and lengths of prompts.
        CheckpointError: If the weights cannot be opened.
    """
    device = _checked(config)
    dtype = resolve_dtype(config.dtype, device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = Path(config.checkpoint)
    with reporter.waiting("Loading the model"):
        model = export.load(folder, dtype=dtype, device=device)
        twin = timing.dense_twin(model)
    settings = timing.TimingSettings(
        tuple(config.prompts), config.batch, config.steps, config.repeats, config.warmup
    )
    compile_error = None
    count = (1 + config.compile) * 2 * len(settings.prompts) + 1
    with reporter.step("Benchmark", count, "timings") as advance:
        done = partial(advance, 1)
        speeds = timing.measure_speed(model, twin, settings, on_run=done)
        if config.compile:
            try:
                speeds += timing.measure_speed(model, twin, settings, compiled=True, on_run=done)
            except Exception as error:  # of a compiler, on which the rest does not depend
                compile_error = f"{type(error).__name__}: {error}".splitlines()[0]
                log.warning("torch.compile failed, so nothing is compiled: %s", compile_error)
        kinds = timing.measure_kinds(model, twin, settings)
        done()
    result: dict[str, Any] = {
        "checkpoint": str(folder),
        "device": str(device),
        "dtype": dtype_name(dtype),
        "threads": torch.get_num_threads(),
        "batch": settings.batch,
        "steps": settings.steps,
        "compile_error": compile_error,
        "speeds": [asdict(speed) for speed in speeds],
        "kinds": [asdict(kind) for kind in kinds],
        "weights_bytes": {
            "checkpoint": model.get_memory_footprint(return_buffers=False),
            "dense": twin.get_memory_footprint(return_buffers=False),
        },
        # lrbo_text.safetensors beside them holds no weights
        "file_bytes": sum(file.stat().st_size for file in folder.glob("model*.safetensors")),
        "peak_bytes": None,
    }
    del model, twin
    if config.memory:
        peak = partial(
            peak_memory_bytes,
            folder,
            batch=settings.batch,
            prompt=max(settings.prompts),
            dtype=result["dtype"],
            device=str(device),
        )
        with reporter.waiting("Measuring memory"):
            try:
                result["peak_bytes"] = {"checkpoint": peak(dense=False), "dense": peak(dense=True)}
            except ModelError as error:  # what was timed is not lost for it
                log.warning("No peak memory: %s", error)
    _print(result, speeds, kinds)
    if config.record is not None:
        record(Path(config.record), result)
    return result


def _checked(config: BenchmarkConfig) -> torch.device:
    """The device; a ConfigError with every problem of the values."""
    problems = checks.check(config)
    if not problems:
        with Collecting(problems, CheckpointError):
            limits = Limits.of(export.load_config(config.checkpoint), config.checkpoint)
            problems += limits.of_prompt("prompts", max(config.prompts), config.steps)
    with Collecting(problems, ConfigError):
        device = resolve_device(config.device, "device")
        if not problems:
            return device
    raise ConfigError(problems)


def _print(
    result: Mapping[str, Any], speeds: list[timing.Speed], kinds: list[timing.KindSpeed]
) -> None:
    threads = f", {result['threads']} threads" if result["device"] == "cpu" else ""
    title = f"{result['checkpoint']}, {result['dtype']} on {result['device']}{threads}"
    rows = []
    for one in speeds:
        name = f"{one.step}, compiled" if one.compiled else one.step
        rates = [f"{rate:,.1f}" for rate in (one.dense_tokens_per_second, one.tokens_per_second)]
        rows.append([name, f"{one.prompt:,}", *rates, f"{one.speedup:.2f} +- {one.error:.2f}"])
    heads = columns("tokens per second", "prompt", "dense", "checkpoint", "times faster")
    print_table(Table(title, heads, rows))
    rows = []
    for kind in kinds:
        cells = [kind.kind, str(kind.layers), f"{kind.keep_ratio:.1%}", f"{kind.dense_ms:.2f}"]
        rows.append([*cells, f"{kind.ms:.2f}", f"{kind.speedup:.2f} +- {kind.error:.2f}"])
    longest = max(one.prompt for one in speeds)
    title = f"Low-rank layers of each kind, one after another, prompt {longest:,}"
    heads = columns("kind", "layers", "kept", "dense ms", "ms", "times faster")
    print_table(Table(title, heads, rows))
    measured = {"weights in memory": result["weights_bytes"], "peak memory": result["peak_bytes"]}
    rows = []
    for name, row in measured.items():
        if row is not None:
            mine, other = row["checkpoint"], row["dense"]
            rows.append([name, f"{other / MIB:,.1f}", f"{mine / MIB:,.1f}", f"{mine / other:.3f}"])
    rows.append(["files of weights", "", f"{result['file_bytes'] / MIB:,.1f}", ""])
    heads = columns("MiB", "dense", "checkpoint", "ratio")
    print_table(Table(f"Sizes; batch {result['batch']}", heads, rows))
    PlainConsole().print()
