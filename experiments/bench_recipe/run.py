"""What a trial costs beside its scoring: the paper's loop, and a trial of lrbo.

The paper's code copies the whole model for each trial, cuts each layer's basis to its rank, puts
two thin layers with a bias in its place, and throws the copy away afterwards. Both are timed in
alternation in one process, on the same factors, the same ranks and the same windows.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from lrbo.config import compose
from lrbo.config.schema import SearchConfig
from lrbo.factorization.factors import LowRankFactors
from lrbo.layers.modules import replace_module
from lrbo.optimization.space import sobol_point
from lrbo.pipeline import build_worker, checks, planning
from lrbo.progress import Reporter
from lrbo.study.journal import Study
from lrbo.tasks.perplexity import score
from lrbo.trials.records import TrialRequest

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
REPEATS = 2 if SMOKE else 7


def configured(studies: str) -> SearchConfig:
    """Return the paper's method, ratios and form on the quickstart's model, or a tiny one."""
    overrides = [
        "experiment=tiny" if SMOKE else "experiment=quickstart",
        "method=bolaco", "space=per_kind", "space.forms=[factored]", "sensitivity.enabled=false",
        f"studies={studies}",
    ]  # fmt: skip
    config = compose.composed("search", overrides)
    assert isinstance(config, SearchConfig)
    return config


def sliced(factors: LowRankFactors, rank: int) -> nn.Sequential:
    """Return two thin layers of their own memory, as the paper's code makes them."""
    left, right = factors.left[:, :rank].contiguous(), factors.right[:rank].contiguous()
    bias = factors.bias_at(rank)
    first = nn.Linear(right.shape[1], rank, bias=False, device="meta")
    second = nn.Linear(rank, left.shape[0], bias=bias is not None, device="meta")
    first.weight = nn.Parameter(right, requires_grad=False)
    second.weight = nn.Parameter(left, requires_grad=False)
    if bias is not None:
        second.bias = nn.Parameter(bias, requires_grad=False)
    return nn.Sequential(first, second)


def main() -> None:
    """Measure and print the table."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    with tempfile.TemporaryDirectory() as studies:
        config = configured(studies)
        study = Study(Path(studies) / "bench")
        with study.locked():
            plan = planning.plan_search(config, study, checks.check(config))
            worker = build_worker.build_worker(plan, study, Reporter())
            point = plan.space.start_point() or sobol_point(plan.space, 0, 0)
            allocation = plan.space.allocate(point)
    request = TrialRequest(0, "start", point, allocation, 0)
    evaluation = config.evaluation
    sizes = {"batch_windows": evaluation.batch_windows, "chunk_tokens": evaluation.chunk_tokens}
    names = ("copying", "cutting", "scoring", "dropping", "the paper's", "lrbo's", "dense scoring")
    taken: dict[str, list[float]] = {name: [] for name in names}

    def paper() -> float:
        marks = [time.perf_counter()]
        model = copy.deepcopy(worker.model)
        marks.append(time.perf_counter())
        for name, option in allocation.compressed.items():
            replace_module(model, name, sliced(worker.prepared[name], *option.level))
        marks.append(time.perf_counter())
        perplexity = score(model, worker.windows, **sizes)
        marks.append(time.perf_counter())
        del model
        marks.append(time.perf_counter())
        for name, begin, end in zip(names, marks, marks[1:], strict=False):
            taken[name].append(end - begin)
        taken["the paper's"].append(marks[-1] - marks[0])
        return perplexity.mean

    losses = paper(), worker(request).metrics["nll"]  # warm; they must be one model
    assert abs(losses[0] - losses[1]) < 0.01, losses
    for samples in taken.values():
        samples.clear()
    for _ in range(REPEATS):
        paper()
        start = time.perf_counter()
        worker(request)
        middle = time.perf_counter()
        score(worker.model, worker.windows, **sizes)
        taken["lrbo's"].append(middle - start)
        taken["dense scoring"].append(time.perf_counter() - middle)

    model = worker.model
    print(
        f"{config.model.name}, {model.dtype} on {model.device}, {torch.get_num_threads()} threads, "
        f"{worker.windows.numel():,} tokens; losses {losses[0]:.5f} and {losses[1]:.5f}"
    )
    print("| part of a trial | seconds | of scoring the dense model |")
    print("|---|---:|---:|")
    for name in names:
        shares = [a / b for a, b in zip(taken[name], taken["dense scoring"], strict=True)]
        seconds, share = statistics.median(taken[name]), statistics.median(shares)
        print(f"| {name} | {seconds:.3f} | {share:.3f} |")


if __name__ == "__main__":
    main()
