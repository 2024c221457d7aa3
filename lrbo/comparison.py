"""Several studies beside each other: one table, one figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lrbo.drawing import GREEN, GREY, TEXT_PT, legend, new_figure, perplexity_axis
from lrbo.optimization.study import Study
from lrbo.plots import COLOURS, MARKERS
from lrbo.results import config_of, summary


def compared(studies: Sequence[Study]) -> pd.DataFrame:
    """Return a table with one row per study, in the given order.

    Returns:
        ``study``, ``model``, ``method``, ``space``, ``keep_ratio`` (that of the best trial),
        ``seed``, ``trials`` (with a value), perplexity of ``dense``, ``uniform``, ``analytic``
        and ``best`` on the validation text and of the best on the ``test`` text; missing where it
        is not known.
    """
    rows = []
    for study in studies:
        config, found = config_of(study), summary(study)
        analytic = next((r for r in study.state.completed if r.request.origin == "analytic"), None)
        best = found["best"] or {}
        rows.append(
            {
                "study": study.name,
                **{key: config[key]["name"] for key in ("model", "method", "space")},
                "keep_ratio": best.get("keep_ratio"),
                "seed": config["seed"],
                "trials": found["trials_completed"] + found["trials_stopped"],
                "dense": (found["dense"] or {}).get("perplexity"),
                "uniform": (found["uniform"] or {}).get("perplexity"),
                "analytic": None if analytic is None else analytic.metrics["perplexity"],
                "best": best.get("perplexity"),
                "test": found["test"].get("best", {}).get("perplexity"),
            }
        )
    numbers = ("keep_ratio", "dense", "uniform", "analytic", "best", "test")
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, float))


def draw(table: pd.DataFrame, *, about: str = "") -> Figure:
    """Draw the best perplexity of several studies against their size, a line per method.

    Studies that differ in nothing but their seed stand above each other, and the line goes
    through their means. Baselines are drawn in the colour of their method, without a line.

    Args:
        table: From :func:`compared`; at least one study has a best trial.
        about: Second line of the title.
    """
    done = table[table["best"].notna()].copy()
    figure, (axes,) = new_figure(f"Best perplexity of {len(done)} studies", about, 4.6)
    known = done[["best", "uniform", "dense"]].stack()
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
        label = " ".join(map(str, name)) if isinstance(name, tuple) else str(name)
        filled: dict[str, Any] = look | {"markeredgecolor": "white", "label": label, "zorder": 4}
        axes.plot(some["keep_ratio"], some["best"], markersize=8, **filled)
    axes.plot([], [], "o", color=GREY, markerfacecolor="white", label="uniform")
    for dense in sorted(set(done["dense"].dropna().round(6))):
        axes.axhline(dense, color=GREEN, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1)
    axes.plot([], [], color=GREEN, linewidth=1.4, linestyle=(0, (5, 3)), label="dense")
    legend(figure, axes)
    return figure
