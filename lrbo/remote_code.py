"""The modelling file of a checkpoint that opens without this package."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from lrbo import modeling_low_rank

FILE = "modeling_low_rank.py"
CLASS = "LowRankForCausalLM"
# Where config.json keeps what others keep in quantization_config: a transformers without this
# package would warn of a quantization that it does not know.
KEY = "lrbo"


def describe(config: PretrainedConfig, low_rank: Mapping[str, Any]) -> None:
    """Name the modelling file in a configuration, and keep what it needs there.

    Args:
        config: Changed.
        low_rank: Storage form, ranks and so on, as in ``quantization_config``.
    """
    config.architectures = [CLASS]
    config.auto_map = {"AutoModelForCausalLM": f"{FILE.removesuffix('.py')}.{CLASS}"}
    setattr(config, KEY, dict(low_rank))
    if hasattr(config, "quantization_config"):  # of a checkpoint that is written again
        del config.quantization_config


def source_for(architecture: str) -> str:
    """Return the text of the modelling file.

    Args:
        architecture: Class of the dense model in transformers, ``"LlamaForCausalLM"``.
    """
    source = inspect.getsource(modeling_low_rank)
    assert source.count("LlamaForCausalLM") == 2  # where it is imported and where it is the base
    return source.replace("LlamaForCausalLM", architecture)
