"""The peak memory of this process, or of a checkpoint in a process of its own."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from lrbo.checkpoints import export
from lrbo.errors import ModelError
from lrbo.evaluation.timing import decode, dense_twin

PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the tensors on a GPU since the last reset, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_memory_bytes(
    folder: Path, *, batch: int, prompt: int, dtype: str, device: str, dense: bool
) -> int:
    """Peak memory of a process that opens a checkpoint, reads prompts and adds a token.

    Measured after the model is loaded: on CUDA what tensors take, else the resident memory of the
    process, libraries included. ``dense`` measures dense layers instead of low-rank ones.

    Raises:
        ModelError: If the process fails, mostly for lack of memory; with its last line.
    """
    call = f"print_peak{(str(folder), batch, prompt, dtype, device, dense)!r}"
    # A new interpreter, not multiprocessing, which would run the caller's script again.
    process = subprocess.run(
        [sys.executable, "-c", f"from lrbo.evaluation.memory import print_peak; {call}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ModelError(
            f"the process that measures memory ended with status {process.returncode} and said "
            f"{last!r}; it loads {folder} once more, so there may be too little memory: "
            "memory=false leaves it out"
        )
    return int(process.stdout.split()[-1])


def print_peak(folder: str, batch: int, prompt: int, dtype: str, device: str, dense: bool) -> None:
    """Measure the peak memory of this process, and print the bytes."""
    transformers_logging.disable_progress_bar()
    model = export.load(folder, dtype=getattr(torch, dtype), device=device)
    model = dense_twin(model) if dense else model
    was_reset = _reset_peak(model.device)
    ids = torch.zeros(batch, prompt + 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        step = decode(model, ids, 1)
        step.prepare()
        step.run()
    sys.stdout.write(f"{_peak_bytes(model.device, was_reset=was_reset)}\n")


def _reset_peak(device: torch.device) -> bool:
    """Forget the peak so far, if this system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes(device: torch.device, *, was_reset: bool) -> int:
    status = Path("/proc/self/status").read_text() if device.type != "cuda" and was_reset else ""
    peak = PEAK.search(status)
    return int(peak[1]) * 1024 if peak else round(peak_memory_gib(device) * 2**30)
