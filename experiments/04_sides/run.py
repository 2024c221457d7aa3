"""Would a switch per kind between one- and two-sided factorization be worth a search variable?

    python experiments/04_sides/run.py

Every layer is factored twice: by inputs and gradients, and by inputs with the size of the
gradients only. Each kind is switched alone, then all, and then those together that gained on the
validation text; the options are each time those of least predicted loss.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lrbo.allocation.allocate import Allocation
from lrbo.allocation.apply import compressed
from lrbo.config import compose
from lrbo.config.schema import SearchConfig
from lrbo.factorization.factors import LowRankFactors
from lrbo.pipeline import build_worker, checks, planning
from lrbo.progress import Reporter
from lrbo.study.journal import Study
from lrbo.tasks.perplexity import score
from lrbo.trials.worker import Worker

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
BASE = ["experiment=tiny", "method=loss_aware", "space=weights"] if SMOKE else [
    "experiment=quickstart", "data.validation.tokens=32768", "data.test.tokens=32768"
]  # fmt: skip
KEPT = (0.8, 0.6)
TEXTS = ("validation", "test")
Factors = Mapping[str, LowRankFactors]


def planned(studies: str, *overrides: str) -> tuple[planning.Plan, Study]:
    """Return the plan of a search with some overrides."""
    config = compose.composed("search", [
        *BASE, "sensitivity.layers_per_kind=0", f"studies={studies}", *overrides
    ])  # fmt: skip
    assert isinstance(config, SearchConfig)
    study = Study(Path(studies) / config.study)
    return planning.plan_search(config, study, checks.check(config)), study


def both_ways(studies: str) -> tuple[Worker, planning.Plan, Factors, Factors]:
    """Return the worker and its plan, and the factors two-sided and one-sided."""
    plan, study = planned(studies)
    worker = build_worker.build_worker(plan, study, Reporter())
    kinds = sorted({spec.kind for spec in plan.layers.compressible})
    other, _ = planned(studies, f"method.one_sided=[{','.join(kinds)}]")
    digest = study.about.model_fingerprint
    model = worker.model
    stored = other.preparation.factors(digest, model.dtype, model.device, Reporter(), model)
    one = {
        name: stored[name].to(dtype=model.dtype, device=model.device, max_rank=two.max_rank)
        for name, two in worker.prepared.items()
    }
    return worker, plan, worker.prepared, one


def losses(
    worker: Worker, plan: planning.Plan, factors: Factors, allocation: Allocation
) -> list[float]:
    """Return nats per token on each text."""

    def on(ids: Tensor) -> float:
        with compressed(worker.model, allocation, factors, tokens=ids.numel()):
            return score(worker.model, ids, batch_windows=worker.batch_windows).mean

    return [on(plan.windows[text].ids) for text in TEXTS]


def measured(studies: str) -> Iterator[tuple[str, float, list[float]]]:
    """Yield what was switched, the keep ratio, and the losses."""
    worker, plan, two, one = both_ways(studies)
    kinds = list(dict.fromkeys(spec.kind for spec in plan.layers.compressible))
    for keep_ratio in KEPT:
        budgeted, _ = planned(
            studies, f"budget.keep_ratio={keep_ratio}", f"study=keep_{keep_ratio}"
        )

        def switched(*sides: str, budgeted: planning.Plan = budgeted) -> list[float]:
            mixed = {
                name: (one if plan.layers.by_name[name].kind in sides else two)[name]
                for name in two
            }
            allocation = budgeted.space.problem.with_losses(mixed).by_loss()
            return losses(worker, plan, mixed, allocation)

        reference = switched()
        yield "none", keep_ratio, reference
        gained = []
        for kind in kinds:
            text_losses = switched(kind)
            yield kind, keep_ratio, text_losses
            if text_losses[0] < reference[0]:
                gained.append(kind)
        yield "all", keep_ratio, switched(*kinds)
        if len(gained) > 1:
            yield " ".join(gained), keep_ratio, switched(*gained)


def main() -> None:
    """Measure and print the table."""
    print("| one-sided | keep ratio | validation nll | difference | test nll | difference |")
    print("|---|---:|---:|---:|---:|---:|")
    reference: list[float] = []
    with tempfile.TemporaryDirectory() as studies:
        for sides, keep_ratio, text_losses in measured(studies):
            if sides == "none":
                reference = text_losses
            cells = [f"{a:.5f} | {a - b:+.5f}" for a, b in zip(text_losses, reference, strict=True)]
            print(f"| {sides} | {keep_ratio} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
