"""Values that settings may take, for their checks and their users; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Literal, get_args

SOURCES = ("packaged", "files", "hf", "generated")  # of text
Role = Literal["calibration", "validation", "test"]
ROLES: tuple[Role, ...] = get_args(Role)  # in the order in which a search uses them
SUFFIXES: Mapping[str, tuple[str, ...]] = {  # of files of text, by their format
    "text": (".txt", ".text", ".md", ".raw", ".tokens", ".utf8"),
    "json": (".json", ".jsonl", ".ndjson", ".jsonlines"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet", ".pq"),
}
AUTO = "auto"
FILE_FORMATS = (AUTO, *SUFFIXES)
BOS = ("start", "window", "none")  # of a protocol
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a parameter, by dtype
STORED_ITEMSIZES = {**ITEMSIZES, "float64": 8}  # also of dtypes that models do not run in
DTYPES = (AUTO, *ITEMSIZES)  # of the weights in memory
STEPS = 4  # of decoding in a timing, of one token each

FORMATS = ("lrbo", "remote_code", "merged", "nemotron_nas", "adapter")  # of checkpoints
STUDIES = "studies"  # the folder of studies, where none is named
STUDY = "study:"  # begins what a warm start takes from a study, by its name or folder
WARM_START = re.compile(rf"uniform|analytic|start|paper|{STUDY}[^:]+(:\d+)?")
SQLITE = "sqlite:///"  # begins the address of an MLflow store in a file

# Names in space.forms that stand for several forms: those that are worth it in a measure, and those
# that both transformers and vLLM read, as lrbo compress format=adapter writes them; what saves
# time without kernels; or changes of the weights of model.base.
FORM_PRESETS: Mapping[str, tuple[str, ...]] = {
    "parameters": ("pivoted",),
    "bytes": ("pivoted", "factored_int4", "int8", "int4", "int3", "int3_sym", "int2"),
    "stock": ("int4_sym", "int8_sym"),
    "structured": ("pivoted", "neurons", "skip"),
    "deltas": ("delta_bands", "delta_int8", "delta"),
}

# Forms with a base and a low rank of what it leaves, and how their names end where its factors are
# floats, as bases.factor_bits=16 takes them.
REPAIRED = (
    *(f"int{bits}{kind}" for kind in ("", "_sym") for bits in (4, 3, 2)),
    *("lut4", "lut3", "sparse_2_4", "sparse", "sparse_rows"),
)
FLOATS = "_float"

# What a variable may be: a kept ratio, the natural logarithm of a factor of a loss curve, or a
# relative error of outputs.
RANGES: Mapping[str, tuple[float, float]] = {
    "ratios": (0.01, 1.0),
    "weights": (-5.0, 5.0),
    "thresholds": (0.0, 1.0),
}

# Parts of a model, in budget.include.
BLOCKS, EMBEDDING, HEAD = PARTS = ("blocks", "embedding", "head")

KEEP_RATIO = "keep_ratio"  # also the variable of a front
THRESHOLD = "threshold"  # of the output error, the variable of a front too
SIZING = frozenset({KEEP_RATIO, THRESHOLD})  # variables that decide the size of a model
# What a search may trade loss against, smaller is better: metrics of every trial, and those that
# are measured where latency.enabled asks for it, each with its standard error beside it.
SIZES = (KEEP_RATIO, "model_parameters", "model_bytes", "macs_per_token")
LATENCIES = ("prefill_latency_ratio", "decode_latency_ratio")
PREDICTED = "predicted_loss"  # of a trial: the sum over units, beyond the dense model
LOSS = "loss"  # the search's objective: nll, and the divergence if it is weighted

# What bases.sweeps has to be with bases.method=nearest.
NO_SWEEPS = "0 with bases.method=nearest: sweeps go on where gptq ends, in its metric"


def ceiling_of(point: object) -> tuple[str, float] | None:
    """Return the metric and its largest value for ``keep=0.75`` and the like; else ``None``."""
    name, _, value = str(point).partition("=")
    metrics = {"keep": KEEP_RATIO} | {latency: latency for latency in LATENCIES}
    with suppress(KeyError, ValueError):
        return metrics[name], float(value)
    return None
