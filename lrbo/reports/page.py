"""The report as one HTML file that needs no network: tables, figures to hover, how to repeat it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from lrbo.config.saved import command_line, repeating
from lrbo.files.rendering import render
from lrbo.layers.options import UNITS
from lrbo.optimization.proposals import Diagnosis, diagnose, observations_of
from lrbo.reports.allocations import options_frame
from lrbo.reports.plots import LEVELS, UNDRAWN, by_origin
from lrbo.reports.results import described, frame, hypervolume_of, score_rows, size_metric
from lrbo.reports.study_tables import detail_tables, head_tables, trials_table
from lrbo.reports.style import BLUE, FAINT, GREY, INK, SKY, VERMILLION, needs_log
from lrbo.study.about import About
from lrbo.study.study_record import StudyRecord
from lrbo.tasks.metrics import COSTS, SIZES, Metric, Task
from lrbo.trials.records import TrialRecord

FEW = 12  # numbers on an axis, each of which has a tick
STEPS: Mapping[str, Any] = {"shape": "hv", "color": INK, "width": 1.5}


def study_page(study: StudyRecord) -> str:
    """Page of a study, with everything that it needs in it."""
    about = study.about
    texts = [
        f"{role}: {used['text']}, {used['windows']} windows, digest {used['digest']}"
        for role, used in study.data.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in about.versions.items())
    return render(
        "report.html",
        study=study.name,
        plotly=get_plotlyjs(),
        lines=[f"{name}: {text}" for name, text in described(study).items()],
        head_tables=head_tables(study),
        has_best=study.state.best() is not None,
        figures=list(_drawings(study)),
        detail_tables=detail_tables(study),
        trials=trials_table(study),
        command=command_line("search", repeating(study.config), study.name),
        origins=[f"model fingerprint {about.model_fingerprint}", *texts, versions],
        config_yaml=study.config_yaml(),
    )


class Drawing(NamedTuple):
    """A figure of the page."""

    title: str
    note: str
    drawn: str  # HTML of plotly, which keeps what it draws from ending the script that it is in


def _drawings(study: StudyRecord) -> Iterator[Drawing]:
    best, task, size = study.state.best(), study.task, size_metric(study)
    if best is None:
        return
    table = frame(study)
    levels = {r.label: r.validation[task.shown] for r in score_rows(study) if r.label in LEVELS}
    if size is not None:
        area = hypervolume_of(study)
        note = "" if area is None else f"Hypervolume {area['value']:.4g} (loss times {size})."
        dense = {label: level for label, level in levels.items() if label == "dense"}
        yield _front(table, task, COSTS[size], dense, note)
    yield _convergence(table, task, levels)
    yield _options(study.about, best)
    if (diagnosis := diagnosed(study)) is not None:
        yield from _surrogate(diagnosis, task.minimized)


def _front(
    table: pd.DataFrame, task: Task, size: Metric, levels: Mapping[str, float], note: str
) -> Drawing:
    front = table[table["on_front"]].sort_values(size.name)
    figure = _quality(table, task, size.name, levels)
    _add_line(figure, front[size.name], front[task.shown], "front", **STEPS)
    is_share = size.name.endswith("_ratio")
    figure.update_xaxes(title=size.label, tickformat=".1~%" if is_share else ".3~s")
    return _drawing("Loss against size", figure, note)


def _convergence(table: pd.DataFrame, task: Task, levels: Mapping[str, float]) -> Drawing:
    done = table[table["outcome"] == "completed"]
    figure = _quality(table, task, "trial", levels)
    _add_line(figure, done["trial"], done[f"best_{task.shown}"], "best so far", **STEPS)
    ends = [-0.5, float(table["trial"].max()) + 0.5]
    figure.update_xaxes(title="trial", range=ends, **_whole(len(table)))
    counts = [
        f"{count} {name}"
        for outcomes, _, name in UNDRAWN
        if (count := int(table["outcome"].isin(outcomes).sum()))
    ]
    note = f"Not drawn, but in the table below: {', '.join(counts)}." if counts else ""
    return _drawing("Trials in order", figure, note)


def _quality(table: pd.DataFrame, task: Task, x: str, levels: Mapping[str, float]) -> go.Figure:
    """Figure of the headline: levels, and a point per trial that says what it measured."""
    figure, headline, done = go.Figure(), task.headline, table[table["outcome"] == "completed"]
    metrics = dict.fromkeys([headline, *task.metrics, *SIZES[:2]])
    lines = ["trial %{customdata[0]}"]
    lines += [f"{m.label} %{{customdata[{i}]:{m.spec}}}" for i, m in enumerate(metrics, 1)]
    lines.append(f"%{{customdata[{len(lines)}]:.1f}} s")
    hovered = ["trial", *(metric.name for metric in metrics), "seconds"]
    for style, subset in by_origin(done):
        figure.add_scatter(
            x=subset[x].tolist(), y=subset[headline.name].tolist(), mode="markers",
            name=style.label,
            marker={"symbol": style.symbol, "color": style.colour, "size": 10,
                    "line": {"color": "white", "width": 1}},
            customdata=subset[hovered].to_numpy().tolist(),
            hovertemplate=f"{'<br>'.join(lines)}<extra>{style.label}</extra>",
        )  # fmt: skip
    ends = done[x].agg(["min", "max"])
    for label, level in levels.items():
        name = f"{label} {headline.text(level)}"
        _add_line(figure, ends, [level] * 2, name, color=LEVELS[label], dash="dash")
    figure.update_yaxes(title=f"validation {headline.label}")
    if needs_log(headline, done[headline.name].tolist()):
        figure.update_yaxes(type="log", dtick="D2", tickformat=",~r")
    return figure


def _add_line(
    figure: go.Figure, x: Iterable[float], y: Iterable[float], name: str, **look: Any
) -> None:
    x, y = list(x), list(y)
    figure.add_scatter(x=x, y=y, mode="lines", name=name, hoverinfo="skip", line=look)


def _whole(count: int) -> dict[str, int]:
    """Ticks for an axis of so many whole numbers; of a few, plotly would mark halves."""
    return {"dtick": 1} if count <= FEW else {}


def _options(about: About, best: TrialRecord) -> Drawing:
    table, unit = options_frame(about, best.request.allocation), UNITS[about.budget.measure]
    kinds = list(dict.fromkeys(table["kind"]))[::-1]
    shares = table.pivot_table(index="kind", columns="block", values="kept", sort=False)
    shares = shares.reindex(kinds)[sorted(shares.columns)]
    texts: dict[tuple[str, int], str] = {}
    outside = table[table["block"].isna()]
    for row in outside.itertuples(index=False):  # of no block: a row of one colour
        shares.loc[row.kind] = row.kept
    for row in table.itertuples(index=False):
        spec = about.layers[row.name]
        lines = [
            row.name,
            f"{spec.out_features:,} x {spec.in_features:,}",
            row.form if row.option == row.form else f"{row.form}, {row.option}",
            f"{row.stored:,} of {row.dense:,} {unit}",
        ]
        # plotly reads some HTML in texts
        blocks = shares.columns if row.name in set(outside["name"]) else [row.block]
        texts |= dict.fromkeys(((row.kind, at) for at in blocks), "<br>".join(map(escape, lines)))
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
    return _drawing(f"What the best trial keeps, {best.request.trial_index}", figure)


def diagnosed(study: StudyRecord) -> Diagnosis | None:
    """Verdict of the surrogate model on the trials of a study."""
    observations = observations_of(study.state.records, size_metric(study))
    return diagnose(study.about.variables, observations, seed=study.about.seed)


def _surrogate(diagnosis: Diagnosis, minimized: Metric) -> Iterator[Drawing]:
    by_share = sorted(diagnosis.importance.items(), key=lambda item: abs(item[1]))
    names, shares = zip(*by_share, strict=True)
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
            x=diagnosis.observed, y=diagnosis.predicted, mode="markers", marker_color=SKY,
            error_y={"array": [1.96 * error for error in diagnosis.errors], "color": FAINT},
            hovertemplate="observed %{x:.4f}<br>predicted %{y:.4f}<extra></extra>",
        )
    )  # fmt: skip
    ends = [min(diagnosis.observed), max(diagnosis.observed)]
    figure.add_scatter(x=ends, y=ends, mode="lines", line_color=GREY, hoverinfo="skip")
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title=f"observed loss, {minimized.unit or minimized.label}")
    figure.update_yaxes(title="predicted without this trial")
    yield _drawing(
        "How well the surrogate model predicts",
        figure,
        f"Each trial predicted from the others, with 95% intervals; R² {diagnosis.fit:.2f} "
        "on the scale that the model works on, where outlying losses are drawn in.",
    )


def _drawing(title: str, figure: go.Figure, note: str = "") -> Drawing:
    figure.update_layout(
        template="plotly_white", margin={"l": 70, "r": 30, "t": 30, "b": 60},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
    )  # fmt: skip
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=re.sub(r"\W+", "-", title.lower()),
        config={"displaylogo": False, "responsive": True},
    )  # fmt: skip
    return Drawing(title, note, drawn)
