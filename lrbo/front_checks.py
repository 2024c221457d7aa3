"""Check what a front minimises, over which range, and what is timed for it."""

from __future__ import annotations

import math

from lrbo.optimization.front import LATENCIES, LOSS, SIZES
from lrbo.options import STEPS
from lrbo.schema import SearchConfig


def check_front(config: SearchConfig) -> list[str]:
    """Return the problems of a front, or of asking for parts of one at a single budget."""
    problems: list[str] = []

    def expect(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            problems.append(f"{key}={value!r}: expected {expected}")

    search, keep = config.search, config.budget.keep_ratio
    racing = search.racing
    lowest = config.budget.lowest
    expect(
        lowest is None or 0 < lowest < keep,
        "budget.lowest",
        lowest,
        f"a number above 0 and below budget.keep_ratio={keep:g}, or null for one budget",
    )
    if racing is not None and lowest is not None:
        problems.append(
            f"search.racing={racing!r}: trials of a front have no single best to race against; "
            "set it to null, or give one budget"
        )
    problems += _check_objective(config)
    for name, value in search.thresholds.items():
        known = (LOSS, search.size)
        expect(
            name in known,
            f"search.thresholds.{name}",
            value,
            f"a threshold of what is minimised: {' or '.join(known)}",
        )
        expect(0 < value < math.inf, f"search.thresholds.{name}", value, "a number above 0")
    ceiling = search.thresholds.get("keep_ratio", math.inf)
    if lowest is None:
        if search.thresholds:
            problems.append(
                "search.thresholds are for a front; give budget.lowest, or none of them for one "
                "budget"
            )
        if search.size in (*SIZES[1:], *LATENCIES):
            problems.append(
                f"search.size={search.size!r} is minimised where a front is searched; give "
                "budget.lowest, or leave it out"
            )
    elif ceiling <= lowest:
        problems.append(
            f"search.thresholds.keep_ratio={ceiling!r}: expected a number above budget.lowest="
            f"{lowest:g}, for no trial is smaller"
        )
    bounds = list(config.space.bounds)
    if lowest is not None and config.space.type == "ratios" and not max(bounds, default=1) >= keep:
        problems.append(
            f"space.bounds={bounds}: expected an upper bound of at least "
            f"budget.keep_ratio={keep:g}, so that every budget of the front can be used up"
        )
    return problems


def _check_objective(config: SearchConfig) -> list[str]:
    """Return the problems of what a front minimises beside the loss, and of what is timed."""
    problems: list[str] = []

    def expect(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            problems.append(f"{key}={value!r}: expected {expected}")

    size, latency, window = config.search.size, config.latency, config.data.window
    expect(
        size in (*SIZES, *LATENCIES),
        "search.size",
        size,
        f"{' or '.join(SIZES)}, metrics of every trial, or with latency.enabled=true "
        f"{' or '.join(LATENCIES)}",
    )
    if size in LATENCIES and not latency.enabled:
        problems.append(
            f"search.size={size!r} is measured only with latency.enabled=true; add it, or take "
            f"{' or '.join(SIZES)}"
        )
    tokens = window if latency.tokens is None else latency.tokens
    if latency.tokens is not None or latency.enabled:
        expect(
            STEPS < tokens <= window,
            "latency.tokens",
            latency.tokens,
            f"more than the {STEPS} decoding steps and at most data.window={window}, which null "
            "stands for",
        )
    expect(latency.repeats >= 3, "latency.repeats", latency.repeats, "at least 3, for a median")
    expect(latency.warmup >= 0, "latency.warmup", latency.warmup, "at least 0")
    return problems
