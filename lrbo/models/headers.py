"""What the files of a model hold, from their headers: names, shapes, ties, and adapters beside."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.errors import ModelError, reading

# What transformers calls them, in the order in which it takes them.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
# Where files of a family call a parameter other than the model does.
RENAMED = {"lm_head.weight": "embed_out.weight"}


def refuse_adapters(folder: Path) -> None:
    """Refuse an adapter: transformers would add it to the weights, and no allocation knows it.

    Raises:
        ModelError: Naming the file, and how to merge.
    """
    names = {path.name for path in folder.iterdir()}
    if beside := [name for name in ADAPTERS if name in names]:
        raise adapted(repr(str(folder)), beside[0])


def adapted(named: str, file: str) -> ModelError:
    """Return what to do with a model that comes with an adapter.

    Args:
        named: What the model is called in an error.
        file: Of the adapter.
    """
    return ModelError(
        f"model {named} comes with an adapter ({file}), expected plain weights; merge it "
        "with PeftModel.from_pretrained(base, adapter).merge_and_unload(), write that with "
        "save_pretrained and give the new folder, or take the adapter's files away."
    )


def weight_files(folder: Path, explicit: object = None) -> list[Path]:
    """Return the files of weights that transformers reads of a folder; none where it has none.

    Args:
        folder: Of the model.
        explicit: What ``config.json`` calls ``transformers_weights``.

    Raises:
        ModelError: If an index is damaged, or it or ``config.json`` names a file elsewhere.
    """
    names = WEIGHTS if explicit is None else (require_name(explicit, folder / CONFIG),)
    first = next((folder / name for name in names if (folder / name).is_file()), None)
    if first is None:
        return []
    return sorted(set(files_of(first).values())) if first.name.endswith(".json") else [first]


def files_of(index: Path) -> dict[str, Path]:
    """Return the file of each tensor that an index lists.

    Raises:
        ModelError: If it is damaged, or names a file that is not beside it: who opens a folder
            means what is in it.
    """
    with reading(ModelError, f"cannot read {index}"):
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: index.parent / require_name(file, index) for name, file in where.items()}


def require_name(file: object, source: Path) -> str:
    """Return a name in a file that is that of one beside it; a link may be, as in a cache.

    Raises:
        ModelError: If it leads elsewhere.
    """
    # A folder of Windows may come to Linux, and the other way round.
    if (
        isinstance(file, str)
        and file not in ("", ".", "..")
        and PurePosixPath(file).name == file == PureWindowsPath(file).name
    ):
        return file
    raise ModelError(
        f"{source} names the file {file!r}, expected the name of a file beside it, without a "
        "folder; take the model's folder from its source again."
    )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, without its numbers.

    Attributes:
        file: That holds it.
        shape: Of it.
        is_floating_point: Whether its numbers are, of any precision.
    """

    file: Path
    shape: tuple[int, ...]
    is_floating_point: bool


def tensors_of(
    folder: Path, named: str | None = None, explicit: object = None
) -> dict[str, StoredTensor]:
    """Return the tensors that transformers reads of a folder, by name.

    Args:
        folder: Of the model.
        named: What the model is called in an error; by default its folder.
        explicit: What ``config.json`` calls ``transformers_weights``.

    Raises:
        ModelError: If there are no weights, a file is damaged or elsewhere, or two hold the same.
    """
    named = named or repr(str(folder))
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder, explicit):
        inside = tensors_in(file)
        if twice := sorted(inside.keys() & tensors.keys()):
            raise ModelError(
                f"model {named} holds {twice[0]} twice, in {tensors[twice[0]].file.name} and in "
                f"{file.name}, expected it once: which of them would be read is not said. Copy it "
                "whole."
            )
        tensors |= inside
    if not tensors:
        raise ModelError(
            f"cannot load model {named}: the folder holds no weights, expected "
            f"{' or '.join(WEIGHTS)}; copy it whole."
        )
    return tensors


def tensors_in(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name.

    Of a safetensors file the header is read. A pickle is opened as transformers does it, where
    only tensors and values that run nothing can come out.

    Raises:
        ModelError: If it is damaged, or holds something else than tensors by name.
    """
    if file.suffix != ".safetensors":
        return {
            name: StoredTensor(file, tuple(tensor.shape), tensor.is_floating_point())
            for name, tensor in _unpickled(file).items()
        }
    with reading(ModelError, f"cannot read {file}"), safe_open(str(file), "pt") as opened:
        reader: Any = opened
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
        return {  # F32, BF16 and so on, but not I8
            name: StoredTensor(file, tuple(part.get_shape()), "F" in part.get_dtype())
            for name, part in slices.items()
        }


def read_tensor(file: Path, key: str) -> Tensor:
    """Return a tensor as it is stored, on the CPU.

    Raises:
        ModelError: If the file is damaged, naming both.
    """
    if file.suffix != ".safetensors":
        return _unpickled(file)[key]
    try:
        with safe_open(str(file), framework="pt") as opened:
            reader: Any = opened
            tensor: Tensor = reader.get_tensor(key)
            return tensor
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {key} from {file}: {error}") from error


def _unpickled(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of ``torch.save``, mapped into memory where that can be.

    Raises:
        ModelError: If it is damaged, or holds something else than tensors by name.
    """
    with reading(ModelError, f"cannot read {file}"):
        held = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    if not isinstance(held, Mapping):
        raise ModelError(
            f"{file} holds a value of type {type(held).__name__}, expected tensors by name; "
            "write it with model.save_pretrained."
        )
    for name, value in held.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ModelError(
                f"{file} holds {name!r} of type {type(value).__name__}, expected tensors by name, "
                "as model.state_dict() has them; load them into the model in your program, and "
                "write it with model.save_pretrained."
            )
    return dict(held)


def stored_names(model: PreTrainedModel, name: str, stored: Container[str]) -> list[str]:
    """Return the names under which a parameter is stored: some files leave the prefix out.

    Args:
        model: Whose parameter it is.
        name: In the model's own naming.
        stored: Names in the files.
    """
    prefix = f"{model.base_model_prefix}."
    choices = (name, name.removeprefix(prefix), f"{prefix}{name}", RENAMED.get(name, name))
    return [choice for choice in dict.fromkeys(choices) if choice in stored]


def stores_own_head(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> bool:
    """Return whether files hold a head other than the embedding that ``config.json`` ties it to.

    transformers then leaves the two apart; files of ``torch.save`` hold a tied one twice.

    Args:
        model: As ``config.json`` describes it, perhaps on the meta device.
        stored: What the files hold, by name.

    Raises:
        ModelError: If a file is damaged.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for pair in tied.items():
        names = [stored_names(model, name, stored) for name in pair]
        if all(names):
            one, other = (read_tensor(stored[known[0]].file, known[0]) for known in names)
            if one.shape != other.shape or not torch.equal(one, other):
                return True
    return False
