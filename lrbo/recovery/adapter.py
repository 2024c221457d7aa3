"""End to end with adapters: a small update of each factor is trained, and added to it at last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lrbo.config.distillation import ALL, DIAGONAL, FORMS, AdapterConfig
from lrbo.errors import ModelError
from lrbo.recovery.distill import Distillation, spent
from lrbo.recovery.stage import Recovery, StageReport
from lrbo.recovery.states import read_tensors, write_tensors
from lrbo.recovery.updates import Update, largest_rank, make_update

__all__ = ["run", "spent"]

START = "start.safetensors"
Shapes = Mapping[str, tuple[int, int]]


def run(recovery: Recovery) -> StageReport:
    """Train updates of factors and thin layers alone, and leave the best sum of both.

    The loss, the windows held back and the report are those of :mod:`lrbo.recovery.distill`.
    Updates are 0 at first, so that it begins with the function of the model, and are added to the
    tensors that they are of, so that it ends with the same shapes.

    Raises:
        ModelError: If no matrix can have such an update.
        NonFiniteError: As of ``distill``.
    """
    return Adaptation(recovery).run()


class Adaptation(Distillation):
    """A training of updates that torch adds to the parameters wherever a layer reads them."""

    name: ClassVar[str] = "adapter"

    @override
    def _parameters(self) -> dict[str, nn.Parameter]:
        settings, trainables = self.settings, self.recovery.trainables
        assert isinstance(settings, AdapterConfig)
        path = self.recovery.folder / START
        if (read := read_tensors(path)) is not None:  # what updates begun elsewhere are of
            trainables.load_state(read[1])
        else:
            write_tensors(path, trainables.state(), {})
        every = dict(trainables.named_parameters())
        matrices = {name: every[name] for name in every if name in trainables.matrices}
        shapes = {name: (len(matrix), matrix.shape[1]) for name, matrix in matrices.items()}
        if problems := adapter_problems(settings, shapes):
            raise ModelError("; ".join(problems))
        generator = torch.Generator().manual_seed(self.recovery.seed)
        self.updates: dict[str, Update] = {
            name: make_update(settings, name, matrix, generator)
            for name, matrix in matrices.items()
            if is_adapted(settings, name)
        }
        for parameter in every.values():
            parameter.requires_grad_(False)
        for name, update in self.updates.items():
            parametrize.register_parametrization(*self._owner(name), update, unsafe=True)
        return {
            f"{name}.{own}": parameter
            for name, update in self.updates.items()
            for own, parameter in update.named_parameters()
        }

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        layer, _, own = name.rpartition(".")
        return self.recovery.trainables.modules[layer], own

    @override
    def _about(self) -> str:
        assert isinstance(self.settings, AdapterConfig)
        every = dict(self.recovery.trainables.named_parameters())
        whole = sum(every[name].numel() for name in self.updates)
        about = f" in place of the {whole:,} of {len(self.updates)} matrices"
        cut = [name for name in self.updates if _is_cut(self.settings, tuple(every[name].shape))]
        return f"{about}, {len(cut)} of which have a smaller rank" if cut else about

    @override
    def _state(self) -> dict[str, Tensor]:
        with torch.no_grad():
            sums = {name: getattr(*self._owner(name)).cpu() for name in self.updates}
        return super()._state() | sums

    @override
    def _put_back(self) -> None:
        for name in self.updates:
            parametrize.remove_parametrizations(*self._owner(name), leave_parametrized=False)
        super()._put_back()

    @property
    @override
    def _lr(self) -> float:
        assert isinstance(self.settings, AdapterConfig)
        return self.settings.lr or FORMS[self.settings.form].lr

    @override
    def _matrices(self) -> frozenset[str]:
        return frozenset(
            f"{name}.{own}"
            for name, update in self.updates.items()
            for own, parameter in update.named_parameters()
            if parameter.dim() == 2
        )


def is_adapted(settings: AdapterConfig, name: str) -> bool:
    """Whether a matrix of a name has an update."""
    return settings.sides == ALL or name.rpartition(".")[2] == settings.sides


def adapter_problems(
    settings: AdapterConfig, shapes: Shapes, prefix: str = "recover.adapter."
) -> list[str]:
    """List why no matrix of these shapes, by name, can have the updates asked for."""
    own = {name: shape for name, shape in shapes.items() if is_adapted(settings, name)}
    if not own:
        sides = "" if settings.sides == ALL else f", {prefix}sides={settings.sides}"
        return [
            "stage adapter: the checkpoint has no matrix to add an update to, expected layers with "
            f"a low rank or fewer neurons{sides}; take another stage, distill trains all numbers"
        ]
    if settings.form == DIAGONAL:
        return []
    fits = {name: largest_rank(settings.form, shape) for name, shape in own.items()}
    largest = max(fits, key=lambda name: fits[name])
    rank = settings.rank or FORMS[settings.form].rank
    if rank <= fits[largest]:
        return []
    rows, columns = own[largest]
    return [
        f"{prefix}rank={rank}: expected at most {fits[largest]}, which is all that the largest "
        f"matrix can have, {largest} of {rows} by {columns}"
    ]


def count_numbers(settings: AdapterConfig, shapes: Shapes) -> int:
    """Count the numbers that are trained."""
    generator = torch.Generator()
    updates = (
        make_update(settings, name, torch.empty(shape, device="meta"), generator)
        for name, shape in shapes.items()
        if is_adapted(settings, name)
    )
    return sum(parameter.numel() for update in updates for parameter in update.parameters())


def _is_cut(settings: AdapterConfig, shape: tuple[int, ...]) -> bool:
    if settings.form == DIAGONAL:
        return False
    rank = settings.rank or FORMS[settings.form].rank
    return rank > largest_rank(settings.form, (shape[0], shape[1]))
