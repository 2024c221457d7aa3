"""Write and read a compressed Hugging Face checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lrbo import remote_code, stored
from lrbo.accounting import Storage
from lrbo.allocation import Allocation
from lrbo.calibration.corpus import Role, TokenWindows
from lrbo.calibration.seen import save_seen
from lrbo.checkpoint import (
    FORMAT,
    METHOD,
    LowRankConfig,
    check_files,
    count_parameters,
    how_to_rewrite,
    put_in,
    stored_tensors,
)
from lrbo.compression import compress_, replace_module
from lrbo.errors import CheckpointError, ModelError, reading
from lrbo.layers import LowRankLinear, PivotedLinear
from lrbo.lazy import LazyModel
from lrbo.loading import resolve_device
from lrbo.model import dtype_name, is_tied, linear_bias, map_model, not_finite
from lrbo.nested import NestedFactors
from lrbo.parsing import ContentError, parse_json
from lrbo.storage import new_folder
from lrbo.strict_json import without_infinity

CARD = "README.md"
# What transformers calls them.
CONFIG, WEIGHTS, INDEX = stored.CONFIG, stored.SINGLE, stored.INDEX
SHARD = "model-{:05d}-of-{:05d}.safetensors"
SHARD_BYTES = 4 * 2**30
# What a checkpoint of formats 1 and 2 holds, and a later one does not.
OLD_ABOUT = "lrbo.json"


def is_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder holds a compressed checkpoint of this package, of any format."""
    try:
        return _about(_read_json(Path(folder), CONFIG)) is not None or _is_old(folder)
    except CheckpointError:
        return _is_old(folder)


def stored_dtype(folder: str | Path) -> str | None:
    """Return the dtype in which a model is stored; ``None`` where it does not say one we run in."""
    stated = _read_json(Path(folder), CONFIG).get("dtype")
    return stated if stated in ("float32", "bfloat16", "float16") else None


def _is_old(folder: str | Path) -> bool:
    """Return whether a folder holds a checkpoint of a format without quantization config."""
    return (Path(folder) / OLD_ABOUT).is_file()


