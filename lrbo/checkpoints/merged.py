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
from lrbo.checkpoints.quantizer import count_parameters, read_headers
from lrbo.data.windows import Role, TokenWindows
from lrbo.errors import CheckpointError
from lrbo.layers.modules import low_rank_layers
from lrbo.layers.tables import heads_of
from lrbo.models.model_map import is_tied, is_transposed, linear_bias

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

    Each low-rank layer is multiplied out in float64. A bias that the method added needs a
    parameter: the configuration's switch for it, such as ``attention_bias``, is turned on where
    the family has one, and every other layer that gets a bias that way has zeros. The arguments
    are those of :func:`lrbo.checkpoints.export.save`; the model is unchanged.

    Raises:
        CheckpointError: If the folder exists or cannot be written, or a layer cannot have a bias.
    """
    with checkpoint_folder(folder, model, tokenizer, card, windows) as beside:
        _merged(model).save_pretrained(beside)
        return count_parameters(read_headers(beside.glob("*.safetensors")), {})


def _merged(model: PreTrainedModel) -> PreTrainedModel:
    """Return a dense model with the products of a compressed one."""
    merged, tensors = frame_of(model)
    for name, layer in low_rank_layers(model).items():
        weight = layer.dense_weight().to(model.dtype)
        is_turned = is_transposed(merged.get_submodule(name))
        tensors[f"{name}.weight"] = weight.T if is_turned else weight
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    merged.load_state_dict(contiguous, strict=False, assign=True)
    merged.tie_weights()
    assert not any(parameter.is_meta for parameter in merged.parameters())
    return merged


def frame_of(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return an empty dense model for a compressed one, and its tensors but the compressed weights.

    It has a bias where the compressed one has one, as of :func:`with_biases`; biases that this
    gives to other layers are zeros.
    """
    values = model.config.to_dict()
    values.pop("auto_map", None)  # names files that are not written here
    values["tie_word_embeddings"] = is_tied(model)
    layers = low_rank_layers(model)
    biases = {name: linear_bias(layer) for name, layer in layers.items()}
    owners = {name: (heads_of(model, name) or [name])[0] for name in layers}  # of a bias
    biased = [owners[name] for name, bias in biases.items() if bias is not None]
    frame = with_biases(type(model.config).from_dict(values), biased)
    replaced = tuple(f"{name}." for name in layers)
    tensors = {n: p.detach() for n, p in model.named_parameters() if not n.startswith(replaced)}
    tensors |= {f"{owners[name]}.bias": bias for name, bias in biases.items() if bias is not None}
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
            f"({lacking[0]} first) that the method added; use format=lrbo, or a method without."
        )
    return merged


def _built(config: PretrainedConfig, biased: Collection[str]) -> tuple[PreTrainedModel, list[str]]:
    """Build an empty model, and list the layers that have no bias in it."""
    with init_empty_weights(include_buffers=False):
        dense: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return dense, [name for name in biased if linear_bias(dense.get_submodule(name)) is None]
