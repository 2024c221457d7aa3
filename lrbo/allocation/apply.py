"""Put an allocation into a model, for good or for the length of a `with`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from lrbo.allocation.allocate import Allocation
from lrbo.factorization.factors import Buffers
from lrbo.factorization.prepared import Prepared
from lrbo.layers import tables
from lrbo.layers.low_rank import FormModule
from lrbo.layers.modules import replace_modules
from lrbo.layers.options import Option
from lrbo.models.model_map import linear_weight


def store_(
    model: nn.Module,
    allocation: Allocation,
    prepared: Mapping[str, Prepared],
    *,
    on_unit: Callable[[str], None] = lambda _: None,
) -> dict[str, nn.Module]:
    """Replace the units of a model by their options as stored, in place; return the dense modules.

    They are rounded to the dtype of the model; ``on_unit`` is called with the name of each. A unit
    that is not prepared (KeyError) or not in the model (AttributeError) leaves it unchanged.
    """
    modules = {}
    for name, option in _options(model, allocation, prepared).items():
        weight = linear_weight(model.get_submodule(name))
        own = prepared[name].bound(model.get_submodule(name))
        modules[name] = own.stored(name, option, weight.dtype).to(weight.device)
        on_unit(name)
    if any(tables.is_table(model, name) for name in modules):
        tables.fix_size_(model)
    return replace_modules(model, tables.stored_modules(model, modules))


def on_device(
    model: nn.Module, prepared: Mapping[str, Prepared], ranks: Mapping[str, Mapping[Option, int]]
) -> dict[str, Prepared]:
    """Take families of options, up to a rank each, in dtype and on the device of their units."""
    moved = {}
    for name in ranks:
        if name not in prepared:
            continue
        dense = model.get_submodule(name)
        weight = linear_weight(dense)
        part = prepared[name].only(ranks[name], weight.dtype, weight.device)
        if part is not None:
            moved[name] = part.bound(dense)
    return moved


@contextmanager
def compressed(
    model: nn.Module,
    allocation: Allocation,
    prepared: Mapping[str, Prepared],
    *,
    tokens: int = 0,
    buffers: Buffers | None = None,
) -> Iterator[nn.Module]:
    """Compress a model for the length of a ``with``; its dense units stay in memory.

    Units are prepared in its dtype and on its device; errors are as of :func:`store_`. For
    ``tokens`` and ``buffers``, which trials may share, see :meth:`Prepared.trial_module`. Embedding
    and head are multiplied out once: the head runs for every few hundred tokens.
    """
    options = _options(model, allocation, prepared)
    buffers = {} if buffers is None else buffers
    with replaced(model, trial_modules(model, options, prepared, tokens, buffers)):
        yield model


def trial_modules(
    model: nn.Module,
    options: Mapping[str, Option],
    prepared: Mapping[str, Prepared],
    tokens: int,
    buffers: Buffers,
) -> dict[str, nn.Module]:
    """Map names in a model to the modules of some options, as of :func:`compressed`."""
    modules: dict[str, nn.Module] = {}
    for name, option in options.items():
        if not tables.is_table(model, name):
            modules[name] = prepared[name].trial_module(name, option, tokens, buffers)
            continue
        module = prepared[name].trial_module(name, option, 0, buffers)
        assert isinstance(module, FormModule)
        weight = module.dense_weight(module.weight.dtype)
        modules |= tables.dense_modules(model, name, weight, module.bias)
    return modules


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Replace modules of a model, by dotted name, for the length of a ``with``."""
    before = replace_modules(model, modules)
    try:
        yield model
    finally:
        replace_modules(model, before)


def _options(
    model: nn.Module, allocation: Allocation, prepared: Mapping[str, Prepared]
) -> Mapping[str, Option]:
    """The options that are not dense, if model and ``prepared`` have all of them."""
    options = allocation.compressed
    if missing := sorted(set(options) - set(prepared)):
        raise KeyError(
            f"{len(missing)} units are not dense and were not prepared, the first is {missing[0]}"
        )
    for name in options:
        model.get_submodule(name)
    return options
