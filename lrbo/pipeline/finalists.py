"""Solve the best trials of a study again, and judge them on the validation text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from lrbo.allocation.allocate import Allocation
from lrbo.allocation.apply import compressed, on_device
from lrbo.config.schema import RefinementConfig, RefitConfig
from lrbo.data.windows import Role
from lrbo.factorization.cache import LayerStatistics
from lrbo.factorization.prepared import Prepared
from lrbo.models.devices import resolve_device
from lrbo.pipeline import build_worker, planning
from lrbo.pipeline.refinements import refined_units
from lrbo.progress import Reporter
from lrbo.refit.sequential import Metric, RefitSettings, output_metric, refit
from lrbo.study.study_record import StudyRecord
from lrbo.trials.records import TrialRecord

AGAIN = "bases made again"  # in messages


@dataclass(frozen=True)
class Finalist:
    """The trial that is written, and its factors by layer name, float32 on the CPU.

    Losses, nats per token, are with these factors on the validation text and on the test text,
    which decided nothing (``None`` if not measured). ``refit`` has its settings, and a row per
    trial that was solved again; ``None`` without a refit. ``bases`` likewise has how bases were
    made again, and a row per trial; ``None`` without.
    """

    record: TrialRecord
    factors: Mapping[str, Prepared]
    loss: float
    test_loss: float | None
    refit: dict[str, Any] | None
    bases: dict[str, Any] | None = None


def finalist(
    plan: planning.Plan,
    study: StudyRecord,
    records: Sequence[TrialRecord],
    config: RefitConfig,
    reporter: Reporter,
    *,
    bases: RefinementConfig | None = None,
    tests: bool = True,
) -> Finalist:
    """Return the trial of least loss on the validation text after each was solved again.

    First ``bases`` are made again, with the low ranks over them, then comes the refit. What neither
    improves competes as it was scored. Without a refit, it is the first of the records, which are
    completed trials. Without ``tests`` the test text is not scored.

    Raises:
        StudyError: If the model is another one by now.
        StatisticsError: If a base cannot be made again, naming its layer.
    """
    digest, dtype = study.about.model_fingerprint, plan.dtype
    device = resolve_device(plan.config.model.device)
    name = study.task.minimized.name
    scored = {test["trial"]: test["metrics"][name] for test in study.state.tests.values()}
    again = bases if bases is not None and (bases.alternations or bases.sweeps) else None
    if not config.enabled and again is None:
        factors, best = plan.preparation.factors(digest, dtype, device, reporter), records[0]
        test_loss = scored.get(best.request.trial_index)
        return Finalist(best, factors, best.metrics[name], test_loss, None)
    model = plan.task.load(plan.source, dtype=dtype, device=device)
    build_worker.require_same_model(study, model)
    factors = plan.preparation.factors(digest, dtype, device, reporter, model)
    statistics = plan.preparation.statistics(digest, dtype, reporter, model)
    metric = output_metric(plan.layers, statistics, config.output_power)
    loss, record = math.inf, records[0]
    refits, refinements = list[dict[str, Any]](), list[dict[str, Any]]()
    solved: Mapping[str, Prepared] = factors
    for candidate in records if config.enabled else records[:1]:
        its_loss: float = candidate.metrics[name]
        its_factors: Mapping[str, Prepared] = factors
        if again is not None:
            allocation = candidate.request.allocation
            row, its_loss, its_factors = refined(
                plan, model, statistics, allocation, factors, its_loss, again, reporter
            )
            refinements.append({"trial": candidate.request.trial_index, **row})
        if config.enabled:
            row, its_loss, its_factors = _solve(
                plan, model, candidate, its_factors, its_loss, metric, config, reporter
            )
            refits.append(row)
        if its_loss < loss:
            loss, record, solved = its_loss, candidate, its_factors
    if len(records) > 1:
        reporter.say(f"Trial {record.request.trial_index} is the best after refits")
    test_loss = scored.get(record.request.trial_index)  # of the factors of the trial
    if solved is not factors:
        test_loss = None
    if solved is not factors and tests:
        last = "refit" if config.enabled else AGAIN
        allocation = record.request.allocation
        test_loss = loss_of(plan, model, allocation, solved, reporter, "test", last)
    return Finalist(
        record,
        solved,
        loss,
        test_loss,
        {**asdict(config), "trials": refits} if config.enabled else None,
        None if again is None else {**asdict(again), "trials": refinements},
    )


def refined(
    plan: planning.Plan,
    model: PreTrainedModel,
    statistics: LayerStatistics,
    allocation: Allocation,
    factors: Mapping[str, Prepared],
    before: float,
    config: RefinementConfig,
    reporter: Reporter,
) -> tuple[dict[str, Any], float, Mapping[str, Prepared]]:
    """Make the bases of an allocation again; return a row for reports, and the better of both.

    ``before`` is the loss with ``factors``, on the same model and the validation text. All else,
    also what is raised, is as of :func:`refined_units`.
    """
    options = allocation.compressed
    row, made = refined_units(plan, model, statistics, factors, options, config, reporter)
    after = loss_of(plan, model, allocation, made, reporter, "validation", AGAIN)
    row |= _judged(plan, "Bases made again", before, after, reporter)
    return (row, after, made) if row["taken"] else (row, before, factors)


def _judged(
    plan: planning.Plan, what: str, before: float, after: float, reporter: Reporter
) -> dict[str, Any]:
    """Say what something did to the loss on the validation text, and return that for reports."""
    better = after < before
    ending = "" if better else "; it is not better, so the factors of before are kept"
    reporter.say(
        f"{what}: validation {plan.task.record.minimized.label} {before:.4f} before, "
        f"{after:.4f} after{ending}"
    )
    return {"taken": better, "validation_loss_before": before, "validation_loss_after": after}


def _solve(
    plan: planning.Plan,
    model: PreTrainedModel,
    record: TrialRecord,
    factors: Mapping[str, Prepared],
    before: float,
    metric: Metric,
    config: RefitConfig,
    reporter: Reporter,
) -> tuple[dict[str, Any], float, Mapping[str, Prepared]]:
    """Solve one trial again; return its row of the report, and loss and factors of the better.

    ``before`` is its loss with the ``factors`` that it has, on the same model and text.
    """
    allocation, calibration = record.request.allocation, plan.config.calibration
    settings = RefitSettings(
        blend=config.blend,
        feedback=config.feedback,
        ridge=config.ridge,
        held_back=0.0 if config.held_back is None else config.held_back,
        batch_windows=calibration.batch_windows,
        memory_bytes=int(calibration.memory_gib * 2**30),
    )
    count, index = len(allocation.compressed), record.request.trial_index
    with reporter.step(f"Refit of trial {index}", count, "layers") as advance:
        solved = refit(
            model,
            plan.layers,
            allocation,
            factors,
            plan.windows["calibration"].examples,
            settings,
            judging=plan.windows["validation"].examples if config.held_back is None else None,
            metric=metric,
            body=plan.task.segments(model),
            on_layer=lambda _: advance(1),
        )
    if not solved.report:
        reporter.say(
            f"Refit: no layer of trial {index} is a product of two factors, which alone are solved "
            "again"
        )
        kept = {"validation_loss_before": before, "validation_loss_after": before}
        return {"trial": index, "layers": 0, "taken": False, **kept}, before, factors
    together = {**factors, **solved.factors}
    after = loss_of(plan, model, allocation, together, reporter, "validation")
    taken, count = sum(row.accepted for row in solved.report), len(solved.report)
    judged = _judged(plan, f"Refit of {taken} of {count} layers", before, after, reporter)
    row = {"trial": index, "layers": taken, **judged}
    return (row, after, together) if judged["taken"] else (row, before, factors)


def loss_of(
    plan: planning.Plan,
    model: PreTrainedModel,
    allocation: Allocation,
    factors: Mapping[str, Prepared],
    reporter: Reporter,
    role: Role,
    after: str = "refit",
) -> float:
    """Return the loss of a dense model with an allocation on a text, nats per token."""
    tokens = plan.task.positions(plan.windows[role].examples)
    prefixes = on_device(model, factors, allocation.ranks)
    with compressed(model, allocation, prefixes, tokens=tokens):
        losses = plan.losses(model, role, f"{role.capitalize()} text after {after}", reporter)
    return float(losses.mean())
