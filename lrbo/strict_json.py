"""Values -> JSON that every reader takes: an infinite perplexity, which JSON lacks, is null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


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


def may_be_infinite(name: str) -> bool:
    """Return whether a number of this name may be infinite, as exp of a finite loss is."""
    return name.endswith("perplexity")


def without_infinity(value: Any) -> Any:
    """Replace infinite perplexities, at any depth."""
    if isinstance(value, Mapping):
        return {
            key: None if item == math.inf and may_be_infinite(str(key)) else without_infinity(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_infinity(item) for item in value]
    return value
