"""Which errors belong to a trial, and which stop the search."""

import pytest
import torch

from lrbo import errors
from lrbo.errors import (
    BudgetError,
    ConfigError,
    DataError,
    LrboError,
    ModelError,
    NonFiniteError,
    StatisticsError,
    outcome_of,
    reading,
    some,
)

TRANSIENT = [
    MemoryError(),
    TimeoutError("no answer"),
    OSError(28, "No space left on device"),
    ConnectionResetError("node lost"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
]
DETERMINISTIC = [
    BudgetError("nothing fits"),
    NonFiniteError("NaN"),
    StatisticsError("missing"),
]
DEFECTS = [
    TypeError("unsupported operand"),
    KeyError("layer"),
    AssertionError("impossible"),
    ValueError("shape"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ConfigError(["bad value"]),
]


def name_of(error: Exception) -> str:
    return f"{type(error).__name__}-{str(error)[:12]}"


@pytest.mark.parametrize("error", TRANSIENT, ids=name_of)
def test_what_the_machine_did_may_be_tried_again(error: Exception) -> None:
    assert outcome_of(error) == "failed"


@pytest.mark.parametrize("error", DETERMINISTIC, ids=name_of)
def test_what_would_come_back_is_abandoned(error: Exception) -> None:
    assert outcome_of(error) == "abandoned"


@pytest.mark.parametrize("error", DEFECTS, ids=name_of)
def test_a_defect_is_raised_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        outcome_of(error)
    assert caught.value is error


def test_out_of_memory_is_recognised_as_torch_itself_raises_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert outcome_of(caught.value) == "failed"


def test_a_configuration_error_lists_every_problem() -> None:
    error = ConfigError(["first", "second", "third"])
    assert str(error) == "3 problems:\n  - first\n  - second\n  - third"
    assert error.problems == ["first", "second", "third"]
    assert str(ConfigError(["only"])) == "1 problem:\n  - only"


def test_a_data_error_lists_every_problem() -> None:
    error = DataError("first", "second")
    assert error.problems == ["first", "second"]
    assert str(error) == "2 problems:\n  - first\n  - second"
    assert str(DataError("alone")) == "alone"


def test_every_error_of_the_package_can_be_caught_as_one() -> None:
    own = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert len(own) >= 10
    assert all(issubclass(error, LrboError) for error in own)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no JSON"), "cannot read x: no JSON"),
        (KeyError("gelu9"), "cannot read x: KeyError: 'gelu9'"),
        (RuntimeError("sizes differ"), "cannot read x: RuntimeError: sizes differ"),
    ],
    ids=name_of,
)
def test_what_a_library_raises_of_a_file_is_one_error_of_ours(
    error: Exception, message: str
) -> None:
    with pytest.raises(ModelError) as caught, reading(ModelError, "cannot read x"):
        raise error
    assert str(caught.value) == message
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [MemoryError(), TRANSIENT[4], TRANSIENT[5], DataError("short")])
def test_lack_of_memory_and_our_own_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, reading(ModelError, "cannot read x"):
        raise error
    assert caught.value is error


def test_one_kind_of_our_own_is_reported_as_another_where_that_is_asked_for() -> None:
    with (
        pytest.raises(ModelError, match=r"^cannot read x: short$"),
        reading(ModelError, "cannot read x", own=DataError),
    ):
        raise DataError("short")


@pytest.mark.parametrize(
    ("names", "text"), [([], "nothing"), (["a", "b"], "a, b"), (["a", "b", "c"], "a, b and 1 more")]
)
def test_of_many_names_some_are_listed(names: list[str], text: str) -> None:
    assert some(names, 2) == text
