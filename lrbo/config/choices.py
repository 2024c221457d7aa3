"""What settings may be, for those who check them and those who use them: no tensors in here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

SOURCES = ("packaged", "files", "hf", "generated")  # of text
# Of a text, in the order in which a search uses them.
ROLES: tuple[Literal["calibration", "validation", "test"], ...]
ROLES = ("calibration", "validation", "test")
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
STEPS = 4  # of decoding in a timing, of one token each

STUDIES = "studies"  # the folder of studies, where none is named
STUDY = "study:"  # begins what a warm start takes from a study, by its name or folder
SQLITE = "sqlite:///"  # begins the address of an MLflow store in a file

# What a variable may be: a kept ratio, or the natural logarithm of a factor of a loss curve.
RANGES: Mapping[str, tuple[float, float]] = {"ratios": (0.01, 1.0), "weights": (-5.0, 5.0)}
