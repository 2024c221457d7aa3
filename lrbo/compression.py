"""Put an allocation into a model, for good or for the length of a `with`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from lrbo.allocation import Allocation
from lrbo.nested import NestedFactors


def compress_(
    model: nn.Module, allocation: Allocation, factors: Mapping[str, NestedFactors]
) -> dict[str, nn.Module]:
    """Replace layers by their low-rank forms, in place.

    Args:
        model: Changed: each layer with a rank becomes ``factors[name].at_rank(rank)``.
        allocation: Ranks by layer name; ``None`` leaves a layer dense.
        factors: In the dtype and on the device of the model.

    Returns:
        The dense modules that were taken out, by name.

    Raises:
        KeyError: If a layer with a rank has no factors. The model is then unchanged.
        AttributeError: If the model has no such layer. The model is then unchanged.
    """
    chosen = {name: rank for name, rank in allocation.ranks.items() if rank is not None}
    missing = sorted(set(chosen) - set(factors))
    if missing:
        raise KeyError(f"{len(missing)} layers have a rank but no factors: {missing[0]} first")
    modules = {name: factors[name].at_rank(rank) for name, rank in chosen.items()}
    for name in modules:
        model.get_submodule(name)  # all are looked up before the first is replaced
    return {name: replace_module(model, name, module) for name, module in modules.items()}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put ``module`` where ``name`` is, and return what was there."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    before: nn.Module = getattr(owner, child)
    setattr(owner, child, module.train(before.training))
    return before


@contextmanager
def compressed(
    model: nn.Module, allocation: Allocation, factors: Mapping[str, NestedFactors]
) -> Iterator[nn.Module]:
    """Give the compressed model for the length of a ``with``; the dense one is put back.

    Nothing is copied: the low-rank layers are views of the factors, and the dense layers stay
    in memory. The dense layers come back whatever happens inside.
    """
    dense = compress_(model, allocation, factors)
    try:
        yield model
    finally:
        for name, module in dense.items():
            replace_module(model, name, module)
