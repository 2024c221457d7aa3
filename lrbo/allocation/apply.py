"""Put an allocation into a model, for good or for the length of a `with`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lrbo.accounting import Storage
from lrbo.allocation import Allocation
from lrbo.model import linear_weight
from lrbo.nested import LowRankFactors, NestedFactors, PivotedFactors

Buffers = MutableMapping[str, Tensor]


def compress_(
    model: nn.Module,
    allocation: Allocation,
    factors: Mapping[str, NestedFactors],
    *,
    on_layer: Callable[[str], None] | None = None,
) -> dict[str, nn.Module]:
    """Replace layers by their low-rank forms, in place.

    Args:
        model: Changed: each layer with a rank becomes ``factors[name].at_rank(rank)``.
        allocation: Ranks by layer name; ``None`` leaves a layer dense.
        factors: In the dtype and on the device of the model.
        on_layer: Told the name of each layer whose form is made.

    Returns:
        The dense modules that were taken out, by name.

    Raises:
        KeyError: If a layer with a rank has no factors. The model is then unchanged.
        AttributeError: If the model has no such layer. The model is then unchanged.
    """
    modules = {}
    for name, rank in _ranks(model, allocation, factors).items():
        modules[name] = factors[name].at_rank(rank)
        if on_layer is not None:
            on_layer(name)
    return _replace(model, modules)


def store_(
    model: nn.Module,
    allocation: Allocation,
    factors: Mapping[str, LowRankFactors],
    storage: Storage,
    *,
    on_layer: Callable[[str], None] | None = None,
) -> None:
    """Replace layers by their low-rank forms as they are stored, in place.

    Args:
        model: Changed.
        allocation: Ranks by layer name; ``None`` leaves a layer dense.
        factors: As precise as they are at hand: pivots are chosen from these, and rounded after.
        storage: The form.
        on_layer: Told the name of each layer whose form is made.

    Raises:
        KeyError: If a layer with a rank has no factors. The model is then unchanged.
        AttributeError: If the model has no such layer. The model is then unchanged.
    """
    places = {name: linear_weight(model.get_submodule(name)) for name in allocation.ranks}
    forms: dict[str, NestedFactors] = {
        name: found.to(dtype=places[name].dtype)
        if storage == "factored"
        else PivotedFactors(found, places[name].dtype, name)
        for name, found in factors.items()
        if name in places
    }
    compress_(model, allocation, forms, on_layer=on_layer)
    for name, rank in allocation.ranks.items():
        if rank is not None:
            model.get_submodule(name).to(places[name].device)


def running(
    model: nn.Module, factors: Mapping[str, LowRankFactors], ranks: Mapping[str, int | None]
) -> dict[str, LowRankFactors]:
    """Return factors as a model runs them: in its dtype, on its device, no longer than needed.

    Args:
        model: With its dense layers in place.
        factors: By layer name.
        ranks: How many directions of each; layers that stay dense are left out.
    """
    found = {}
    for name, rank in ranks.items():
        if rank is not None and name in factors:
            weight = linear_weight(model.get_submodule(name))
            found[name] = factors[name].to(dtype=weight.dtype, device=weight.device, max_rank=rank)
    return found


def _ranks(
    model: nn.Module, allocation: Allocation, factors: Mapping[str, NestedFactors]
) -> dict[str, int]:
    """Return the layers that are not dense; all must be in the model and have factors."""
    chosen = {name: rank for name, rank in allocation.ranks.items() if rank is not None}
    missing = sorted(set(chosen) - set(factors))
    if missing:
        raise KeyError(f"{len(missing)} layers have a rank but no factors: {missing[0]} first")
    for name in chosen:
        model.get_submodule(name)
    return chosen


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Put modules where their names are for the length of a ``with``.

    Args:
        model: Changed, and put back whatever happens inside.
        modules: By dotted name, each of a module that the model has.

    Yields:
        The model.
    """
    before = _replace(model, modules)
    try:
        yield model
    finally:
        _replace(model, before)


def _replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put modules where their names are, and return what was there."""
    return {name: replace_module(model, name, module) for name, module in modules.items()}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put ``module`` where ``name`` is, and return what was there.

    Args:
        model: Changed.
        name: Dotted path of a module in it.
        module: Put there, in the training mode of what it replaces.

    Raises:
        AttributeError: If the model has no such module.
    """
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    before: nn.Module = getattr(owner, child)
    setattr(owner, child, module.train(before.training))
    return before


def is_dearer(rank: int, out_features: int, in_features: int, tokens: int) -> bool:
    """Return whether two thin products cost more than multiplying them out for these tokens.

    Two products take ``rank * (out + in)`` operations per token. The dense one takes
    ``out * in``, after ``rank * out * in`` for making it.

    Args:
        rank: Of the layer.
        out_features: Rows of its weight.
        in_features: Columns of its weight.
        tokens: That will be run through it before another rank takes its place.
    """
    dense = out_features * in_features
    return tokens * rank * (out_features + in_features) > (tokens + rank) * dense


def multiplied_out(
    factors: LowRankFactors, rank: int, buffer: Float[Tensor, "out in"]
) -> nn.Linear:
    """Return the rank-``rank`` layer as one dense layer whose weight is ``buffer``.

    The product is rounded once: matrix products accumulate in float32 or better. The bias is
    formed from the rounded product.

    Args:
        factors: In the dtype and on the device of the layer.
        rank: In ``0..max_rank``.
        buffer: Overwritten.
    """
    prefix = factors.at_rank(rank)
    torch.mm(prefix.left.weight, prefix.right.weight, out=buffer)
    bias = factors.bias_for(lambda x: buffer.to(x.dtype) @ x, buffer.dtype)
    with torch.device("meta"):
        layer = nn.Linear(buffer.shape[1], buffer.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(buffer, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


@contextmanager
def compressed(
    model: nn.Module,
    allocation: Allocation,
    factors: Mapping[str, LowRankFactors],
    *,
    tokens: int = 0,
    buffers: Buffers | None = None,
) -> Iterator[nn.Module]:
    """Give the compressed model for the length of a ``with``; the dense one is put back.

    The low-rank layers are views of the factors, and the dense layers stay in memory. Where a
    rank is so high that two thin products would cost more than a dense one, as happens under
    budgets of pivoted storage, the prefix is multiplied out into a buffer. The dense layers come
    back whatever happens inside.

    Args:
        model: Changed for the length of the ``with``.
        allocation: Ranks by layer name; ``None`` leaves a layer dense.
        factors: In the dtype and on the device of the model.
        tokens: That will be run through the model; 0 multiplies nothing out.
        buffers: Where products are written, by layer name. Missing ones are made and stay there,
            so that trial after trial uses the same memory; ``None`` makes them for this ``with``.

    Yields:
        The model, compressed.

    Raises:
        KeyError: If a layer with a rank has no factors. The model is then unchanged.
        AttributeError: If the model has no such layer. The model is then unchanged.
    """
    buffers = {} if buffers is None else buffers
    modules: dict[str, nn.Module] = {}
    for name, rank in _ranks(model, allocation, factors).items():
        found = factors[name]
        shape = (found.left.shape[0], found.right.shape[1])
        if is_dearer(rank, *shape, tokens):
            if name not in buffers:
                buffers[name] = found.left.new_empty(shape)
            modules[name] = multiplied_out(found, rank, buffers[name])
        else:
            modules[name] = found.at_rank(rank)
    with replaced(model, modules):
        yield model
