"""The report for a terminal: header, results, front, allocation, failures, time."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lrbo.gains import MEANING, UNIT, gains, with_error
from lrbo.optimization.front import LATENCIES
from lrbo.optimization.study import Study
from lrbo.presentation import LABELS, count_text, perplexity_text
from lrbo.results import (
    ScoreRow,
    counted_trials,
    dense_kinds,
    dense_size,
    described,
    front,
    kept_by_depth,
    score_rows,
    sensitivity,
    size_metric,
    summary,
    weights,
)
from lrbo.tabular import is_piped, lines_of, print_piped

WIDTH, INDENT = 80, 2
SHOWN = 10  # rows of the front and of failures; what is left out is counted


def print_report(study: Study, console: Console) -> None:
    """Print what came of a study, at most 80 columns wide on a terminal.

    Raises:
        StudyError: If there is no study.
    """
    report = _Report(console)
    _print_header(study, report)
    _print_results(study, report)
    _print_gains(study, report)
    _print_front(study, report)
    _print_allocation(study, report)
    _print_checkpoints(study, report)
    _print_failures(study, report)
    _print_seconds(study, report)


def print_comparison(studies: Sequence[Study], table: pd.DataFrame, console: Console) -> None:
    """Print several studies, one line each, at most 80 columns wide.

    They are called by their names where something else than method, space, size and seed tells
    them apart.

    Args:
        studies: In the order of the table.
        table: From :func:`lrbo.comparison.compared`.
        console: Where to.
    """
    report = _Report(console)
    settings = ["method", "space", "kept", "seed"]
    rows = table.assign(kept=[_number(_known(kept), ".1%") for kept in table["keep_ratio"]])
    if rows["model"].nunique() > 1 or rows.duplicated(settings).any():
        settings = ["study", "kept"]
    texts = (("validation", "", [*settings, "trials"]), ("test", "test_", settings))
    for text, prefix, heads in texts:
        columns = [label for label in LABELS if rows[f"{prefix}{label}"].notna().any()]
        if not columns:
            continue
        shown = _comparison(heads)
        for label in columns:
            shown.add_column(label, justify="right", no_wrap=True)
        for row in rows.to_dict("records"):
            values = (_perplexity(_known(row[f"{prefix}{label}"])) for label in columns)
            shown.add_row(*(str(row[key]) for key in heads), *values)
        report.part(f"Perplexity of {len(table)} studies on the {text} text", shown)
    largest = [gains(study.state)[:1] for study in studies]
    if not any(largest):
        return
    shown = _comparison([*settings, "text"])
    shown.add_column("best - analytic", justify="right", no_wrap=True)
    for row, some in zip(rows.to_dict("records"), largest, strict=True):
        for text, line in [pair for gain in some for pair in gain.lines.items()]:
            shown.add_row(*(str(row[key]) for key in settings), text, line)
    report.part(f"What the searches add, {UNIT}", shown, less=settings[1:])
    report.note(MEANING)


def _comparison(heads: Sequence[str]) -> Table:
    """Return an empty table of studies, whose first column breaks where there is no room."""
    shown = _table(*heads, gap=0)
    shown.columns[0].no_wrap, shown.columns[0].overflow = False, "fold"
    return shown


def _known(value: float) -> float | None:
    """Return a number of a table; ``None`` where it is missing."""
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class _Report:
    """Prints parts of a report, with a title and an empty line before each.

    Into a file or pipe it prints whole lines, cells with tabs between them.
    """

    console: Console

    @property
    def width(self) -> int:
        """Return the columns of a terminal that are used."""
        return min(self.console.width, WIDTH)

    @property
    def shown(self) -> int | None:
        """Return how many rows of a long table are printed; ``None`` for all."""
        return None if is_piped(self.console) else SHOWN

    def table(self, body: Table) -> None:
        """Print a table without a title."""
        if is_piped(self.console):
            for line in lines_of(body):
                print_piped(self.console, line)
        else:
            self.console.print(body, width=self.width, highlight=False)

    def line(self, text: str) -> None:
        """Print a line of text behind an empty one."""
        self.console.print()
        if is_piped(self.console):
            print_piped(self.console, text)
        else:
            self.console.print(Text(text), width=self.width)

    def part(self, title: str, body: Table, note: str = "", less: Sequence[str] = ()) -> None:
        """Print one part.

        Args:
            title: Of the part.
            body: Its table.
            note: Printed below.
            less: Columns that a narrow terminal goes without, the first one first: half a number
                is worse than none.
        """
        if is_piped(self.console):
            self.line(title)
            self.table(body)
            if note:
                self.note(note)
            return
        wide, omitted = self.console.options.update_width(sys.maxsize), []
        for name in less:
            if Measurement.get(self.console, wide, body).maximum + INDENT <= self.width:
                break
            body.columns = [column for column in body.columns if column.header != name]
            omitted.append(name)
        self.console.print()
        self.console.print(Text(title, style="bold"), width=self.width)
        indented = Padding(body, (0, 0, 0, INDENT), expand=False)
        self.console.print(indented, width=self.width, highlight=False)
        if omitted:
            self.note(f"no room here for {', '.join(omitted)}")
        if note:
            self.note(note)

    def note(self, text: str) -> None:
        """Print a remark."""
        if is_piped(self.console):
            print_piped(self.console, text)
            return
        indented = Padding(Text(text, style="dim"), (0, 0, 0, INDENT), expand=False)
        self.console.print(indented, width=self.width)


def _print_header(study: Study, report: _Report) -> None:
    """Print what was searched."""
    lines = {**described(study), "Trials": counted_trials(study)}
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines.items():
        table.add_row(name, Text(text))
    report.table(table)


def _print_results(study: Study, report: _Report) -> None:
    """Print dense model, baseline, start values and best trial."""
    state, rows = study.state, score_rows(study, "start", "transfer")
    labels = [row.label for row in rows]
    if not rows:
        report.line("No trial has a value yet.")
        return
    table = _table(
        "", "trial", "nll", "ppl", "KL", "kept", "params", "size", "MACs", "test ppl", gap=0
    )
    whole = {**dense_size(study), "keep_ratio": 1.0, "kl_dense_to_compressed": 0.0}
    for row in rows:
        is_dense, test = row.trial is None, _perplexity(row.test.get("perplexity"))
        metrics = {**whole, **row.validation} if is_dense else row.validation
        style = "bold" if row.label == "best" else ""
        table.add_row(
            row.label, "" if is_dense else str(row.trial), *_cells(metrics), test, style=style
        )
    report.part("Results", table, less=("MACs", "size", "params", "KL", "nll"))
    notes = [
        "nll and KL(dense || compressed): nats per token on the validation text",
        "kept: share of the parameters of the compressible layers",
        "params, size (in the dtype it ran in), MACs (per token): of the whole model",
    ]
    if chosen := state.chosen:
        notes.append(
            f"validation text: {len(chosen['windows'])} of {chosen['pool']} windows, chosen "
            "because they rank allocations as all of them do: its losses compare trials of this "
            "study, their level is not that of the text they came from; the test text is whole"
        )
    if size_metric(study) is not None:
        notes.append("best: the lowest loss at any size; uniform and analytic: the largest")
    if "analytic" in labels:
        notes.append("analytic: the ranks of least predicted loss")
    notes += [*_latencies(rows), *_agreement(study)]
    if "start" in labels:
        notes.append("start: the ratios that the search space starts from")
    if "transfer" in labels:
        notes.append("transfer: an allocation of another study, at this budget")
    if state.tests:
        texts = dict.fromkeys(str(test["text"]) for test in state.tests.values())
        notes.append(f"test: {', '.join(texts)}")
    for note in notes:
        report.note(note)


def _print_gains(study: Study, report: _Report) -> None:
    """Print what the search adds to the analytic allocation, if there is one."""
    found = gains(study.state)
    if not found:
        return
    table = _table("trials", "kept", "text", "best - analytic")
    for gain in found:
        trials = f"{gain.best.request.trial_index} - {gain.analytic.request.trial_index}"
        kept = _number(gain.analytic.metrics["keep_ratio"], ".1%")
        for text, line in gain.lines.items():
            table.add_row(trials, kept, text, line)
    report.part(f"What the search adds, {UNIT}", table)
    report.note(MEANING)


def _latencies(rows: Sequence[ScoreRow]) -> list[str]:
    """Return a remark on how long trials take beside the dense model, if that was measured."""
    notes = []
    for name in LATENCIES:
        found = [
            f"{row.label} {_size(name, row.validation)}" for row in rows if name in row.validation
        ]
        notes += [f"{name}, compressed to dense: {', '.join(found)}"] if found else []
    return notes


def _agreement(study: Study) -> list[str]:
    """Return a remark on how well losses were predicted, if that was measured."""
    measured = sensitivity(study)
    if measured is None or math.isnan(measured.rank_correlation):
        return []
    return [
        f"predicted against measured loss of single layers, {len(measured.measurements)} points: "
        f"rank correlation {measured.rank_correlation:.3f}"
    ]


def _print_front(study: Study, report: _Report) -> None:
    """Print the Pareto front, where one was searched."""
    size, points = size_metric(study), front(study)
    if not points:
        return
    # Of sizes that are columns anyway there is none beside them.
    beside = size if size not in (None, "keep_ratio") else None
    table = _table(
        "trial", "perplexity", "nll", "kept", "parameters", *([beside] if beside else [])
    )
    for record in points[: report.shown]:
        metrics = record.metrics
        table.add_row(
            str(record.request.trial_index),
            _perplexity(metrics.get("perplexity")),
            _number(metrics.get("nll"), ".4f"),
            _number(metrics.get("keep_ratio"), ".3%"),
            _number(metrics.get("parameters"), ",d"),
            *([_size(beside, metrics)] if beside else []),
        )
    left = len(points) - len(points[: report.shown])
    note = f"and {left} larger" if left else ""
    title = "Front: no other trial is both smaller and better"
    report.part(title, table, note, less=("parameters", "nll"))
    if (area := summary(study)["hypervolume"]) is not None:
        ends = ", ".join(f"{name} {value:.6g}" for name, value in area["reference"].items())
        report.note(f"hypervolume {area['value']:.4g} (loss x {area['size']}) below {ends}")


def _print_allocation(study: Study, report: _Report) -> None:
    """Print what the best trial keeps of each kind of layer, over depth, and its weights."""
    best = study.state.best()
    if best is None:
        return
    index = best.request.trial_index
    shares = kept_by_depth(study, best)
    table = _table("kind", *shares.columns)
    for kind, row in shares.iterrows():
        cells = (None if math.isnan(value) else float(value) for value in row)
        style = "bold" if kind == "all" else ""
        table.add_row(str(kind), *(_number(cell, ".1%") for cell in cells), style=style)
    report.part(f"Share of the parameters kept in the best trial, {index}", table)
    dense = dense_kinds(study, best)
    if dense:
        report.note(f"dense in every block: {', '.join(dense)}")
    found = weights(study, best)
    if not found:
        return
    table = _table("variable", "weight", "factor")
    for name, value in found.items():
        table.add_row(name, _number(value, "+.3f"), _number(math.exp(value), ".3f"))
    report.part(f"Weights of the best trial, {index}", table)
    report.note("factor: exp(weight), on predicted losses; that of exponent is their power")


def _print_checkpoints(study: Study, report: _Report) -> None:
    """Print which models were written, where, and which of them are gone."""
    found = summary(study)["checkpoints"]
    if not found:
        return
    table = _table("folder", "trial", "kept", "ppl", "test ppl", "format", "dtype", "", gap=0)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for one in found:
        table.add_row(
            one["folder"],
            str(one["trial"]),
            _number(one["keep_ratio"], ".1%"),
            _perplexity(one["validation_perplexity"]),
            _perplexity(one["test_perplexity"]),
            one["format"],
            one["dtype"],
            "" if one["exists"] else "gone",
        )
    report.part("Checkpoints", table)
    report.note("ppl: on the validation text, after the refit if there was one")


def _print_failures(study: Study, report: _Report) -> None:
    """Print which trials have no value, and why."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for record in study.state.ended:
        if record.result is not None and not (record.is_completed or record.is_stopped):
            reason = (record.result.error or "").strip() or "no reason given"
            key = (record.result.outcome, reason.splitlines()[0])
            reasons.setdefault(key, []).append(record.request.trial_index)
    if not reasons:
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", max_width=16)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for (outcome, reason), indices in list(reasons.items())[: report.shown]:
        table.add_row(", ".join(map(str, indices)), outcome, Text(reason))
    left = len(reasons) - len(list(reasons)[: report.shown])
    note = f"and {left} more reasons" if left else ""
    report.part("Trials without a value", table, note)


