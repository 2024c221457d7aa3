"""The rules of keys that several sections of the configuration have, or that are long."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from lrbo.config import choices, options
from lrbo.config.options import ANY_COUNT, REPEATED, Rule, at_least, one_of


def _is_point(point: object) -> bool:
    if ceiling := choices.ceiling_of(point):
        metric, value = ceiling
        return 0 < value <= (1 if metric == choices.KEEP_RATIO else math.inf)
    return str(point) == "best" or str(point).isdigit()


NAME = Rule("a name", str.strip)
POINT = Rule(
    "best, a trial number or keep=RATIO; where it was measured, also "
    + " or ".join(f"{name}=RATIO" for name in choices.LATENCIES),
    _is_point,
)
SIZE = Rule(
    f"{' or '.join(choices.SIZES)}, metrics of every trial, or with latency.enabled=true "
    f"{' or '.join(choices.LATENCIES)}",
    lambda v: v in (*choices.SIZES, *choices.LATENCIES),
)
START = "uniform, analytic, start, paper, study:NAME or study:NAME:TRIAL"
STARTS = Rule(START, choices.WARM_START.fullmatch, each=True)
HOST = re.compile(r"[^\s,/@]+")
HOSTS = Rule("a host as runs.example.org, without http://", HOST.fullmatch, each=True)
INCLUDE = Rule(
    f"{choices.BLOCKS}, and beside it {choices.EMBEDDING} or {choices.HEAD} or both, each once",
    lambda v: {choices.BLOCKS} <= {*v} <= {*choices.PARTS} and len({*v}) == len(v),
)
CONFIDENCE = Rule("a confidence above 0.5 and below 1", lambda v: 0.5 < v < 1).or_null()
ALLOCATIONS = at_least(2, " allocations, for windows to differ on", most=REPEATED)
LENGTHS = Rule("lengths of at least 1 token", lambda v: len(v) > 0 and min(v) >= 1)
SEED = replace(options.WHOLE_FROM_0, most=2**32 - 1)  # numpy takes no larger one
DTYPE, FORMAT = one_of(choices.DTYPES), one_of(choices.FILE_FORMATS)
OUTPUT = one_of(("text", "json"))
WINDOW, LIMIT = at_least(2, " tokens"), ANY_COUNT.or_null()
