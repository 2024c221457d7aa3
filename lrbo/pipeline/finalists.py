"""Solve the best trials of a study again, and judge them on the validation text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from lrbo import builders
from lrbo.allocation import Allocation
from lrbo.calibration.corpus import Role
from lrbo.compression import compressed, running
from lrbo.evaluation.perplexity import score
from lrbo.factorization.base import Statistic
from lrbo.factorization.loss_aware import PREDICTION_SHRINKAGE, shrunk
from lrbo.factorization.store import LayerStatistics
from lrbo.linalg import psd_eigenpairs
from lrbo.loading import load_model, resolve_device
from lrbo.nested import LowRankFactors
from lrbo.optimization.study import Study
from lrbo.progress import Reporter
from lrbo.refit import Metric, RefitSettings, refit
from lrbo.schema import RefitConfig
from lrbo.specs import ModelMap
from lrbo.trial import TrialRecord


@dataclass(frozen=True)
class Finalist:
    """The trial that is written, and with which factors.

    Attributes:
        record: The trial.
        factors: By layer name, float32 on the CPU.
        nll: Its loss on the validation text with these factors, nats per token.
        test_nll: The same on the test text, which decided nothing; ``None`` if not measured.
        refit: Settings of the refit, layers taken, and the loss on the validation text before
            and after, of every trial that was solved again; ``None`` without a refit.
    """

    record: TrialRecord
    factors: Mapping[str, LowRankFactors]
    nll: float
    test_nll: float | None
    refit: dict[str, Any] | None


def finalist(
    plan: builders.Plan,
    study: Study,
    records: Sequence[TrialRecord],
    chosen: RefitConfig,
    reporter: Reporter,
) -> Finalist:
    """Return the trial of least loss on the validation text after each was solved again.

    A trial that the refit does not better competes as it was scored.

    Args:
        plan: Of the study.
        study: Whose model it must be.
        records: Completed trials; without a refit, the first is returned.
        chosen: Whether and how to refit.
        reporter: Shows progress.

    Raises:
        StudyError: If the model is another one by now.
    """
    about = study.about()
    digest, dtype = about["model_fingerprint"], getattr(torch, about["dtype"])
    device = resolve_device(plan.config.model.device)
    if not chosen.enabled:
        factors = plan.preparation.factors(digest, dtype, device, reporter)
        record = records[0]
        return Finalist(record, factors, record.metrics["nll"], _tested(study, record), None)
    model = load_model(plan.source, dtype=dtype, device=device)
    builders.require_same_model(study, model)
    factors = plan.preparation.factors(digest, dtype, device, reporter, model)
    statistics = plan.preparation.statistics(digest, dtype, reporter, model)
    metric = output_metric(plan.layers, statistics, chosen.output_power)
    best: tuple[float, TrialRecord, Mapping[str, LowRankFactors]] | None = None
    trials = []
    for record in records:
        row, solved = _solve(plan, model, record, factors, metric, chosen, reporter)
        trials.append(row)
        after, before = row["validation_nll_after"], row["validation_nll_before"]
        found = (after, record, solved) if row["taken"] else (before, record, factors)
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None
    if len(records) > 1:
        reporter.say(f"Trial {best[1].request.trial_index} is the best after refits")
    nll, winner, its_factors = best
    test_nll = _tested(study, winner)
    if its_factors is not factors:
        allocation = winner.request.allocation
        test_nll = _loss(plan, model, allocation, its_factors, reporter, "test", "Test text")
    return Finalist(winner, its_factors, nll, test_nll, {**asdict(chosen), "trials": trials})


def _tested(study: Study, record: TrialRecord) -> float | None:
    """Return what a trial lost on the test text as it was searched, if that was scored."""
    tests = {test["trial"]: test["metrics"]["nll"] for test in study.state.tests.values()}
    return tests.get(record.request.trial_index)


def output_metric(layers: ModelMap, statistics: LayerStatistics, power: float) -> Metric:
    """Return what weighs a layer's output errors: its gradients' second moment, if gathered.

    It is read when it is asked for, so that one layer's is in memory.

    Args:
        layers: The map of the model.
        statistics: Of its layers.
        power: Flattens the moment's spectrum: 1 takes it as it is, 0 weighs all outputs alike.
            Sizes of errors, which only this changes, are not compared between layers.
    """

    def metric(name: str) -> torch.Tensor | None:
        found = statistics.of(layers.by_name[name]).get(Statistic.OUTPUT_GRADIENT)
        if found is None or power == 0:
            return None
        seen = shrunk(found, PREDICTION_SHRINKAGE)
        if power == 1:
            return seen
        strength, axes = psd_eigenpairs(seen, f"{name}: output gradient moment")
        return (axes * strength**power) @ axes.T

    return metric


def _solve(
    plan: builders.Plan,
    model: PreTrainedModel,
    record: TrialRecord,
    factors: Mapping[str, LowRankFactors],
    metric: Metric,
    chosen: RefitConfig,
    reporter: Reporter,
) -> tuple[dict[str, Any], dict[str, LowRankFactors]]:
    """Solve one trial again; return how it went, and the factors."""
    allocation = record.request.allocation
    calibration = plan.config.calibration
    settings = RefitSettings(
        blend=chosen.blend,
        feedback=chosen.feedback,
        ridge=chosen.ridge,
        held_back=0.0 if chosen.held_back is None else chosen.held_back,
        batch_windows=calibration.batch_windows,
        memory_bytes=int(calibration.memory_gib * 2**30),
    )
    count = sum(rank is not None for rank in allocation.ranks.values())
    index = record.request.trial_index
    with reporter.step(f"Refit of trial {index}", count, "layers") as advance:
        solved = refit(
            model,
            plan.layers,
            allocation,
            factors,
            plan.windows["calibration"].ids,
            settings,
            judging=plan.windows["validation"].ids if chosen.held_back is None else None,
            metric=metric,
            on_layer=lambda _: advance(1),
        )
    before = record.metrics["nll"]  # the same model, text and factors
    after = _loss(
        plan, model, allocation, solved.factors, reporter, "validation", "Validation text"
    )
    taken = sum(row.taken for row in solved.report)
    better = after < before
    reporter.say(
        f"Refit of {taken} of {count} layers: validation nll {before:.4f} before, {after:.4f} "
        f"after{'' if better else '; it is not better, so the factors of the trial are kept'}"
    )
    row = {
        "trial": index,
        "taken": better,
        "layers": taken,
        "validation_nll_before": before,
        "validation_nll_after": after,
    }
    return row, solved.factors


def _loss(
    plan: builders.Plan,
    model: PreTrainedModel,
    allocation: Allocation,
    factors: Mapping[str, LowRankFactors],
    reporter: Reporter,
    role: Role,
    name: str,
) -> float:
    """Return the loss on a text, nats per token."""
    windows = plan.windows[role]
    prefixes = running(model, factors, allocation.ranks)
    with (
        reporter.step(f"{name} after refit", windows.scored_tokens, "tokens") as advance,
        compressed(model, allocation, prefixes, tokens=windows.ids.numel()),
    ):
        return score(model, windows.ids, on_tokens=advance).mean
