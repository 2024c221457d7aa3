"""Options: what units can become, what each costs and loses, and what the whole model costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lrbo.layers.form import DENSE_FORM, Costs, Form, Grid, Integers, Level, Levels
from lrbo.layers.forms import FORMS, Based, Delta, QuantizedFactors, form_named, is_joint
from lrbo.layers.product_form import Factored
from lrbo.models.specs import LayerSpec, ModelMap

Measure = Literal["parameters", "bytes", "macs"]
UNITS: Mapping[Measure, str]  # of a measure, in words
UNITS = {"parameters": "parameters", "bytes": "bytes", "macs": "multiply-adds"}
MEASURES: tuple[Measure, ...] = tuple(UNITS)
Losses = NDArray[np.float64]

# Tail sums in float32 rise by about 1e-7 of the largest loss. What rises or is negative by more
# than this share of it is not rounding, and is refused.
LOSS_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Option:
    """A form, by name, at a level, such as a rank."""

    form: str
    level: Level = ()

    def __str__(self) -> str:
        """Return the option as files have it: ``"pivoted 96"``, ``"dense"``."""
        return " ".join([self.form, *map(str, self.level)])

    @staticmethod
    @cache  # journals name the same options over and over
    def parse(text: str) -> Option:
        """Read what ``str`` wrote; ValueError for any other text, or an unknown form."""
        form, *level = text.split(" ")
        if form in FORMS and all(number.isdecimal() for number in level):
            option = Option(form, tuple(map(int, level)))
            if str(option) == text:  # no digits of other scripts, no zeros ahead
                return option
        raise ValueError(f"{text!r} is no option: expected one of {', '.join(FORMS)}, and a level")

    @property
    def label(self) -> str:
        """The option for readers: ``"rank 96"``, ``"dense"``."""
        return FORMS[self.form].label(self.level)

    @property
    def family(self) -> Option:
        """What is prepared together: the option without the last number of its level."""
        return Option(self.form, self.level[:-1])

    @property
    def is_low_rank(self) -> bool:
        """Whether it is a low rank of the whole weight, or change, in numbers or integers."""
        return isinstance(form_named(self.form), Factored | QuantizedFactors | Delta)

    @property
    def rank(self) -> int:
        """The last number of its level, 0 where that has none."""
        return self.level[-1] if self.level else 0

    def at(self, last: int) -> Option:
        """Return the option of this family with a last number of its level."""
        return Option(self.form, (*self.level, last))


DENSE = Option(DENSE_FORM)


@dataclass(frozen=True)
class Cost:
    """What a unit, or several together, store and run."""

    parameters: int
    bytes: int  # of all that is stored: parameters, biases, indices
    macs: int  # multiply-adds per token

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(self.of(measure) + other.of(measure) for measure in MEASURES))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(self.of(measure) - other.of(measure) for measure in MEASURES))

    def of(self, measure: Measure) -> int:
        """Return one of the three."""
        value: int = getattr(self, measure)
        return value

    @classmethod
    def total(cls, costs: Iterable[Cost]) -> Cost:
        """Return the cost of all together."""
        return sum(costs, cls(0, 0, 0))


@dataclass(frozen=True)
class Budget:
    """A ceiling on what the units cost together, and what is counted."""

    measure: Measure
    limit: int

    @classmethod
    def keeping(cls, keep_ratio: float, dense: Cost, measure: Measure = "parameters") -> Budget:
        """Keep a share in (0, 1] of what the dense units cost, rounded down."""
        if not 0.0 < keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio={keep_ratio} is outside (0, 1].")
        exact = Fraction(str(float(keep_ratio)))  # 0.57 of 100 is 57; in binary it is 56.99...
        return cls(measure, math.floor(exact * dense.of(measure)))

    def __str__(self) -> str:
        """Write it as in ``"84_934_656 parameters"``."""
        return f"{self.limit:_} {UNITS[self.measure]}"


def cost_of(unit: LayerSpec, option: Option, *, bias: bool, itemsize: int) -> Cost:
    """Count a unit in parameters of ``itemsize`` bytes; ``bias`` is not for dense."""
    return Cost(*_costs(form_named(option.form), unit, option.level, bias=bias, itemsize=itemsize))


def _costs(form: Form, unit: LayerSpec, level: Levels, *, bias: bool, itemsize: int) -> Costs:
    """Return the costs of a form; of rows that are only looked up, without multiply-adds."""
    parameters, size, macs = form.cost(unit, level, bias=bias, itemsize=itemsize)
    return parameters, size, macs * unit.multiplies


@dataclass(frozen=True)
class ModelAccount:
    """What the compressible units and the whole model cost, dense and as allocated.

    Tied tensors are counted once; multiply-adds are those of all linear layers, the head included,
    without attention scores, norms and embeddings.
    """

    units_dense: Cost
    units: Cost
    model_dense: Cost
    model: Cost

    def keep_ratio(self, measure: Measure) -> float:
        """The share of the dense units that is kept."""
        return self.units.of(measure) / self.units_dense.of(measure)


def dense_cost(units: Iterable[LayerSpec], itemsize: int) -> Cost:
    """Count dense units together, in parameters of ``itemsize`` bytes."""
    return Cost.total(cost_of(unit, DENSE, bias=False, itemsize=itemsize) for unit in units)


def account(model: ModelMap, units: Cost, *, itemsize: int) -> ModelAccount:
    """Count a whole model whose compressible units cost ``units`` as allocated."""
    units_dense = dense_cost(model.compressible, itemsize)
    macs = dense_cost(model.layers, itemsize).macs
    model_dense = Cost(model.parameters, model.parameters * itemsize, macs)
    return ModelAccount(units_dense, units, model_dense, model_dense - units_dense + units)


def as_stored(
    model: ModelMap, options: Mapping[str, Option], adds_bias: bool, itemsize: int
) -> tuple[dict[str, Cost], ModelAccount]:
    """Count units by name, and the whole model.

    ``adds_bias`` is for all layers of blocks but dense ones.
    """
    costs = {}
    for name, option in options.items():
        unit = model.by_name[name]
        bias = unit.is_biased(adds_bias)
        costs[name] = cost_of(unit, option, bias=bias, itemsize=itemsize)
    return costs, account(model, Cost.total(costs.values()), itemsize=itemsize)


@dataclass(frozen=True, eq=False)
class Section:
    """The options of a family on a menu: levels ``(n, k)``, and costs ``(n, 3)`` as of a menu."""

    form: str
    levels: Integers
    costs: Integers

    @property
    def family(self) -> Option:
        """The option that all of them are, without the last number of a level."""
        return Option(self.form, tuple(map(int, self.levels[:1].ravel()[:-1])))


@dataclass(frozen=True, eq=False)
class Menu:
    """The options of one unit as arrays: by form, in the order of preference, dense last.

    ``losses``, ``(n,)``, are the predicted increase of the loss, nats per token: 0 for dense, and
    within a section never rising; ``None`` where nothing is predicted.
    """

    unit: LayerSpec
    sections: tuple[Section, ...]
    losses: Losses | None = None

    @classmethod
    def of(
        cls,
        unit: LayerSpec,
        forms: Sequence[str],
        *,
        bias: bool,
        itemsize: int,
        measure: Measure | None = None,
        **offered: Any,
    ) -> Menu:
        """Return the menu of a unit, without losses; dense is always on it.

        ``bias`` is for forms other than dense; ``offered`` are fields of :class:`Grid`. Bases that
        are not cheaper than dense in a ``measure``, such as integers in parameters, are left out,
        and so are forms whose rows cannot be looked up where the unit is a table, or that are of
        tables alone where it is none.
        """
        grid = Grid(**offered)
        sections = []
        for name in [*(form for form in forms if form != DENSE_FORM), DENSE_FORM]:
            form = form_named(name)
            if not form.suits(unit):
                continue
            for levels in form.levels(unit, grid):
                columns = _costs(form, unit, tuple(levels.T), bias=bias, itemsize=itemsize)
                costs = np.column_stack([np.broadcast_to(each, len(levels)) for each in columns])
                sections.append(Section(name, levels, costs.astype(np.int64)))
        if measure is not None:
            column = MEASURES.index(measure)
            dense = int(sections[-1].costs[0, column])
            sections = [
                section
                for section in sections
                if not isinstance(form_named(section.form), Based)
                or bool((section.costs[:, column] < dense).any())
            ]
        return cls(unit, tuple(sections))

    def __len__(self) -> int:
        return len(self.costs)

    @cached_property
    def costs(self) -> Integers:
        """Parameters, bytes and multiply-adds of every option: ``(n, 3)``."""
        return np.concatenate([section.costs for section in self.sections])

    @property
    def dense(self) -> Cost:
        """The cost of the dense unit."""
        return self.cost(len(self) - 1)

    def option(self, index: int) -> Option:
        """Return an option by its index."""
        for section in self.sections:
            if index < len(section.levels):
                return Option(section.form, tuple(map(int, section.levels[index])))
            index -= len(section.levels)
        raise IndexError(f"{self.unit.name} has {len(self)} options")

    def index(self, option: Option) -> int:
        """Return the index of an option, that of dense if it is not on the menu."""
        start = 0
        for section in self.sections:
            if section.form == option.form:
                same = (section.levels == np.array(option.level)).all(1)
                if same.any():
                    return start + int(same.argmax())
            start += len(section.levels)
        return len(self) - 1

    def cost(self, index: int) -> Cost:
        """Return the cost of an option by its index."""
        return Cost(*map(int, self.costs[index]))

    def only_dense(self) -> Menu:
        """Keep dense alone, as of a unit that was not factored."""
        return Menu(self.unit, self.sections[-1:], np.zeros(1))

    def with_losses(self, losses: Sequence[Losses]) -> Menu:
        """Return the menu with predicted losses of the levels of each section but dense, ``(n,)``.

        Levels beyond their end leave the menu. Rises and negative values up to 1e-6 of the largest
        are taken for rounding and flattened.

        Raises:
            ValueError: If losses are not finite, negative, or rise with the level.
        """
        sections, parts = [], []
        for whole, predicted in zip(self.sections[:-1], losses, strict=True):
            count = len(predicted)
            section = Section(whole.form, whole.levels[:count], whole.costs[:count])
            sections.append(section)
            parts.append(_checked(self.unit.name, section, predicted))
        return Menu(
            self.unit, (*sections, self.sections[-1]), np.concatenate([*parts, np.zeros(1)])
        )

    def ladder(self, measure: Measure, losses: Losses | None) -> Ladder:
        """Return the options that are worth having, from cheap to dear.

        An option that costs as much as dense is not, because dense is exact; nor is one that loses
        more than a cheaper one, or as much as a cheaper one of another form. Without losses, which
        may be others than those of the menu, nothing compares forms: only the first is offered.
        Joint options are none of a unit alone.
        """
        prices = self.costs[:, MEASURES.index(measure)]
        alone = [section for section in self.sections[:-1] if not is_joint(section.form)]
        offered = alone if losses is not None else alone[:1]
        worth = (prices < prices[-1]) & self._marked(offered)
        worth[-1] = True
        if losses is None:
            order = np.argsort(prices, kind="stable")
            indices = order[worth[order]]
        else:
            order = np.lexsort((losses, prices))
            indices = order[worth[order]]
            lost = losses[indices]
            indices = indices[lost <= np.minimum.accumulate(lost)]
            indices = indices[self._of_cheapest_form(indices, losses[indices])]
        indices = indices[np.diff(prices[indices], prepend=-1) > 0]
        return Ladder(indices, prices[indices], None if losses is None else losses[indices])

    def of_form(self, form: str) -> Menu:
        """Return the menu of one form and dense, without losses."""
        own = tuple(section for section in self.sections[:-1] if section.form == form)
        return Menu(self.unit, (*own, self.sections[-1]))

    def _marked(self, sections: Sequence[Section]) -> NDArray[np.bool_]:
        """Mark the options of some sections."""
        parts = [np.full(len(s.levels), any(s is each for each in sections)) for s in self.sections]
        return np.concatenate(parts)

    def _of_cheapest_form(self, indices: NDArray[np.intp], losses: Losses) -> NDArray[np.bool_]:
        """Mark the options, in order of price, that have the form of the cheapest of equal loss."""
        sizes = [len(section.levels) for section in self.sections]
        form = np.repeat(np.arange(len(sizes)), sizes)[indices]
        is_first = np.append(True, np.diff(losses) != 0)
        same: NDArray[np.bool_] = form == form[is_first][np.cumsum(is_first) - 1]
        same[-1] = True  # dense
        return same


def _checked(name: str, section: Section, losses: Losses) -> Losses:
    """Return the losses of a form in float64, free of rounding, or refuse them."""
    values = np.asarray(losses, dtype=np.float64)
    if values.shape != (len(section.levels),):
        raise ValueError(
            f"{name}: losses of shape {values.shape}; expected one per level of {section.form}, "
            f"{len(section.levels)}."
        )

    def refuse(bad: NDArray[np.bool_], what: str) -> None:
        if bad.any():
            first = int(bad.argmax())
            level = FORMS[section.form].label(tuple(map(int, section.levels[first])))
            raise ValueError(
                f"{name}: {bad.sum()} of {len(values)} losses {what}, the first at {level}: "
                f"{values[first]}; expected nats above dense, which never rise with the level."
            )

    refuse(~np.isfinite(values), "are not finite")
    tolerance = LOSS_TOLERANCE * float(np.abs(values).max(initial=0.0))
    refuse(values < -tolerance, "are negative")
    falling = np.minimum.accumulate(np.maximum(values, 0.0))
    refuse(values - falling > tolerance, "are above one at a lower level")
    return falling


@dataclass(frozen=True, eq=False)
class Ladder:
    """The options of a unit that are worth having, from cheap to dear, ``(m,)`` each."""

    indices: NDArray[np.intp]  # on the menu; the last is dense
    prices: Integers  # in the measure of a budget, rising
    losses: Losses | None  # never rising; None where nothing is predicted

    def __len__(self) -> int:
        return len(self.indices)