def _about(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a ``config.json`` says of low-rank layers, if anything."""
    for key in ("quantization_config", remote_code.KEY):
        found = config.get(key)
        if isinstance(found, dict) and found.get("quant_method") == METHOD:
            return found
    return None


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
    card: str | None = None,
    with_code: bool = False,
    windows: Mapping[Role, TokenWindows] | None = None,
) -> int:
    """Write a compressed model as a checkpoint that ``from_pretrained`` and :func:`load` open.

    The folder is written beside its place and renamed, so that it is never half there. Weights
    are written in files of about 4 GiB, as they come.

    Args:
        folder: Must not exist.
        model: With its low-rank layers in place.
        tokenizer: Of the dense model.
        allocation: What was decided.
        about: Method, base model and whatever else should be remembered.
        storage: The form of the low-rank layers.
        parameters: What the accountant says that the model holds.
        parts: The tensors, some at a time, where the model does not hold them all
            (:func:`streamed`); by default those of ``model``.
        card: Text of the model card, if one is to be written.
        with_code: Write a modelling file too, and a ``config.json`` that names it: the folder
            then opens without this package, with ``trust_remote_code=True``.
        windows: Of the study, so that ``lrbo evaluate`` can refuse what was calibrated on.

    Returns:
        Parameters in the files.

    Raises:
        CheckpointError: If the folder exists, something cannot be written, or file and accountant
            disagree.
    """
    require_writable(model, tokenizer)
    with checkpoint_folder(folder) as beside:
        files = _write(beside, [_tensors(model)] if parts is None else parts)
        in_file = sum(map(count_parameters, files))
        if in_file != parameters:
            raise CheckpointError(
                f"{folder}: the files hold {in_file:_} parameters, the accountant says "
                f"{parameters:_}; nothing was written."
            )
        config = copy.deepcopy(model.config)
        config.dtype = model.dtype
        if hasattr(config, "auto_map"):  # of the dense model: names files that are not written here
            del config.auto_map
        config.architectures = [type(model).__name__]
        config.tie_word_embeddings = is_tied(model)
        ranks = {name: rank for name, rank in allocation.ranks.items() if rank is not None}
        with torch.device("meta"):
            skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        low_rank = LowRankConfig(
            format=FORMAT,
            storage=storage,
            parameters=parameters,
            ranks=ranks,
            added_biases=_added_biases(skeleton, ranks, files),
            provenance=without_infinity({**about, "budget": allocation.budget.parameters}),
        )
        put_in(skeleton, low_rank)
        check_files(skeleton, files, parameters)
        if with_code:
            remote_code.describe(config, low_rank.to_dict())
            code = remote_code.source_for(type(model).__name__)
            (beside / remote_code.FILE).write_text(code, encoding="utf-8")
        else:
            config.quantization_config = low_rank
        config.save_pretrained(beside)
        write_rest(beside, model, tokenizer, card, windows)
    return in_file


def _added_biases(model: nn.Module, ranks: Iterable[str], files: Iterable[Path]) -> list[str]:
    """Return the layers with a rank that are stored with a bias and have none when dense."""
    names = {name for file in files for name in stored_tensors(file)}
    return [
        name
        for name in ranks
        if {f"{name}.bias", f"{name}.left.bias"} & names
        and linear_bias(model.get_submodule(name)) is None
    ]


def require_writable(model: PreTrainedModel, tokenizer: object) -> None:
    """Refuse what cannot be written beside the weights, before these are.

    Raises:
        CheckpointError: Saying what to correct.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise CheckpointError(
            f"tokenizer of type {type(tokenizer).__name__}: expected that of the model, as "
            "AutoTokenizer.from_pretrained gives it"
        )
    if model.generation_config is not None:
        with reading(CheckpointError, "correct model.generation_config, which is not written so"):
            model.generation_config.validate(strict=True)


def write_rest(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str | None,
    windows: Mapping[Role, TokenWindows] | None,
) -> None:
    """Write what lies beside configuration and weights."""
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8")
    if windows is not None:
        save_seen(folder, windows)


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
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in [*module.named_parameters(), *_buffers(module)]:
        if tensor.is_meta:
            continue
        kept = tensor.detach().contiguous().cpu()
        if kept.numel() and kept.data_ptr() in seen:  # which safetensors does not write
            kept = kept.clone()
        seen.add(kept.data_ptr())
        found[name] = kept
    return found


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of low-rank layers: all that a file needs beside parameters."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear | PivotedLinear):
            for own, buffer in module.named_buffers(recurse=False):
                yield f"{name}.{own}", buffer


def _write(folder: Path, parts: Iterable[Mapping[str, Tensor]]) -> list[Path]:
    """Write tensors as they come, into one file or, beyond its size, several with an index."""
    waiting: dict[str, Tensor] = {}
    shards: list[tuple[Path, list[str]]] = []
    total = 0

    def flush() -> None:
        shards.append((folder / f"{len(shards)}.part", list(waiting)))
        save_file(waiting, shards[-1][0], metadata={"format": "pt"})
        waiting.clear()

    held = 0
    for name, tensor in (pair for part in parts for pair in part.items()):
        if waiting and held + tensor.nbytes > SHARD_BYTES:
            flush()
            held = 0
        waiting[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        return [shards[0][0].rename(folder / WEIGHTS)]
    names = [SHARD.format(place, len(shards)) for place in range(1, len(shards) + 1)]
    where = {tensor: name for name, (_, held) in zip(names, shards, strict=True) for tensor in held}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [file.rename(folder / name) for name, (file, _) in zip(names, shards, strict=True)]


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Open a compressed checkpoint as a normal ``PreTrainedModel``.

    The same as ``AutoModelForCausalLM.from_pretrained``, with every problem a
    :class:`CheckpointError`. No code of the folder is executed and nothing is unpickled.

    Args:
        folder: What ``lrbo compress`` wrote.
        dtype: Of the weights in memory; ``None`` is that of the file.
        device: Where to; ``"auto"`` is the best at hand.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        ConfigError: If there is no such device here.
        CheckpointError: If a file is missing, of another format, lies elsewhere, or does not hold
            exactly the tensors and the number of parameters that it states, a number is not
            finite, or an adapter lies beside.
    """
    folder = Path(folder)
    place = resolve_device(str(device), "device")
    config = load_config(folder)
    try:
        stored.weight_files(folder)
    except ModelError as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error}") from error
    with reading(CheckpointError, f"{folder} is not a whole checkpoint"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
        )
    if problem := not_finite(model):
        narrow = "Take bfloat16 or float32, or if" if model.dtype == torch.float16 else "If"
        raise CheckpointError(
            f"{folder} in {dtype_name(model.dtype)}: {problem} {narrow} the file "
            "is damaged, copy it again."
        )
    return model.to(device=place).eval().requires_grad_(False)


def load_config(folder: str | Path) -> PretrainedConfig:
    """Return the configuration of a checkpoint, with what it says of low-rank layers.

    Raises:
        CheckpointError: If it is damaged, or of another format, or an adapter lies beside.
    """
    folder = Path(folder)
    if _is_old(folder):
        old = _read_json(folder, OLD_ABOUT)
        raise CheckpointError(
            f"{folder} has format {old.get('format')!r}, this lrbo reads format {FORMAT}; an "
            f"older lrbo wrote it: {how_to_rewrite(old)}."
        )
    values = _read_json(folder, CONFIG)
    about = _about(values)
    if about is None:
        raise CheckpointError(
            f"{folder / CONFIG} says nothing of low-rank layers, so this is no compressed "
            "checkpoint; open it with transformers."
        )
    try:
        LowRankConfig.from_dict(about)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    release = f"transformers {transformers.__version__}"
    with reading(CheckpointError, f"{folder / CONFIG} cannot be read by {release}"):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # A folder with a modelling file is read as one without: its code is not executed.
    for key in (remote_code.KEY, "auto_map"):
        if hasattr(config, key):
            delattr(config, key)
    config.quantization_config = about
    try:
        stored.refuse_adapters(folder)
    except ModelError as error:
        raise CheckpointError(str(error)) from error
    return config


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a checkpoint."""
    path = folder / name
    try:
        found = parse_json(path.read_bytes(), str(path))
    except (OSError, ContentError) as error:
        raise CheckpointError(
            f"{path} cannot be read, so this is no whole checkpoint: {error}"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return found


@contextmanager
def checkpoint_folder(folder: Path) -> Iterator[Path]:
    """Give a folder beside ``folder`` to write to, and rename it if all went well."""
    try:
        with new_folder(folder) as beside:
            yield beside
    except FileExistsError as error:
        raise CheckpointError(str(error)) from error
