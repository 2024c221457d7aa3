"""Allocations that tests decide by hand, with the costs that the forms count."""

from collections.abc import Iterable, Mapping

from lrbo.allocation.allocate import Allocation
from lrbo.layers.forms import Quantized, form_named
from lrbo.layers.options import DENSE, Budget, Cost, Measure, Option, cost_of
from lrbo.models.specs import LayerSpec


def decided(
    units: Iterable[LayerSpec],
    options: Mapping[str, Option],
    *,
    adds_bias: bool = False,
    itemsize: int = 4,
    measure: Measure = "parameters",
) -> Allocation:
    """Return an allocation that uses up its budget; units without an option are dense."""
    known = {unit.name: unit for unit in units}
    whole = {name: options.get(name, DENSE) for name in known}
    costs = {
        name: cost_of(
            known[name], option, bias=adds_bias or known[name].has_bias, itemsize=itemsize
        )
        for name, option in whole.items()
    }
    limit = Cost.total(costs.values()).of(measure)
    return Allocation(whole, costs, Budget(measure, limit))


def mixed_options(units: Iterable[LayerSpec], forms: tuple[str, ...]) -> dict[str, Option]:
    """Return an option per unit: ranks from 1 to 5, every fourth unit dense, forms in turns.

    Integers are in groups of 16, of the largest rank at most; units without whole groups are dense.
    """
    options = {}
    for i, unit in enumerate(units):
        form, level = form_named(forms[i % len(forms)]), (1 + i % 5,)
        shape = unit.out_features, unit.in_features
        if isinstance(form, Quantized):
            level = (16, min(1 + i % 5, form.largest_rank(*shape)))
        is_dense = i % 4 == 3 or form.problem(*shape, level)
        options[unit.name] = DENSE if is_dense else Option(form.name, level)
    return options
