"""The parameters in training and their loss: what the Trainer of transformers takes for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from lrbo.config.distillation import CACHED, FACTORS, DistillConfig
from lrbo.errors import ModelError
from lrbo.models.model_map import body_and_head
from lrbo.recovery.divergence import (
    FullTeacher,
    Teacher,
    TopTeacher,
    Weights,
    chunked_loss,
    hidden_distance,
)
from lrbo.recovery.stage import Recovery
from lrbo.tasks.perplexity import DenseReference, measure_dense

SIDES = ("left", "right")  # names of factors among the parameters of a layer


class Windows(Dataset[dict[str, Any]]):
    """Windows of tokens with their numbers."""

    def __init__(self, windows: Int[Tensor, "windows tokens"]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"ids": self.windows[index], "index": index}


class Student(nn.Module):
    """The loss of windows; its parameters are those of the compressed model that are trained.

    Attributes:
        tokens: That were trained on.
        last: Parts of the loss of the last batch, without their weights.
    """

    def __init__(self, recovery: Recovery) -> None:
        """Take the parameters; others no longer have gradients.

        Raises:
            ModelError: If nothing is left to train.
        """
        super().__init__()
        settings = recovery.settings
        assert isinstance(settings, DistillConfig)
        trained = dict(recovery.trainables.named_parameters())
        if settings.train == FACTORS:
            trained = {n: p for n, p in trained.items() if n.rpartition(".")[2] in SIDES}
            for name, parameter in recovery.trainables.named_parameters():
                parameter.requires_grad_(name in trained)
        if not trained:
            raise ModelError(
                f"nothing to train: no layer has what train={settings.train} trains, expected "
                "low ranks; take train=all"
            )
        # A name of a parameter has no dots.
        self.trained = nn.ParameterDict({n.replace(".", "/"): p for n, p in trained.items()})
        self._models = recovery.model, recovery.dense  # in a tuple they are no submodules
        self._settings = settings
        self._chunk_tokens: int = getattr(recovery.task, "chunk_tokens", 256)
        self._stored: dict[int, DenseReference] = {}
        self.tokens, self.last = 0, dict[str, float]()

    def forward(self, ids: Int[Tensor, "b tokens"], index: Int[Tensor, " b"]) -> dict[str, Tensor]:
        """Return the mean loss of windows, which have numbers, over all tokens but the first.

        Raises:
            NonFiniteError: If it is not finite for a token.
        """
        (model, dense), settings = self._models, self._settings
        body, head = body_and_head(model)
        ids = ids.to(model.device)
        self.tokens += ids.numel()
        own, wanted = self._states(body, ids), None
        teacher: Teacher | None = None
        with torch.no_grad():
            if settings.teacher == CACHED:
                teacher = TopTeacher.of(self._references(dense, ids, index.tolist()), ids.device)
            elif settings.kl or settings.hidden:
                dense_body, dense_head = body_and_head(dense)
                wanted = self._states(dense_body, ids)
                teacher = FullTeacher(_scored(wanted), dense_head)
        weights = Weights(settings.kl, settings.ce, settings.temperature)
        following = ids[:, 1:].flatten()
        loss = chunked_loss(_scored(own), head, following, teacher, weights, self._chunk_tokens)
        self.last, total = {"kl": loss.kl, "nll": loss.nll}, loss.total
        if settings.hidden and wanted is not None:
            distance = hidden_distance(own.hidden_states[1:], wanted.hidden_states[1:])
            self.last["hidden"] = float(distance.detach())
            total = total + settings.hidden * distance
        return {"loss": total}

    def _states(self, body: nn.Module, ids: Int[Tensor, "b tokens"]) -> Any:
        """Run a model up to its head."""
        return body(ids, use_cache=False, output_hidden_states=self._settings.hidden > 0)

    def _references(
        self, dense: Any, ids: Int[Tensor, "b tokens"], numbers: Sequence[int]
    ) -> list[DenseReference]:
        """Return the stored distributions of windows, gathered when they are first met."""
        for number, window in zip(numbers, ids, strict=True):
            if number not in self._stored:
                self._stored[number] = measure_dense(
                    dense, window[None], top=self._settings.top_k, chunk_tokens=self._chunk_tokens
                )
        return [self._stored[number] for number in numbers]


def _scored(states: Any) -> Tensor:
    """Return the finished states that have a next token, window after window."""
    rows: Tensor = states.last_hidden_state[:, :-1].flatten(0, 1)
    return rows