def _print_seconds(study: Study, report: _Report) -> None:
    """Print where the time went."""
    if not study.state.ended:
        return
    seconds = summary(study)["seconds"]
    total = math.fsum(seconds.values())
    table = _table("stage", "seconds", "per trial", "share")
    for stage, spent in seconds.items():
        trials = sum(stage in record.seconds for record in study.state.records)
        each = spent / trials if trials else None
        table.add_row(
            stage,
            _number(spent, ",.1f" if spent >= 0.05 else ".1g"),
            _number(each, ",.2f" if each is None or each >= 0.005 else ".1g"),
            "<1%"
            if 0 < spent < 0.005 * total
            else _number(spent / total if total else None, ".0%"),
        )
    report.part("Time", table)


def _table(*columns: str, gap: int = 1) -> Table:
    """Return an empty table: names to the left, numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False)
    for place, column in enumerate(columns):
        left = place == 0 and column != "trial"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


def _cells(metrics: Mapping[str, float]) -> list[str]:
    """Return the cells that every row of the results has, from nll to MACs."""
    return [
        _number(metrics.get("nll"), ".4f"),
        _perplexity(metrics.get("perplexity")),
        _number(metrics.get("kl_dense_to_compressed"), ".4f"),
        _number(metrics.get("keep_ratio"), ".1%"),
        _count(metrics.get("model_parameters")),
        _bytes(metrics.get("model_bytes")),
        _count(metrics.get("macs_per_token")),
    ]


def _size(name: str, metrics: Mapping[str, float]) -> str:
    """Return what a front is minimised in, with its standard error where it was measured."""
    value = metrics.get(name)
    if name in LATENCIES:
        return "-" if value is None else with_error(value, metrics[f"{name}_sem"])
    return _bytes(value) if name == "model_bytes" else _count(value)


def _number(value: float | None, spec: str) -> str:
    """Return a formatted number, or a dash for none."""
    if value is None:
        return "-"
    return format(int(value) if spec.endswith("d") else value, spec)


def _perplexity(value: float | None) -> str:
    """Return a perplexity, or a dash for none."""
    return "-" if value is None else perplexity_text(value)


def _count(value: float | None) -> str:
    """Return a large number in thousands, millions or billions, or a dash for none."""
    return "-" if value is None else count_text(value)


def _bytes(value: float | None) -> str:
    """Return a number of bytes in binary units, or a dash for none."""
    if value is None:
        return "-"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.{0 if value >= 100 * unit else 1}f} {name}"
    return f"{value:.0f} B"
