"""Trials that were recovered after a search: their scores before and after, and their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrbo.files.paths import model_folder
from lrbo.files.tables import Column, Table, columns
from lrbo.study.study_record import StudyRecord

MODELS = ("dense", "before", "after")


@dataclass(frozen=True)
class Recoveries:
    """Trials that were recovered with the same settings, so that they compare."""

    settings: Mapping[str, Any]
    loss: str  # the metric that they are ranked by, on the validation text
    events: Sequence[Mapping[str, Any]]  # Recovered, the best after it first
    events_before: Sequence[Mapping[str, Any]]  # the same, the best before it first
    tests: Mapping[int, Mapping[str, Any]]  # Reranked, by trial

    @property
    def after(self) -> list[int]:
        """Their trials, the best after recovery first."""
        return [event["trial"] for event in self.events]

    @property
    def before(self) -> list[int]:
        """Their trials, the best before recovery first."""
        return [event["trial"] for event in self.events_before]

    @property
    def sentence(self) -> str:
        """Which trial is the best now, and what became of the order."""
        best, first = self.events[0], self.events_before[0]
        text = f"trial {best['trial']} is the best after recovery"
        text += ", as before" if best is first else f"; before it was trial {first['trial']}"
        if self.after != self.before:
            orders = (", ".join(map(str, order)) for order in (self.before, self.after))
            text += "; order {} before, {} after".format(*orders)
        elif len(self.after) > 1:
            text += "; the order is the same"
        if best["validation"]["after"][self.loss] >= first["validation"]["before"][self.loss]:
            text += f"; none is better than trial {first['trial']} was before it"
        return text


def recoveries(study: StudyRecord) -> list[Recoveries]:
    """Group recovered trials by their settings, in order of the first of each."""
    state, loss, sets = study.state, study.task.minimized.name, list[Recoveries]()
    for first in state.recovered:
        settings = first["settings"]
        if any(each.settings == settings for each in sets):
            continue
        events = [event for event in state.recovered if event["settings"] == settings]
        before, after = (
            sorted(events, key=lambda event: event["validation"][model][loss])
            for model in ("before", "after")
        )
        tests = {test["trial"]: test for test in state.reranked if test["settings"] == settings}
        sets.append(Recoveries(settings, loss, after, before, tests))
    return sets


def checkpoint_folder(study: StudyRecord, event: Mapping[str, Any]) -> str:
    """Return the folder that a checkpoint is in: of a recovered trial, where its study is now."""
    own = {each["id"]: each["folder"] for each in study.state.recovered}
    if event["id"] in own:
        return str((study.folder / own[event["id"]]).absolute())
    folder: str = event["folder"]
    return folder


def is_there(folder: Path) -> bool:
    """Whether the checkpoint of a recovered trial is still in its folder."""
    return (Path(model_folder(str(folder))) / "config.json").is_file()


def recovered_rows(study: StudyRecord) -> list[dict[str, Any]]:
    """Return a row per recovered trial as plain values, those of one set best first.

    Returns:
        ``trial``; ``is_best`` of its set, once that was scored on the test text; ``folder`` of its
        checkpoint, and whether it ``exists``; ``validation``, and ``test`` if it was scored: scores
        ``before`` and ``after``; ``stages``; ``settings``.
    """
    names = [metric.name for metric in study.task.scores]

    def scores(texts: Mapping[str, Any]) -> dict[str, Any]:
        return {
            model: {name: texts[model].get(name) for name in names}
            for model in MODELS
            if model in texts
        }

    rows = []
    for each in recoveries(study):
        for event in each.events:
            trial, folder = event["trial"], study.folder / event["folder"]
            test = each.tests.get(trial)
            rows.append(
                {
                    "trial": trial,
                    "is_best": trial == each.after[0] and test is not None,
                    "folder": str(folder),
                    "exists": is_there(folder),
                    "validation": scores(event["validation"]),
                    "test": None if test is None else scores(test["test"]),
                    "stages": event["stages"],
                    "settings": event["settings"],
                }
            )
    return rows


def recovery_tables(study: StudyRecord) -> list[Table]:
    """Return a table per set of settings: a row per trial, the best first."""
    metric, tables = study.task.headline, []
    for each in recoveries(study):
        rows = []
        for event in each.events:
            test = each.tests.get(event["trial"], {}).get("test", {})
            texts = (event["validation"], test)
            cells = [metric.of(text.get(m, {})) for text in texts for m in ("before", "after")]
            rows.append([str(event["trial"]), *cells, event["folder"]])
        heads = [
            Column(f"{text} {metric.label} {model}", f"{short}{model}")
            for text, short in (("validation", ""), ("test", "test "))
            for model in ("before", "after")
        ]
        stages, tokens = each.settings["recover.stages"], each.settings["recover.tokens"]
        length = f"{each.settings['recover.minutes']:g} min each"
        length += "" if tokens is None else f", at most {tokens:,} tokens a stage"
        folder = Column("folder", is_text=True, folds=True)
        tables.append(
            Table(
                f"Recovered, {' and '.join(stages)}, {length}",
                columns("trial", *heads, folder),
                rows,
                [
                    each.sentence,
                    f"before, after: {metric.label} on the validation text, as written; ranked by "
                    "it after recovery",
                    "test: of the best alone, on which nothing was chosen",
                ],
                expendable=("folder",),
            )
        )
    return tables
