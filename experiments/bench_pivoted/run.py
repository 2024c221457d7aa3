"""What the pivoted form costs and how exact it is, beside the factored form and the dense layer.

Parameters are equal where a keep ratio is given; in the last table ranks are. Times of one shape
are taken in alternation, so that what else the machine does touches every form.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from lrbo.layers import pivoted
from lrbo.layers.low_rank import LowRankLinear
from lrbo.layers.pivoted import PivotedLinear, Pivoting, pivot

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
SHAPES = [(576, 1536), (1536, 576), (4096, 11008), (11008, 4096)]  # (out, in)
SHAPES = [(24, 64), (64, 24)] if SMOKE else SHAPES
KEEP = (0.8, 0.5)
TOKENS = (1, 16) if SMOKE else (1, 256)
REPEATS = 2 if SMOKE else 9
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A random weight at two ranks: those with the same number of parameters.

    Attributes:
        out_features: Of the layer.
        in_features: Of the layer.
        keep: Share of the dense parameters.
        left: ``(out, pivoted)``.
        right: ``(pivoted, in)``.
        factored: Rank of the factored form.
        pivoted: Rank of the pivoted form, larger.
    """

    out_features: int
    in_features: int
    keep: float
    left: Tensor
    right: Tensor
    factored: int
    pivoted: int

    @property
    def name(self) -> str:
        """Return shape and keep ratio as they stand in the tables."""
        return f"{self.out_features}x{self.in_features} at {self.keep}"


def cases() -> Iterator[Case]:
    """Draw factors of random layers: an orthonormal left, as principal directions are."""
    for out_features, in_features in SHAPES:
        generator = torch.Generator().manual_seed(0)
        both, product = out_features + in_features, out_features * in_features
        for keep in KEEP:
            factored = int(keep * product / both)
            pivoted = int((both - math.sqrt(both**2 - 4 * keep * product)) / 2)
            left, _ = torch.linalg.qr(torch.randn(out_features, pivoted, generator=generator))
            right = torch.randn(pivoted, in_features, generator=generator) / in_features**0.5
            yield Case(out_features, in_features, keep, left, right, factored, pivoted)


def modules(case: Case, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the forms in a dtype: dense, factored at both ranks, pivoted."""
    with torch.device("meta"):
        dense = nn.Linear(case.in_features, case.out_features, bias=False, dtype=dtype)
    weight = (case.left.double() @ case.right.double()).to(dtype)
    dense.weight = nn.Parameter(weight, requires_grad=False)

    def factored(count: int) -> LowRankLinear:
        left, right = case.left[:, :count], case.right[:count]
        return LowRankLinear(left.T.contiguous().to(dtype).T, right.contiguous().to(dtype), None)

    return {
        "dense": dense,
        "factored": factored(case.factored),
        "factored, same rank": factored(case.pivoted),
        "pivoted": PivotedLinear.of_product(
            case.name, case.left, case.right, lambda *_: None, dtype
        ),
    }


def error_of(module: nn.Module, x: Tensor, expected: Tensor) -> float:
    """Return the largest error over the root mean square of the outputs."""
    difference = module(x).double() - expected
    return float(difference.abs().max() / expected.square().mean().sqrt())


def milliseconds(layers: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Return the shortest time of each module; they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(REPEATS + 1):
        for name, module in layers.items():
            start = time.perf_counter()
            module(x)
            taken[name].append(1000 * (time.perf_counter() - start))
    return {name: min(times[1:]) for name, times in taken.items()}  # the first warms up


def pivot_and_count(left: Tensor, right: Tensor) -> tuple[Pivoting, int]:
    """Return the pivoted form, and the number of swaps that it took."""
    counts, swap = [0], pivoted._swap

    def counted(coefficients: Tensor, order: Tensor) -> int:
        counts.append(swap(coefficients, order))
        return counts[-1]

    with mock.patch.object(pivoted, "_swap", counted):
        return pivot(left, right), sum(counts)


@torch.inference_mode()
def main() -> None:
    """Convert, measure and print three tables."""
    torch.set_num_threads(1)
    conversion, errors, times = [], [], []
    for case in cases():
        start = time.perf_counter()
        form, swaps = pivot_and_count(case.left, case.right)
        seconds = time.perf_counter() - start
        conversion.append(
            f"| {case.name} | {case.factored} | {case.pivoted} | {seconds:.2f} | "
            f"{float(form.coefficients.abs().max()):.3f} | {swaps} |"
        )
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(max(TOKENS), case.in_features, generator=generator)
        for dtype in DTYPES:
            layers = modules(case, dtype)
            given = x.to(dtype)
            expected = (given.double() @ case.right.double().T) @ case.left.double().T
            shown = [
                f"{error_of(layers[name], given, expected):.1e}"
                for name in ("dense", "factored, same rank", "pivoted")
            ]
            errors.append(f"| {case.name} | {str(dtype)[6:]} | {' | '.join(shown)} |")
            if dtype == torch.float64:
                continue
            for tokens in TOKENS:
                taken = milliseconds(layers, given[:tokens])
                shown = [f"{value:.3g}" for value in taken.values()]
                times.append(f"| {case.name} | {str(dtype)[6:]} | {tokens} | {' | '.join(shown)} |")
    print("| layer | rank factored | rank pivoted | conversion s | growth | swaps |")
    print("|---|---:|---:|---:|---:|---:|", *conversion, sep="\n")
    print("\n| layer | dtype | dense error | factored error | pivoted error |")
    print("|---|---|---:|---:|---:|", *errors, sep="\n")
    print(
        "\n| layer | dtype | tokens | dense ms | factored ms | factored, same rank ms | "
        "pivoted ms |"
    )
    print("|---|---|---:|---:|---:|---:|---:|", *times, sep="\n")


if __name__ == "__main__":
    main()
