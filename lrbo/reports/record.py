"""A file of measurements: a line of JSON for each, with its time and the versions that made it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrbo.files.parsing import to_json
from lrbo.study.versions import versions


def record(file: Path, measured: Mapping[str, Any]) -> None:
    """Add a line to a file, which is made if it is not there, and see it onto the disk."""
    line = {"time": time.time(), **measured, "versions": versions()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as opened:
        opened.write(f"{to_json(line)}\n")
        opened.flush()
        os.fsync(opened.fileno())
