"""What a journal says, event by event."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lrbo.config.choices import LATENCIES, SIZING
from lrbo.files.parsing import shown
from lrbo.layers.form import DENSE_FORM
from lrbo.layers.forms import FORMS
from lrbo.layers.options import DENSE, UNITS, Cost, Option, cost_of
from lrbo.study import events
from lrbo.study.about import About
from lrbo.trials.records import Origin, TrialRecord, TrialRequest, TrialResult


@dataclass
class StudyState:
    """What the journal says; what is a mapping of any values has the fields of its event."""

    # By index of an allocation: nats per token of each window of the pool; None if not finite.
    pooled: dict[int, list[float] | None] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)  # Chosen; empty without a pool
    dense: dict[str, float] = field(default_factory=dict)  # metrics; empty before they are measured
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)  # Tested, by label
    checkpoints: list[dict[str, Any]] = field(default_factory=list)  # Compressed, in order
    recovered: list[dict[str, Any]] = field(default_factory=list)  # Recovered, in order
    reranked: list[dict[str, Any]] = field(default_factory=list)  # Reranked, likewise
    versions: dict[str, str] = field(default_factory=dict)  # where other than those of the start
    about: About | None = field(default=None, compare=False, repr=False)

    @property
    def records(self) -> list[TrialRecord]:
        """The trials by number."""
        return [self.trials[index] for index in sorted(self.trials)]

    @property
    def completed(self) -> list[TrialRecord]:
        """The trials that have a value."""
        return [record for record in self.records if record.is_completed]

    @property
    def stopped(self) -> list[TrialRecord]:
        """The trials that were stopped early, because they were surely worse than the best."""
        return [record for record in self.records if record.is_stopped]

    @property
    def ended(self) -> list[TrialRecord]:
        """The trials that are over, with or without a value."""
        return [record for record in self.records if record.result is not None]

    @property
    def searched(self) -> list[TrialRecord]:
        """Those of the search that are over, without what `lrbo compress` adds."""
        return [record for record in self.ended if record.request.origin != "between"]

    @property
    def open(self) -> list[TrialRecord]:
        """The trials that were suggested and have not ended."""
        return [record for record in self.records if record.result is None]

    @property
    def uniform(self) -> TrialRecord | None:
        """The uniform baseline, if it has a value; of a front the largest one."""
        return self._largest("uniform")

    @property
    def analytic(self) -> TrialRecord | None:
        """The allocation of least predicted loss, likewise."""
        return self._largest("analytic")

    def _largest(self, origin: Origin) -> TrialRecord | None:
        records = [r for r in self.completed if r.request.origin == origin]
        return max(records, key=lambda r: r.metrics["keep_ratio"], default=None)

    def best(self) -> TrialRecord | None:
        """Return the completed trial with the lowest objective, the first of equals."""
        return min(self.completed, key=lambda r: r.metrics["objective"], default=None)

    def recovery(self, trial: int, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return how a trial was recovered with settings, if it was."""
        return next(
            (r for r in self.recovered if r["trial"] == trial and r["settings"] == settings), None
        )

    def apply(self, event: events.Event) -> None:
        """Take in one event of the journal, for which :meth:`problem` has none."""
        match event:
            case events.Dense():
                self.dense = dict(event.metrics)
            case events.Versions():
                self.versions = dict(event.versions)
            case events.Pooled():
                self.pooled[event.allocation] = event.losses
            case events.Chosen():
                self.selection = _fields(event)
            case events.Tested():
                self.tests[event.label] = _fields(event)
            case events.Compressed():
                self.checkpoints.append(_fields(event))
            case events.Recovered():
                self.recovered.append(_fields(event))
            case events.Reranked():
                self.reranked.append(_fields(event))
            case events.Suggested():
                allocation = events.allocation_of(event.allocation)
                request = TrialRequest(
                    event.trial, event.origin, event.variables, allocation, event.seed, event.rival
                )
                self.trials[event.trial] = TrialRecord(request, seconds=dict(event.seconds))
            case events.Started():
                record = self.trials[event.trial]
                self._change(event.trial, started=event.time, attempts=record.attempts + 1)
            case events.Ended():
                result = TrialResult(
                    event.trial,
                    event.outcome,
                    event.metrics,
                    event.seconds["scoring"],
                    event.error,
                    event.example_losses,
                    event.example_divergences,
                )
                seconds = {**self.trials[event.trial].seconds, **event.seconds}
                self._change(event.trial, result=result, ended=event.time, seconds=seconds)
            case events.Logged():
                seconds = {**self.trials[event.trial].seconds, "logging": event.seconds}
                self._change(event.trial, seconds=seconds)

    def _change(self, trial: int, **fields: Any) -> None:
        self.trials[trial] = dataclasses.replace(self.trials[trial], **fields)

    def problem(self, event: events.Event) -> str | None:
        """Why an event, written twice or of elsewhere, cannot follow those before it, if so."""
        match event:
            case events.Dense() if self.dense:
                return "the dense model was scored already"
            case events.Suggested():
                return self._problem_of_suggestion(event)
            case events.Started() | events.Ended() | events.Logged():
                record = self.trials.get(event.trial)
                if record is None:
                    return f"no line before it suggests trial {event.trial}"
                if record.result is not None and not isinstance(event, events.Logged):
                    return f"trial {event.trial} has ended already"
                return self._problem_of_end(event) if isinstance(event, events.Ended) else None
            case events.Tested():
                return self._problem_of_test(event)
            case events.Compressed():
                return self._problem_of_value(event.trial)
            case events.Recovered() if self.recovery(event.trial, event.settings):
                return f"trial {event.trial} was recovered with these settings already"
            case events.Recovered():
                return self._problem_of_value(event.trial)
            case events.Reranked() if not self.recovery(event.trial, event.settings):
                return f"no line before it recovers trial {event.trial} with these settings"
            case events.Pooled() | events.Chosen() if self.selection:
                return "windows were chosen already"
            case events.Pooled() if event.allocation in self.pooled:
                return f"allocation {event.allocation} was scored already"
            case events.Pooled() if event.losses is not None and len(event.losses) != self._pool:
                return f"losses has {len(event.losses)} values, expected {self._pool}"
            case events.Chosen() if event.pool != self._pool:
                return f"pool is {event.pool}, expected {self._pool}"
            case events.Chosen(windows=windows, pool=pool):
                if len(set(windows)) < len(windows) or max(windows) >= pool:
                    return f"windows are not some of {pool}"
        return None

    @property
    def fixed(self) -> About:
        """What was fixed when the study was begun, if it was."""
        assert self.about is not None, "no study was begun"
        return self.about

    def _problem_of_suggestion(self, event: events.Suggested) -> str | None:
        if event.trial in self.trials:
            return f"trial {event.trial} was suggested already"
        rival = None if event.rival is None else self.trials.get(event.rival)
        if event.rival is not None and (rival is None or not rival.is_completed):
            return f"rival is {event.rival}, which no line before it gives a value"
        units, known = event.allocation["units"], self.fixed.units
        if unknown := units.keys() - known.keys():
            return f"allocation.units has {min(unknown)}, which is no layer in the model's blocks"
        if missing := known.keys() - units.keys():
            return f"allocation.units lacks the layer {min(missing)}"
        if event.variables and event.variables.keys() != self.fixed.variables.keys():
            names = ", ".join(self.fixed.variables)
            return f"variables are {', '.join(event.variables)}, expected {names}"
        problems = (self._problem_of_unit(name, fields) for name, fields in units.items())
        return next(filter(None, problems), None) or self._problem_of_size(event.allocation)

    def _problem_of_unit(self, name: str, fields: events.UnitFields) -> str | None:
        about, (text, named) = self.fixed, fields
        unit, known = about.units[name], dict.fromkeys([*about.forms, DENSE_FORM])
        try:
            option = Option.parse(text)
        except ValueError as error:
            return f"allocation.units.{name}: {error}"
        if option.form not in known:
            return f"allocation.units.{name} is {shown(text)}, expected one of {', '.join(known)}"
        form = FORMS[option.form]
        if why := form.problem(unit.out_features, unit.in_features, option.level):
            return f"allocation.units.{name}: {why}"
        measure = about.budget.measure
        bias = unit.has_bias or name in about.added_biases
        cost = cost_of(unit, option, bias=bias, itemsize=about.itemsize)
        if Cost(*named) != cost:
            return (
                f"allocation.units.{name} costs {shown(list(named))}, and {option} costs "
                f"{cost.parameters} parameters, {cost.bytes} bytes, {cost.macs} multiply-adds"
            )
        dense = cost_of(unit, DENSE, bias=False, itemsize=about.itemsize)
        if option != DENSE and cost.of(measure) >= dense.of(measure):
            return (
                f"allocation.units.{name} is {option}, which costs {cost.of(measure):_} "
                f"{UNITS[measure]}; expected less than dense does, {dense.of(measure):_}"
            )
        return None

    def _problem_of_size(self, fields: events.AllocationFields) -> str | None:
        allocation, ceiling = events.allocation_of(fields), self.fixed.budget
        budget, is_front = allocation.budget, bool(SIZING & self.fixed.variables.keys())
        fits = budget.limit <= ceiling.limit if is_front else budget == ceiling
        if budget.measure != ceiling.measure or not fits:
            most = "at most " if is_front else ""
            return (
                f"allocation.budget is {budget}, expected {most}{ceiling}, the budget of the study"
            )
        if (cost := allocation.cost.of(budget.measure)) > budget.limit:
            return f"allocation.units cost {cost:_}, above their budget of {budget}"
        return None

    def _problem_of_end(self, event: events.Ended) -> str | None:
        windows = len(self.selection.get("windows", ())) or self._pool
        for name in ("example_losses", "example_divergences"):
            if (count := len(getattr(event, name))) not in (0, windows):
                return f"{name} has {count} values, expected {windows}"
        is_timed = self.fixed.timed and event.outcome == "completed"
        lacking = [name for name in LATENCIES if is_timed and name not in event.metrics]
        return f"metrics lack {', '.join(lacking)}" if lacking else None

    def _problem_of_value(self, trial: int) -> str | None:
        record = self.trials.get(trial)
        if record is None or not record.is_completed:
            return f"no line before it gives trial {trial} a value"
        return None

    def _problem_of_test(self, event: events.Tested) -> str | None:
        if (event.label == "dense") != (event.trial is None):
            return f"label is {shown(event.label)} and trial {shown(event.trial)}"
        windows = self.fixed.data["test"]["windows"]
        if len(event.example_losses) != windows:
            return f"example_losses has {len(event.example_losses)} values, expected {windows}"
        return None if event.trial is None else self._problem_of_value(event.trial)

    @property
    def _pool(self) -> int:
        """The number of validation windows, of which some may be selected."""
        return self.fixed.data["validation"]["windows"]


def _fields(event: events.Event) -> dict[str, Any]:
    """What an event says beside its name, time and label."""
    return {k: v for k, v in vars(event).items() if k not in ("event", "time", "label")}
