"""Check values before anything is loaded, and report every problem at once."""

from __future__ import annotations

import math
import os
from pathlib import Path

from lrbo.accounting import STORAGES
from lrbo.calibration.corpus import SOURCES
from lrbo.errors import ConfigError
from lrbo.factorization.registry import METHODS
from lrbo.schema import (
    CompressConfig,
    Config,
    DashboardConfig,
    EvaluateConfig,
    RoleConfig,
    SearchConfig,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check(config: Config) -> list[str]:
    """Return every problem that the values alone show, before anything is loaded."""
    problems: list[str] = []

    def expect(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            problems.append(f"{key}={value!r}: expected {expected}")

    if not isinstance(config, DashboardConfig):
        expect(config.output in ("text", "json"), "output", config.output, "text or json")
    if isinstance(config, CompressConfig):
        expect(config.dtype in DTYPES, "dtype", config.dtype, " or ".join(DTYPES))
        expect(_is_point(config.point), "point", config.point, "best, a trial number or keep=RATIO")
        problems += check_new_folder("out", Path(config.out))
    if isinstance(config, SearchConfig | EvaluateConfig):
        model, data = config.model, config.data
        sources = ("packaged", "hf", "tiny")
        expect(model.source in sources, "model.source", model.source, " or ".join(sources))
        expect(model.dtype in DTYPES, "model.dtype", model.dtype, " or ".join(DTYPES))
        expect(data.source in SOURCES, "data.source", data.source, " or ".join(SOURCES))
        expect(data.window >= 2, "data.window", data.window, "at least 2 tokens")
        windows = data.max_windows
        expect(windows is None or windows >= 1, "data.max_windows", windows, "at least 1, or null")
        for role in ("calibration", "validation", "test"):
            found: RoleConfig = getattr(data, role)
            needed = isinstance(config, SearchConfig) or role == "test"
            if not needed:
                continue
            paths = role_paths(found)
            expect(bool(paths), f"data.{role}.path", found.path, "a text or a list of texts")
            tokens = found.tokens
            expect(
                tokens is None or tokens >= data.window * max(len(paths), 1),
                f"data.{role}.tokens",
                tokens,
                f"at least one window of {data.window} tokens per text",
            )
        problems += _check_folder("model.path", model.path if model.source == "hf" else None)
        expect(config.seed >= 0, "seed", config.seed, "a whole number from 0 on")
    if isinstance(config, EvaluateConfig):
        problems += _check_folder("checkpoint", config.checkpoint)
    if isinstance(config, SearchConfig):
        problems += _check_search(config)
    return problems


def require_valid(config: Config) -> None:
    """Refuse values that cannot work.

    Raises:
        ConfigError: Listing every problem.
    """
    problems = check(config)
    if problems:
        raise ConfigError(problems)


def _check_search(config: SearchConfig) -> list[str]:
    """Return the problems of a search."""
    problems: list[str] = []

    def expect(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            problems.append(f"{key}={value!r}: expected {expected}")

    known = ", ".join(METHODS)
    expect(config.method.name in METHODS, "method.name", config.method.name, f"one of {known}")
    keep = config.budget.keep_ratio
    expect(0 < keep <= 1, "budget.keep_ratio", keep, "a number above 0 and up to 1")
    storage = config.budget.storage
    expect(storage in STORAGES, "budget.storage", storage, " or ".join(STORAGES))
    space = config.space
    granularities = ("kind", "depth", "layer")
    expect(
        space.granularity in granularities,
        "space.granularity",
        space.granularity,
        " or ".join(granularities),
    )
    expect(space.depth_groups >= 1, "space.depth_groups", space.depth_groups, "at least 1")
    expect(space.rank_multiple >= 1, "space.rank_multiple", space.rank_multiple, "at least 1")
    expect(
        len(space.bounds) == 2 and 0 < space.bounds[0] < space.bounds[1] <= 1,
        "space.bounds",
        list(space.bounds),
        "[low, high] with 0 < low < high <= 1",
    )
    for group, value in space.start.items():
        ratios = list(value) if isinstance(value, list | tuple) else [value]
        good = ratios and all(isinstance(r, int | float) and 0 < r <= 1 for r in ratios)
        expect(bool(good), f"space.start.{group}", value, "a ratio in (0, 1], or a list of them")
    search = config.search
    expect(search.trials >= 1, "search.trials", search.trials, "at least 1")
    expect(search.initial >= 2, "search.initial", search.initial, "at least 2: baseline and start")
    weight = search.kl_weight
    expect(0 <= weight < math.inf, "search.kl_weight", weight, "a number from 0 on")
    for section, keys in (
        ("calibration", ("groups", "batch_windows")),
        ("evaluation", ("batch_windows", "chunk_tokens", "kl_top")),
    ):
        for key in keys:
            value = getattr(getattr(config, section), key)
            expect(value >= 1, f"{section}.{key}", value, "at least 1")
    problems += check_writable("study", study_folder(config.studies, config.study))
    return problems


def check_new_folder(key: str, folder: Path) -> list[str]:
    """Return the problem if ``folder`` exists already or cannot be made."""
    if folder.exists():
        return [f"{key}={str(folder)!r} exists already; lrbo overwrites nothing, choose another"]
    return check_writable(key, folder)


def _check_folder(key: str, path: str | None) -> list[str]:
    """Return the problem if a path that cannot be a hub id is no folder."""
    is_local = path is not None and (path[:1] in ("/", ".", "~") or path.count("/") > 1)
    return [f"{key}={path!r}: no such folder"] if is_local and not Path(str(path)).is_dir() else []


def check_writable(key: str, folder: Path) -> list[str]:
    """Return the problem if ``folder`` cannot be made or written."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return [f"{key}={str(folder)!r}: {place} is a file, not a folder"]
    if not os.access(place, os.W_OK | os.X_OK):
        return [f"{key}={str(folder)!r}: no permission to write in {place}"]
    return []


def role_paths(role: RoleConfig) -> tuple[str, ...]:
    """Return the texts of a role: none, one, or several."""
    if role.path is None:
        return ()
    return tuple(map(str, role.path)) if isinstance(role.path, list) else (str(role.path),)


def study_folder(studies: str, study: str) -> Path:
    """Return the folder of a study: a name is one under ``studies``, a path is itself."""
    return Path(study) if os.sep in study else Path(studies) / study


def _is_point(point: object) -> bool:
    """Return whether ``point`` can name a trial."""
    text = str(point)
    if text.startswith("keep="):
        try:
            return 0 < float(text[5:]) <= 1
        except ValueError:
            return False
    return text == "best" or text.isdigit()
