"""The peak memory of a checkpoint, and of its dense architecture, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from lrbo import export
from lrbo.compression import replace_module
from lrbo.errors import ModelError
from lrbo.speed import SpeedSettings, decode_of, dense_like, low_rank_layers
from lrbo.worker import peak_memory_gib

PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def peak_memory_bytes(
    folder: Path, settings: SpeedSettings, dtype: str, device: str, *, dense: bool
) -> int:
    """Return the peak memory of a process that opens a model, reads a prompt and adds a token.

    Measured in a process of its own, after the model is loaded: on CUDA what tensors take, else
    the resident memory of the process, libraries included.

    Args:
        folder: A checkpoint.
        settings: The longest prompt counts.
        dtype: Name of the dtype.
        device: Name of the device.
        dense: Whether dense layers take the place of low-rank ones.

    Raises:
        ModelError: If the process ends without an answer, mostly for lack of memory; with what
            it said.
    """
    given = {
        "folder": str(folder),
        "batch": settings.batch,
        "prompt": max(settings.prompts),
        "dtype": dtype,
        "device": device,
        "dense": dense,
    }
    # A new interpreter, not multiprocessing, which would run the caller's script again.
    command = [sys.executable, "-c", "from lrbo.peak_memory import answer_peak; answer_peak()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(
        command,
        input=json.dumps(given),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        said = ran.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise ModelError(
            f"the process that measures memory ended with status {ran.returncode} and said "
            f"{said[0]!r}; it loads {folder} once more, so there may be too little memory: "
            "memory=false leaves it out"
        )
    return int(ran.stdout.split()[-1])


def answer_peak() -> None:
    """Measure what stdin asks for in this process, and write the bytes to stdout."""
    transformers_logging.disable_progress_bar()
    given = json.load(sys.stdin)
    place = torch.device(given["device"])
    model = export.load(given["folder"], dtype=getattr(torch, given["dtype"]), device=place)
    if given["dense"]:
        for name in low_rank_layers(model):
            layer: Any = model.get_submodule(name)
            replace_module(model, name, dense_like(layer))
    reset = _reset_peak(place)
    ids = torch.zeros(given["batch"], given["prompt"] + 1, dtype=torch.long, device=place)
    with torch.inference_mode():
        prepare, decode = decode_of(model, ids, 1, compiled=False)
        prepare()
        decode()
    sys.stdout.write(f"{_peak(place, reset=reset)}\n")


def _reset_peak(device: torch.device) -> bool:
    """Forget the peak so far; return whether this system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak(device: torch.device, *, reset: bool) -> int:
    """Return the peak memory in bytes, since the reset where there was one."""
    if device.type != "cuda" and reset:
        found = PEAK.search(Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    return round(peak_memory_gib(device) * 2**30)
