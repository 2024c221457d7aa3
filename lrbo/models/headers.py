"""The tensors in the files of a model, mapped into memory: names, shapes, ties; and adapters."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Container, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors.torch import load_file
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
    """Refuse an adapter, which transformers would add to the weights unseen by any allocation."""
    for name in ADAPTERS:
        if (folder / name).exists():
            raise adapter_error(repr(str(folder)), name)


def adapter_error(label: str, file: str) -> ModelError:
    """Return the error of a model with an adapter file, which says how to merge it."""
    return ModelError(
        f"model {label} comes with an adapter ({file}), expected plain weights; merge it with "
        "PeftModel.from_pretrained(base, adapter).merge_and_unload() and write that with "
        "save_pretrained, or remove the adapter's files."
    )


def weight_files(folder: Path, explicit: object = None) -> list[Path]:
    """Return the files of weights in a folder that transformers reads, if there are any.

    ``explicit``, the ``transformers_weights`` of ``config.json``, names one. A damaged index, and
    a name of a file elsewhere, are ModelErrors.
    """
    names = WEIGHTS if explicit is None else (_file_name(explicit, folder / CONFIG),)
    first = [folder / name for name in names if (folder / name).is_file()][:1]
    if not first or first[0].suffix != ".json":
        return first
    with reading(ModelError, f"cannot read {first[0]}"):
        files = json.loads(first[0].read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({folder / _file_name(file, first[0]) for file in files})


def _file_name(file: object, source: Path) -> str:
    """Refuse the name of a file that is not beside ``source``; it may be a link, as in a cache."""
    # A folder of Windows may come to Linux, and the other way round.
    if (
        isinstance(file, str)
        and file not in ("", ".", "..")
        and PurePosixPath(file).name == file == PureWindowsPath(file).name
    ):
        return file
    raise ModelError(
        f"{source} names the file {file!r}, expected the name of a file beside it; take the "
        "model's folder from its source again."
    )


def tensors_of(folder: Path, label: str, explicit: object = None) -> dict[str, Tensor]:
    """Map the tensors in a folder that transformers reads into memory, by name.

    ``label`` names the model in messages, ``explicit`` is as for :func:`weight_files`. No weights,
    a file that is damaged or elsewhere, and a tensor in two files are ModelErrors.
    """
    tensors: dict[str, Tensor] = {}
    files: dict[str, str] = {}  # by tensor
    for path in weight_files(folder, explicit):
        for name, tensor in tensors_in(path).items():
            if name in tensors:
                raise ModelError(
                    f"model {label} holds {name} twice, in {files[name]} and in {path.name}, "
                    "expected it once: it is not clear which of them is meant. Copy it whole."
                )
            tensors[name], files[name] = tensor, path.name
    if not tensors:
        raise ModelError(
            f"cannot load model {label}: the folder holds no weights, expected "
            f"{' or '.join(WEIGHTS)}; copy it whole."
        )
    return tensors


def tensors_in(file: Path) -> dict[str, Tensor]:
    """Map tensors by name without running code; a damaged file or other content: ModelError."""
    with reading(ModelError, f"cannot read {file}"):
        if file.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(file)
            return tensors
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    entries = content.items() if isinstance(content, Mapping) else [(None, content)]
    for name, value in entries:
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ModelError(
                f"{file} holds {'a value' if name is None else repr(name)} of type "
                f"{type(value).__name__}, expected tensors by name; load them into the model in "
                "your program, and write it with model.save_pretrained."
            )
    return dict(entries)


def stored_names(model: PreTrainedModel, name: str, stored: Container[str]) -> list[str]:
    """Return the names under which a model's parameter is stored: some leave the prefix out."""
    prefix = f"{model.base_model_prefix}."
    choices = (name, name.removeprefix(prefix), f"{prefix}{name}", RENAMED.get(name, name))
    return [choice for choice in dict.fromkeys(choices) if choice in stored]


def stores_own_head(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> bool:
    """Whether files hold a head other than the embedding that the model ties it to.

    transformers then leaves the two apart; files of ``torch.save`` hold a tied one twice.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = [[stored_names(model, name, tensors) for name in pair] for pair in tied.items()]
    return any(
        all(names) and not torch.equal(*(tensors[each[0]] for each in names)) for names in pairs
    )
