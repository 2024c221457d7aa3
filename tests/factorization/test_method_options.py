"""Options of methods that cannot work are refused, not repaired."""

import math
import re

import pytest
import torch

from lrbo import checks
from lrbo.errors import StatisticsError
from lrbo.factorization.loss_aware import LossAware
from lrbo.factorization.registry import METHODS, method_named
from lrbo.schema import MethodConfig
from tests.methods import SHAPES, make_layer

OPTIONS = [
    ("asvd", "alpha"),
    ("loss_aware", "input_shrinkage"),
    ("loss_aware", "output_shrinkage"),
    ("loss_aware", "output_power"),
]
FEW = (2, 1)  # tokens: gradients of three directions only


@pytest.mark.parametrize(("name", "option"), OPTIONS)
@pytest.mark.parametrize("value", [-math.inf, -0.1, 0.0, 0.5, 1.0, 1.1, math.inf, math.nan])
def test_an_option_is_refused_where_the_configuration_refuses_it(
    name: str, option: str, value: float
) -> None:
    problems = checks._check_method(MethodConfig(name=name, **{option: value}))
    if not problems:
        assert getattr(method_named(name, {option: value}), option) == value
        return
    (problem,) = problems
    for make in (METHODS[name].__class__, lambda **options: method_named(name, options)):
        with pytest.raises(ValueError, match=rf"^{option}=") as caught:
            make(**{option: value})
        assert problem == f"method.{caught.value}".rstrip(".")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power", [0.75, 1.0])
@pytest.mark.parametrize("shrinkage", [1e-300, 1e-17, 1e-9])
def test_a_shrinkage_that_rounding_swallows_is_refused_or_harmless(
    shape: str, power: float, shrinkage: float
) -> None:
    layer = make_layer(shape, bias=True, tokens=FEW)
    method = LossAware(output_shrinkage=shrinkage, output_power=power)
    try:
        found = method.factor(layer.weight, layer.bias, layer.statistics)
    except StatisticsError as error:
        message = str(error)
    else:
        torch.testing.assert_close(found.left @ found.right, layer.weight, rtol=0, atol=1e-10)
        return
    assert shrinkage < 1e-9
    assert re.match(
        rf"output_gradient has .* output_shrinkage={shrinkage!r} .* at least 1e-9", message
    )
