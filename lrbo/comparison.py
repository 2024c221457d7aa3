"""Several studies beside each other: one table."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lrbo.optimization.study import Study
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
