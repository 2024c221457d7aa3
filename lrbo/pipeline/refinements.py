"""Make bases again for the options of a trial: by sweeps, and in turns with low ranks over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from lrbo.calibration.statistics import Statistic
from lrbo.config.choices import NO_SWEEPS
from lrbo.config.options import mismatch
from lrbo.config.schema import RefinementConfig
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.cache import LayerStatistics, naming
from lrbo.factorization.prepared import BasedWeight, Prepared, UnitFactors
from lrbo.factorization.refinement import Parts, is_integer, is_repaired, refine
from lrbo.layers.options import Option
from lrbo.pipeline.planning import Plan
from lrbo.progress import Reporter
from lrbo.trials.records import TrialRecord

_PREDICTED = ("predicted_before", "predicted_after")  # keys of a row, nats per token
# By key, what it needs in a trial.
_NEEDED = {
    "alternations": "a base with a low rank over it, such as int3 64 8",
    "sweeps": "integers, such as int3 64 0",
}


def refined_options(options: Mapping[str, Option], config: RefinementConfig) -> dict[str, Option]:
    """Return the options whose bases are made again: in integers, or with a low rank over them."""
    return {
        name: option
        for name, option in options.items()
        if (config.alternations and is_repaired(option)) or (config.sweeps and is_integer(option))
    }


def refinement_problems(
    config: RefinementConfig, plan: Plan, records: Sequence[TrialRecord]
) -> list[str]:
    """Say why no base can be made again in some trials, before a model is loaded."""
    asked = {key: value for key, value in vars(config).items() if value}
    bases, reasons = plan.preparation.bases, list[tuple[str, str]]()
    for record in records if asked else ():
        if not refined_options(record.request.allocation.compressed, config):
            trial = record.request.trial_index
            reasons += [(key, f"0: in trial {trial} no layer has {_NEEDED[key]}") for key in asked]
    if config.sweeps and bases is not None and bases.options.method == "nearest":
        reasons.append(("sweeps", NO_SWEEPS))
    if Statistic.OUTPUT_GRADIENT not in plan.preparation.needs:
        lacking = (
            "0: gradients of outputs, which say what a base made again is worth, were not gathered "
            "(sensitivity.enabled=false); search with sensitivity.enabled=true"
        )
        reasons += [(key, lacking) for key in asked]
    return [mismatch(f"bases.{key}", asked[key], expected) for key, expected in reasons]


def refined_units(
    plan: Plan,
    model: PreTrainedModel,
    statistics: LayerStatistics,
    factors: Mapping[str, Prepared],
    options: Mapping[str, Option],
    config: RefinementConfig,
    reporter: Reporter,
) -> tuple[dict[str, Any], dict[str, Prepared]]:
    """Make the base of every layer again that is of integers, or has a low rank over it.

    Args:
        plan: Of the study.
        model: Dense, on the device that decomposes.
        statistics: Of its layers.
        factors: By layer, as they were prepared.
        options: By layer; at least one of them is such.
        config: Whether low ranks are made again in turns, and how often integers are swept, the
            study's own sweeps at least.
        reporter: Shows progress, and what was gained.

    Returns:
        Totals for reports, with a row per layer and predicted losses in nats per token, and all
        units, these layers with their one option made again.

    Raises:
        StatisticsError: Naming the layer.
    """
    own_plan, own_options = plan.preparation.bases, refined_options(options, config)
    assert own_plan is not None
    sweeps = max(config.sweeps, own_plan.options.sweeps)
    bases = BasePlan(own_plan.forms, replace(own_plan.options, sweeps=sweeps))
    weights = plan.preparation.source_weights(model)
    rows, made = list[dict[str, Any]](), dict[str, Prepared]()
    with reporter.step("Bases made again", len(own_options), "layers") as advance:
        for name, option in own_options.items():
            own = factors[name]
            assert isinstance(own, UnitFactors)
            unit, spec = own.based[option.family], plan.layers.by_name[name]
            assert isinstance(unit, BasedWeight)
            given, module = statistics.of(spec), weights.get_submodule(name)
            with naming(name):
                parts = Parts.of(spec, module, unit, plan.method, given, bases, model.device)
                result = refine(unit, option.rank, parts, max(config.alternations, 1))
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
        f"Bases made again in {better} of {len(rows)} layers: predicted loss {before:.4f} nats per "
        f"token before, {after:.4f} after{gain}"
    )
    totals = dict(zip(_PREDICTED, (before, after), strict=True))
    return {"layers": better, **totals, "rows": rows}, {**factors, **made}
