"""The figures of a study, and each of them from data frames."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lrbo.layers.form import DENSE_FORM
from lrbo.layers.options import UNITS
from lrbo.reports import style
from lrbo.reports.allocations import dense_size, options_frame
from lrbo.reports.gains import gains
from lrbo.reports.results import LABELS, frame, score_rows, sensitivity, size_metric
from lrbo.study.study_record import StudyRecord
from lrbo.tasks.metrics import COSTS, KEEP_RATIO, LATENCIES, Metric

Look = dict[str, Any]  # of a line or of points, by matplotlib's names


class OriginStyle(NamedTuple):
    """How the trials of one origin look; marker and colour both tell them apart."""

    label: str
    marker: str
    colour: str
    symbol: str  # plotly's name of the marker


ORIGINS: Mapping[str, OriginStyle] = {
    "uniform": OriginStyle("uniform baseline", "s", style.VERMILLION, "square"),
    "analytic": OriginStyle("least predicted loss", "P", style.ORANGE, "cross"),
    "start": OriginStyle("start of the space", "D", style.PURPLE, "diamond"),
    "transfer": OriginStyle("of another study", "X", style.INK, "x"),
    "sobol": OriginStyle("Sobol", "^", style.SKY, "triangle-up"),
    "model": OriginStyle("surrogate model", "o", style.BLUE, "circle"),
    "between": OriginStyle("between two of the front", "v", style.GREY, "triangle-down"),
}
# Levels that trials are compared with.
LEVELS = {"dense": style.GREEN, "uniform": style.VERMILLION, "analytic": style.ORANGE}
# Trials without a value stand along the worse edge: outcomes, marker, label.
UNDRAWN = ((("stopped",), "|", "stopped early"), (("failed", "abandoned"), "x", "no value"))


def figures(study: StudyRecord) -> dict[str, Figure]:
    """Draw what there is to draw.

    Returns:
        ``convergence``, ``front``, ``ranks`` and ``sensitivity``; those whose data do not exist,
        or not yet, are left out, and so is a front at one budget.
    """
    state, about, size = study.state, study.about, size_metric(study)
    best, uniform = state.best(), state.uniform
    if best is None:
        return {}
    metric, table, rows = study.task.headline, frame(study), score_rows(study)
    levels = {row.label: row.validation[metric.name] for row in rows if row.label != "best"}
    tests = {row.label: row.test[metric.name] for row in rows if row.test}
    config, unit = study.config, UNITS[about.budget.measure]
    keep, lowest = config.budget.kept(about.itemsize), config.budget.lowest
    budget = f"keep ratio {keep:.4g}" if lowest is None else f"keep ratios {lowest:.4g}-{keep:.4g}"
    names = f"{study.name}, {config.model.name}, {config.method['name']}"
    subtitle = f"{names}, {budget} of the {unit}"
    notes = [line for gain in gains(state)[:1] for line in gain.sentences]
    drawn = {
        "convergence": convergence(
            table, metric, levels, tests=tests, subtitle=subtitle, notes=notes
        )
    }
    if size is not None:
        cost, dense = COSTS[size], levels.get("dense")
        whole = dense_size(about).get(size, cost.dense or 1.0)
        drawn["front"] = front(table, metric, dense, cost, whole, subtitle=subtitle)
    drawn["ranks"] = options_over_depth(
        options_frame(about, best.request.allocation),
        None if uniform is None else options_frame(about, uniform.request.allocation),
        subtitle=f"{subtitle}, best trial {best.request.trial_index}",
    )
    if (measured := sensitivity(study)) is not None:
        points = pd.DataFrame([asdict(point) for point in measured.measurements])
        drawn["sensitivity"] = predicted_and_measured(
            points, measured.rank_correlation, subtitle=subtitle
        )
    return drawn


def by_origin(trials: pd.DataFrame) -> Iterator[tuple[OriginStyle, pd.DataFrame]]:
    """Yield the trials of each origin that there is, with their look."""
    for origin, look in ORIGINS.items():
        subset = trials[trials["origin"] == origin]
        if len(subset):
            yield look, subset


@rc_context(style.STYLE)
def convergence(
    trials: pd.DataFrame,
    metric: Metric,
    levels: Mapping[str, float],
    *,
    tests: Mapping[str, float] = MappingProxyType({}),
    subtitle: str = "",
    notes: Sequence[str] = (),
) -> Figure:
    """Draw the validation metric of each trial, in order, and the best so far.

    Args:
        trials: From :func:`lrbo.reports.results.frame`; at least one has a value.
        metric: The column that is drawn.
        levels: Its known values of ``dense``, ``uniform`` and ``analytic``.
        tests: Its values on the test text, of these and of ``best``.
        subtitle: Second line of the title.
        notes: Lines below the axes.
    """
    done = trials[trials["outcome"] == "completed"]
    right = 0.71 if tests else 0.83
    title = f"{metric.label.capitalize()} over {len(trials)} trial{'s' * (len(trials) > 1)}"
    height = 4.6 + style.NOTE_IN * len(notes)
    figure, (axes,) = style.new_figure(title, subtitle, height, right=right, notes=notes)
    style.metric_axis(axes, metric, [*done[metric.name], *levels.values()])
    axes.set(xlabel="trial", xlim=(-0.7, max(float(trials["trial"].max()), 1.0) + 0.7))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    so_far = done[f"best_{metric.name}"]
    best = float(so_far.iloc[-1])
    named = {name: (levels[name], colour) for name, colour in LEVELS.items() if name in levels}
    for value, colour in named.values():
        axes.axhline(value, color=colour, linewidth=1.4, linestyle=style.DASHED, zorder=1)
    if best not in (levels.get("uniform"), levels.get("analytic")):
        named["best"] = (best, style.INK)
    # The last value holds to the right edge, where its label stands.
    x, y = [*done["trial"], axes.get_xlim()[1]], [*so_far, best]
    axes.step(x, y, where="post", color=style.INK, linewidth=1.8, label="best so far", zorder=2)
    for (name, marker, colour, _), subset in by_origin(done):
        points = subset["trial"], subset[metric.name], marker
        axes.plot(*points, color=colour, mec="white", label=name, zorder=3)
    edge = 0.97 if metric.lower_is_better else 0.03  # share of the height of the axes
    look: Look = {"color": style.GREY, "markersize": 7, "markeredgewidth": 1.6, "zorder": 3}
    for outcomes, marker, name in UNDRAWN:
        lost = trials.loc[trials["outcome"].isin(outcomes), "trial"]
        if len(lost):
            heights = axes.get_xaxis_transform()
            axes.plot(lost, [edge] * len(lost), marker, transform=heights, label=name, **look)
    style.legend(figure, axes)
    labels = []
    for name, (value, colour) in named.items():
        test = f", test {metric.text(tests[name])}" if name in tests else ""
        labels.append((value, f"{name} {metric.text(value)}{test}", colour))
    style.label_right(axes, labels)
    return figure


@rc_context(style.STYLE)
def front(
    trials: pd.DataFrame,
    metric: Metric,
    dense: float | None,
    size: Metric = KEEP_RATIO,
    whole: float = 1.0,
    *,
    subtitle: str = "",
) -> Figure:
    """Draw quality against size: all trials, the Pareto front, baselines and dense model.

    The columns are ``metric`` and ``size``, of which the dense model has ``dense``, if that is
    known, and ``whole``.
    """
    done = trials[trials["outcome"] == "completed"]
    done = done.assign(share=done[size.name] / whole).sort_values("share", kind="stable")
    title = f"{metric.label.capitalize()} against {'time' if size in LATENCIES else 'size'}"
    figure, (axes,) = style.new_figure(title, subtitle, 4.6, right=0.83)
    style.metric_axis(axes, metric, [*done[metric.name], *([] if dense is None else [dense])])
    _share_axis(axes, [*done["share"], 1.0], f"{size.label} (dense = 100%)")
    baselines = ("uniform", "analytic")
    others = done[~done["on_front"] & ~done["origin"].isin(baselines)]
    plain: Look = {"color": style.GREY, "alpha": 0.45, "markeredgewidth": 0.0, "zorder": 2}
    axes.plot(others["share"], others[metric.name], "o", label="trial", **plain)
    line: Look = {"color": style.BLUE, "linewidth": 1.8, "markersize": 9.0, "zorder": 4}
    best = done[done["on_front"]]
    axes.plot(best["share"], best[metric.name], "o-", mec="white", label="Pareto front", **line)
    # Above the front, which they may be on.
    dashed: Look = {"linestyle": style.DASHED, "linewidth": 1.2, "mec": "white", "zorder": 5}
    for (name, marker, colour, _), subset in by_origin(done[done["origin"].isin(baselines)]):
        points = subset["share"], subset[metric.name]
        axes.plot(*points, marker=marker, color=colour, label=name, **dashed)
    labels = []
    if dense is not None and math.isfinite(dense):
        point: Look = {"color": style.GREEN, "markersize": 10.0, "zorder": 4}
        axes.axhline(dense, color=style.GREEN, linewidth=1.0, alpha=0.5, zorder=1)
        axes.plot([1.0], [dense], "D", mec="white", label="dense model", **point)
        labels.append((dense, f"dense {metric.text(dense)}", style.GREEN))
    style.legend(figure, axes)
    style.label_right(axes, labels)
    return figure


def _share_axis(axes: Axes, shares: Iterable[float], label: str) -> None:
    low, high = min(shares), max(shares)
    margin = max(0.1 * (high - low), 0.01)
    axes.set(xlabel=label, xlim=(low - margin, high + margin))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))


@rc_context(style.STYLE)
def comparison(table: pd.DataFrame, metric: Metric, *, subtitle: str = "") -> Figure:
    """Draw the best values of several studies against their size, a line per method.

    The line goes through the means of studies that differ in nothing but their seed. Baselines
    have the colour of their method, without a line. The table is that of
    :func:`lrbo.reports.comparison.compared`, with at least one best trial.
    """
    done = table[table["best"].notna()].copy()
    title = f"Best {metric.label} of {len(done)} studies"
    figure, (axes,) = style.new_figure(title, subtitle, 4.6)
    style.metric_axis(axes, metric, list(done[list(LABELS)].stack()))
    measures = " or ".join(dict.fromkeys(done["measure"]))
    _share_axis(axes, done["keep_ratio"], f"{measures} kept in the compressible layers")
    done["size"] = done["keep_ratio"].round(2)  # ranks round, seeds do not meet exactly
    for index, (name, subset) in enumerate(done.groupby(["method", "space"], sort=False)):
        marker, colour = style.marker_and_colour(index)
        means = subset.groupby("size")[["keep_ratio", "best"]].mean()
        axes.plot(means["keep_ratio"], means["best"], color=colour, linewidth=1.6, zorder=2)
        # Below the best trial, which may be the baseline itself.
        sizes = subset["keep_ratio"]
        hollow: Look = {"color": colour, "mfc": "white", "zorder": 3}
        axes.plot(sizes, subset["uniform"], marker, markersize=9, **hollow)
        axes.plot(sizes, subset["analytic"], "P", **hollow)
        filled: Look = {"color": colour, "mec": "white", "label": " ".join(name), "zorder": 4}
        axes.plot(sizes, subset["best"], marker, **filled)
    for baseline, marker in (("uniform", "o"), ("analytic", "P")):
        if done[baseline].notna().any():
            axes.plot([], [], marker, color=style.GREY, markerfacecolor="white", label=baseline)
    dashed: Look = {"color": style.GREEN, "linewidth": 1.4, "linestyle": style.DASHED}
    for dense in sorted(set(done["dense"].dropna().round(6))):
        axes.axhline(dense, zorder=1, **dashed)
    axes.plot([], [], label="dense", **dashed)
    style.legend(figure, axes)
    return figure


@rc_context(style.STYLE)
def fronts(table: pd.DataFrame, metric: Metric, *, subtitle: str = "") -> Figure:
    """Draw the fronts of several studies in one figure, a line each.

    Uniform baselines are hollow points of the same colour; those of least predicted loss a dashed
    line. The table is that of :func:`lrbo.reports.comparison.fronts`, with at least one row.
    """
    count = table["study"].nunique()
    title = f"{metric.label.capitalize()} against size, {count} stud{'ies' if count > 1 else 'y'}"
    figure, (axes,) = style.new_figure(title, subtitle, 4.6)
    style.metric_axis(axes, metric, list(table["value"]))
    measures = " or ".join(dict.fromkeys(table["measure"]))
    _share_axis(axes, table["keep_ratio"], f"{measures} kept in the compressible layers")
    for index, (line, own) in enumerate(table.groupby("line", sort=False)):
        marker, colour = style.marker_and_colour(index)
        looks: dict[str, Look] = {
            "front": {"mec": "white", "linewidth": 1.8, "label": line, "zorder": 4},
            "uniform": {"mfc": "white", "linewidth": 0.0, "zorder": 3},
            "analytic": {"marker": "", "linestyle": style.DASHED, "linewidth": 1.2, "zorder": 2},
        }
        for what, look in looks.items():
            part = own[own["what"] == what]
            points = part["keep_ratio"], part["value"]
            axes.plot(*points, **{"marker": marker, "color": colour, **look})
    keys: dict[str, Look] = {
        "uniform": {"marker": "o", "mfc": "white", "linewidth": 0.0},
        "least predicted loss": {"linestyle": style.DASHED, "linewidth": 1.2},
    }
    for name, what in zip(keys, ("uniform", "analytic"), strict=True):
        if (table["what"] == what).any():
            axes.plot([], [], color=style.GREY, label=name, **keys[name])
    style.legend(figure, axes)
    return figure


@rc_context(style.STYLE)
def options_over_depth(
    options: pd.DataFrame, uniform: pd.DataFrame | None = None, *, subtitle: str = ""
) -> Figure:
    """Draw what each layer keeps, block by block, with a panel per kind.

    Tables are those of :func:`lrbo.reports.allocations.options_frame`; the uniform baseline is a
    dashed line. Embedding and head have a panel each.
    """
    kinds = list(dict.fromkeys(options["kind"]))
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    title, height = "What each layer keeps, by depth", 2.0 + 1.75 * rows
    grid: Any = {"grid": (rows, columns), "right": 0.985, "head_in": 1.25}
    figure, panels = style.new_figure(title, subtitle, height, **grid)
    last = int(options["block"].max())
    width = 0.8 if last < 40 else 1.0  # gaps of less than a pixel would flicker
    is_dense = options["form"] == DENSE_FORM
    for spare in panels[len(kinds) :]:
        spare.set_visible(False)
    for index, (panel, kind) in enumerate(zip(panels, kinds, strict=False)):
        subset = options[options["kind"] == kind]
        colours = is_dense[subset.index].map({True: style.GREEN, False: style.SKY})
        # Embedding and head are in no block: their bar is as wide as the panel.
        is_inside = bool(subset["block"].notna().all())
        at = subset["block"] if is_inside else [last / 2]
        panel.bar(at, subset["kept"], width if is_inside else last + 1, color=colours, zorder=2)
        if uniform is not None:
            base = uniform[uniform["kind"] == kind]
            dashed: Look = {"color": style.VERMILLION, "linestyle": (0, (4, 2)), "zorder": 3}
            outline = [withStroke(linewidth=3.2, foreground="white")]
            at = base["block"] if is_inside else [-0.5, last + 0.5]
            kept = base["kept"] if is_inside else [*base["kept"]] * 2
            (line,) = panel.plot(at, kept, linewidth=1.6, **dashed)
            line.set(label="uniform baseline", path_effects=outline)
        panel.set_title(kind, fontsize=style.TEXT_PT, loc="left", pad=4, color=style.INK)
        panel.set(xlim=(-0.7, last + 0.7), ylim=(0.0, 1.04), yticks=[0.0, 0.5, 1.0])
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        is_lowest = index + columns >= len(kinds)
        panel.tick_params(labelleft=index % columns == 0, labelbottom=is_lowest)
        panel.set_xlabel("block" if is_lowest else "")
    figure.supylabel("kept", fontsize=style.TEXT_PT, x=0.008, color=style.INK)
    patches = [Patch(color=style.SKY, label="compressed")]
    patches += [Patch(color=style.GREEN, label="kept dense")] if is_dense.any() else []
    style.legend(figure, panels[0], patches)
    return figure


@rc_context(style.STYLE)
def predicted_and_measured(
    points: pd.DataFrame, correlation: float, *, subtitle: str = ""
) -> Figure:
    """Draw the loss that single layers were predicted to cost against what they do, log-log.

    Points have ``kind``, ``predicted`` and ``measured``, nats per token. Those that are not both
    positive are counted only. The rank correlation is NaN if there is none.
    """
    shown = points[(points[["predicted", "measured"]] > 0).all(axis=1)]
    title = "Predicted and measured loss of single layers"
    if not math.isnan(correlation):
        title += f": rank correlation {correlation:.3f}"
    figure, (axes,) = style.new_figure(title, subtitle, 5.4, left=0.115, right=0.78, head_in=0.72)
    axes.set(xscale="log", yscale="log")
    axes.grid(axis="x", color=style.GRID, linewidth=0.8)
    if len(shown):
        values = shown[["predicted", "measured"]]
        # One range for both, so that the line of equality is the diagonal.
        ends = float(values.min().min()) / 1.6, float(values.max().max()) * 1.6
        axes.set(xlim=ends, ylim=ends)
        for axis in (axes.xaxis, axes.yaxis):
            style.log_ticks(axis, ends[1] / ends[0])
        diagonal: Look = {"color": style.INK, "linewidth": 1.2, "linestyle": style.DASHED}
        axes.plot(ends, ends, label="equal", zorder=1, **diagonal)
    for index, kind in enumerate(dict.fromkeys(points["kind"])):
        subset = shown[shown["kind"] == kind]
        marker, colour = style.marker_and_colour(index)
        losses = subset["predicted"], subset["measured"]
        axes.plot(*losses, marker, color=colour, mec="white", label=kind, zorder=3)
    missing = len(points) - len(shown)
    note = f", {missing} at or below 0 not shown" if missing else ""
    axes.set_xlabel(f"predicted loss, nats per token ({len(points)} points{note})")
    axes.set_ylabel("measured: KL(dense || one compressed layer)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
