"""The report as one HTML file that needs no network: tables, figures with hover, how to repeat."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from lrbo.command_lines import command_line, repeating
from lrbo.drawing import BLUE, FAINT, GREEN, GREY, INK, LOG_FROM, ORANGE, SKY, VERMILLION
from lrbo.gains import MEANING, UNIT, gains
from lrbo.optimization.client import Diagnosis, diagnose, observations_of
from lrbo.optimization.study import Study
from lrbo.plots import ORIGINS, SIZE_LABELS, UNDRAWN
from lrbo.presentation import perplexity_text
from lrbo.rendering import render
from lrbo.results import (
    counted_trials,
    dense_size,
    described,
    frame,
    ranks_frame,
    score_rows,
    size_metric,
    summary,
)
from lrbo.storage import write_text
from lrbo.trial import TrialRecord

SYMBOLS = {
    "s": "square", "P": "cross", "D": "diamond", "X": "x", "^": "triangle-up", "o": "circle",
    "v": "triangle-down",
}  # fmt: skip
LEVELS = {"dense": GREEN, "uniform": VERMILLION, "analytic": ORANGE}
FEW = 12  # numbers on an axis, each of which has a tick


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        heads: Of the columns.
        rows: Cells as they are shown.
        note: Below it.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Part:
    """Tables under a title.

    Attributes:
        title: Over them.
        tables: In order.
    """

    title: str
    tables: Sequence[Table]


@dataclass(frozen=True)
class Drawing:
    """A figure under a title.

    Attributes:
        title: Over it.
        note: Between the two.
        drawn: HTML of plotly, which keeps what it draws from ending the script that it is in.
    """

    title: str
    note: str
    drawn: str


def write_html(study: Study, path: Path) -> None:
    """Write the report of a study, in place of an older one.

    Raises:
        StudyError: If there is no study.
    """
    write_text(path, html_report(study))


def html_report(study: Study) -> str:
    """Return the report of a study: one page with everything that it needs in it.

    Raises:
        StudyError: If there is no study.
    """
    best = study.state.best()
    figures: list[Drawing] = []
    parts: list[Part] = []
    trials = Table([], [])
    if best is not None:
        table = frame(study)
        figures += _front(study, table)
        figures += _convergence(study, table)
        figures += _ranks(study, best)
        figures += _surrogate(study)
        parts += _accounting(study, best)
        trials = _trials(table)
    parts += _checkpoints(study)
    return render(
        "report.html",
        study=study.name,
        plotly=get_plotlyjs(),
        searched=_searched(study),
        scores=_scores(study),
        gains=_gains(study),
        has_best=best is not None,
        figures=figures,
        parts=parts,
        trials=trials,
        command=command_line("search", repeating(study.config()), study.name),
        made_of=_made_of(study),
        config_yaml=study.config_yaml(),
    )


def _searched(study: Study) -> list[str]:
    """Say what was searched, a line each."""
    lines = {**described(study), "Trials": counted_trials(study)}
    del lines["Study"]
    return [f"{name}: {text}" for name, text in lines.items()]


def _scores(study: Study) -> Table:
    """Say what came of it."""
    rows = [
        [
            row.name, _share(row.keep_ratio), _text(row.validation.get("nll"), ".4f"),
            _perplexity(row.validation.get("perplexity")), _text(row.test.get("nll"), ".4f"),
            _perplexity(row.test.get("perplexity")),
        ]
        for row in score_rows(study)
    ]  # fmt: skip
    heads = [
        "model", "kept", "validation nll", "validation perplexity", "test nll", "test perplexity"
    ]  # fmt: skip
    note = "nll: nats per token; kept: share of the parameters of the compressible layers."
    return Table(heads, rows, note)


def _gains(study: Study) -> Table:
    """Say what the search adds to the allocation that it starts from."""
    rows = [
        [
            f"trial {gain.best.request.trial_index} - {gain.analytic.request.trial_index}",
            _share(gain.analytic.metrics["keep_ratio"]), text, line,
        ]
        for gain in gains(study.state)
        for text, line in gain.lines.items()
    ]  # fmt: skip
    return Table(
        ["what the search adds", "kept", "text", f"best - analytic, {UNIT}"], rows, f"{MEANING}."
    )


def _front(study: Study, table: pd.DataFrame) -> Iterator[Drawing]:
    """Yield loss against size."""
    size = size_metric(study)
    if size is None:  # at one budget all trials are of one size
        return
    done = table[table["outcome"] == "completed"]
    figure = go.Figure()
    _points(figure, done, size)
    front = done[done["on_front"]].sort_values(size)
    figure.add_scatter(
        x=front[size].tolist(), y=front["perplexity"].tolist(), mode="lines", name="front",
        hoverinfo="skip", line={"shape": "hv", "color": INK, "width": 1.5},
    )  # fmt: skip
    _levels(figure, study, front[size].min(), front[size].max(), "dense")
    is_share = size.endswith("_ratio")
    figure.update_xaxes(title=SIZE_LABELS[size], tickformat=".1~%" if is_share else ".3~s")
    _perplexity_axis(figure, done)
    area = summary(study)["hypervolume"]
    note = "" if area is None else f"Hypervolume {area['value']:.4g} (loss times {area['size']})."
    yield _drawing("Loss against size", figure, note)


def _convergence(study: Study, table: pd.DataFrame) -> Iterator[Drawing]:
    """Yield the trials in order."""
    done = table[table["outcome"] == "completed"]
    figure = go.Figure()
    _points(figure, done, "trial")
    figure.add_scatter(
        x=done["trial"].tolist(), y=done["best_perplexity"].tolist(), mode="lines",
        name="best so far", hoverinfo="skip", line={"shape": "hv", "color": INK, "width": 1.5},
    )  # fmt: skip
    last = float(table["trial"].max())
    _levels(figure, study, 0, last, "dense", "uniform", "analytic")
    figure.update_xaxes(title="trial", range=[-0.5, last + 0.5], **_whole(len(table)))
    _perplexity_axis(figure, done)
    counts = [
        f"{count} {name}"
        for outcomes, _, name in UNDRAWN
        if (count := int(table["outcome"].isin(outcomes).sum()))
    ]
    note = f"Not drawn, but in the table below: {', '.join(counts)}." if counts else ""
    yield _drawing("Trials in order", figure, note)


def _whole(count: int) -> dict[str, int]:
    """Return ticks for an axis of so many whole numbers; of a few, plotly would mark halves."""
    return {"dtick": 1} if count <= FEW else {}


def _levels(figure: go.Figure, study: Study, low: float, high: float, *labels: str) -> None:
    """Add horizontal lines of what trials are compared with."""
    found = summary(study)
    for label in labels:
        value = (found[label] or {}).get("perplexity")
        if value is not None:
            figure.add_scatter(
                x=[low, high], y=[value, value], mode="lines",
                name=f"{label} {perplexity_text(value)}", hoverinfo="skip",
                line={"color": LEVELS[label], "dash": "dash"},
            )  # fmt: skip


def _perplexity_axis(figure: go.Figure, done: pd.DataFrame) -> None:
    """Name the axis; its scale is logarithmic where trials differ by much."""
    wide = done["perplexity"].max() > LOG_FROM * done["perplexity"].min()
    figure.update_yaxes(title="validation perplexity", type="log" if wide else "linear")
    if wide:
        figure.update_yaxes(dtick="D2", tickformat=",~r")


def _points(figure: go.Figure, done: pd.DataFrame, x: str) -> None:
    """Add a point per trial, told apart by what proposed it."""
    for origin, style in ORIGINS.items():
        some = done[done["origin"] == origin]
        if len(some):
            figure.add_scatter(
                x=some[x].tolist(), y=some["perplexity"].tolist(), mode="markers", name=style.label,
                marker={"symbol": SYMBOLS[style.marker], "color": style.colour, "size": 10,
                        "line": {"color": "white", "width": 1}},
                customdata=some[["trial", "nll", "kl", "keep_ratio", "model_parameters",
                                 "seconds"]].to_numpy().tolist(),
                hovertemplate="trial %{customdata[0]}<br>perplexity %{y:.3f}"
                "<br>nll %{customdata[1]:.4f}<br>KL to dense %{customdata[2]:.4f}"
                "<br>kept %{customdata[3]:.3%}<br>parameters %{customdata[4]:,.0f}"
                "<br>%{customdata[5]:.1f} s<extra>" + style.label + "</extra>",
            )  # fmt: skip


def _ranks(study: Study, best: TrialRecord) -> Iterator[Drawing]:
    """Yield what each layer keeps in the best trial, kind by block."""
    table = ranks_frame(study, best)
    kinds = list(dict.fromkeys(table["kind"]))[::-1]
    shares = table.pivot_table(index="kind", columns="block", values="kept", sort=False)
    shares = shares.reindex(kinds)[sorted(shares.columns)]
    specs = {spec["name"]: spec for spec in study.about()["layers"]}
    texts = {  # escaped because plotly reads some HTML in texts
        (row.kind, row.block): f"{escape(row.name)}<br>{specs[row.name]['out_features']:,} x "
        f"{specs[row.name]['in_features']:,}<br>"
        + ("dense" if pd.isna(row.rank) else f"rank {row.rank:,}")
        + f"<br>{row.stored:,} of {row.dense:,} parameters"
        for row in table.itertuples(index=False)
    }
    figure = go.Figure(
        go.Heatmap(
            z=shares.to_numpy(dtype=float).tolist(), x=[int(block) for block in shares.columns],
            y=[escape(kind) for kind in kinds], zmin=0, zmax=1,
            colorscale=[[0, "#f3f8fc"], [1, "#08306b"]],
            xgap=1, ygap=1, colorbar={"title": "kept", "tickformat": ".0%"},
            text=[[texts.get((kind, block), "") for block in shares.columns] for kind in kinds],
            hovertemplate="%{text}<br>%{z:.1%} kept<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="block", **_whole(len(shares.columns)))
    yield _drawing(f"What the best trial keeps, {best.request.trial_index}", figure)


def _surrogate(study: Study) -> Iterator[Drawing]:
    """Yield which variables matter, and how well the surrogate model predicts."""
    found = diagnosed(study)
    if found is None:
        return
    names = sorted(found.importance, key=lambda name: abs(found.importance[name]))
    shares = [found.importance[name] for name in names]
    figure = go.Figure(
        go.Bar(
            x=[abs(share) for share in shares], y=[escape(name) for name in names], orientation="h",
            marker_color=[BLUE if share < 0 else VERMILLION for share in shares],
            customdata=["falls" if share < 0 else "rises" for share in shares],
            hovertemplate="%{y}: %{x:.3f}, the loss %{customdata} with it<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="share of the loss's variance (total Sobol index)")
    figure.update_layout(height=160 + 22 * len(names))
    yield _drawing(
        "Which variables matter",
        figure,
        "Of the surrogate model, over the whole range of each variable. Blue: the loss falls as "
        "the variable rises; red: it rises.",
    )
    figure = go.Figure(
        go.Scatter(
            x=found.observed, y=found.predicted, mode="markers", marker_color=SKY,
            error_y={"array": [1.96 * error for error in found.errors], "color": FAINT},
            hovertemplate="observed %{x:.4f}<br>predicted %{y:.4f}<extra></extra>",
        )
    )  # fmt: skip
    ends = [min(found.observed), max(found.observed)]
    figure.add_scatter(x=ends, y=ends, mode="lines", line_color=GREY, hoverinfo="skip")
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title="observed loss, nats per token")
    figure.update_yaxes(title="predicted without this trial")
    yield _drawing(
        "How well the surrogate model predicts",
        figure,
        f"Each trial predicted from the others, with 95% intervals; R² {found.fit:.2f} "
        "on the scale that the model works on, where outlying losses are drawn in.",
    )


def diagnosed(study: Study) -> Diagnosis | None:
    """Return what the surrogate model says of the trials of a study."""
    observations = observations_of(study.state.records, size_metric(study))
    if not observations:
        return None
    about = study.about()
    ends = {name: (float(low), float(high)) for name, (low, high) in about["variables"].items()}
    return diagnose(ends, observations, seed=about["seed"])


def _accounting(study: Study, best: TrialRecord) -> Iterator[Part]:
    """Yield what the budget counts, kind by kind, and the whole model."""
    table = ranks_frame(study, best)
    sums = table.groupby("kind", sort=False)[["dense", "stored"]].sum()
    dense = table.assign(is_dense=table["rank"].isna()).groupby("kind", sort=False)["is_dense"]
    sums["layers"], sums["left"] = dense.size(), dense.sum()
    sums.loc["all"] = sums.sum()
    rows = [
        [
            str(kind), f"{row.layers:,.0f}", f"{row.left:,.0f}", f"{row.dense:,.0f}",
            f"{row.stored:,.0f}", f"{row.stored / row.dense:.2%}",
        ]
        for kind, row in zip(sums.index, sums.itertuples(), strict=True)
    ]  # fmt: skip
    about = study.about()
    counted = Table(
        ["kind", "layers", "left dense", "parameters before", "after", "kept"],
        rows,
        f"Budget: {about['budget_parameters']:,} parameters in the {about['storage']} form, "
        "biases that the method adds included.",
    )
    whole, metrics = dense_size(study), best.metrics
    heads = ["whole model", "dense", "best trial", "share"]
    rows = [
        [SIZE_LABELS[name].removesuffix(" of the whole model"), f"{whole[name]:,.0f}",
         f"{metrics[name]:,.0f}", f"{metrics[name] / whole[name]:.2%}"]
        for name in ("model_parameters", "model_bytes", "macs_per_token")
    ]  # fmt: skip
    title = f"Budget of the best trial, {best.request.trial_index}"
    yield Part(title, [counted, Table(heads, rows)])


def _trials(table: pd.DataFrame) -> Table:
    """Tell of every trial."""
    rows = [
        [
            str(row.trial), row.origin, row.outcome, _text(row.nll, ".4f"),
            _perplexity(row.perplexity), _text(row.kl, ".4f"), _share(row.keep_ratio),
            _text(row.seconds, ".1f"), "" if row.error is None else str(row.error),
        ]
        for row in table.itertuples()
    ]  # fmt: skip
    heads = [
        "trial", "origin", "outcome", "nll", "perplexity", "KL to dense", "kept", "seconds",
        "reason",
    ]  # fmt: skip
    return Table(heads, rows)


def _checkpoints(study: Study) -> Iterator[Part]:
    """Yield which models were written, where, and which of them are gone."""
    rows = [
        [
            one["folder"], str(one["trial"]), _share(one["keep_ratio"]),
            _perplexity(one["validation_perplexity"]), _perplexity(one["test_perplexity"]),
            one["format"], one["dtype"], "yes" if one["exists"] else "no",
        ]
        for one in summary(study)["checkpoints"]
    ]  # fmt: skip
    heads = [
        "folder", "trial", "kept", "validation perplexity", "test perplexity", "format", "dtype",
        "there",
    ]  # fmt: skip
    if rows:
        yield Part("Checkpoints", [Table(heads, rows)])


def _made_of(study: Study) -> list[str]:
    """Say what the search depended on, a line each."""
    about = study.about()
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    texts = [
        f"{role}: {found['text']}, {found['windows']} windows, digest {found['digest']}"
        for role, found in study.data().items()
    ]
    return [f"model fingerprint {about['model_fingerprint']}", *texts, versions]


def _drawing(title: str, figure: go.Figure, note: str = "") -> Drawing:
    """Draw a figure."""
    figure.update_layout(
        template="plotly_white", margin={"l": 70, "r": 30, "t": 30, "b": 60},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
    )  # fmt: skip
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=re.sub(r"\W+", "-", title.lower()),
        config={"displaylogo": False, "responsive": True},
    )  # fmt: skip
    return Drawing(title, note, drawn)


def _is_known(value: Any) -> bool:
    return value is not None and not math.isnan(value)


def _text(value: float | None, spec: str) -> str:
    """Return a formatted number, or a dash for none."""
    return format(value, spec) if value is not None and _is_known(value) else "-"


def _share(value: float | None) -> str:
    return _text(value, ".2%")


def _perplexity(value: float | None) -> str:
    return perplexity_text(value) if value is not None and _is_known(value) else "-"
