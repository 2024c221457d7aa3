"""What lrbo's functions take and return is checked while tests run, with shapes and without."""

from collections.abc import Callable

import pytest
import torch
import typechecker

from lrbo.layers.options import Cost
from lrbo.linalg import require_finite, weighted_svd


def test_a_value_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="name"):
        require_finite(3, torch.ones(1))  # which would not have looked at it
    with pytest.raises(TypeError, match="parameters"):
        Cost("1", 2, 3)


def test_tensors_of_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(TypeError, match="right_root"):
        weighted_svd(torch.ones(2, 3), torch.ones(4, 4))


def test_inner_functions_of_one_code_are_checked_each_with_its_own_variables() -> None:
    def make(step: int) -> Callable[[int], int]:
        def inner(value: int) -> int:
            return value + step

        return inner

    functions = [typechecker.checked_function(make(step)) for step in (1, 2)]
    assert [function(1) for function in functions] == [2, 3]
    for function in functions:
        with pytest.raises(TypeError, match="value"):
            function("1")
