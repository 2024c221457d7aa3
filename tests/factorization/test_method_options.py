"""Options of methods that cannot work are refused, not repaired."""

import math
import re
from dataclasses import dataclass

import pytest
import torch

from lrbo.config.options import (
    FLAG,
    FROM_0,
    NAMES,
    Options,
    check_options,
    option,
    rules_of,
    with_options,
)
from lrbo.errors import StatisticsError
from lrbo.factorization.methods import LossAware
from lrbo.factorization.options import METHOD_OPTIONS
from lrbo.factorization.registry import METHODS, method_named
from tests.support.methods import SHAPES, make_layer

OPTIONS = [
    ("asvd", "alpha"),
    ("first_order", "kept"),
    ("loss_aware", "input_shrinkage"),
    ("loss_aware", "output_shrinkage"),
    ("loss_aware", "output_power"),
]


def problems(name: str, **given: object) -> list[str]:
    """Return the problems of a method with some of its options given."""
    options = {one: getattr(METHODS[name], one) for one in rules_of(METHODS[name])}
    return check_options("method", {"name": name, **options, **given}, METHOD_OPTIONS)


FEW = (2, 1)  # tokens: gradients of three directions only


@pytest.mark.parametrize(("name", "option"), OPTIONS)
@pytest.mark.parametrize("value", [-math.inf, -0.1, 0.0, 0.5, 1.0, 1.1, math.inf, math.nan])
def test_an_option_is_refused_where_the_configuration_refuses_it(
    name: str, option: str, value: float
) -> None:
    refusals = problems(name, **{option: value})
    if not refusals:
        assert getattr(method_named(name, {option: value}), option) == value
        return
    (problem,) = refusals
    for make in (METHODS[name].__class__, lambda **options: method_named(name, options)):
        with pytest.raises(ValueError, match=rf"^{option}=") as caught:
            make(**{option: value})
        assert problem == f"method.{caught.value}"


def test_every_method_has_the_options_that_are_known_without_tensors() -> None:
    assert set(METHOD_OPTIONS) == set(METHODS)
    for name, method in METHODS.items():
        assert rules_of(method) == rules_of(METHOD_OPTIONS[name])
        assert problems(name) == []
    assert {name for name, options in METHOD_OPTIONS.items() if rules_of(options)} == {
        name for name, _ in OPTIONS
    }


@pytest.mark.parametrize("value", ["much", True, None, [0.5]])
def test_an_option_of_another_kind_is_refused(value: object) -> None:
    assert problems("asvd", alpha=value) == [f"method.alpha={value!r}: expected a number from 0 on"]
    (problem,) = problems("loss_aware", centred=1)
    assert problem == "method.centred=1: expected true or false"
    (problem,) = problems("loss_aware", one_sided="q_proj")
    assert problem == "method.one_sided='q_proj': expected a list of names"


def test_a_name_or_an_option_that_is_missing_or_unknown_is_named() -> None:
    known = ", ".join(METHOD_OPTIONS)
    for name in ("magic", None, ["svd"]):
        given = {} if name is None else {"name": name}
        (problem,) = check_options("method", given, METHOD_OPTIONS)
        assert problem == f"method.name={name!r}: expected one of {known}"
    assert check_options("method", {"name": "asvd", "beta": 1}, METHOD_OPTIONS) == [
        "method.alpha is missing: expected a number from 0 on",
        "method.beta=1: asvd has no such option; it has alpha",
    ]


@dataclass(frozen=True)
class Mine(Options):
    """Options that somebody else declares."""

    power: float = option(1.0, FROM_0)
    kinds: tuple[str, ...] = option((), NAMES)
    flag: bool = option(False, FLAG)
    name: str = "mine"


def test_equal_options_are_the_same_options() -> None:
    """A whole number typed for another, and a list of YAML, would make other factors."""
    mine = with_options(Mine(power=0.5), {"power": 1, "kinds": ["a"]})
    assert repr(mine) == repr(Mine(kinds=("a",)))
    assert set(rules_of(Mine)) == {"power", "kinds", "flag"}
    with pytest.raises(ValueError, match=r"^power=-1\.0: expected a number from 0 on$"):
        Mine(power=-1.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power", [0.75, 1.0])
@pytest.mark.parametrize("shrinkage", [1e-300, 1e-17, 1e-9])
def test_a_shrinkage_that_rounding_swallows_is_refused_or_harmless(
    shape: str, power: float, shrinkage: float
) -> None:
    layer = make_layer(shape, bias=True, tokens=FEW)
    method = LossAware(output_shrinkage=shrinkage, output_power=power)
    try:
        actual = method.factor(layer.weight, layer.bias, layer.statistics)
    except StatisticsError as error:
        message = str(error)
    else:
        torch.testing.assert_close(actual.left @ actual.right, layer.weight, rtol=0, atol=1e-10)
        return
    assert shrinkage < 1e-9
    assert re.match(
        rf"output_gradient has .* output_shrinkage={shrinkage!r} .* at least 1e-9", message
    )
