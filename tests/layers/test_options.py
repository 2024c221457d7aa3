"""Options and menus: what is worth having, against its definition; and exact budgets."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrbo.errors import ConfigError
from lrbo.layers.form import DENSE_FORM
from lrbo.layers.forms import FORMS
from lrbo.layers.modules import PRODUCTS
from lrbo.layers.options import (
    DENSE,
    MEASURES,
    Budget,
    Cost,
    Measure,
    Menu,
    Option,
    cost_of,
)
from lrbo.models.specs import LayerSpec
from tests.support import reference

NAMES = list(PRODUCTS)  # forms of which a rank is the level
UNIT = LayerSpec("layers.0.up", "up", 0, 20, 30, False, site="x")


def menu_of(unit: LayerSpec = UNIT, forms: list[str] | None = None, **changes: object) -> Menu:
    options = {"bias": False, "itemsize": 2, **changes}
    return Menu.of(unit, NAMES if forms is None else forms, **options)  # type: ignore[arg-type]


def falling(count: int, first: float = 1.0) -> np.ndarray:
    return np.linspace(first, 0.0, count + 1)[:-1]


# --- options -----------------------------------------------------------------------------------


@given(st.sampled_from(list(FORMS)), st.lists(st.integers(0, 10**6), max_size=3))
def test_an_option_is_what_its_text_says(form: str, level: list[int]) -> None:
    option = Option(form, tuple(level))
    assert Option.parse(str(option)) == option
    assert str(option).split() == [form, *map(str, level)]


def test_the_text_of_options() -> None:
    assert str(DENSE) == DENSE.label == "dense"
    assert str(Option("pivoted", (96,))) == "pivoted 96"
    assert Option("pivoted", (96,)).label == "rank 96"


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "96", "pivot 96", "Pivoted 96", "pivoted ninety", "pivoted -1", "pivoted 1.5",
        "pivoted  96", " pivoted 96", "pivoted 96 ", "pivoted\n96", "pivoted 1e3", "dense,",
        "pivoted ²", "pivoted ٣", "pivoted 9_6", "pivoted 096",
    ],
)  # fmt: skip
def test_what_is_no_option_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r} is no option: ")) as caught:
        Option.parse(text)
    assert all(name in str(caught.value) for name in FORMS)


@given(st.lists(st.builds(Cost, *[st.integers(0, 10**12)] * 3), max_size=5))
def test_costs_add(costs: list[Cost]) -> None:
    total = Cost.total(costs)
    for measure in MEASURES:
        assert total.of(measure) == sum(getattr(cost, measure) for cost in costs)
    assert Cost.total([]) == Cost(0, 0, 0)


def test_an_option_of_no_form_has_no_cost() -> None:
    with pytest.raises(ConfigError, match="form 'banded' is unknown"):
        cost_of(UNIT, Option("banded", (3,)), bias=False, itemsize=2)


# --- budgets -----------------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.integers(1, 10**12), st.sampled_from(MEASURES))
def test_a_keep_ratio_of_decimals_is_exact(share: int, size: int, measure: Measure) -> None:
    """0.57 of 100 is 57, although 0.57 * 100 is 56.99999999999999 in binary."""
    dense = Cost(**(dict.fromkeys(MEASURES, 7) | {measure: size}))
    budget = Budget.keeping(share / 10_000, dense, measure)
    assert budget == Budget(measure, share * size // 10_000)


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10**15))
def test_any_keep_ratio_is_taken_as_it_is_printed(keep_ratio: float, size: int) -> None:
    exact = Fraction(repr(keep_ratio)) * size
    limit = Budget.keeping(keep_ratio, Cost(size, 0, 0)).limit
    assert limit <= exact < limit + 1


@pytest.mark.parametrize("keep_ratio", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_a_keep_ratio_outside_its_range_is_refused(keep_ratio: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"keep_ratio={keep_ratio}")):
        Budget.keeping(keep_ratio, Cost(16, 32, 16))


def test_a_budget_says_what_it_counts() -> None:
    texts = [str(Budget(measure, 84_934_656)) for measure in MEASURES]
    units = ("parameters", "bytes", "multiply-adds")
    assert texts == [f"84_934_656 {unit}" for unit in units]


# --- menus -------------------------------------------------------------------------------------


@pytest.mark.parametrize("forms", [NAMES, NAMES[::-1], NAMES[:1], [], [DENSE_FORM, *NAMES]])
@pytest.mark.parametrize("bias", [False, True])
def test_a_menu_has_all_levels_of_its_forms_then_dense(forms: list[str], bias: bool) -> None:
    menu = menu_of(forms=forms, bias=bias, multiple=4, minimum=3)
    expected = [Option(form, (rank,)) for form in forms if form != DENSE_FORM
                for rank in (4, 8, 12, 16, 20)]  # fmt: skip
    options = [menu.option(index) for index in range(len(menu))]
    assert options == [*expected, DENSE]
    for index, option in enumerate(options):
        assert menu.cost(index) == cost_of(UNIT, option, bias=bias, itemsize=2)
    assert menu.dense == Cost(600, 1200, 600)
    with pytest.raises(IndexError, match=f"layers.0.up has {len(menu)} options"):
        menu.option(len(menu))


def test_losses_end_the_levels_that_are_on_the_menu() -> None:
    menu = menu_of(forms=["factored", "pivoted"]).with_losses([falling(3), falling(5, 2.0)])
    assert [str(menu.option(index)) for index in range(len(menu))] == [
        *(f"factored {rank}" for rank in (1, 2, 3)),
        *(f"pivoted {rank}" for rank in (1, 2, 3, 4, 5)),
        "dense",
    ]
    assert menu.losses is not None
    assert menu.losses.tolist() == [*falling(3), *falling(5, 2.0), 0.0]
    only = menu.only_dense()
    assert (len(only), only.option(0), only.dense) == (1, DENSE, menu.dense)
    assert only.losses is not None
    assert only.losses.tolist() == [0.0]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([1.0, math.nan, 0.5, math.inf], r"2 of 4 losses are not finite, .* rank 2: nan"),
        ([1.0, 0.5, -0.25, -0.5], r"2 of 4 losses are negative, .* rank 3: -0.25"),
        ([1.0, 0.5, 0.7, 0.5, 0.6], r"2 of 5 losses are above one at a lower .* rank 3: 0.7"),
        ([-1.0, -2.0], r"2 of 2 losses are negative, .* rank 1: -1.0"),
        ([1.0] * 21, r"losses of shape \(21,\); expected one per level of {form}, 20"),
        (np.ones((9, 1)), r"losses of shape \(9, 1\); expected one per level of {form}, 9"),
    ],
)
@pytest.mark.parametrize("form", NAMES)
def test_what_is_no_loss_per_level_is_refused_by_name(
    form: str, losses: object, message: str
) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.up: " + message.replace("{form}", form)):
        menu_of(forms=[form]).with_losses([np.asarray(losses, dtype=np.float64)])
    others = [name for name in NAMES if name != form]
    fine = [falling(20) for _ in others]
    with pytest.raises(ValueError, match=r"layers\.0\.up: " + message.replace("{form}", form)):
        menu_of(forms=[*others, form]).with_losses([*fine, np.asarray(losses, dtype=np.float64)])


@pytest.mark.parametrize("count", [0, len(NAMES) - 1, len(NAMES) + 1])
def test_losses_of_fewer_or_more_forms_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="zip"):
        menu_of().with_losses([falling(20)] * count)


def test_rounding_of_losses_is_flattened() -> None:
    losses = np.array([1.0, 0.5, 0.5 + 1e-7, 0.2, -1e-7, 1e-8, 0.0])
    menu = menu_of(forms=["pivoted"]).with_losses([losses])
    assert menu.losses is not None
    assert menu.losses.tolist() == [1.0, 0.5, 0.5, 0.2, 0.0, 0.0, 0.0, 0.0]
    assert losses[4] == -1e-7  # what was given is left alone


# --- ladders -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """What a menu is made of; plain values, because type checks must not run in a strategy."""

    shape: tuple[int, int]
    has_bias: bool
    forms: list[str]
    settings: dict[str, int]
    curves: list[list[float]]

    @property
    def menu(self) -> Menu:
        unit = LayerSpec("a", "kind", 0, *self.shape, self.has_bias, site="a")
        menu = menu_of(unit, self.forms, **self.settings)
        return menu.with_losses(
            [
                np.array(curve[: len(section.levels)])
                for section, curve in zip(menu.sections[:-1], self.curves, strict=True)
            ]
        )


@st.composite
def menus(draw) -> Drawn:
    """Draw a menu of one form or several, with whole losses that are often equal."""
    side, has_bias = st.integers(1, 16), draw(st.booleans())
    forms = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=len(NAMES)))
    curves = []
    for _ in forms:
        drop = st.sampled_from([0, 0, 1, 2, 7]) if draw(st.booleans()) else st.integers(0, 99)
        drops = draw(st.lists(drop, max_size=16))
        curves.append([float(sum(drops[level:])) for level in range(len(drops))])
    if draw(st.booleans()):  # as of forms that store the same function
        curves = curves[:1] * len(curves)
    settings = {
        "bias": has_bias or draw(st.booleans()),
        "itemsize": draw(st.sampled_from([1, 2, 4])),
        "multiple": draw(st.integers(1, 4)),
        "minimum": draw(st.integers(0, 4)),
    }
    return Drawn((draw(side), draw(side)), has_bias, forms, settings, curves)


def described(menu: Menu, measure: Measure) -> list[tuple[Option, int, float]]:
    assert menu.losses is not None
    return [
        (menu.option(index), menu.cost(index).of(measure), float(menu.losses[index]))
        for index in range(len(menu))
    ]


def steps_of(
    menu: Menu, measure: Measure, losses: np.ndarray | None = None
) -> list[tuple[Option, int, float]]:
    ladder = menu.ladder(measure, menu.losses if losses is None else losses)
    assert ladder.losses is not None
    assert len(ladder) == len(ladder.indices) == len(ladder.prices) == len(ladder.losses)
    options = [menu.option(int(index)) for index in ladder.indices]
    return list(zip(options, map(int, ladder.prices), map(float, ladder.losses), strict=True))


every_measure = pytest.mark.parametrize("measure", MEASURES)


@every_measure
@given(drawn=menus())
@settings(max_examples=150)
def test_a_ladder_has_what_nothing_beats(measure: Measure, drawn: Drawn) -> None:
    menu = drawn.menu
    steps = steps_of(menu, measure)
    assert steps == reference.undominated(described(menu, measure))
    options, prices, losses = zip(*steps, strict=True)
    assert list(prices) == sorted(set(prices))
    assert list(losses) == sorted(losses, reverse=True)
    assert options[-1] == DENSE
    assert losses[-1] == 0.0
    assert prices[-1] == menu.dense.of(measure)


@every_measure
@given(drawn=menus())
def test_nothing_that_is_left_out_could_lose_less(measure: Measure, drawn: Drawn) -> None:
    """At any price the ladder offers the least loss that the menu has."""
    menu = drawn.menu
    steps, everything = steps_of(menu, measure), described(menu, measure)
    for limit in {price for _, price, _ in everything}:
        least = min(loss for _, price, loss in everything if price <= limit)
        assert min((x for _, p, x in steps if p <= limit), default=math.inf) == least


@every_measure
@given(drawn=menus(), factor=st.sampled_from([0.5, 4.0]))
def test_other_losses_may_take_the_place_of_those_of_the_menu(
    measure: Measure, drawn: Drawn, factor: float
) -> None:
    menu = drawn.menu
    assert menu.losses is not None
    scaled = steps_of(menu, measure, losses=factor * menu.losses)
    plain = steps_of(menu, measure)
    assert scaled == [(option, price, factor * loss) for option, price, loss in plain]


@every_measure
@given(drawn=menus())
def test_without_losses_the_first_form_and_dense_are_offered(
    measure: Measure, drawn: Drawn
) -> None:
    menu = drawn.menu
    ladder = menu.ladder(measure, None)
    assert ladder.losses is None
    first = menu.sections[0].form
    offered = [(o, price) for o, price, _ in described(menu, measure) if o.form == first]
    if first != DENSE_FORM:
        offered.append((DENSE, menu.dense.of(measure)))
    options = [menu.option(int(index)) for index in ladder.indices]
    steps = list(zip(options, map(int, ladder.prices), strict=True))
    assert steps == reference.ladder(offered)


def test_of_forms_that_store_the_same_function_the_cheaper_is_offered() -> None:
    """In bytes the index of a pivoted layer outweighs what it saves while ranks are small."""
    losses = falling(20)
    menu = menu_of(forms=["factored", "pivoted"]).with_losses([losses, losses])
    in_bytes = [str(option) for option, _, _ in steps_of(menu, "bytes")]
    # 2 * rank * 50 against 2 * (rank * 50 - rank**2) + 80: equal at rank 6.3
    assert in_bytes == [
        *(f"factored {rank}" for rank in range(1, 7)),
        *(f"pivoted {rank}" for rank in range(7, 20) if 100 * rank - 2 * rank**2 + 80 < 1200),
        "dense",
    ]
    in_parameters = [str(option) for option, _, _ in steps_of(menu, "parameters")]
    assert in_parameters == [*(f"pivoted {rank}" for rank in range(1, 20)), "dense"]
