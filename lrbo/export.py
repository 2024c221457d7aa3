"""Write and read a compressed Hugging Face checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lrbo.accounting import STORAGES, Storage
from lrbo.allocation import Allocation
from lrbo.calibration.corpus import Role, TokenWindows
from lrbo.calibration.seen import save_seen
from lrbo.compression import compress_, replace_module
from lrbo.errors import CheckpointError
from lrbo.layers import LowRankLinear, PivotedLinear
from lrbo.lazy import LazyModel
from lrbo.model import is_linear, is_transposed, linear_bias, map_model
from lrbo.nested import NestedFactors
from lrbo.storage import new_folder

FORMAT = 2
FACTORED_ONLY = 1  # an earlier format, without pivoted layers
ABOUT = "lrbo.json"
ALLOCATION = "allocation.json"
# Not model.safetensors: a loader that does not know low-rank layers would find that name, leave
# out what it does not know and start those layers at random. So it says that nothing is there.
WEIGHTS = "lrbo_model.safetensors"
SHARDS = "lrbo_model-*-of-*.safetensors"
SHARD_BYTES = 4 * 2**30


def is_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder holds a compressed checkpoint of this package."""
    return (Path(folder) / ABOUT).is_file()


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    allocation: Allocation,
    about: Mapping[str, Any],
    *,
    storage: Storage,
    parameters: int,
    parts: Iterable[Mapping[str, Tensor]] | None = None,
    windows: Mapping[Role, TokenWindows] | None = None,
) -> int:
    """Write a compressed model as a checkpoint that :func:`load` opens.

    The folder is written beside its place and renamed, so that it is never half there. Weights
    are written in files of about 4 GiB, as they come.

    Args:
        folder: Must not exist.
        model: With its low-rank layers in place.
        tokenizer: Of the dense model.
        allocation: What was decided, kept beside the weights.
        about: Method, base model and whatever else should be remembered.
        storage: The form of the low-rank layers.
        parameters: What the accountant says that the model holds.
        parts: The tensors, some at a time, where the model does not hold them all
            (:func:`streamed`); by default those of ``model``.
        windows: Of the study, so that ``lrbo evaluate`` can refuse what was calibrated on.

    Returns:
        Parameters in the files.

    Raises:
        CheckpointError: If the folder exists, or file and accountant disagree.
    """
    with _new_folder(folder) as beside:
        _write(beside, [_tensors(model)] if parts is None else parts)
        in_file = sum(map(count_parameters, _weights(beside)))
        _require_equal(in_file, parameters, folder)
        model.config.save_pretrained(beside)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if windows is not None:
            save_seen(beside, windows)
        (beside / ALLOCATION).write_text(allocation.to_json() + "\n", encoding="utf-8")
        whole = {"format": FORMAT, "storage": storage, "parameters": parameters, **about}
        (beside / ABOUT).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return in_file


