"""Dense weights of a compressed model, for loaders that know no low-rank layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lrbo.checkpoints.export import checkpoint_folder
from lrbo.checkpoints.structure import Structure, padded
from lrbo.checkpoints.tensors import count_parameters, read_headers
from lrbo.data.windows import Role, TokenWindows
from lrbo.errors import CheckpointError
from lrbo.layers.joint import SkippedLinear, ThinLinear
from lrbo.layers.modules import compressed_layers
from lrbo.layers.tables import heads_of
from lrbo.models.model_map import (
    is_tied,
    is_transposed,
    linear_bias,
    linear_weight,
    map_model,
)

# The switches of a configuration that give layers a bias, and the layers that they give it to.
SWITCHES = {
    "attention_bias": (".self_attn.", ".attention."),
    "mlp_bias": (".mlp.",),
    "enable_bias": (".self_attn.", ".fc1", ".fc2"),
}


def save_merged(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    card: str | None = None,
    windows: Mapping[Role, TokenWindows] | None = None,
) -> int:
    """Write dense weights that any loader opens, and return the number of parameters in the files.

    Each low-rank layer is multiplied out in float64. Where all MLPs have fewer neurons, so has the
    configuration: as many as the widest, the others with zeros. Blocks of which nothing is left are
    left out but for the first; other skipped parts are zeros, with their bias. A bias that is new
    needs a parameter: the configuration's switch for it, such as ``attention_bias``, is turned on
    where the family has one, and every other layer that gets a bias that way has zeros. The
    arguments are those of :func:`lrbo.checkpoints.export.save`; the model is unchanged.

    Raises:
        CheckpointError: If the folder exists or cannot be written, or a layer cannot have a bias.
    """
    with checkpoint_folder(folder, model, tokenizer, card, windows) as beside:
        merged_model(model).save_pretrained(beside)
        return count_parameters(read_headers(beside.glob("*.safetensors")), {})


def merged_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a dense model with the products of a compressed one."""
    structure = Structure.of(model)
    merged, tensors = frame_of(model, structure)
    specs = map_model(merged).by_name
    for own, layer in compressed_layers(model).items():
        name = structure.renamed(own)
        if name is None:
            continue
        target = merged.get_submodule(name)
        if isinstance(layer, ThinLinear):
            weight, bias = padded(layer, specs[name])
            if bias is not None:
                tensors[f"{name}.bias"] = bias.to(model.dtype)
        elif isinstance(layer, SkippedLinear):
            weight = layer.weight.new_zeros(linear_weight(target).shape)
        else:
            weight = layer.dense_weight()
        weight = weight.to(model.dtype)
        tensors[f"{name}.weight"] = weight.T if is_transposed(target) else weight
    for own, constant in structure.constants.items():
        name = f"{structure.renamed(own)}.bias"
        tensors[name] = (constant + tensors[name].double()).to(model.dtype)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    merged.load_state_dict(contiguous, strict=False, assign=True)
    merged.tie_weights()
    assert not any(parameter.is_meta for parameter in merged.parameters())
    return merged


def frame_of(
    model: PreTrainedModel, structure: Structure
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return an empty dense model for a compressed one, and its tensors but the compressed weights.

    It has the blocks and neurons of a structure, and a bias where the compressed one has one, as of
    :func:`with_biases`; biases that this gives to other layers are zeros.
    """
    values = model.config.to_dict()
    values.pop("auto_map", None)  # names files that are not written here
    values["tie_word_embeddings"] = is_tied(model)
    layers = compressed_layers(model)
    biases = {
        (heads_of(model, name) or [name])[0]: bias
        for name, layer in layers.items()
        if (bias := linear_bias(layer)) is not None
    }
    moved = map(structure.renamed, dict.fromkeys([*biases, *structure.constants]))
    config = structure.config(type(model.config).from_dict(values))
    frame = with_biases(config, [name for name in moved if name is not None])
    replaced = tuple(f"{name}." for name in layers)
    own = {n: p.detach() for n, p in model.named_parameters() if not n.startswith(replaced)}
    own |= {f"{name}.bias": bias for name, bias in biases.items()}
    pairs = {structure.renamed(name): tensor for name, tensor in own.items()}
    tensors = {name: tensor for name, tensor in pairs.items() if name is not None}
    for name, parameter in frame.named_parameters():
        if name not in tensors and name.endswith(".bias"):
            tensors[name] = torch.zeros(parameter.shape, dtype=model.dtype, device=model.device)
    return frame, tensors


def with_biases(config: PretrainedConfig, biased: Collection[str]) -> PreTrainedModel:
    """Build an empty dense model with a bias in these layers; CheckpointError if one has none."""
    values = config.to_dict()
    merged, lacking = _built(type(config).from_dict(values), biased)
    added = {
        key: True
        for key, parts in SWITCHES.items()
        if key in values and any(part in name for name in lacking for part in parts)
    }
    if added:
        merged, lacking = _built(type(config).from_dict(values | added), biased)
    if lacking:
        raise CheckpointError(
            f"{type(merged).__name__} has no parameter for the bias of {len(lacking)} layers "
            f"({lacking[0]} first) that the method or a skipped part adds; use "
            "format=lrbo, or others without."
        )
    return merged


def _built(config: PretrainedConfig, biased: Collection[str]) -> tuple[PreTrainedModel, list[str]]:
    """Build an empty model, and list the layers that have no bias in it."""
    with init_empty_weights(include_buffers=False):
        dense: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return dense, [name for name in biased if linear_bias(dense.get_submodule(name)) is None]
