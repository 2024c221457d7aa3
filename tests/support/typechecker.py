"""Checks annotations while tests run; an int is a float there, as PEP 484 says.

jaxtyping binds the arguments of every call to a signature, to compare the shapes that annotations
name with each other. That takes 30 us, which is most of the time of tests without tensors. Where
no annotation of a function names a shape, beartype alone checks the same in one.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))

with_shapes = jaxtyping.jaxtyped


# An inner function is made anew by every call of the outer one, and beartype writes code for each:
# 7 % of the time of all tests. What it wrote for the first takes the function as a default.
BOUND = "__beartype_func"
_CHECKED: dict[CodeType, Callable[..., Any]] = {}


def hint_of(annotation: Any, names: dict[str, Any]) -> Any:
    """Evaluate an annotation; as jaxtyping does, take one that cannot be as ``Any``."""

    def carrier() -> None: ...

    carrier.__annotations__ = {"it": annotation}
    try:
        return get_type_hints(carrier, names, include_extras=True)["it"]
    except Exception:
        return Any


def names_a_shape(hint: Any) -> bool:
    """Return whether a hint has a type of jaxtyping anywhere in it."""
    if isinstance(hint, list | tuple):  # the arguments of a Callable
        return any(map(names_a_shape, hint))
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(names_a_shape, get_args(hint)))


def checked_function(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Check what a function takes and returns."""
    if function.__code__ in _CHECKED:
        return bound_to(function, _CHECKED[function.__code__])
    annotations = function.__annotations__
    hints = {name: hint_of(each, function.__globals__) for name, each in annotations.items()}
    if any(map(names_a_shape, hints.values())):
        return with_shapes(function, **options)
    function.__annotations__ = hints
    checked = check(function)
    function.__annotations__ = checked.__annotations__ = annotations
    if "<locals>" in function.__qualname__ and BOUND in (checked.__kwdefaults__ or {}):
        _CHECKED[function.__code__] = checked
    return checked


def bound_to(function: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function as another one of the same code is checked."""
    copy = FunctionType(checked.__code__, checked.__globals__, function.__name__)
    copy.__kwdefaults__ = {**checked.__kwdefaults__, BOUND: function}
    return functools.update_wrapper(copy, function)


def checked(it: Any = None, **options: Any) -> Any:
    """Stand in for ``jaxtyping.jaxtyped``, which the import hook puts on all that it imports."""
    if it is None:
        return lambda target: checked(target, **options)
    if inspect.isfunction(it):
        return checked_function(it, **options)
    if dataclasses.is_dataclass(it) and inspect.isfunction(it.__init__):
        if it.__init__.__globals__["__name__"] != with_shapes.__module__:  # not of its base
            it.__init__ = checked_function(it.__init__, **options)
        return it
    return with_shapes(it, **options)


jaxtyping.jaxtyped = checked
