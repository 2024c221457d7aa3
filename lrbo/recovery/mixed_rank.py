"""End to end with layers of the dense model in turns: fewer and fewer of them as it goes on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from typing_extensions import override

from lrbo.config.distillation import MixedRankConfig
from lrbo.errors import ModelError
from lrbo.layers.joint import SkippedLinear
from lrbo.layers.low_rank import FormModule
from lrbo.layers.modules import replace_module
from lrbo.layers.shared import SharedLinear
from lrbo.layers.tables import is_table
from lrbo.recovery.distill import Distillation, spent
from lrbo.recovery.divergence import chunked_consistency
from lrbo.recovery.stage import Recovery, StageReport
from lrbo.recovery.student import Student, Target, scored

__all__ = ["run", "spent"]


def run(recovery: Recovery) -> StageReport:
    """Train parameters while some layers, drawn anew at each step, are those of the dense model.

    A layer is the dense one with a probability that falls from ``probability`` to 0 over the share
    ``decay`` of the steps. With ``consistency`` each batch goes through twice, with two draws: the
    loss is the mean of both and ``consistency`` times their symmetric divergence. Everything else
    is as in :mod:`lrbo.recovery.distill`, which it is once the probability is 0.

    Unlike in the paper, where the full-rank weight is trained as well, the dense layer stays as it
    is, and the loss is the divergence from the dense model.

    Raises:
        ModelError: If no layer has a counterpart in the dense model.
        NonFiniteError: As of ``distill``.

    References:
        Ren & Zhu, *Low-Rank Prune-And-Factorize for Language Model Compression* (LPAF), 2023; the
        divergence of two passes is that of Liang et al., *R-Drop*, NeurIPS 2021, equation 2.
    """
    return MixedRank(recovery).run()


class MixedRank(Distillation):
    """A distillation that draws the layers of each step, by the seed and the step alone."""

    name: ClassVar[str] = "mixed_rank"
    student: MixedStudent

    @override
    def _student(self, trained: dict[str, nn.Parameter]) -> MixedStudent:
        return MixedStudent(self.recovery, trained)

    @override
    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        super().on_step_begin(_args, state, _control)
        assert isinstance(self.settings, MixedRankConfig)
        done = self.progress(state.global_step - 1)  # before this step
        left = max(1 - done / self.settings.decay, 0.0)
        self.student.draw(state.global_step, self.settings.probability * left)


class MixedStudent(Student):
    """The loss of passes in which some layers are those of the dense model.

    Attributes:
        units: The names of those that may be, together where they share a factor.
        drawn: The names of those that are, of each pass; no pass where none can be.
    """

    def __init__(self, recovery: Recovery, trained: Mapping[str, nn.Parameter]) -> None:
        """Take the parameters by name.

        Raises:
            ModelError: If no layer has a counterpart in the dense model.
        """
        super().__init__(recovery, trained)
        stored = {name: each.stored for name, each in recovery.trainables.modules.items()}
        self.units, self.seed = units_of(recovery.model, stored), recovery.seed
        if problems := mixed_rank_problems(self.units):
            raise ModelError("; ".join(problems))
        self.probability, self.drawn = 0.0, list[list[str]]()

    def draw(self, step: int, probability: float) -> None:
        """Draw the layers of a step, at least one of which stays: else there is no gradient."""
        assert isinstance(self.settings, MixedRankConfig)
        self.probability, self.drawn = probability, []
        if not probability:
            return
        generator = np.random.default_rng((self.seed, step))
        passes = 2 if self.settings.consistency else 1
        for row in generator.random((passes, len(self.units))) < probability:
            if row.all():
                row[generator.integers(len(row))] = False
            pairs = zip(self.units, row, strict=True)
            self.drawn.append([name for unit, is_dense in pairs if is_dense for name in unit])

    @override
    def loss(self, ids: Int[Tensor, "b tokens"], target: Target) -> Tensor:
        assert isinstance(self.settings, MixedRankConfig)
        model, dense = self.models
        passes, losses, parts = list[Tensor](), list[Tensor](), list[dict[str, float]]()
        for names in self.drawn or [[]]:
            with dense_instead(model, dense, names):
                states = self.states(ids)
            passes.append(scored(states))
            losses.append(self.compared(states, ids, target))
            parts.append(self.last)
        self.last = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        self.last["probability"] = self.probability
        if len(passes) == 1:
            return losses[0]
        divergence = chunked_consistency(passes[0], passes[1], self.head, self.chunk_tokens)
        self.last["consistency"] = float(divergence.detach())
        return torch.stack(losses).mean() + self.settings.consistency * divergence


@contextmanager
def dense_instead(model: nn.Module, dense: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let layers of a model be those of the dense one for a pass; they share no parameters."""
    own = {name: replace_module(model, name, dense.get_submodule(name)) for name in names}
    try:
        yield
    finally:
        for name, module in own.items():
            replace_module(model, name, module)


def units_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """Return the names of layers that the dense model has as well, of the same inputs and outputs.

    Those that share a factor come together. Tables, and parts of an MLP or attention that has lost
    neurons or is skipped, are none.
    """
    units: dict[str, list[str]] = {}
    for name, layer in layers.items():
        is_whole = isinstance(layer, FormModule) and not isinstance(layer, SkippedLinear)
        if is_whole and not is_table(model, name):
            unit = layer.site if isinstance(layer, SharedLinear) else name
            units.setdefault(unit, []).append(name)
    return [tuple(names) for names in units.values()]


def mixed_rank_problems(units: Collection[tuple[str, ...]]) -> list[str]:
    """List why there is nothing to take from the dense model."""
    if units:
        return []
    return [
        "stage mixed_rank: no compressed layer has a counterpart in the dense model, expected "
        "linear layers that are neither thinner nor skipped; take distill"
    ]
