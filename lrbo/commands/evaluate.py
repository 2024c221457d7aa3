"""Score a checkpoint, or a dense model, on the test text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrbo import builders, checks, export, texts
from lrbo.errors import ConfigError
from lrbo.evaluation.perplexity import score
from lrbo.loading import (
    ModelSource,
    load_model,
    load_tokenizer,
    missing_package,
    resolve_device,
    resolve_dtype,
)
from lrbo.progress import Reporter
from lrbo.schema import EvaluateConfig


def run(chosen: EvaluateConfig, reporter: Reporter) -> dict[str, Any]:
    """Score a checkpoint, or a dense model, on the test text.

    Raises:
        ConfigError: If a value cannot work or the text is too short.
        CheckpointError: If the checkpoint cannot be opened.
        ModelError: If the model cannot be loaded.
    """
    problems = checks.check(chosen)
    source = builders.model_source(chosen.model)
    if chosen.checkpoint is None:
        problems += [problem for problem in [missing_package(source)] if problem]
    if problems:
        raise ConfigError(problems)
    device = resolve_device(chosen.model.device)
    dtype = resolve_dtype(chosen.model.dtype, device)
    tokenizer, load = _to_evaluate(chosen, source)
    windows = texts.test_windows(chosen, tokenizer)
    model = load(dtype, device)
    with reporter.step("Evaluation", windows.scored_tokens, "tokens") as advance:
        found = score(
            model,
            windows.ids,
            batch_windows=chosen.batch_windows,
            chunk_tokens=chosen.chunk_tokens,
            on_tokens=advance,
        )
    window = windows.ids.shape[1]
    name = chosen.checkpoint or chosen.model.path
    Console(highlight=False).print(
        f"{name}: perplexity {found.value:.4f} (nll {found.mean:.5f} nats/token)\n"
        f"on {windows.text}: {found.tokens:,} tokens in {len(windows.ids)} windows of {window}, "
        f"stride {window}, {model.dtype} on {device}",
        markup=False,
        emoji=False,
        soft_wrap=True,
    )
    return {
        "text": windows.text,
        "window": window,
        "stride": window,
        "tokens": found.tokens,
        "nll": found.mean,
        "perplexity": found.value,
    }


def _to_evaluate(
    chosen: EvaluateConfig, source: ModelSource
) -> tuple[PreTrainedTokenizerBase, Callable[[torch.dtype, torch.device], PreTrainedModel]]:
    """Return the tokenizer, and what loads the model once the text is known to be long enough."""
    folder = chosen.checkpoint
    if folder is None:
        return load_tokenizer(source), lambda dtype, device: load_model(
            source, dtype=dtype, device=device
        )
    if export.is_checkpoint(folder):
        tokenizer = load_tokenizer(ModelSource("hf", folder))
        return tokenizer, lambda dtype, device: export.load(folder, dtype=dtype, device=device)
    plain = ModelSource("hf", folder)
    return load_tokenizer(plain), lambda dtype, device: load_model(
        plain, dtype=dtype, device=device
    )
