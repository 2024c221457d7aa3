"""How every figure looks: colours, frame, axes, labels that do not cover each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from lrbo.tasks.metrics import Metric, count_text

# Okabe and Ito's palette, which people with any form of colour blindness can tell apart.
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILLION, PURPLE, ORANGE = "#D55E00", "#CC79A7", "#E69F00"
INK, GREY, FAINT, GRID = "#222222", "#666666", "#B8B8B8", "#E6E6E6"

COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
MARKERS = "os^Dv<>P"  # one more than colours: a pair repeats only after 56 kinds

DPI = 150
WIDTH_IN = 8.0  # 1200 pixels
TITLE_PT, TEXT_PT = 13.0, 10.5
SUBTITLE_CHARACTERS = 98  # what fits in one line
NOTE_IN = 0.2  # height of a line below the axes
LOG_FROM = 4.0  # a log axis where the largest value is this many times the smallest
DASHED = (0, (5, 3))
STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.labelsize": TEXT_PT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.size": TEXT_PT,
    "grid.color": GRID,
    "legend.fontsize": TEXT_PT - 1,
    "legend.frameon": False,
    "lines.markeredgewidth": 0.8,
    "lines.markersize": 8.0,
}


def marker_and_colour(index: int) -> tuple[str, str]:
    """Look of the points of one kind."""
    return MARKERS[index % len(MARKERS)], COLOURS[index % len(COLOURS)]


def new_figure(
    title: str,
    subtitle: str,
    height_in: float,
    *,
    grid: tuple[int, int] = (1, 1),
    left: float = 0.1,
    right: float = 0.96,
    head_in: float = 1.0,
    notes: Sequence[str] = (),
) -> tuple[Figure, list[Axes]]:
    """Make a figure with room for title, legend and notes around its axes."""
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI)
    bottom = (0.55 + NOTE_IN * len(notes)) / height_in
    figure.subplots_adjust(left, bottom, right, 1 - head_in / height_in, 0.12, 0.32)
    axes = list(figure.subplots(*grid, squeeze=False).flat)
    if len(subtitle) > SUBTITLE_CHARACTERS:
        subtitle = subtitle[: SUBTITLE_CHARACTERS - 1] + "…"
    top, x = height_in - 0.16, 0.012
    figure.text(x, top / height_in, title, fontsize=TITLE_PT, weight="bold", color=INK, va="top")
    small: dict[str, Any] = {"fontsize": TEXT_PT - 1, "color": GREY, "parse_math": False}
    figure.text(x, (top - 0.26) / height_in, subtitle, va="top", **small)
    for row, note in enumerate(reversed(notes)):
        figure.text(x, (0.06 + NOTE_IN * row) / height_in, note, va="bottom", **small)
    for each in axes:
        each.tick_params(which="both", labelsize=TEXT_PT - 0.5, color=FAINT, labelcolor=INK)
        each.grid(axis="y", color=GRID, linewidth=0.8)
    return figure, axes


def needs_log(metric: Metric, values: Sequence[float]) -> bool:
    """Whether an axis of a metric is logarithmic; infinite values are left out."""
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    return metric.is_log and max(finite) >= LOG_FROM * min(finite)


def metric_axis(axes: Axes, metric: Metric, values: Sequence[float]) -> None:
    """Set scale, limits and ticks of the vertical axis, leaving out infinite values."""
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    low, high, label = min(finite), max(finite), f"validation {metric.label}"
    if needs_log(metric, finite):
        factor = (high / low) ** 0.08
        axes.set(yscale="log", ylim=(low / factor, high * factor), ylabel=f"{label} (log scale)")
        log_ticks(axes.yaxis, high / low)
    else:
        margin = max(0.1 * (high - low), 0.01 * abs(high))
        axes.set(ylim=(low - margin, high + margin), ylabel=label)


def log_ticks(axis: Axis, ratio: float) -> None:
    """Set ticks of short labels, few enough for an axis that ends at ``ratio`` times its start."""
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if ratio < 10 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps if ratio < 1_000 else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        lambda value, _: count_text(value) if value >= 10_000 else f"{value:g}"
    )


def label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (value, text, colour) right of the axes, each at its height or above the one below.

    The limits of the axes must be final. Infinite values have no label.
    """
    look: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "annotation_clip": False}
    look |= {"textcoords": "offset points", "va": "center"}
    lowest = -math.inf
    for y, text, colour in sorted(label for label in labels if math.isfinite(label[0])):
        height = float(axes.transData.transform((0.0, y))[1]) * 72.0 / DPI
        lowest = max(lowest, height)
        offset = (5, lowest - height)  # in points
        axes.annotate(text, (1.0, y), offset, color=colour, **look)
        lowest += TEXT_PT * 1.35


def legend(figure: Figure, axes: Axes, more: Sequence[Patch] = ()) -> None:
    """Put the legend between title and data, in as many lines as it needs.

    All axes begin as much lower: what is placed by their final size comes after it.
    """
    handles = [*more, *axes.get_legend_handles_labels()[0]]
    corner = (0.004, 1 - 0.6 / figure.get_figheight())
    look = {"handlelength": 1.6, "handletextpad": 0.5, "columnspacing": 1.4, "borderpad": 0.2}
    heights = []
    for columns in range(len(handles), 0, -1):
        drawn = figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=corner, ncols=columns, **look
        )
        box = drawn.get_window_extent()
        heights.append(box.height)
        if box.x1 <= figure.bbox.x1 or columns == 1:
            break
        drawn.remove()
    lower = (heights[-1] - heights[0]) / figure.bbox.height
    figure.subplots_adjust(top=figure.subplotpars.top - lower)
