"""Convergence, front and ranks over depth; data frame in, figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter

# Okabe and Ito's palette, which people with any form of colour blindness can tell apart.
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILLION, PURPLE = "#D55E00", "#CC79A7"
INK, GREY, FAINT, GRID = "#222222", "#666666", "#B8B8B8", "#E6E6E6"

DPI = 150
WIDTH_IN = 8.0  # 1200 pixels
TITLE_PT, TEXT_PT = 13.0, 10.5
ABOUT_CHARACTERS = 98  # what fits in one line
LOG_FROM = 4.0  # a log axis where the largest perplexity is this many times the smallest
ONE_SIZE = 0.01  # keep ratios closer together than this differ only by the rounding of ranks


@dataclass(frozen=True)
class OriginStyle:
    """How the trials of one origin look; marker and colour both tell them apart.

    Attributes:
        label: In the legend.
        marker: Matplotlib's name of the shape.
        colour: Of edge and face.
    """

    label: str
    marker: str
    colour: str


ORIGINS: Mapping[str, OriginStyle] = {
    "uniform": OriginStyle("uniform baseline", "s", VERMILLION),
    "start": OriginStyle("paper's ratios", "D", PURPLE),
    "sobol": OriginStyle("Sobol", "^", SKY),
    "model": OriginStyle("surrogate model", "o", BLUE),
}


DENSE_POINT: Mapping[str, Any] = {
    "color": GREEN,
    "linestyle": "none",
    "marker": "D",
    "markeredgecolor": "white",
    "markersize": 10.0,
    "label": "dense model",
    "zorder": 4,
}


def convergence(
    frame: pd.DataFrame, dense: float | None, uniform: float | None, *, about: str = ""
) -> Figure:
    """Draw the validation perplexity of each trial, in order, and the best so far.

    Args:
        frame: Trials that ended, from :func:`lrbo.report.frame`; at least one has a value.
        dense: Perplexity of the dense model, if known.
        uniform: Perplexity of the uniform baseline, if known.
        about: Second line of the title: study, model, budget.
    """
    done = frame[frame["outcome"] == "completed"]
    lost = frame[frame["outcome"] != "completed"]
    figure, (axes,) = _figure(f"Perplexity over {_trials(len(frame))}", about, 4.6, right=0.83)
    known = [value for value in (dense, uniform) if value is not None]
    _perplexity_axis(axes, [*done["perplexity"], *known])
    axes.set_xlim(-0.7, max(float(frame["trial"].max()), 1.0) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("trial", fontsize=TEXT_PT)
    labels = []
    for value, name, colour in ((dense, "dense", GREEN), (uniform, "uniform", VERMILLION)):
        if value is not None:
            axes.axhline(value, color=colour, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1)
            labels.append((value, f"{name} {perplexity_text(value)}", colour))
    best = float(done["best_perplexity"].iloc[-1])
    if best != uniform:
        labels.append((best, f"best {perplexity_text(best)}", INK))
    # The last value holds to the right edge, where its label stands.
    axes.step(
        [*done["trial"], axes.get_xlim()[1]],
        [*done["best_perplexity"], best],
        where="post",
        color=INK,
        linewidth=1.8,
        label="best so far",
        zorder=2,
    )
    for origin, style in ORIGINS.items():
        some = done[done["origin"] == origin]
        if len(some):
            axes.plot(
                some["trial"],
                some["perplexity"],
                style.marker,
                color=style.colour,
                markeredgecolor="white",
                markeredgewidth=0.8,
                markersize=8,
                label=style.label,
                zorder=3,
            )
    if len(lost):
        axes.plot(
            lost["trial"],
            [0.97] * len(lost),
            "x",
            color=GREY,
            markersize=7,
            markeredgewidth=1.6,
            transform=axes.get_xaxis_transform(),
            label="no value",
            zorder=3,
        )
    _label_right(axes, labels)
    _legend(figure, axes)
    return figure


def front(frame: pd.DataFrame, dense: float | None, *, about: str = "") -> Figure:
    """Draw perplexity against size: all trials, the Pareto front, baseline and dense model.

    The trials of one budget differ in size only by the rounding of ranks, which must not look
    like a trade-off. They are drawn as a strip along the perplexity axis, with the dense model
    in a row of its own. Where the sizes do differ (frames of studies with different budgets,
    concatenated), the axis of sizes reaches to the dense model.

    Args:
        frame: Trials that ended, from :func:`lrbo.report.frame`; at least one has a value.
        dense: Perplexity of the dense model, if known; its keep ratio is 1.
        about: Second line of the title: study, model, budget.
    """
    done = frame[frame["outcome"] == "completed"]
    if done["keep_ratio"].max() - done["keep_ratio"].min() < ONE_SIZE:
        return _front_of_one_size(done, dense, about)
    figure, (axes,) = _figure("Perplexity against size", about, 4.6)
    _perplexity_axis(axes, [*done["perplexity"], *([] if dense is None else [dense])])
    smallest = float(done["keep_ratio"].min())
    reach = max(1.0 - smallest, 0.08)
    axes.set_xlim(smallest - 0.12 * reach, 1.0 + 0.12 * reach)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("parameters kept in the compressible layers (dense = 100%)", fontsize=TEXT_PT)
    for some, look in _front_series(done):
        axes.plot(some["keep_ratio"], some["perplexity"], **look)
    if dense is not None:
        axes.axhline(dense, color=GREEN, linewidth=1.0, alpha=0.5, zorder=1)
        axes.plot([1.0], [dense], **DENSE_POINT)
        _label(axes, (1.0, dense), (0, 9), f"dense {perplexity_text(dense)}", GREEN)
    _legend(figure, axes)
    return figure


def _front_of_one_size(done: pd.DataFrame, dense: float | None, about: str) -> Figure:
    """Draw trials of one size as a strip."""
    figure, (axes,) = _figure(
        f"Perplexity of {_trials(len(done))} within one budget", about, 3.3, left=0.13
    )
    _perplexity_axis(axes, [*done["perplexity"], *([] if dense is None else [dense])], along="x")
    smallest, largest = float(done["keep_ratio"].min()), float(done["keep_ratio"].max())
    rows = [f"{_share(smallest, largest)}\nkept"] + ([] if dense is None else ["dense\n100%"])
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.7, len(rows) - 0.5)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    for some, look in _front_series(done):
        axes.plot(some["perplexity"], [0.0] * len(some), **look)
    for value in done.loc[done["origin"] == "uniform", "perplexity"]:
        _label(axes, (value, 0.0), (0, 10), f"uniform {perplexity_text(value)}", VERMILLION)
    lowest = done[done["on_front"]].sort_values("keep_ratio", kind="stable").iloc[-1]
    if lowest["origin"] != "uniform":
        text = f"{perplexity_text(lowest['perplexity'])} in trial {lowest['trial']}"
        _label(axes, (lowest["perplexity"], 0.0), (0, -19), text, BLUE)
    if dense is not None:
        axes.axvline(dense, color=GREEN, linewidth=1.0, alpha=0.5, zorder=1)
        axes.plot([dense], [1.0], **DENSE_POINT)
        _label(axes, (dense, 1.0), (10, -4), f"dense {perplexity_text(dense)}", GREEN, "left")
    _legend(figure, axes)
    return figure


def _front_series(done: pd.DataFrame) -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    """Return what a front figure shows, with its look: other trials, front, baseline.

    The baseline comes last and is the smaller mark: it stays visible where it is on the front.
    """
    by_size = done.sort_values("keep_ratio", kind="stable")
    is_uniform = by_size["origin"] == "uniform"
    look = {"markeredgecolor": "white", "markersize": 9.0}
    return [
        (
            by_size[~by_size["on_front"] & ~is_uniform],
            {
                "color": GREY,
                "alpha": 0.45,
                "linestyle": "none",
                "marker": "o",
                "markeredgewidth": 0.0,
                "markersize": 8.0,
                "label": "trial",
                "zorder": 2,
            },
        ),
        (
            by_size[by_size["on_front"]],
            look
            | {
                "color": BLUE,
                "linewidth": 1.8,
                "marker": "o",
                "label": "Pareto front",
                "zorder": 4,
            },
        ),
        (
            by_size[is_uniform],
            look
            | {
                "color": VERMILLION,
                "linestyle": (0, (5, 3)),
                "linewidth": 1.2,
                "marker": "s",
                "markersize": 8.0,
                "label": "uniform baseline",
                "zorder": 5,
            },
        ),
    ]


def ranks_over_depth(
    ranks: pd.DataFrame, uniform: pd.DataFrame | None = None, *, about: str = ""
) -> Figure:
    """Draw what each layer keeps, block by block, with a panel per kind.

    Args:
        ranks: Layers of an allocation, from :func:`lrbo.report.ranks_frame`.
        uniform: The same of the uniform baseline, drawn as a dashed line.
        about: Second line of the title: study, model, budget, trial.
    """
    kinds = list(dict.fromkeys(ranks["kind"]))
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, panels = _figure(
        "Parameters kept in each layer, by depth",
        about,
        2.0 + 1.75 * rows,
        grid=(rows, columns),
        left=0.1,
        right=0.985,
        head_in=1.25,
    )
    last = int(ranks["block"].max())
    width = 0.8 if last < 40 else 1.0  # gaps of less than a pixel would flicker
    for place, panel in enumerate(panels):
        if place >= len(kinds):
            panel.set_visible(False)
            continue
        some = ranks[ranks["kind"] == kinds[place]]
        colours = [GREEN if is_dense else SKY for is_dense in some["rank"].isna()]
        panel.bar(some["block"], some["kept"], width, color=colours, zorder=2)
        if uniform is not None:
            base = uniform[uniform["kind"] == kinds[place]]
            panel.plot(
                base["block"],
                base["kept"],
                color=VERMILLION,
                linestyle=(0, (4, 2)),
                linewidth=1.6,
                label="uniform baseline",
                zorder=3,
                path_effects=[withStroke(linewidth=3.2, foreground="white")],
            )
        panel.set_title(kinds[place], fontsize=TEXT_PT, loc="left", pad=4, color=INK)
        panel.set_xlim(-0.7, last + 0.7)
        panel.set_ylim(0.0, 1.04)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.set_yticks([0.0, 0.5, 1.0])
        panel.tick_params(labelleft=place % columns == 0)
        if place + columns >= len(kinds):
            panel.set_xlabel("block", fontsize=TEXT_PT)
        else:
            panel.tick_params(labelbottom=False)
    figure.supylabel("parameters kept", fontsize=TEXT_PT, x=0.008, color=INK)
    patches = [Patch(color=SKY, label="low rank")]
    patches += [Patch(color=GREEN, label="kept dense")] if ranks["rank"].isna().any() else []
    _legend(figure, panels[0], patches)
    return figure


def perplexity_text(value: float) -> str:
    """Return a perplexity with as many digits as matter.

    Example:
        >>> perplexity_text(17.2345), perplexity_text(1234.5), perplexity_text(3.2e9)
        ('17.23', '1,234', '3.2e+09')
    """
    if value < 1_000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1_000_000 else f"{value:.1e}"


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move numbers apart until neighbours are ``gap`` from each other, as little as possible.

    Numbers that come too close form a cluster, which is laid out evenly around its mean; the
    order stays.

    Example:
        >>> spread([10.0, 0.0, 1.0], 4.0)
        [10.0, -1.5, 2.5]
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    clusters: list[list[int]] = []
    for index in order:
        clusters.append([index])
        while len(clusters) > 1:
            below, above = (_laid_out(cluster, values, gap) for cluster in clusters[-2:])
            if above[0] - below[-1] >= gap:
                break
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    moved = list(values)
    for cluster in clusters:
        for index, value in zip(cluster, _laid_out(cluster, values, gap), strict=True):
            moved[index] = value
    return moved


def _laid_out(cluster: Sequence[int], values: Sequence[float], gap: float) -> list[float]:
    """Return the places of a cluster, ``gap`` apart around the mean of its values."""
    middle = sum(values[index] for index in cluster) / len(cluster)
    first = middle - gap * (len(cluster) - 1) / 2
    return [first + gap * step for step in range(len(cluster))]


def _trials(count: int) -> str:
    """Return the number of trials in words that agree with it."""
    return "1 trial" if count == 1 else f"{count} trials"


def _figure(
    title: str,
    about: str,
    height_in: float,
    *,
    grid: tuple[int, int] = (1, 1),
    left: float = 0.1,
    right: float = 0.96,
    head_in: float = 1.0,
) -> tuple[Figure, list[Axes]]:
    """Return a figure with room for title and legend above its axes, and the axes in order."""
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, facecolor="white")
    figure.subplots_adjust(
        left=left,
        right=right,
        top=1 - head_in / height_in,
        bottom=0.55 / height_in,
        hspace=0.32,
        wspace=0.12,
    )
    axes = list(figure.subplots(*grid, squeeze=False).flat)
    figure.text(
        0.012, 1 - 0.16 / height_in, title, fontsize=TITLE_PT, weight="bold", color=INK, va="top"
    )
    line = about if len(about) <= ABOUT_CHARACTERS else about[: ABOUT_CHARACTERS - 1] + "…"
    place = (0.012, 1 - 0.42 / height_in)
    figure.text(*place, line, fontsize=TEXT_PT - 1, color=GREY, va="top", parse_math=False)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(FAINT)
        each.tick_params(labelsize=TEXT_PT - 0.5, color=FAINT, labelcolor=INK)
        each.grid(axis="y", color=GRID, linewidth=0.8)
        each.set_axisbelow(True)
    return figure, axes


def _perplexity_axis(
    axes: Axes, values: Sequence[float], *, along: Literal["x", "y"] = "y"
) -> None:
    """Set scale, limits and ticks of a perplexity axis that holds ``values``."""
    low, high = min(values), max(values)
    is_log = high / low >= LOG_FROM
    if is_log:
        factor = (high / low) ** 0.08
        limits = low / factor, high * factor
    else:
        margin = max(0.1 * (high - low), 0.01 * high)
        limits = low - margin, high + margin
    scale = "log" if is_log else "linear"
    label = "validation perplexity (log scale)" if is_log else "validation perplexity"
    axes.set(**{f"{along}scale": scale, f"{along}lim": limits})
    axis = axes.xaxis if along == "x" else axes.yaxis
    axis.set_label_text(label, fontsize=TEXT_PT)
    if is_log:
        steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high / low < 10 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=steps if high / low < 1_000 else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axis.minorticks_off()


def _tick(value: float) -> str:
    """Return the label of a tick on a log axis, short enough for the margin."""
    if value < 10_000:
        return f"{value:g}"
    if value < 1_000_000:
        return f"{value / 1_000:g}k"
    return f"{value / 1_000_000:g}M" if value < 1_000_000_000 else f"{value:.0e}"


def _share(smallest: float, largest: float) -> str:
    """Return a range of keep ratios in percent; one number where they print the same."""
    first, last = f"{smallest:.1%}", f"{largest:.1%}"
    return first if first == last else f"{first} to {last}"


def _label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (height, text, colour) right of the axes, each at its height, none over another.

    The limits of the axes must be final.
    """
    points_per_pixel = 72.0 / DPI
    heights = [
        float(axes.transData.transform((0.0, y))[1]) * points_per_pixel for y, _, _ in labels
    ]
    places = spread(heights, TEXT_PT * 1.35)
    for (y, text, colour), height, place in zip(labels, heights, places, strict=True):
        axes.annotate(
            text,
            (1.0, y),
            xycoords=("axes fraction", "data"),
            xytext=(5, place - height),
            textcoords="offset points",
            va="center",
            fontsize=TEXT_PT,
            color=colour,
            annotation_clip=False,
        )


def _label(
    axes: Axes,
    point: tuple[float, float],
    offset_pt: tuple[float, float],
    text: str,
    colour: str,
    align: str = "center",
) -> None:
    """Write a text beside a point."""
    axes.annotate(
        text,
        point,
        xytext=offset_pt,
        textcoords="offset points",
        ha=align,
        fontsize=TEXT_PT,
        color=colour,
        path_effects=[withStroke(linewidth=3.0, foreground="white")],
        annotation_clip=False,
    )


def _legend(figure: Figure, axes: Axes, more: Sequence[Patch] = ()) -> None:
    """Put the legend in one line between title and data, where it covers nothing."""
    handles = [*more, *axes.get_legend_handles_labels()[0]]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.6 / figure.get_figheight()),
        ncols=len(handles),
        frameon=False,
        fontsize=TEXT_PT - 1,
        handlelength=1.6,
        handletextpad=0.5,
        columnspacing=1.4,
        borderpad=0.2,
    )
