"""Dense weights of a compressed model, for loaders that know no low-rank layers."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lrbo.calibration.corpus import Role, TokenWindows
from lrbo.checkpoint import count_parameters
from lrbo.errors import CheckpointError
from lrbo.export import checkpoint_folder, require_writable, write_rest
from lrbo.layers import LowRankLinear, PivotedLinear
from lrbo.model import is_linear, is_tied, is_transposed, linear_bias

# The switches of a configuration that give layers a bias, and the layers that they give it to.
SWITCHES = {
    "attention_bias": (".self_attn.", ".attention."),
    "mlp_bias": (".mlp.",),
    "enable_bias": (".self_attn.", ".fc1", ".fc2"),
}


def save_merged(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str | None = None,
    windows: Mapping[Role, TokenWindows] | None = None,
) -> int:
    """Write dense weights that any loader opens; nothing is saved that way.

    Each low-rank layer is multiplied out in float64. A bias that the method added needs a place:
    the configuration's switch for it, such as ``attention_bias``, is turned on where the family
    has one, and every other layer that gets a bias that way starts from zero.

    Args:
        folder: Must not exist.
        model: With its low-rank layers in place; unchanged.
        tokenizer: Of the dense model.
        card: Text of the model card, if one is to be written.
        windows: Of the study, so that ``lrbo evaluate`` can refuse what was calibrated on.

    Returns:
        Parameters in the files.

    Raises:
        CheckpointError: If the folder exists, something cannot be written, or the architecture has
            no place for a bias.
    """
    require_writable(model, tokenizer)
    values = model.config.to_dict()
    values.pop("auto_map", None)  # names files that are not written here
    values["tie_word_embeddings"] = is_tied(model)
    low_rank = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear | PivotedLinear)
    }
    biased = [name for name, layer in low_rank.items() if linear_bias(layer) is not None]
    merged = with_biases(type(model.config).from_dict(values), biased)
    tensors = {
        name: tensor
        for name, tensor in model.named_parameters()
        if not any(name.startswith(f"{layer}.") for layer in low_rank)
    }
    for name, layer in low_rank.items():
        target = merged.get_submodule(name)
        assert is_linear(target)
        weight = layer.multiplied().to(model.dtype)
        tensors[f"{name}.weight"] = weight.T if is_transposed(target) else weight
        bias = linear_bias(layer)
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    for name, parameter in merged.named_parameters():
        if name not in tensors and name.endswith(".bias"):
            tensors[name] = torch.zeros(parameter.shape, dtype=model.dtype, device=model.device)
    merged.load_state_dict(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, strict=False, assign=True
    )
    merged.tie_weights()
    empty = [name for name, p in merged.named_parameters() if p.is_meta]
    assert not empty, empty
    with checkpoint_folder(folder) as beside:
        merged.save_pretrained(beside)
        in_file = sum(count_parameters(path) for path in beside.glob("*.safetensors"))
        write_rest(beside, model, tokenizer, card, windows)
    return in_file


def with_biases(config: PretrainedConfig, biased: Collection[str]) -> PreTrainedModel:
    """Build the dense model of a configuration without its numbers, with a place for biases.

    Args:
        config: Of the dense model; unchanged.
        biased: Names of the layers that are to have a bias.

    Raises:
        CheckpointError: If the architecture has no place for one of them.
    """
    merged = _empty(config)
    homeless = _without_place(merged, biased)
    values = config.to_dict()
    added = {
        key: True
        for key, parts in SWITCHES.items()
        if key in values and any(part in name for name in homeless for part in parts)
    }
    if added:
        merged = _empty(type(config).from_dict(values | added))
        homeless = _without_place(merged, biased)
    if homeless:
        raise CheckpointError(
            f"{type(merged).__name__} has no place for the bias of {len(homeless)} layers "
            f"({homeless[0]} first), which the method added; use format=lrbo, or a method "
            "without bias."
        )
    return merged


def _empty(config: PretrainedConfig) -> PreTrainedModel:
    """Return the dense model of a configuration without its numbers."""
    with init_empty_weights(include_buffers=False):
        dense: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return dense


def _without_place(merged: PreTrainedModel, biased: Collection[str]) -> list[str]:
    """Return the layers whose bias has no place in the dense model."""
    return [name for name in biased if linear_bias(merged.get_submodule(name)) is None]
