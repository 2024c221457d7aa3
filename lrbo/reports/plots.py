"""Convergence, front, ranks over depth, predictions; data frame in, figure out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lrbo.drawing import (
    BLUE,
    GREEN,
    GREY,
    GRID,
    INK,
    NOTE_IN,
    ORANGE,
    PURPLE,
    SKY,
    TEXT_PT,
    VERMILLION,
    label,
    label_right,
    legend,
    new_figure,
    perplexity_axis,
)
from lrbo.optimization.front import LATENCIES
from lrbo.presentation import LABELS, perplexity_text

COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
MARKERS = "os^Dv<>P"  # one more than colours: a pair repeats only after 56 kinds
SIZE_LABELS = {
    "keep_ratio": "parameters kept in the compressible layers",
    "model_parameters": "parameters of the whole model",
    "model_bytes": "bytes of the whole model",
    "macs_per_token": "multiply-adds per token",
    "prefill_latency_ratio": "time of a prefill",
    "decode_latency_ratio": "time of a decoding step",
}
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
    "analytic": OriginStyle("least predicted loss", "P", ORANGE),
    "start": OriginStyle("paper's ratios", "D", PURPLE),
    "transfer": OriginStyle("of another study", "X", INK),
    "sobol": OriginStyle("Sobol", "^", SKY),
    "model": OriginStyle("surrogate model", "o", BLUE),
    "between": OriginStyle("between two of the front", "v", GREY),
}


# Trials without a perplexity stand along the upper edge: outcomes, marker, what they are called.
UNDRAWN = ((("stopped",), "|", "stopped early"), (("failed", "abandoned"), "x", "no value"))
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
    frame: pd.DataFrame,
    dense: float | None,
    uniform: float | None,
    analytic: float | None = None,
    *,
    tests: Mapping[str, float] = MappingProxyType({}),
    about: str = "",
    notes: Sequence[str] = (),
) -> Figure:
    """Draw the validation perplexity of each trial, in order, and the best so far.

    Args:
        frame: Trials that ended, from :func:`lrbo.results.frame`; at least one has a value.
        dense: Perplexity of the dense model, if known.
        uniform: Perplexity of the uniform baseline, if known.
        analytic: Perplexity of the allocation of least predicted loss, if known.
        tests: Perplexity on the test text: of ``dense``, ``uniform``, ``analytic``, ``best``.
        about: Second line of the title: study, model, budget.
        notes: Lines below the axes: what the search adds.
    """
    done = frame[frame["outcome"] == "completed"]
    right = 0.71 if tests else 0.83
    title, height = f"Perplexity over {_trials(len(frame))}", 4.6 + NOTE_IN * len(notes)
    figure, (axes,) = new_figure(title, about, height, right=right, notes=notes)
    levels = (
        (dense, "dense", GREEN),
        (uniform, "uniform", VERMILLION),
        (analytic, "analytic", ORANGE),
    )
    known = [value for value, _, _ in levels if value is not None]
    perplexity_axis(axes, [*done["perplexity"], *known])
    axes.set_xlim(-0.7, max(float(frame["trial"].max()), 1.0) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("trial", fontsize=TEXT_PT)
    labels: list[tuple[float, str, str]] = []

    def name_right(value: float, name: str, colour: str) -> None:
        test = f", test {perplexity_text(tests[name])}" if name in tests else ""
        labels.append((value, f"{name} {perplexity_text(value)}{test}", colour))

    for value, name, colour in levels:
        if value is not None:
            axes.axhline(value, color=colour, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1)
            name_right(value, name, colour)
    best = float(done["best_perplexity"].iloc[-1])
    if best not in (uniform, analytic):
        name_right(best, "best", INK)
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
    for outcomes, marker, name in UNDRAWN:
        lost = frame[frame["outcome"].isin(outcomes)]
        if len(lost):
            axes.plot(
                lost["trial"],
                [0.97] * len(lost),
                marker,
                color=GREY,
                markersize=7,
                markeredgewidth=1.6,
                transform=axes.get_xaxis_transform(),
                label=name,
                zorder=3,
            )
    legend(figure, axes)
    label_right(axes, labels)
    return figure


def front(
    frame: pd.DataFrame,
    dense: float | None,
    size: str = "keep_ratio",
    whole: float = 1.0,
    *,
    about: str = "",
) -> Figure:
    """Draw perplexity against size: all trials, the Pareto front, baseline and dense model.

    The trials of one budget differ in size only by the rounding of ranks, which must not look
    like a trade-off. They are drawn as a strip along the perplexity axis, the best one marked,
    with the dense model in a row of its own. Where the sizes do differ (frames of studies with
    different budgets, concatenated), the axis of sizes reaches to the dense model.

    Args:
        frame: Trials that ended, from :func:`lrbo.results.frame`; at least one has a value.
        dense: Perplexity of the dense model, if known.
        size: Column that says how large a trial is.
        whole: What the dense model has in that column; sizes are drawn as shares of it.
        about: Second line of the title: study, model, budget.
    """
    done = frame[frame["outcome"] == "completed"]
    if done["keep_ratio"].max() - done["keep_ratio"].min() < ONE_SIZE:
        return _front_of_one_size(done, dense, about)
    done = done.assign(share=done[size] / whole)
    what = "time" if size in LATENCIES else "size"
    figure, (axes,) = new_figure(f"Perplexity against {what}", about, 4.6)
    perplexity_axis(axes, [*done["perplexity"], *([] if dense is None else [dense])])
    smallest, largest = float(done["share"].min()), max(float(done["share"].max()), 1.0)
    reach = max(largest - smallest, 0.08)
    axes.set_xlim(smallest - 0.12 * reach, largest + 0.12 * reach)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(f"{SIZE_LABELS[size]} (dense = 100%)", fontsize=TEXT_PT)
    for some, look in _front_series(done, "Pareto front", "share"):
        axes.plot(some["share"], some["perplexity"], **look)
    if dense is not None:
        axes.axhline(dense, color=GREEN, linewidth=1.0, alpha=0.5, zorder=1)
        axes.plot([1.0], [dense], **DENSE_POINT)
        # Trials that take longer than the dense model stand above its point.
        offset = (0.0, 9.0 if largest == 1.0 else -19.0)
        label(axes, (1.0, dense), offset, f"dense {perplexity_text(dense)}", GREEN)
    legend(figure, axes)
    return figure


def _front_of_one_size(done: pd.DataFrame, dense: float | None, about: str) -> Figure:
    """Draw trials of one size as a strip."""
    figure, (axes,) = new_figure(
        f"Perplexity of {_trials(len(done))} within one budget", about, 3.3, left=0.13
    )
    perplexity_axis(axes, [*done["perplexity"], *([] if dense is None else [dense])], along="x")
    smallest, largest = float(done["keep_ratio"].min()), float(done["keep_ratio"].max())
    rows = [_share(smallest, largest)] + ([] if dense is None else ["dense\n100%"])
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.7, len(rows) - 0.5)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    lowest = done.sort_values("objective", kind="stable").iloc[0]
    alone = done.assign(on_front=done["trial"] == lowest["trial"])
    for some, look in _front_series(alone, "best trial"):
        axes.plot(some["perplexity"], [0.0] * len(some), **look)
    for value in done.loc[done["origin"] == "uniform", "perplexity"]:
        label(axes, (value, 0.0), (0.0, 10.0), f"uniform {perplexity_text(value)}", VERMILLION)
    if lowest["origin"] != "uniform":
        text = f"{perplexity_text(lowest['perplexity'])} in trial {lowest['trial']}"
        label(axes, (lowest["perplexity"], 0.0), (0.0, -19.0), text, BLUE)
    if dense is not None:
        axes.axvline(dense, color=GREEN, linewidth=1.0, alpha=0.5, zorder=1)
        axes.plot([dense], [1.0], **DENSE_POINT)
        label(axes, (dense, 1.0), (10.0, -4.0), f"dense {perplexity_text(dense)}", GREEN, "left")
    legend(figure, axes)
    return figure


def _front_series(
    done: pd.DataFrame, label: str, size: str = "keep_ratio"
) -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    """Return what a front figure shows, with its look: other trials, front (labelled), baseline.

    Baselines come last and are smaller marks: they stay visible where they are on the front.
    """
    by_size = done.sort_values(size, kind="stable")
    is_uniform, is_analytic = (by_size["origin"] == name for name in ("uniform", "analytic"))
    look = {"markeredgecolor": "white", "markersize": 9.0}
    return [
        (
            by_size[~by_size["on_front"] & ~is_uniform & ~is_analytic],
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
                "label": label,
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
        *(
            [
                (
                    by_size[is_analytic],
                    look
                    | {
                        "color": ORANGE,
                        "linestyle": (0, (5, 3)),
                        "linewidth": 1.2,
                        "marker": "P",
                        "markersize": 8.0,
                        "label": ORIGINS["analytic"].label,
                        "zorder": 6,
                    },
                )
            ]
            if is_analytic.any()
            else []
        ),
    ]


def ranks_over_depth(
    ranks: pd.DataFrame, uniform: pd.DataFrame | None = None, *, about: str = ""
) -> Figure:
    """Draw what each layer keeps, block by block, with a panel per kind.

    Args:
        ranks: Layers of an allocation, from :func:`lrbo.results.ranks_frame`.
        uniform: The same of the uniform baseline, drawn as a dashed line.
        about: Second line of the title: study, model, budget, trial.
    """
    kinds = list(dict.fromkeys(ranks["kind"]))
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, panels = new_figure(
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
    legend(figure, panels[0], patches)
    return figure


def predicted_and_measured(points: pd.DataFrame, correlation: float, *, about: str = "") -> Figure:
    """Draw the loss that single layers were predicted to cost against what they do, log-log.

    Args:
        points: A row per layer and rank: ``kind``, ``predicted`` and ``measured``, nats per
            token. Those that are not both positive have no place on the axes, and are counted.
        correlation: Of the ranks of all points; NaN if there is none.
        about: Second line of the title: study, model, budget.
    """
    places = points[["predicted", "measured"]]
    shown = points[(places > 0).all(axis=1)]
    title = "Predicted and measured loss of single layers"
    if not math.isnan(correlation):
        title += f": rank correlation {correlation:.3f}"
    figure, (axes,) = new_figure(title, about, 5.4, left=0.115, right=0.78, head_in=0.72)
    axes.set(xscale="log", yscale="log")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    if len(shown):
        values = shown[["predicted", "measured"]]
        # One range for both, so that the line of equality is the diagonal.
        low, high = float(values.min().min()) / 1.6, float(values.max().max()) * 1.6
        axes.set(xlim=(low, high), ylim=(low, high))
        axes.plot(
            [low, high],
            [low, high],
            color=INK,
            linewidth=1.2,
            linestyle=(0, (5, 3)),
            label="equal",
            zorder=1,
        )
    for place, kind in enumerate(dict.fromkeys(points["kind"])):
        some = shown[shown["kind"] == kind]
        axes.plot(
            some["predicted"],
            some["measured"],
            MARKERS[place % len(MARKERS)],
            color=COLOURS[place % len(COLOURS)],
            markeredgecolor="white",
            markeredgewidth=0.8,
            markersize=8,
            label=kind,
            zorder=3,
        )
    missing = len(points) - len(shown)
    note = f", {missing} at or below 0 not shown" if missing else ""
    count = f"{len(points)} points{note}"
    axes.set_xlabel(f"predicted loss, nats per token ({count})", fontsize=TEXT_PT)
    axes.set_ylabel("measured: KL(dense || one layer at low rank)", fontsize=TEXT_PT)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=TEXT_PT - 1)
    return figure


def _trials(count: int) -> str:
    """Return the number of trials in words that agree with it."""
    return "1 trial" if count == 1 else f"{count} trials"


def _share(smallest: float, largest: float) -> str:
    """Return a range of keep ratios on two lines; one number where they print the same."""
    first, last = f"{smallest:.1%}", f"{largest:.1%}"
    return f"{first}\nkept" if first == last else f"{first} to\n{last} kept"


def comparison(table: pd.DataFrame, *, about: str = "") -> Figure:
    """Draw the best perplexity of several studies against their size, a line per method.

    Studies that differ in nothing but their seed stand above each other, and the line goes
    through their means. Baselines are drawn in the colour of their method, without a line.

    Args:
        table: From :func:`lrbo.comparison.compared`; at least one study has a best trial.
        about: Second line of the title.
    """
    done = table[table["best"].notna()].copy()
    figure, (axes,) = new_figure(f"Best perplexity of {len(done)} studies", about, 4.6)
    known = done[list(LABELS)].stack()
    perplexity_axis(axes, list(known))
    smallest, largest = float(done["keep_ratio"].min()), float(done["keep_ratio"].max())
    reach = max(0.08 * (largest - smallest), 0.01)
    axes.set_xlim(smallest - reach, largest + reach)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("parameters kept in the compressible layers", fontsize=TEXT_PT)
    done["size"] = done["keep_ratio"].round(2)  # ranks round, seeds do not meet exactly
    for place, (name, some) in enumerate(done.groupby(["method", "space"], sort=False)):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        means = some.groupby("size")[["keep_ratio", "best"]].mean()
        axes.plot(means["keep_ratio"], means["best"], color=colour, linewidth=1.6, zorder=2)
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none"}
        # Below the best trial, which may be the baseline itself.
        hollow: dict[str, Any] = look | {"markerfacecolor": "white", "zorder": 3}
        axes.plot(some["keep_ratio"], some["uniform"], markersize=9, **hollow)
        axes.plot(some["keep_ratio"], some["analytic"], **hollow | {"marker": "P"}, markersize=8)
        label = " ".join(map(str, name)) if isinstance(name, tuple) else str(name)
        filled: dict[str, Any] = look | {"markeredgecolor": "white", "label": label, "zorder": 4}
        axes.plot(some["keep_ratio"], some["best"], markersize=8, **filled)
    axes.plot([], [], "o", color=GREY, markerfacecolor="white", label="uniform")
    if done["analytic"].notna().any():
        axes.plot([], [], "P", color=GREY, markerfacecolor="white", label="analytic")
    for dense in sorted(set(done["dense"].dropna().round(6))):
        axes.axhline(dense, color=GREEN, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1)
    axes.plot([], [], color=GREEN, linewidth=1.4, linestyle=(0, (5, 3)), label="dense")
    legend(figure, axes)
    return figure
