"""What the files of a model hold, from their headers: names, shapes, ties, and adapters beside."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Container, Iterable, Mapping
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
ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
# Where files of a family call a parameter other than the model does.
RENAMED = {"lm_head.weight": "embed_out.weight"}


def refuse_adapters(files: Iterable[str], named: str) -> None:
    """Refuse an adapter: transformers would add it to the weights, and no allocation knows it.

    Args:
        files: Names that are there.
        named: What the model is called in an error.

    Raises:
        ModelError: Naming the file, and how to merge.
    """
    names = set(files)
    if beside := [name for name in ADAPTERS if name in names]:
        raise ModelError(
            f"model {named} comes with an adapter ({beside[0]}), expected plain weights; merge it "
            "with PeftModel.from_pretrained(base, adapter).merge_and_unload(), write that with "
            "save_pretrained and give the new folder, or take the adapter's files away."
        )


def weight_files(folder: Path, explicit: str | None = None) -> list[Path]:
    """Return the files of weights that transformers reads of a folder; none where it has none.

    Args:
        folder: Of the model.
        explicit: What ``config.json`` calls ``transformers_weights``.

    Raises:
        ModelError: If an index is damaged, or names a file elsewhere.
    """
    names = WEIGHTS if explicit is None else (explicit,)
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


def require_name(file: object, index: Path) -> str:
    """Return a name in an index that is that of a file beside it; a link may be, as in a cache.

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
        f"{index} names the file {file!r}, expected the name of a file beside it, without a "
        "folder; take the model's folder from its source again."
    )


def tensors_in(file: Path) -> tuple[dict[str, Tensor], set[str]]:
    """Return the tensors of a file on the meta device, and the names of those that are integers.

    Of a safetensors file the header is read. A pickle is opened as transformers does it, where
    only tensors and values that run nothing can come out.

    Raises:
        ModelError: If it is damaged, or holds something else than tensors by name.
    """
    if file.suffix != ".safetensors":
        tensors = _unpickled(file)
        integers = {name for name, t in tensors.items() if not t.is_floating_point()}
        return {name: tensor.to("meta") for name, tensor in tensors.items()}, integers
    found, integers = {}, set()
    with reading(ModelError, f"cannot read {file}"), safe_open(str(file), "pt") as opened:
        reader: Any = opened
        for name in reader.keys():  # noqa: SIM118 (not a mapping)
            part = reader.get_slice(name)
            found[name] = torch.empty(part.get_shape(), device="meta")
            if "F" not in part.get_dtype():  # F32, BF16 and so on, but not I8
                integers.add(name)
    return found, integers


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


def stores_own_head(model: PreTrainedModel, stored: Mapping[str, Path]) -> bool:
    """Return whether files hold a head other than the embedding that ``config.json`` ties it to.

    transformers then leaves the two apart; files of ``torch.save`` hold a tied one twice.

    Args:
        model: As ``config.json`` describes it, perhaps on the meta device.
        stored: File of each tensor.

    Raises:
        ModelError: If a file is damaged.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for pair in tied.items():
        names = [stored_names(model, name, stored) for name in pair]
        if all(names):
            one, other = (read_tensor(stored[known[0]], known[0]) for known in names)
            if one.shape != other.shape or not torch.equal(one, other):
                return True
    return False
