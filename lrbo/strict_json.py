"""Values -> JSON that every reader takes: an infinite perplexity, which JSON lacks, is null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

PERPLEXITY = "perplexity"  # what the names of all numbers end with that may be infinite


def to_json(value: object, **options: Any) -> str:
    """Write strict JSON, a perplexity beyond floating point as null.

    Its nll, which is finite, is always beside it. Anything else that is not finite is a defect.

    Args:
        value: Numbers, texts, and containers of these.
        **options: Of ``json.dumps``.

    Raises:
        ValueError: If another number is not finite.
    """
    return json.dumps(without_infinity(value), allow_nan=False, **options)


def with_infinity(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Read metrics that :func:`to_json` wrote: a perplexity that is null is infinite."""
    return {
        name: math.inf if value is None and name.endswith(PERPLEXITY) else value
        for name, value in metrics.items()
    }


def without_infinity(value: Any) -> Any:
    """Replace infinite perplexities, at any depth."""
    if isinstance(value, Mapping):
        return {
            key: None
            if item == math.inf and str(key).endswith(PERPLEXITY)
            else without_infinity(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_infinity(item) for item in value]
    return value
