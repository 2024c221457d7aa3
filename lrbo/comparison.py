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
from lrbo.results import LABELS, config_of, summary


def compared(studies: Sequence[Study]) -> pd.DataFrame:
    """Return a table with one row per study, in the given order.

    Returns:
        ``study``, ``model``, ``method``, ``space``, ``keep_ratio`` (that of the best trial),
        ``seed``, ``trials`` (with a value), perplexity of ``dense``, ``uniform``, ``analytic``
        and ``best`` on the validation text, and on the test text as ``test_dense`` and so on;
        what the search adds to the analytic allocation at the largest budget, nats per token, as
        ``gain`` and ``gain_error`` on the validation text, ``test_gain`` and ``test_gain_error``.
        Missing where it is not known.
    """
    rows = []
    for study in studies:
        config, found = config_of(study), summary(study)
        best = found["best"] or {}
        gain: dict[str, Any] = next(iter(found["gains"]), {})
        rows.append(
            {
                "study": study.name,
                **{key: config[key]["name"] for key in ("model", "method", "space")},
                "keep_ratio": best.get("keep_ratio"),
                "seed": config["seed"],
                "trials": found["trials_completed"] + found["trials_stopped"],
                **{label: (found[label] or {}).get("perplexity") for label in LABELS},
                **{
                    f"test_{label}": found["test"].get(label, {}).get("perplexity")
                    for label in LABELS
                },
                **{
                    f"{prefix}gain{suffix}": (gain.get(text) or {}).get(key)
                    for text, prefix in (("validation", ""), ("test", "test_"))
                    for key, suffix in (("difference", ""), ("standard_error", "_error"))
                },
            }
        )
    texts = [name for name in rows[0] if name.startswith("test_") or "gain" in name]
    numbers = ["keep_ratio", *LABELS, *texts]
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
