"""The text that a recovery trains on, judges by and scores, and which of it was seen before."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lrbo.checkpoints.calibration_text import SEEN_LIMIT, seen_shares
from lrbo.config.recovery import STUDY_TEXT
from lrbo.config.schema import RecoverConfig
from lrbo.data import documents
from lrbo.data.windows import Role, TokenWindows, make_windows, overlaps
from lrbo.errors import DataError, StudyError
from lrbo.models.loading import load_tokenizer
from lrbo.models.sources import ModelSource
from lrbo.pipeline import planning
from lrbo.study.journal import Study

TEXTS: tuple[Role, ...] = ("validation", "test")  # that are scored


def windows_of(
    config: RecoverConfig,
    folder: Path,
    about: Mapping[str, Any],
    source: ModelSource | None,
    study: Study | None,
) -> dict[Role, TokenWindows]:
    """Return the text that is asked for: that of the study, or new text.

    Raises:
        DataError: If a text is missing, too short or another one.
        StudyError: If the tokens of the study cannot be had.
    """
    if config.data.name != STUDY_TEXT:
        if config.data.source == "packaged" and (missing := documents.missing_package()):
            raise DataError(missing)
        tokenizer = load_tokenizer(ModelSource("hf", str(folder)))
        return make_windows(config.data, tokenizer, seed=config.seed)
    if study is None:
        name = about.get("study")
        what = (
            f"{folder} is of the study {name}, which is not in {config.studies} with the same "
            "model; say where with studies=FOLDER, or"
            if isinstance(name, str)
            else f"{folder} is of no study;"
        )
        raise DataError(f"no text to train on: {what} choose text with data=NAME")
    assert source is not None
    examples = planning.examples_of(study.config, source, study)
    windows = {role: each for role, each in examples.items() if isinstance(each, TokenWindows)}
    stated = about.get("data", {})
    if others := [r for r, w in windows.items() if stated.get(r, {}).get("digest") != w.digest]:
        raise DataError(
            f"the study {study.name} has other text now than {folder} says, for "
            f"{', '.join(others)}; choose text with data=NAME"
        )
    return windows


def seen_problems(
    config: RecoverConfig, folder: Path, windows: Mapping[Role, TokenWindows], study: Study | None
) -> list[str]:
    """List text that would be scored and was seen, or trained on and is to be scored."""
    problems = []
    for role in ("validation", "test"):
        for own, share in (seen_shares(folder, windows[role].ids) or {}).items():
            is_expected = role == "validation" and own.startswith("validation")
            if share > SEEN_LIMIT and not is_expected:
                problems.append(
                    f"data.{role}: {share:.1%} of {windows[role].text} is in what {folder} used "
                    f"for {own}, so its score would mean nothing; choose another text, or "
                    "allow_seen=true to score it nevertheless, which the result states"
                )
    if study is not None and config.data.name != STUDY_TEXT:
        with suppress(DataError, StudyError):
            test = planning.examples_of(
                study.config, planning.model_source(study.config.model), study
            )["test"]
            assert isinstance(test, TokenWindows)
            shared = overlaps({"calibration": windows["calibration"], "test": test})
            problems += [
                f"data.calibration: {sentence}; choose another text, or allow_seen=true to train "
                "on it nevertheless"
                for sentence in shared
            ]
    return problems


def split(windows: TokenWindows, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Part windows into those to train on and, spread evenly over all texts, those held back.

    Raises:
        DataError: If there is only one.
    """
    count = len(windows.ids)
    back = max(1, int(count * share))
    if count <= back:
        raise DataError(
            f"data.calibration has {count} window, and {back} is held back to judge by, which "
            "leaves none to train on; give it at least 2"
        )
    held = sorted({(2 * index + 1) * count // (2 * back) for index in range(back)})
    rest = [index for index in range(count) if index not in {*held}]
    return windows.ids[rest], windows.ids[held]
