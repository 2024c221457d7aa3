"""Make bases and the low ranks over them again in turns, for the options of a trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from lrbo.calibration.statistics import Statistic
from lrbo.config.options import mismatch
from lrbo.factorization.alternation import Parts, alternate, is_alternated
from lrbo.factorization.cache import LayerStatistics, naming
from lrbo.factorization.prepared import BasedWeight, Prepared, UnitFactors
from lrbo.layers.options import Option
from lrbo.pipeline.planning import Plan
from lrbo.progress import Reporter
from lrbo.trials.records import TrialRecord

KEY = "bases.alternations"
_PREDICTED = ("predicted_before", "predicted_after")  # keys of a row, nats per token


def alternated_options(record: TrialRecord) -> dict[str, Option]:
    """Return the options of a trial that have a base and a low rank over it, by layer."""
    options = record.request.allocation.compressed
    return {name: option for name, option in options.items() if is_alternated(option)}


def alternation_problems(turns: int, plan: Plan, records: Sequence[TrialRecord]) -> list[str]:
    """Say why nothing can be alternated in some trials, before a model is loaded."""
    if not turns:
        return []
    problems = []
    for record in records:
        if not alternated_options(record):
            expected = (
                f"0: in trial {record.request.trial_index} no layer has a base with a low rank "
                "over it, such as int3 64 8"
            )
            problems.append(mismatch(KEY, turns, expected))
    if Statistic.OUTPUT_GRADIENT not in plan.preparation.needs:
        expected = (
            "0: gradients of outputs, which say what an alternation is worth, were not gathered "
            "(sensitivity.enabled=false); search with sensitivity.enabled=true"
        )
        problems.append(mismatch(KEY, turns, expected))
    return problems


def alternate_trial(
    plan: Plan,
    model: PreTrainedModel,
    statistics: LayerStatistics,
    factors: Mapping[str, Prepared],
    record: TrialRecord,
    turns: int,
    reporter: Reporter,
) -> tuple[dict[str, Any], dict[str, Prepared]]:
    """Alternate every layer of a trial that has a base with a low rank over it.

    Args:
        plan: Of the study.
        model: Dense, on the device that decomposes.
        statistics: Of its layers.
        factors: By layer, as they were prepared.
        record: The trial.
        turns: Alternations of each layer, at least 1.
        reporter: Shows progress, and what was gained.

    Returns:
        A row of the trial for reports, with a row per layer and predicted losses in nats per token,
        and all units, these layers with their one option made again.

    Raises:
        StatisticsError: Naming the layer.
    """
    preparation, options = plan.preparation, alternated_options(record)
    bases = preparation.bases
    assert bases is not None
    weights = preparation.source_weights(model)
    rows, made = list[dict[str, Any]](), dict[str, Prepared]()
    index = record.request.trial_index
    with reporter.step(f"Alternations of trial {index}", len(options), "layers") as advance:
        for name, option in options.items():
            own = factors[name]
            assert isinstance(own, UnitFactors)
            unit, spec = own.based[option.family], plan.layers.by_name[name]
            assert isinstance(unit, BasedWeight)
            given, module = statistics.of(spec), weights.get_submodule(name)
            with naming(name):
                parts = Parts.of(spec, module, unit, plan.method, given, bases, model.device)
                result = alternate(unit, option.rank, parts, turns)
            made[name] = replace(own, based={**own.based, option.family: result.unit})
            rows.append(
                {
                    "layer": name,
                    "option": str(option),
                    "predicted_before": result.before,
                    "predicted_after": result.after,
                    "turn": result.turn,
                }
            )
            advance(1)
    before, after = (sum(row[key] for row in rows) for key in _PREDICTED)
    better = sum(row["turn"] > 0 for row in rows)
    gain = f", {1 - after / before:.1%} less" if before > 0 else ""
    reporter.say(
        f"Alternations of {better} of {len(rows)} layers: predicted loss {before:.4f} nats per "
        f"token before, {after:.4f} after{gain}"
    )
    totals = dict(zip(_PREDICTED, (before, after), strict=True))
    return {"trial": index, "layers": better, **totals, "rows": rows}, {**factors, **made}
