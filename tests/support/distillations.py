"""Tiny models compressed by plain SVD, for the tests of stages that train them as a whole."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.config.distillation import DistillConfig, TrainingConfig
from lrbo.factorization.options import BaseOptions
from lrbo.pipeline.in_memory import factorize
from lrbo.progress import PlainConsole, Reporter
from lrbo.recovery.stage import Recovery, StageReport
from lrbo.recovery.trainable import make_trainable
from lrbo.tasks.causal_lm import CausalLM
from tests.support.tiny import build, token_ids

QUIET = Reporter(PlainConsole(quiet=True))
FAST = DistillConfig(lr=5e-3, epochs=1, batch_windows=2, evaluate_every=4, patience=100)


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model of random weights prefer some tokens by far."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
    return model


def recovery_of(
    folder: Path,
    settings: TrainingConfig = FAST,
    *,
    case: str = "llama_untied",
    form: str = "factored",
    keep: float = 0.6,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Recovery:
    """Return a tiny model that was compressed by plain SVD, in training."""
    dense = sharpened(build(case)).to(dtype)
    model = copy.deepcopy(dense)
    made = factorize(model, None, "svd", forms=[form], bases=BaseOptions("nearest"), progress=False)
    made.compress_(model, made.uniform(keep, measure="bytes"))
    folder.mkdir(exist_ok=True)
    made_of = Recovery(
        model, make_trainable(model), dense, CausalLM(), token_ids(16, 12), token_ids(4, 12, 1),
        settings, lambda: 1000.0, folder, QUIET, lambda *_: None, seed=0,
    )  # fmt: skip
    return replace(made_of, **changes)


def parameters(recovery: Recovery) -> dict[str, Tensor]:
    return recovery.trainables.state()


def held_back_kl(recovery: Recovery) -> float:
    """Work out the divergence from all logits at once."""
    with torch.no_grad():
        log_p, log_q = (
            each(recovery.held_back).logits[:, :-1].float().log_softmax(-1)
            for each in (recovery.dense, recovery.model)
        )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


class Killed(BaseException):
    """Ends the process."""


def interrupted(run: Callable[[Recovery], StageReport], recovery: Recovery, step: int) -> None:
    """Run a stage whose process ends in a step, after it has written a checkpoint."""

    def die(name: str, _: float, now: int) -> None:
        if now == step and name.endswith("/kl"):
            raise Killed

    with pytest.raises(Killed):
        run(replace(recovery, log=die))
