"""The modules that run the forms: one class per form but dense, which stays what it is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lrbo.layers.low_rank import FormModule, LowRankLinear
from lrbo.layers.pivoted import PivotedLinear

MODULES: Mapping[str, type[FormModule]] = {"factored": LowRankLinear, "pivoted": PivotedLinear}


def low_rank_layers(model: nn.Module) -> dict[str, FormModule]:
    """Return the modules of the forms in a model by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, FormModule)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Replace a module, keeping its training mode, and return the one before.

    Raises:
        AttributeError: If the model has no module of that path.
    """
    before = model.get_submodule(name)
    model.set_submodule(name, module.train(before.training))
    return before
