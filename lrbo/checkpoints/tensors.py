"""The tensors of a checkpoint's files: which there are, of which shapes, and how many numbers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from lrbo.errors import CheckpointError, ModelError, reading, some
from lrbo.layers.modules import low_rank_layers, parameters_of
from lrbo.layers.options import Option
from lrbo.models import headers


def check_tensors(
    model: PreTrainedModel, stored: Mapping[str, Tensor], where: Path, *, adds: bool = False
) -> None:
    """Compare names and shapes of stored tensors with a model that has its low-rank layers.

    Where layers add to a base, only those of these layers must be there.
    """
    # transformers starts a missing one at random and passes over one too many.
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    excused = {name for pair in tied.items() if stored.keys() & set(pair) for name in pair}
    if adds:  # all others may be those of the base
        layers = tuple(f"{name}." for name in low_rank_layers(model))
        excused |= {name for name in wanted if not name.startswith(layers)}
    missing = sorted(wanted.keys() - stored.keys() - excused)
    unexpected = sorted(stored.keys() - wanted.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"the files of weights in {where} do not fit its config.json: missing "
            f"{some(missing, 3)}, not expected {some(unexpected, 3)}; copy the folder whole."
        )
    for name, tensor in stored.items():
        if tensor.shape != wanted[name]:
            raise CheckpointError(
                f"{name} in {where} has shape {tuple(tensor.shape)}, config.json wants "
                f"{wanted[name]}; the weights or config.json were changed."
            )


def require_inside(files: Iterable[Path], folder: Path) -> None:
    """Refuse files of weights elsewhere, which an index may name; a link in the folder is fine."""
    home = folder.absolute()
    for file in files if folder.is_dir() else []:  # in the hub's cache its client sees to it
        if not Path(os.path.normpath(file.absolute())).is_relative_to(os.path.normpath(home)):
            raise CheckpointError(
                f"the index of {folder} names {file}, expected one in the folder; copy it again."
            )


def read_headers(files: Iterable[Path]) -> dict[str, Tensor]:
    """Map the tensors of files by name, each once; reads the headers alone."""
    stored: dict[str, Tensor] = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise CheckpointError(
                f"{file} is no safetensors file, and lrbo opens no other: a pickle could run code."
            )
        with reading(CheckpointError, "copy the checkpoint again", own=ModelError):
            tensors = headers.tensors_in(file)
        if both := sorted(tensors.keys() & stored.keys()):
            raise CheckpointError(f"{file} holds {both[0]}, and so does another of {file.parent}.")
        stored |= tensors
    return stored


def count_parameters(tensors: Mapping[str, Tensor], units: Mapping[str, str]) -> int:
    """Count the parameters of a model in its tensors; ``units`` are options by name, as written."""
    own: dict[str, dict[str, Tensor]] = {name: {} for name in units}
    others = 0
    for name, tensor in tensors.items():
        parts = name.split(".")
        # A factor of a unit is a module of its own.
        unit = next((u for u in (".".join(parts[:-n]) for n in (1, 2)) if u in own), None)
        if unit is not None:
            own[unit][name.removeprefix(f"{unit}.")] = tensor
        elif tensor.is_floating_point():
            others += tensor.numel()
    return others + sum(parameters_of(Option.parse(units[n]), each) for n, each in own.items())
