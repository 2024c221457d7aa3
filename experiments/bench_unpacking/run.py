"""Integers unpacked at each call, beside the kernels that torch has for them and the dense layer.

    OMP_NUM_THREADS=1 python experiments/bench_unpacking/run.py

Microseconds of the processor, medians of turns of all ways. Kernels of torch take weights in an
order of their own, and 8 bits with one scale per output only.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lrbo.factorization.rounding import round_nearest
from lrbo.layers.forms import Quantized
from lrbo.layers.packing import unpack

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
SHAPES = [(32, 64)] if SMOKE else [(1536, 576), (2048, 2048)]
TOKENS = (1, 8) if SMOKE else (1, 8, 64)
TURNS = 2 if SMOKE else 5
GROUP = 64

Way = Callable[[Tensor], Tensor]


def ways(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Way]:
    """Return what multiplies with one random weight of a shape, by name."""
    weight = torch.randn(shape, dtype=torch.float64)
    forms = Quantized(4), Quantized(8)
    four, eight = (round_nearest(weight, [(form, GROUP)], dtype=dtype)[0] for form in forms)
    dense = four.weight(dtype)
    zero, scale = four.tensors["zero"].float(), four.tensors["scale"].float()
    operators = torch.ops.aten
    codes = unpack(four.tensors["packed"], 4).int()
    packed = operators._convert_weight_to_int4pack_for_cpu(codes, 1)
    grid = torch.stack([scale.T, ((8 - zero) * scale).T], 2).contiguous().to(dtype)
    integers = torch.randint(-127, 128, shape, dtype=torch.int8)
    steps = torch.rand(shape[0]).to(dtype)
    device = torch.device("cpu")
    return {
        "dense": lambda x: torch.nn.functional.linear(x, dense),
        "int4 unpacked": four.module(None, None, device),
        "int4 by torch": lambda x: operators._weight_int4pack_mm_for_cpu(x, packed, GROUP, grid),
        "int8 unpacked": eight.module(None, None, device),
        "int8 by torch": lambda x: operators._weight_int8pack_mm(x, integers, steps),
    }


def seconds(way: Way, x: Tensor) -> float:
    """Return the processor's seconds of one call, of as many as take a hundredth of a second."""
    start = time.process_time()
    way(x)
    once = max(time.process_time() - start, 1e-6)
    count = 1 if SMOKE else max(int(0.01 / once), 1)
    start = time.process_time()
    for _ in range(count):
        way(x)
    return (time.process_time() - start) / count


def main() -> None:
    """Print a table."""
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            every = ways(shape, dtype)
            for tokens in TOKENS:
                x = torch.randn(tokens, shape[1]).to(dtype)
                expected, actual = every["int4 unpacked"](x), every["int4 by torch"](x)
                torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05 * shape[1] ** 0.5)
                turns = [[seconds(way, x) for way in every.values()] for _ in range(TURNS)]
                taken = (1e6 * statistics.median(each) for each in zip(*turns, strict=True))
                cells = " | ".join(f"{each:,.0f}" for each in taken)
                rows.append(f"| {shape[0]}x{shape[1]} | {dtype} | {tokens} | {cells} |")
                names = list(every)
    print(f"| layer | dtype | tokens | {' | '.join(names)} |")
    print("|---|---|---:|" + "---:|" * len(names))
    print("\n".join(rows).replace("torch.", ""))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
