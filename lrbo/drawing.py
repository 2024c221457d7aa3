"""How every figure looks: colours, frame, axes, labels that do not cover each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator
from matplotlib.transforms import Bbox

# Okabe and Ito's palette, which people with any form of colour blindness can tell apart.
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILLION, PURPLE, ORANGE = "#D55E00", "#CC79A7", "#E69F00"
INK, GREY, FAINT, GRID = "#222222", "#666666", "#B8B8B8", "#E6E6E6"

DPI = 150
WIDTH_IN = 8.0  # 1200 pixels
TITLE_PT, TEXT_PT = 13.0, 10.5
ABOUT_CHARACTERS = 98  # what fits in one line
NOTE_IN = 0.2  # height of a line below the axes
LOG_FROM = 4.0  # a log axis where the largest perplexity is this many times the smallest


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


def new_figure(
    title: str,
    about: str,
    height_in: float,
    *,
    grid: tuple[int, int] = (1, 1),
    left: float = 0.1,
    right: float = 0.96,
    head_in: float = 1.0,
    notes: Sequence[str] = (),
) -> tuple[Figure, list[Axes]]:
    """Return a figure with room for title and legend above its axes, and the axes in order.

    Below the axes stand the notes, of which each takes ``NOTE_IN`` of the height.
    """
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, facecolor="white")
    figure.subplots_adjust(
        left=left,
        right=right,
        top=1 - head_in / height_in,
        bottom=(0.55 + NOTE_IN * len(notes)) / height_in,
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
    for row, note in enumerate(reversed(notes)):
        place = (0.012, (0.06 + NOTE_IN * row) / height_in)
        figure.text(*place, note, fontsize=TEXT_PT - 1, color=GREY, va="bottom", parse_math=False)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(FAINT)
        each.tick_params(labelsize=TEXT_PT - 0.5, color=FAINT, labelcolor=INK)
        each.grid(axis="y", color=GRID, linewidth=0.8)
        each.set_axisbelow(True)
    return figure, axes


def perplexity_axis(axes: Axes, values: Sequence[float], *, along: Literal["x", "y"] = "y") -> None:
    """Set scale, limits and ticks of a perplexity axis that holds ``values``.

    Infinite ones stand nowhere on it, and without any other it has no scale.
    """
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    low, high = min(finite), max(finite)
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


def label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (height, text, colour) right of the axes, each at its height, none over another.

    The limits of the axes must be final. What is infinite has no height, and no label.
    """
    labels = [one for one in labels if math.isfinite(one[0])]
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


def label(
    axes: Axes,
    point: tuple[float, float],
    offset_pt: tuple[float, float],
    text: str,
    colour: str,
    align: str = "center",
) -> None:
    """Write a text beside a point, unless that is infinitely far away."""
    if not all(map(math.isfinite, point)):
        return
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


def legend(figure: Figure, axes: Axes, more: Sequence[Patch] = ()) -> None:
    """Put the legend between title and data, where it covers nothing.

    It has as many lines as it needs, and all axes begin as much lower: what is placed by their
    final size comes after it.
    """
    handles = [*more, *axes.get_legend_handles_labels()[0]]

    def put(columns: int) -> Bbox:
        for earlier in figure.legends[:]:
            earlier.remove()
        return figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.004, 1 - 0.6 / figure.get_figheight()),
            ncols=columns,
            frameon=False,
            fontsize=TEXT_PT - 1,
            handlelength=1.6,
            handletextpad=0.5,
            columnspacing=1.4,
            borderpad=0.2,
        ).get_window_extent()

    columns = len(handles)
    one_line = place = put(columns)
    while place.x1 > figure.bbox.x1 and columns > 1:
        columns -= 1
        place = put(columns)
    lower = (place.height - one_line.height) / figure.bbox.height
    figure.subplots_adjust(top=figure.subplotpars.top - lower)
