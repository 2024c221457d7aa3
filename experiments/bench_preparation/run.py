"""How long do all forms of a layer take to prepare, beside its factorization alone?

    python experiments/bench_preparation/run.py

Layers of the shapes of SmolLM2-135M with random weights, inputs and gradients, on one thread.
Everything is measured in one process and in alternation, in seconds of the processor.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lrbo.calibration.statistics import Statistic
from lrbo.config.choices import FORM_PRESETS
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prepare_unit import prepared_unit
from lrbo.factorization.registry import method_named

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
REPEATS = 1 if SMOKE else 5
SHRINK = 3 if SMOKE else 1
# By kind: outputs, inputs, and how many of the shape are in a block.
SHAPES = {
    "q_proj, o_proj": (576, 576, 2),
    "k_proj, v_proj": (192, 576, 2),
    "gate_proj, up_proj": (1536, 576, 2),
    "down_proj": (576, 1536, 1),
}
FORMS = FORM_PRESETS["bytes"]
PLAIN, ALL = "factorization alone", "all forms together"


def moment(size: int, generator: torch.Generator) -> Tensor:
    """Draw a second moment whose energies fall as those of trained models do, a few far above."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    energy = torch.arange(1, size + 1, dtype=torch.float64) ** -1.2
    scale = torch.ones(size, dtype=torch.float64)
    scale[:3] = 10.0
    root = scale[:, None] * basis * energy.sqrt()
    return root @ root.T


def layer(out: int, into: int) -> tuple[nn.Linear, Mapping[Statistic, Tensor]]:
    """Draw a layer in bfloat16 and the statistics that the preset needs."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(into, out, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    spread = torch.rand(out, 1, generator=generator) + 0.5
    module.weight.copy_(torch.randn(out, into, generator=generator) * spread / into**0.5)
    mean = torch.randn(into, generator=generator, dtype=torch.float64) / into**0.5
    return module, {
        Statistic.INPUT_MEAN: mean / 4,
        Statistic.INPUT_COVARIANCE: moment(into, generator),
        Statistic.OUTPUT_GRADIENT: moment(out, generator) / out,
    }


def plans() -> Iterator[tuple[str, BasePlan | None]]:
    """Name what is measured: nothing, each form that is made alone, and all of them."""
    yield PLAIN, None
    for form in FORMS:
        if (plan := BasePlan.of((form,), BaseOptions())) is not None:
            yield form, plan
    yield ALL, BasePlan.of(FORMS, BaseOptions())


def main() -> None:
    """Measure, and print seconds of a block of layers and ratios."""
    torch.set_num_threads(1)
    method = method_named("loss_aware")
    totals = {name: 0.0 for name, _ in plans()}
    shapes = []
    for kind, (out, into, count) in SHAPES.items():
        module, given = layer(out // SHRINK, into // SHRINK)
        taken: dict[str, list[float]] = {name: [] for name in totals}
        for _ in range(REPEATS + 1):
            for name, plan in plans():
                start = time.process_time()
                prepared_unit(module, method, given, None, bases=plan, errors=False)
                taken[name].append(time.process_time() - start)
        # The first warms up.
        median = {name: statistics.median(times[1:]) for name, times in taken.items()}
        shape = f"{module.out_features}x{module.in_features}"
        ratio = median[ALL] / median[PLAIN]
        shapes.append(
            f"| {kind} | {shape} | {median[PLAIN]:.3f} | {median[ALL]:.3f} | {ratio:.2f} |"
        )
        for name, value in median.items():
            totals[name] += count * value
    print("| layer | shape | factorization s | all forms s | ratio |")
    print("|---|---|---:|---:|---:|")
    print(*shapes, sep="\n")
    print("\n| of a block of seven layers | s | over factorization |")
    print("|---|---:|---:|")
    for name, seconds in totals.items():
        own = seconds if name in (PLAIN, ALL) else seconds - totals[PLAIN]
        label = name if name in (PLAIN, ALL) else f"{name}, beside it"
        print(f"| {label} | {own:.3f} | {own / totals[PLAIN]:.2f} |")


if __name__ == "__main__":
    main()
