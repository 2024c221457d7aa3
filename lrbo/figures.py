"""The figures of a study, from its journal."""

from __future__ import annotations

from dataclasses import asdict

import pandas as pd
from matplotlib.figure import Figure

from lrbo import plots
from lrbo.gains import gains
from lrbo.optimization.study import Study
from lrbo.results import (
    dense_size,
    frame,
    ranks_frame,
    sensitivity,
    size_metric,
    summary,
)


def figures(study: Study) -> dict[str, Figure]:
    """Draw what there is to draw.

    Returns:
        ``convergence``, ``front``, ``ranks`` and ``sensitivity``; those whose data do not exist,
        or not yet, are left out, and so is a front at one budget.
    """
    state = study.state
    best, uniform = state.best(), state.uniform
    if best is None:
        return {}
    table, size = frame(study), size_metric(study)
    title = _subtitle(study)
    found = summary(study)
    dense, uniform_perplexity, analytic = (
        (found[label] or {}).get("perplexity") for label in ("dense", "uniform", "analytic")
    )
    drawn = {
        "convergence": plots.convergence(
            table,
            dense,
            uniform_perplexity,
            analytic,
            tests={label: test["perplexity"] for label, test in found["test"].items()},
            about=title,
            notes=[line for gain in gains(state)[:1] for line in gain.sentences],
        )
    }
    if size is not None:
        whole = dense_size(study).get(size, 1.0)
        drawn["front"] = plots.front(table, dense, size, whole, about=title)
    drawn["ranks"] = plots.ranks_over_depth(
        ranks_frame(study, best),
        None if uniform is None else ranks_frame(study, uniform),
        about=f"{title}, best trial {best.request.trial_index}",
    )
    measured = sensitivity(study)
    if measured is not None:
        points = pd.DataFrame([asdict(point) for point in measured.measurements])
        drawn["sensitivity"] = plots.predicted_and_measured(
            points, measured.rank_correlation, about=title
        )
    return drawn


def _subtitle(study: Study) -> str:
    """Return study, model, method and budget in one line under a figure's title."""
    config = study.config()
    keep, lowest = config.budget.keep_ratio, config.budget.lowest
    names = [config.model.name, config.method.name]
    budget = f"keep ratio {keep:.4g}" if lowest is None else f"keep ratios {lowest:.4g}-{keep:.4g}"
    return ", ".join([study.name, *names, budget])
