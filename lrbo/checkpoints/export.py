"""Write and read a compressed Hugging Face checkpoint."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lrbo.allocation.allocate import Allocation
from lrbo.checkpoints import modeling_low_rank, quantizer, tensors
from lrbo.checkpoints.calibration_text import save_seen
from lrbo.config.choices import ITEMSIZES
from lrbo.data.windows import Role, TokenWindows
from lrbo.errors import CheckpointError, LrboError, ModelError, reading
from lrbo.files.atomic import new_folder
from lrbo.files.parsing import ContentError, parse_json, without_infinity
from lrbo.layers.modules import low_rank_layers, parameters_of
from lrbo.layers.options import Cost, Option
from lrbo.models import headers
from lrbo.models.devices import dtype_name, resolve_device
from lrbo.models.model_map import is_tied, linear_bias
from lrbo.models.pairs import BaseModel
from lrbo.models.parameters import not_finite

CARD = "README.md"
# What transformers calls them.
CONFIG, WEIGHTS, INDEX = headers.CONFIG, headers.SINGLE, headers.INDEX
SHARD_BYTES = 4 * 2**30
OLD_ABOUT = "lrbo.json"  # of formats 1 and 2, which had no quantization config
CODE = "modeling_low_rank.py"
CODE_CLASS = "LowRankForCausalLM"
# Where config.json keeps, beside a modelling file, what others keep in quantization_config: a
# transformers without this package would warn of a quantization that it does not know.
CODE_KEY = "lrbo"


def is_checkpoint(folder: str | Path) -> bool:
    """Tell a compressed checkpoint of this package, of any format."""
    try:
        return _low_rank_values(Path(folder)) is not None
    except CheckpointError:
        return False


def stored_dtype(folder: str | Path) -> str | None:
    """Return the dtype in which a model is stored; ``None`` where it does not say one we run in."""
    stated = _read_json(Path(folder) / CONFIG).get("dtype")
    return stated if isinstance(stated, str) and stated in ITEMSIZES else None


def _low_rank_values(folder: Path) -> dict[str, Any] | None:
    """Return the quantization config of a folder with low-rank layers, or what stood for it."""
    if (folder / OLD_ABOUT).is_file():
        old = _read_json(folder / OLD_ABOUT)
        return {"format": old.get("format"), "provenance": old}
    config = _read_json(folder / CONFIG)
    for key in ("quantization_config", CODE_KEY):
        values = config.get(key)
        if isinstance(values, dict) and values.get("quant_method") == quantizer.METHOD:
            return values
    return None


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    allocation: Allocation,
    about: Mapping[str, Any],
    *,
    costs: Mapping[str, Cost],
    parameters: int,
    card: str | None = None,
    with_code: bool = False,
    windows: Mapping[Role, TokenWindows] | None = None,
    auto_class: str = "AutoModelForCausalLM",
    base: BaseModel | None = None,
    shared: Collection[str] = (),
) -> int:
    """Write a compressed model as a checkpoint that ``from_pretrained`` and :func:`load` open.

    The folder is written beside its final path and renamed, so that it is never half there. Weights
    are written in files of about 4 GiB, whose parameters are returned.

    Args:
        folder: Must not exist.
        model: With its low-rank layers.
        tokenizer: Of the dense model; ``None`` for a model that reads no text.
        allocation: An option per unit.
        about: Method, base model and whatever else should be remembered.
        costs: Of the units that are not dense, in the dtype of the model, as their forms count.
        parameters: Of the whole model, as the accountant counts.
        card: Text of the model card, if one is to be written.
        with_code: Write a modelling file too, with which the folder opens without this package.
        windows: Of the study, so that ``lrbo evaluate`` can refuse what was calibrated on.
        auto_class: Of transformers, which opens the checkpoint.
        base: That layers add to, if any.
        shared: Parameters that are those of the base, and are not written.

    Raises:
        CheckpointError: If the folder exists, cannot be written, or differs from the accountant.
    """
    with checkpoint_folder(folder, model, tokenizer, card, windows) as beside:
        own = {n: each for n, each in stored_tensors(model).items() if n not in shared}
        stored = tensors.read_headers(write_tensors(beside, own))
        units = {name: str(option) for name, option in allocation.compressed.items()}
        _require_costs(folder, stored, allocation.compressed, costs)
        config = copy.deepcopy(model.config)
        config.dtype = model.dtype
        if hasattr(config, "auto_map"):  # of the dense model: names files that are not written here
            del config.auto_map
        config.architectures = [type(model).__name__]
        config.tie_word_embeddings = is_tied(model)
        with torch.device("meta"):
            skeleton = type(model)(copy.deepcopy(config))
        low_rank = quantizer.LowRankConfig(
            format=quantizer.FORMAT,
            auto_class=auto_class,
            parameters=parameters,
            units=units,
            added_biases=[
                name
                for name in units
                if {f"{name}.bias", f"{name}.left.bias"} & stored.keys()
                and linear_bias(skeleton.get_submodule(name)) is None
            ],
            **({} if base is None else {"base": base_fields(base)}),
            provenance=without_infinity({**about, "budget": asdict(allocation.budget)}),
        )
        quantizer.put_in(skeleton, low_rank)
        # First, because it names the layer.
        tensors.check_tensors(skeleton, stored, folder, adds=base is not None)
        in_file = tensors.count_parameters(stored, units)
        if in_file != parameters:
            raise CheckpointError(
                f"{folder}: the files hold {in_file:_} parameters, the accountant says "
                f"{parameters:_}; nothing was written."
            )
        if with_code:
            config.architectures = [CODE_CLASS]
            config.auto_map = {auto_class: f"{Path(CODE).stem}.{CODE_CLASS}"}
            setattr(config, CODE_KEY, low_rank.to_dict())
            if hasattr(config, "quantization_config"):  # of a checkpoint that is written again
                del config.quantization_config
            code = inspect.getsource(modeling_low_rank)
            assert code.count("LlamaForCausalLM") == 2  # where it is imported and is the base
            code = code.replace("LlamaForCausalLM", type(model).__name__)
            (beside / CODE).write_text(code, encoding="utf-8")
        else:
            config.quantization_config = low_rank
        config.save_pretrained(beside)
    return in_file


def base_fields(base: BaseModel) -> quantizer.BaseFields:
    """Return the entry of a base for ``config.json``, a folder by its whole path.

    Raises:
        CheckpointError: If it has no folder and no id.
    """
    source = base.source
    if not source.path:
        raise CheckpointError(
            "the base model has no name_or_path that it would be found by again; write it with "
            "save_pretrained, and load it from that folder"
        )
    path = str(Path(source.path).absolute()) if Path(source.path).is_dir() else source.path
    return {
        "source": source.source,
        "path": path,
        "revision": source.revision,
        "fingerprint": base.fingerprint,
    }


def _require_costs(
    folder: Path,
    stored: Mapping[str, Tensor],
    options: Mapping[str, Option],
    costs: Mapping[str, Cost],
) -> None:
    """Compare what the files hold of each unit with what its form counts, byte for byte."""
    for name, cost in costs.items():
        prefix = f"{name}."
        own = {k.removeprefix(prefix): each for k, each in stored.items() if k.startswith(prefix)}
        parameters = parameters_of(options[name], own)
        size = sum(tensor.nbytes for tensor in own.values())
        if (parameters, size) != (cost.parameters, cost.bytes):
            raise CheckpointError(
                f"{folder}: the files hold {parameters:_} parameters in {size:_} bytes of {name}, "
                f"its form counts {cost.parameters:_} in {cost.bytes:_}; nothing was written."
            )


@contextmanager
def checkpoint_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    card: str | None,
    windows: Mapping[Role, TokenWindows] | None,
    below: str = "",
) -> Iterator[Path]:
    """Give a new folder for configuration and weights, and write what lies beside them.

    These, and what belongs to them, may be in a folder ``below`` it; card and hashes are not.
    """
    reads_text = model.get_output_embeddings() is not None
    if not isinstance(tokenizer, PreTrainedTokenizerBase) and (tokenizer or reads_text):
        raise CheckpointError(
            f"tokenizer of type {type(tokenizer).__name__}: expected that of the model, as "
            "AutoTokenizer.from_pretrained gives it"
        )
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        with reading(CheckpointError, "correct model.generation_config, which is not written so"):
            generation.validate(strict=True)
    try:
        with new_folder(folder) as beside:
            (beside / below).mkdir(exist_ok=True)
            yield beside
            if generation is not None:
                generation.save_pretrained(beside / below)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside / below)
            if card is not None:
                (beside / CARD).write_text(card, encoding="utf-8")
            if windows is not None:
                save_seen(beside, windows)
    except FileExistsError as error:
        raise CheckpointError(str(error)) from error


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint: parameters, and the buffers of form modules."""
    buffers = (
        (f"{name}.{own}", buffer)
        for name, module in low_rank_layers(model).items()
        for own, buffer in module.named_buffers(recurse=False)
        if own not in module._non_persistent_buffers_set
    )
    return dict([*model.named_parameters(), *buffers])


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> list[Path]:
    """Write tensors into one file or, beyond its size, several with an index."""
    own: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        stored = tensor.detach().contiguous().cpu()
        if stored.numel() and stored.data_ptr() in addresses:  # which safetensors does not write
            stored = stored.clone()
        addresses.add(stored.data_ptr())
        own[name] = stored
    # Of tensors on the meta device, since those that share memory would be kept together.
    sizes = {name: tensor.to("meta") for name, tensor in own.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_BYTES)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, names in split.filename_to_tensors.items():
        save_file({n: own[n] for n in names}, folder / file, metadata={"format": "pt"})
    return [folder / file for file in split.filename_to_tensors]


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    base: str | Path | None = None,
) -> PreTrainedModel:
    """Open a compressed checkpoint as a ``PreTrainedModel`` in evaluation mode, without gradients.

    The same as ``from_pretrained`` of its class of transformers, with every problem a
    :class:`CheckpointError`. No code of the folder is executed and nothing is unpickled.

    Args:
        folder: What ``lrbo compress`` wrote.
        dtype: Of the weights in memory; ``None`` is that of the file.
        device: Where to; ``"auto"`` is the best at hand.
        base: Where the base model of a delta is; ``None`` is where it was when it was written.

    Raises:
        ConfigError: If there is no such device here.
        CheckpointError: If a file is missing, of another format, elsewhere, or without exactly the
            tensors and parameters stated, a number is not finite, or an adapter lies beside.
    """
    folder = Path(folder)
    target = resolve_device(str(device), "device")
    config = load_config(folder)
    if base is not None:
        if "base" not in config.quantization_config:
            raise CheckpointError(f"{folder} adds to no base model; leave base={str(base)!r} out")
        source = {"source": "hf", "path": str(Path(base).absolute()), "revision": None}
        config.quantization_config["base"] |= source
    with reading(CheckpointError, f"{folder} is not a whole checkpoint", own=ModelError):
        headers.weight_files(folder)
        kind = getattr(transformers, config.quantization_config["auto_class"])
        model: PreTrainedModel = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
        )
    if problem := not_finite(model):
        hint = "Take bfloat16 or float32, or if" if model.dtype == torch.float16 else "If"
        raise CheckpointError(
            f"{folder} in {dtype_name(model.dtype)}: {problem} {hint} it is damaged, copy it again."
        )
    return model.to(device=target).eval().requires_grad_(False)


def load_config(folder: str | Path) -> PretrainedConfig:
    """Return the configuration of a checkpoint; CheckpointError if it cannot be opened."""
    folder = Path(folder)
    path, values = folder / CONFIG, _low_rank_values(folder)
    if values is None:
        raise CheckpointError(
            f"{path} says nothing of low-rank layers, so this is no compressed checkpoint; open it "
            "with transformers."
        )
    with reading(CheckpointError, str(path), own=LrboError):
        quantizer.LowRankConfig.from_dict(values)
        headers.refuse_adapters(folder)
    reader = f"transformers {transformers.__version__}"
    with reading(CheckpointError, f"{path} cannot be read by {reader}"):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # A folder with a modelling file is read as one without: its code is not executed.
    for key in (CODE_KEY, "auto_map"):
        if hasattr(config, key):
            delattr(config, key)
    config.quantization_config = values
    return config


def _read_json(path: Path) -> dict[str, Any]:
    what = f"{path} cannot be read, so this is no whole checkpoint"
    with reading(CheckpointError, what, own=ContentError):
        content = parse_json(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content
