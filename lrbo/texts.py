"""Which token windows a search uses: cut from text, or as its study has them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lrbo.calibration import corpus
from lrbo.calibration.corpus import CorpusSpec, Role, RoleText, TokenWindows
from lrbo.checks import role_paths
from lrbo.errors import DataError, StudyError
from lrbo.loading import ModelSource, load_tokenizer
from lrbo.optimization.study import Study
from lrbo.schema import DataConfig, SearchConfig


def corpus_spec(config: DataConfig, seed: int, pool_tokens: int | None = None) -> CorpusSpec:
    """Return what decides the token windows; roles without a text are left out.

    Args:
        config: The values.
        seed: Draws windows.
        pool_tokens: Of validation text, where its windows are chosen from a pool.
    """
    roles = {
        role: RoleText(role_paths(found), found.tokens, format=found.format, column=found.column)
        for role in corpus.ROLES
        if role_paths(found := getattr(config, role))
    }
    if pool_tokens is not None:
        pool = replace(roles["validation"], tokens=pool_tokens, key="evaluation.pool_tokens")
        roles["validation"] = pool
    return CorpusSpec(config.source, roles, config.window, config.max_windows, seed, config.bos)


def token_windows(
    config: SearchConfig, source: ModelSource, study: Study
) -> Mapping[Role, TokenWindows]:
    """Return the token windows: those of the study, or newly cut ones.

    Of validation these are the whole pool until windows have been chosen from it. A file that is
    missing or damaged is made again where the texts still give the tokens of the study.

    Raises:
        DataError: If a text is missing, or too short.
        StudyError: If they are not the tokens that the study was begun with.
    """
    file = tokens_file(study)
    if not study.exists:  # a file alone may be of settings that were given up
        return _cut(config, source)
    expected = study.about()["data"]
    windows: dict[Role, TokenWindows] = {}
    with suppress(DataError):
        windows = corpus.load_windows(file)
    if _strangers(windows, expected):
        windows = _cut(config, source)
        if strangers := _strangers(windows, expected):
            raise StudyError(
                f"{file} is missing, damaged or of other tokens, and the texts give others by now "
                f"for {', '.join(strangers)}: their digests are not those in study.json. Restore "
                "the file or the texts, or begin another study=NAME"
            )
        study.remake(file, lambda: corpus.save_windows(file, windows))
    if chosen := study.state.chosen:
        windows["validation"] = windows["validation"].only(chosen["windows"])
        if windows["validation"].digest != chosen["digest"]:
            raise StudyError(
                f"{study.journal}: the windows of the event chosen have the digest "
                f"{windows['validation'].digest}, it says {chosen['digest']}; restore the file, or "
                "begin another study=NAME"
            )
    return windows


def _cut(config: SearchConfig, source: ModelSource) -> dict[Role, TokenWindows]:
    """Cut windows from the texts."""
    spec = corpus_spec(config.data, config.seed, config.evaluation.pool_tokens)
    return corpus.make_windows(spec, load_tokenizer(source))


def _strangers(
    windows: Mapping[Role, TokenWindows], expected: Mapping[Role, Mapping[str, object]]
) -> list[Role]:
    """Return the roles whose windows are not those that a study was begun with."""
    return [
        role
        for role, about in expected.items()
        if role not in windows
        or (len(windows[role].ids), windows[role].digest) != (about["windows"], about["digest"])
    ]


def tokens_file(study: Study) -> Path:
    """Return where the token windows of a study are; of validation, the whole pool."""
    return study.folder / "tokens.safetensors"
