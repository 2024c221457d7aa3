"""Dense weights of a compressed model, for loaders that know no low-rank layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lrbo.calibration.corpus import Role, TokenWindows
from lrbo.checkpoint import count_parameters
from lrbo.errors import CheckpointError
from lrbo.export import checkpoint_folder, write_rest
from lrbo.layers import LowRankLinear, PivotedLinear
from lrbo.model import is_linear, is_tied, is_transposed, linear_bias

# The switches of a configuration that give layers a bias, and the layers that they give it to.
SWITCHES = {"attention_bias": ".self_attn.", "mlp_bias": ".mlp."}


def save_merged(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str | None = None,
    windows: Mapping[Role, TokenWindows] | None = None,
) -> int:
    """Write dense weights that any loader opens; nothing is saved that way.

    Each low-rank layer is multiplied out in float64. A bias that the method added needs a place:
    the configuration's ``attention_bias`` or ``mlp_bias`` is switched on where it is missing and
    the family has it, and every other layer that gets a bias that way starts from zero.

    Args:
        folder: Must not exist.
        model: With its low-rank layers in place; unchanged.
        tokenizer: Of the dense model.
        card: Text of the model card, if one is to be written.
        windows: Of the study, so that ``lrbo evaluate`` can refuse what was calibrated on.

    Returns:
        Parameters in the files.

    Raises:
        CheckpointError: If the folder exists, or the architecture has no place for a bias.
    """
    values = model.config.to_dict()
    values.pop("auto_map", None)  # names files that are not written here
    values["tie_word_embeddings"] = is_tied(model)
    low_rank = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear | PivotedLinear)
    }
    merged = _empty(model, values)
    homeless = _without_place(merged, low_rank)
    asked = {key: True for key, part in SWITCHES.items() if any(part in name for name in homeless)}
    if added := {key: True for key in asked if key in values}:
        merged = _empty(model, values | added)
        homeless = _without_place(merged, low_rank)
    if homeless:
        raise CheckpointError(
            f"{type(model).__name__} has no place for the bias of {len(homeless)} layers "
            f"({homeless[0]} first), which the method added; use format=lrbo, or a method "
            "without bias."
        )
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


def _empty(model: PreTrainedModel, values: Mapping[str, Any]) -> PreTrainedModel:
    """Return the dense model of a configuration without its numbers."""
    with init_empty_weights(include_buffers=False):
        dense: PreTrainedModel = AutoModelForCausalLM.from_config(
            type(model.config).from_dict(dict(values))
        )
    return dense


def _without_place(merged: PreTrainedModel, layers: Mapping[str, nn.Module]) -> list[str]:
    """Return the layers whose bias has no place in the dense model."""
    return [
        name
        for name, layer in layers.items()
        if linear_bias(layer) is not None and linear_bias(merged.get_submodule(name)) is None
    ]
