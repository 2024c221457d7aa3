"""The parameters in training and their loss: what the Trainer of transformers takes for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from lrbo.config.distillation import CACHED, TrainingConfig
from lrbo.errors import NonFiniteError
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


class Windows(Dataset[dict[str, Any]]):
    """Windows of tokens with their numbers."""

    def __init__(self, windows: Int[Tensor, "windows tokens"]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"ids": self.windows[index], "index": index}


class Target(NamedTuple):
    """What the dense model makes of windows."""

    teacher: Teacher | None  # None where its distributions do not count
    states: Any  # None where they were not worked out


class Student(nn.Module):
    """The loss of windows; its parameters are those of the compressed model that are trained.

    Attributes:
        tokens: That were trained on.
        last: Parts of the loss of the last batch, without their weights.
    """

    def __init__(self, recovery: Recovery, trained: Mapping[str, nn.Parameter]) -> None:
        """Take the parameters by name."""
        super().__init__()
        settings = recovery.settings
        assert isinstance(settings, TrainingConfig)
        # A name of a parameter has no dots.
        self.trained = nn.ParameterDict({n.replace(".", "/"): p for n, p in trained.items()})
        self.models = recovery.model, recovery.dense  # in a tuple they are no submodules
        self.settings = settings
        self.chunk_tokens: int = getattr(recovery.task, "chunk_tokens", 256)
        self._stored: dict[int, DenseReference] = {}
        self.tokens, self.last = 0, dict[str, float]()

    def forward(self, ids: Int[Tensor, "b tokens"], index: Int[Tensor, " b"]) -> dict[str, Tensor]:
        """Return the mean loss of windows, which have numbers, over all tokens but the first.

        Raises:
            NonFiniteError: If it is not finite for a token.
        """
        ids = ids.to(self.models[0].device)
        self.tokens += ids.numel()
        return {"loss": self.loss(ids, self._target(ids, index))}

    def loss(self, ids: Int[Tensor, "b tokens"], target: Target) -> Tensor:
        """Return the loss of a pass of the compressed model."""
        return self.compared(self.states(ids), ids, target)

    def states(self, ids: Int[Tensor, "b tokens"]) -> Any:
        """Run the compressed model up to its head."""
        return self._run(body_and_head(self.models[0])[0], ids)

    def compared(self, own: Any, ids: Int[Tensor, "b tokens"], target: Target) -> Tensor:
        """Return the loss of states of the compressed model, and note its parts."""
        settings = self.settings
        weights = Weights(settings.kl, settings.ce, settings.temperature)
        following = ids[:, 1:].flatten()
        loss = chunked_loss(
            scored(own), self.head, following, target.teacher, weights, self.chunk_tokens
        )
        self.last, total = {"kl": loss.kl, "nll": loss.nll}, loss.total
        if settings.hidden and target.states is not None:
            distance = hidden_distance(own.hidden_states[1:], target.states.hidden_states[1:])
            self.last["hidden"] = float(distance.detach())
            total = total + settings.hidden * distance
        return total

    def require_finite_gradients(self) -> None:
        """Refuse gradients that are not finite, before they reach a parameter.

        Raises:
            NonFiniteError: With the number of their elements that are not.
        """
        gradients = [each.grad for each in self.parameters() if each.grad is not None]
        if not torch.isfinite(torch.stack([each.sum() for each in gradients]).sum()):
            bad = sum(int((~torch.isfinite(each)).sum()) for each in gradients)
            if bad:
                raise NonFiniteError(f"{bad} elements of the gradient are not finite")

    @property
    def head(self) -> nn.Module:
        """The compressed model's head."""
        return body_and_head(self.models[0])[1]

    @torch.no_grad()
    def _target(self, ids: Int[Tensor, "b tokens"], index: Int[Tensor, " b"]) -> Target:
        """Run the dense model on windows, as far as the loss counts it."""
        settings, dense = self.settings, self.models[1]
        if settings.teacher == CACHED:
            stored = self._references(dense, ids, index.tolist())
            return Target(TopTeacher.of(stored, ids.device), None)
        if not (settings.kl or settings.hidden):
            return Target(None, None)
        body, head = body_and_head(dense)
        states = self._run(body, ids)
        return Target(FullTeacher(scored(states), head), states)

    def _run(self, body: nn.Module, ids: Int[Tensor, "b tokens"]) -> Any:
        return body(ids, use_cache=False, output_hidden_states=self.settings.hidden > 0)

    def _references(
        self, dense: Any, ids: Int[Tensor, "b tokens"], numbers: Sequence[int]
    ) -> list[DenseReference]:
        """Return the stored distributions of windows, gathered when they are first met."""
        for number, window in zip(numbers, ids, strict=True):
            if number not in self._stored:
                self._stored[number] = measure_dense(
                    dense, window[None], top=self.settings.top_k, chunk_tokens=self.chunk_tokens
                )
        return [self._stored[number] for number in numbers]


def scored(states: Any) -> Tensor:
    """Return the finished states that have a next token, window after window."""
    rows: Tensor = states.last_hidden_state[:, :-1].flatten(0, 1)
    return rows
