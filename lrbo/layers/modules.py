"""The modules that run the forms: one class per form but dense, which stays what it is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lrbo.layers.based import BasedLinear, bands_of, parameters_in
from lrbo.layers.forms import Based, form_named
from lrbo.layers.frequency import GroupedLinear
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.joint import SkippedAttention, SkippedLinear, ThinLinear
from lrbo.layers.kronecker import KroneckerLinear
from lrbo.layers.kronecker_form import Kronecker
from lrbo.layers.low_rank import FormModule, LowRankLinear, ProductModule
from lrbo.layers.options import Option
from lrbo.layers.pivoted import PivotedLinear
from lrbo.layers.shared import link_

PRODUCTS: Mapping[str, type[ProductModule]]
PRODUCTS = {"factored": LowRankLinear, "pivoted": PivotedLinear}


def empty_module(
    name: str, option: Option, out_features: int, in_features: int, *, bias: bool
) -> FormModule:
    """Return the layer of an option on the meta device, for weights to be loaded into."""
    form = form_named(option.form)
    if isinstance(form, Based):
        return BasedLinear.on_meta(form, out_features, in_features, option.level, bias=bias)
    if isinstance(form, Kronecker):
        return KroneckerLinear.on_meta(out_features, in_features, option.level, bias=bias)
    if isinstance(form, FrequencyGroups):
        return GroupedLinear.on_meta(out_features, in_features, option.level, bias=bias)
    kind = PRODUCTS[option.form]
    return kind.empty(name, out_features, in_features, option.level, bias=bias)


def parameters_of(option: Option, tensors: Mapping[str, Tensor]) -> int:
    """Count the parameters in the tensors of a unit, by their names in its module."""
    form = form_named(option.form)
    if isinstance(form, Based):
        return parameters_in(form, tensors, bands_of(form, option.level[:-1]))
    return sum(each.numel() for each in tensors.values() if each.is_floating_point())


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a layer, those of a base among them, which are no floats."""
    if isinstance(module, BasedLinear):
        return parameters_in(module.form, module.state_dict(), module.bands)
    return sum(parameter.numel() for parameter in module.parameters())


def low_rank_layers(model: nn.Module) -> dict[str, FormModule]:
    """Return the modules of the forms in a model by name, thinner plain layers not among them."""
    return {name: part for name, part in model.named_modules() if isinstance(part, FormModule)}


def thin_layers(model: nn.Module) -> dict[str, ThinLinear]:
    """Return the plain layers in a model that have lost neurons, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, ThinLinear)}


def compressed_layers(model: nn.Module) -> dict[str, FormModule | ThinLinear]:
    """Return every layer in a model that is not what it was, by name."""
    return {**low_rank_layers(model), **thin_layers(model)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Replace a module, keeping its training mode, and return the one before.

    Raises:
        AttributeError: If the model has no module of that path.
    """
    before = model.get_submodule(name)
    model.set_submodule(name, module.train(before.training))
    return before


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Replace modules by name, and each attention of which the last layer is skipped as a whole.

    Layers that share a factor are replaced together, and learn of each other.

    Returns:
        The modules before, by name, in the order that puts them back if they are replaced again.
    """
    link_(modules)
    before = {name: replace_module(model, name, module) for name, module in modules.items()}
    attentions = {}
    for name, module in modules.items():
        if isinstance(module, SkippedLinear) and module.whole and module.bias is not None:
            path, _, last = name.rpartition(".")
            skipped = SkippedAttention(model.get_submodule(path), last)
            attentions[path] = replace_module(model, path, skipped)
    return attentions | before
