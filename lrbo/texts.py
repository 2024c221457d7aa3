"""Which token windows a search uses: cut from text, or as its study has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lrbo.calibration import corpus
from lrbo.calibration.corpus import CorpusSpec, Role, RoleText, TokenWindows
from lrbo.checks import role_paths
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

    Of validation these are the whole pool until windows have been chosen from it.
    """
    stored = tokens_file(study)
    if study.exists and stored.is_file():  # a file alone may be of settings that were given up
        windows = corpus.load_windows(stored)
    else:
        spec = corpus_spec(config.data, config.seed, config.evaluation.pool_tokens)
        windows = corpus.make_windows(spec, load_tokenizer(source))
    if chosen := study.state.chosen:
        windows["validation"] = windows["validation"].only(chosen["windows"])
    return windows


def tokens_file(study: Study) -> Path:
    """Return where the token windows of a study are; of validation, the whole pool."""
    return study.folder / "tokens.safetensors"
