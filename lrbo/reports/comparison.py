"""Several studies beside each other: one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from lrbo.optimization.study import Study
from lrbo.presentation import LABELS
from lrbo.results import summary


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
        config, found = study.config(), summary(study)
        best = found["best"] or {}
        gain: dict[str, Any] = next(iter(found["gains"]), {})
        rows.append(
            {
                "study": study.name,
                "model": config.model.name,
                "method": config.method.name,
                "space": config.space.name,
                "keep_ratio": best.get("keep_ratio"),
                "seed": config.seed,
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
