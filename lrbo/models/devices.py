"""The device and dtype that a model runs in; `auto` takes the best of this machine."""

from __future__ import annotations

import gc
import timeit

import torch

from lrbo.errors import ConfigError

BATCH, FEW = 512, 32  # tokens


def resolve_device(device: str, key: str = "model.device") -> torch.device:
    """Turn ``auto`` into the best device here, of cuda, mps and cpu; ConfigError if unusable."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        return accelerator or torch.device("cpu")
    try:
        named = torch.device(device)
        torch.empty(1, device=named)
    except (RuntimeError, AssertionError) as error:
        count = torch.accelerator.device_count()
        usable = " or ".join(["auto", "cpu", *(f"{accelerator}:{index}" for index in range(count))])
        reason = str(error).splitlines()[0]
        why = f" ({reason})" if "device type at start" not in reason else ""  # all that torch has
        problem = f"{key}={device!r} cannot be used here: expected {usable}{why}"
        raise ConfigError([problem]) from error
    return named


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turn ``auto`` into bfloat16 where ``device`` multiplies it faster, else float32.

    Measured, not guessed: CPUs with AMX or AVX512-BF16 gain, others lose.
    """
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    limit = 0.8 * _matmul_seconds(torch.float32, device, BATCH)
    # Some CPUs emulate bfloat16, and would take long for a batch: a few tokens tell.
    is_faster = all(_matmul_seconds(torch.bfloat16, device, n) < limit for n in (FEW, BATCH))
    return torch.bfloat16 if is_faster else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Write a dtype as configurations do: ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def _matmul_seconds(dtype: torch.dtype, device: torch.device, tokens: int) -> float:
    """Time the product of a batch of tokens and a typical layer: the fastest of five."""
    batch = torch.ones(tokens, 1024, dtype=dtype, device=device)
    weight = torch.ones(1024, 1024, dtype=dtype, device=device)
    # item() waits for the device.
    return min(timeit.repeat(lambda: (batch @ weight)[0, 0].item(), number=1, repeat=5))


def release_memory() -> None:
    """Release the memory of models that nothing refers to any more but they themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
