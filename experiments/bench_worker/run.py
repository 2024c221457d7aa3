"""What calibration, a trial, an allocation and a suggestion cost, in units of a forward pass.

Everything is measured in one process and in alternation, so that what else the machine does
touches both sides of a ratio.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lrbo.calibration.collect import calibrate
from lrbo.calibration.statistics import Statistic
from lrbo.config import compose
from lrbo.config.schema import SearchConfig
from lrbo.evaluation.memory import peak_memory_gib
from lrbo.factorization.registry import METHODS
from lrbo.models.blockwise import BlockwiseBody
from lrbo.optimization.proposals import Observation, SearchClient
from lrbo.optimization.space import Space, sobol_point
from lrbo.pipeline import build_worker, checks, planning
from lrbo.progress import Reporter
from lrbo.study.journal import Study
from lrbo.tasks.perplexity import score
from lrbo.trials.records import TrialRequest
from lrbo.trials.worker import Worker

DTYPE = os.environ.get("LRBO_BENCH_DTYPE", "float32")
SMOKE = bool(os.environ.get("LRBO_SMOKE"))
REPEATS = 1 if SMOKE else 3
OBSERVATIONS = 5 if SMOKE else 20
POOLED = METHODS["bolaco"].needs
WITH_GRADIENTS = METHODS["loss_aware"].needs
LIMITS = {
    "trial / dense scoring": 1.3,
    "calibration / forward": 2.0,
    "calibration with gradients / forward": 3.5,
}


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def configured(studies: str) -> SearchConfig:
    """Return the configuration: the quickstart's with fewer tokens, or the tiny one.

    In float32: moments are float32 whatever the model runs in, so where the CPU multiplies
    bfloat16 several times faster the ratio to a forward pass says more about the CPU.
    """
    overrides = ["experiment=tiny"] if SMOKE else [
        "experiment=quickstart", "data.calibration.tokens=8192", f"model.dtype={DTYPE}"
    ]  # fmt: skip
    config = compose.composed("search", [*overrides, f"studies={studies}"])
    assert isinstance(config, SearchConfig)
    return config


def main() -> None:
    """Measure, print the table, and fail if a promise is broken."""
    with tempfile.TemporaryDirectory() as studies:
        config = configured(studies)
        study = Study(Path(studies) / "bench")
        with study.locked():
            plan = planning.plan_search(config, study, checks.check(config))
            worker = build_worker.build_worker(plan, study, Reporter())
            space = build_worker.informed_space(
                plan, study, worker.model, worker.prepared, Reporter()
            )
            measure(plan, worker, space, config)


def measure(plan: planning.Plan, worker: Worker, space: Space, config: SearchConfig) -> None:
    """Print one row per quantity."""
    sizes = {
        "batch_windows": config.evaluation.batch_windows,
        "chunk_tokens": config.evaluation.chunk_tokens,
    }
    model = worker.model
    calibration, validation = plan.windows["calibration"].ids, worker.windows

    def forward_only() -> None:
        with torch.inference_mode():
            for batch in torch.split(calibration, config.calibration.batch_windows):
                model(batch.to(model.device), use_cache=False, logits_to_keep=1)

    body, settings = BlockwiseBody(model), plan.preparation.settings

    def gather(needs: frozenset[Statistic]) -> None:
        for _ in calibrate(body, plan.layers, calibration, needs, settings):
            pass

    def dense() -> None:
        score(model, validation, **sizes)

    point = space.start_point() or sobol_point(space, 0, 0)
    request = TrialRequest(0, "start", point, space.allocate(point), 0)
    names = ("forward", "calibration", "calibration with gradients", "dense scoring", "trial")
    taken: dict[str, list[float]] = {name: [] for name in names}
    dense()  # warm
    for _ in range(REPEATS):
        taken["forward"].append(seconds(forward_only))
        taken["calibration"].append(seconds(lambda: gather(POOLED)))
        taken["calibration with gradients"].append(seconds(lambda: gather(WITH_GRADIENTS)))
        taken["dense scoring"].append(seconds(dense))
        taken["trial"].append(seconds(lambda: worker(request)))

    client = SearchClient(space, seed=0)
    points = [sobol_point(space, index, 0) for index in range(OBSERVATIONS)]
    known = [Observation(p, sum((1 - x) ** 2 for x in p.values())) for p in points]
    median = {name: statistics.median(values) for name, values in taken.items()}
    # Of the repeats, so that what slows one repeat down slows both sides of its ratio down.
    ratios = {
        "trial / dense scoring": _ratio(taken["trial"], taken["dense scoring"]),
        "calibration / forward": _ratio(taken["calibration"], taken["forward"]),
        "calibration with gradients / forward": _ratio(
            taken["calibration with gradients"], taken["forward"]
        ),
    }
    allocation_s = seconds(lambda: [space.allocate(p) for p in points]) / len(points)
    suggestion_s = seconds(lambda: client.ask(len(known), known))
    tokens = dict.fromkeys(names[:3], calibration.numel())

    print(
        f"{config.model.name}, {model.dtype} on {model.device}, {torch.get_num_threads()} threads"
    )
    print("| quantity | seconds | tokens |")
    print("|---|---:|---:|")
    for name, value in median.items():
        print(f"| {name} | {value:.2f} | {tokens.get(name, validation.numel()):,} |")
    print(f"| allocation | {allocation_s:.4f} | |")
    print(f"| suggestion after {len(known)} trials | {suggestion_s:.2f} | |")
    print()
    print("| ratio | measured | promised |")
    print("|---|---:|---:|")
    for name, value in ratios.items():
        print(f"| {name} | {value:.2f} | {LIMITS[name]:.1f} |")
    print(f"\npeak memory of the process: {peak_memory_gib(torch.device('cpu')):.2f} GiB")
    broken = [name for name, value in ratios.items() if value > LIMITS[name]]
    if broken and not SMOKE:  # milliseconds of a tiny model say nothing
        raise SystemExit(f"promise broken: {', '.join(broken)}")


def _ratio(above: list[float], below: list[float]) -> float:
    """Return the median of the ratios of the repeats."""
    ratio = statistics.median(a / b for a, b in zip(above, below, strict=True))
    assert math.isfinite(ratio)
    return ratio


if __name__ == "__main__":
    main()