def streamed(
    lazy: LazyModel,
    allocation: Allocation,
    factors: Mapping[str, NestedFactors],
    on_layer: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a compressed model that never is in memory as a whole.

    Args:
        lazy: The dense model; afterwards as before.
        allocation: Ranks by layer name; ``None`` is dense.
        factors: Of the layers with a rank, in the dtype of the model.
        on_layer: Told the name of each layer whose form is made.

    Yields:
        What lies outside the blocks, then one block after the other: what :func:`save` takes.

    Raises:
        KeyError: If a layer with a rank has no factors, or is in no block.
        ModelError: If a tensor is missing or a file is damaged, naming it.
    """
    blocks = {spec.name: spec.block for spec in map_model(lazy.model).compressible}
    if strange := sorted(set(allocation.ranks) - set(blocks)):
        raise KeyError(f"{len(strange)} allocated layers are in no block: {strange[0]} first")
    yield _tensors(lazy.model)  # blocks that are closed are on the meta device
    for index in range(len(lazy)):
        here = {n: rank for n, rank in allocation.ranks.items() if blocks[n] == index}
        with lazy.open_block(index) as block:
            dense = compress_(
                lazy.model, replace(allocation, ranks=here), factors, on_layer=on_layer
            )
            try:
                prefix = lazy.prefix(index)
                yield {f"{prefix}{name}": tensor for name, tensor in _tensors(block).items()}
            finally:
                for name, module in dense.items():
                    replace_module(lazy.model, name, module)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a module, as far as it is in memory."""
    return {
        name: tensor.detach().contiguous().cpu()
        for name, tensor in [*module.named_parameters(), *_places(module)]
        if not tensor.is_meta
    }


def _write(folder: Path, parts: Iterable[Mapping[str, Tensor]]) -> None:
    """Write tensors as they come, into one file or, beyond its size, several."""
    waiting: dict[str, Tensor] = {}
    files: list[Path] = []

    def flush() -> None:
        files.append(folder / f"{len(files)}.part")
        save_file(waiting, files[-1], metadata={"format": "pt"})
        waiting.clear()

    for part in parts:
        if waiting and sum(t.nbytes for t in [*waiting.values(), *part.values()]) > SHARD_BYTES:
            flush()
        waiting |= part
    flush()
    for place, file in enumerate(files, 1):
        shard = SHARDS.replace("*", f"{place:05d}", 1).replace("*", f"{len(files):05d}")
        file.rename(folder / (WEIGHTS if len(files) == 1 else shard))


def _weights(folder: Path) -> list[Path]:
    """Return the files of weights.

    Raises:
        CheckpointError: If one of several is missing.
    """
    shards = sorted(folder.glob(SHARDS))
    if not shards:
        return [folder / WEIGHTS]
    expected = int(shards[0].stem.rpartition("-")[2])
    if len(shards) != expected:
        raise CheckpointError(
            f"{folder} holds {len(shards)} of the {expected} files {SHARDS}; copy it whole."
        )
    return shards


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Open a compressed checkpoint as a normal ``PreTrainedModel``.

    No code of the folder is executed and nothing is unpickled.

    Args:
        folder: What ``lrbo compress`` wrote.
        dtype: Of the weights in memory; ``None`` is that of the file.
        device: Where to.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        CheckpointError: If a file is missing, of another format, or does not hold exactly the
            tensors and the number of parameters that it states.
    """
    folder = Path(folder)
    about = _read_json(folder, ABOUT)
    if about.get("format") not in (FACTORED_ONLY, FORMAT):
        raise CheckpointError(
            f"{folder / ABOUT} has format {about.get('format')!r}, this lrbo reads "
            f"{FACTORED_ONLY} and {FORMAT}; use the version that wrote it."
        )
    storage = "factored" if about["format"] == FACTORED_ONLY else about.get("storage")
    if storage not in STORAGES:
        raise CheckpointError(
            f"{folder / ABOUT} has storage {storage!r}, expected {' or '.join(STORAGES)}."
        )
    try:
        allocation = Allocation.from_dict(_read_json(folder, ALLOCATION))
        tensors: dict[str, Tensor] = {}
        for file in _weights(folder):
            tensors |= load_file(file)
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error}") from error
    # Here and not by model.to(dtype): that would round the rotary frequencies too.
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    specs = map_model(model).by_name
    for name, rank in allocation.ranks.items():
        if name not in specs:
            raise CheckpointError(f"{folder}: {name} in {ALLOCATION} is no layer of the model.")
        if rank is not None:
            spec = specs[name]
            if not 0 <= rank <= min(spec.out_features, spec.in_features):
                raise CheckpointError(f"{folder}: {name} cannot have rank {rank}.")
            kind = PivotedLinear if storage == "pivoted" else LowRankLinear
            bias = f"{name}.bias" in tensors or f"{name}.left.bias" in tensors
            module = kind.empty(spec.out_features, spec.in_features, rank, bias=bias)
            replace_module(model, name, module)
    try:
        # Tied parameters are stored once, so some may be missing; tie_weights brings them back.
        _, strange = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {error}") from error
    model.tie_weights()
    empty = [name for name, p in [*model.named_parameters(), *_places(model)] if p.is_meta]
    if empty or strange:
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit its {ALLOCATION}: missing {empty or 'nothing'}, "
            f"not expected {strange or 'nothing'}."
        )
    for name, places in _places(model):
        if not torch.equal(places.sort().values, torch.arange(len(places), dtype=torch.int32)):
            raise CheckpointError(f"{folder / WEIGHTS}: {name} is no order of its outputs.")
    in_files = sum(map(count_parameters, _weights(folder)))
    _require_equal(in_files, about.get("parameters"), folder)
    return model.to(device=device).eval().requires_grad_(False)


def save_merged(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Mapping[Role, TokenWindows] | None = None,
) -> int:
    """Write dense weights that any loader opens; nothing is saved that way.

    Each low-rank layer is multiplied out in float64. A bias that the method added needs a place:
    the configuration's ``attention_bias`` and ``mlp_bias`` are switched on where the family has
    them, and every layer that gets a bias that way starts from zero.

    Args:
        folder: Must not exist.
        model: With its low-rank layers in place.
        tokenizer: Of the dense model.
        windows: Of the study, so that ``lrbo evaluate`` can refuse what was calibrated on.

    Returns:
        Parameters in the files.

    Raises:
        CheckpointError: If the folder exists, or the architecture has no place for a bias.
    """
    values = model.config.to_dict()
    low_rank = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear | PivotedLinear)
    }
    if any(module.bias is not None for module in low_rank.values()):
        values |= {key: True for key in ("attention_bias", "mlp_bias") if key in values}
    config = type(model.config).from_dict(values)
    with init_empty_weights(include_buffers=False):
        merged: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    tensors = {
        name: tensor
        for name, tensor in model.named_parameters()
        if not any(name.startswith(f"{layer}.") for layer in low_rank)
    }
    homeless = []
    for name, layer in low_rank.items():
        target = merged.get_submodule(name)
        assert is_linear(target)
        weight = layer.multiplied().to(model.dtype)
        tensors[f"{name}.weight"] = weight.T if is_transposed(target) else weight
        bias = linear_bias(layer)
        if bias is not None and linear_bias(target) is None:
            homeless.append(name)
        elif bias is not None:
            tensors[f"{name}.bias"] = bias
    if homeless:
        raise CheckpointError(
            f"{type(model).__name__} has no place for the bias of {len(homeless)} layers "
            f"({homeless[0]} first), which the method added; use merged=false, or a method "
            "without bias."
        )
    for name, parameter in merged.named_parameters():
        if name not in tensors and name.endswith(".bias"):
            tensors[name] = torch.zeros(parameter.shape, dtype=model.dtype, device=model.device)
    merged.load_state_dict(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, strict=False, assign=True
    )
    merged.tie_weights()
    empty = [name for name, p in merged.named_parameters() if p.is_meta]
    assert not empty, empty
    with _new_folder(folder) as beside:
        merged.save_pretrained(beside)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if windows is not None:
            save_seen(beside, windows)
        return sum(count_parameters(path) for path in beside.glob("*.safetensors"))


def count_parameters(file: Path) -> int:
    """Return the floating-point numbers in a safetensors file; reads its header only."""
    total = 0
    with safe_open(str(file), framework="pt") as opened:
        reader: Any = opened
        for name in reader.keys():  # noqa: SIM118 (not a mapping)
            part = reader.get_slice(name)
            if "F" in part.get_dtype():  # F32, BF16 and so on, but not I32
                total += math.prod(part.get_shape())
    return total


def _places(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the orders of outputs that pivoted layers keep: all that a file needs of buffers."""
    return [
        (f"{name}.places", module.places)
        for name, module in model.named_modules()
        if isinstance(module, PivotedLinear)
    ]


def _require_equal(in_file: int, stated: object, folder: Path) -> None:
    """Refuse a checkpoint whose file holds another number of parameters than it states."""
    if in_file != stated:
        raise CheckpointError(
            f"{folder}: the file holds {in_file:_} parameters, {stated} are stated."
        )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a checkpoint."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a compressed checkpoint: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder / name} holds no JSON object.")
    return found


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder beside ``folder`` to write to, and rename it if all went well."""
    try:
        with new_folder(folder) as beside:
            yield beside
    except FileExistsError as error:
        raise CheckpointError(str(error)) from error
