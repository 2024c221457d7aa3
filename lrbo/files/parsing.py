"""JSON -> typed records, or one error: file, field, value, and what was expected; and back.

Strict JSON has no infinity: an infinite perplexity is null.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Annotated, Any, NoReturn

from pydantic import Field, PlainValidator, Strict, TypeAdapter, ValidationError

from lrbo.errors import LrboError, cut

SHOWN = 5  # problems of one record; the others are counted
LARGEST = 2**63 - 1  # whole number that tables and tensors take
LENGTH = 60  # characters of a value in a message


class ContentError(LrboError):
    """A file, or a line of it, has other content than expected; the message names the field."""


def _number(value: object) -> float:
    """Take a finite number of JSON as it is: whole ones stay whole."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    if not abs(value) <= sys.float_info.max:  # nor a whole number beyond all floats
        raise ValueError("a finite number")
    return value


# Values of JSON, none of which is taken for another: no "3" for 3, no true for 1.
Number = Annotated[int | float, PlainValidator(_number)]
Whole = Annotated[int, Strict(), Field(ge=-LARGEST, le=LARGEST)]
Count = Annotated[int, Strict(), Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Strict(), Field(ge=1, le=LARGEST)]
Flag = Annotated[bool, Strict()]

# Types of pydantic's errors in the words of JSON.
EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "an object",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "string_type": "text",
    "tuple_type": "a list",
}


def _refuse(constant: str) -> NoReturn:
    raise ContentError(f"{constant} is no number of JSON")


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ContentError(f"the field {shown(name)} is there twice")
        fields[name] = value
    return fields


def parse_json(content: bytes | str, where: str) -> Any:
    """Read one JSON value; ContentError where it is none, or a field comes twice."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except ContentError as error:
        raise ContentError(f"{where}: {error}") from None
    except RecursionError as error:
        raise ContentError(f"{where}: lists or objects are nested too deep") from error
    except ValueError as error:  # also bytes that are no UTF-8, and endless numbers
        raise ContentError(f"{where}: it is not JSON: {error}") from error


def checked(value: object, kind: Any, where: str) -> Any:
    """Turn a JSON value into a typed record: a dataclass, a TypedDict, or another pydantic type.

    ContentError, which begins with ``where``, lists missing, unknown and mistyped fields.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        problems = list(dict.fromkeys(map(_problem, error.errors(include_url=False))))
        more = f"; and {len(problems) - SHOWN} more" if problems[SHOWN:] else ""
        raise ContentError(f"{where}: {'; '.join(problems[:SHOWN])}{more}") from None


def parsed(content: bytes | str, kind: Any, where: str) -> Any:
    """Read one JSON value as a typed record: :func:`parse_json`, then :func:`checked`."""
    return checked(parse_json(content, where), kind, where)


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)  # which takes milliseconds


def _problem(error: Any) -> str:
    """Word an error of pydantic: the field, its value, what was expected."""
    kind, context = error["type"], error.get("ctx", {})
    field = ".".join(str(part) for part in error["loc"])
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"the field {field} is missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"there is no field {field}"
    given = f"{field or 'it'} is {shown(error['input'])}"
    if kind == "literal_error":
        return f"{given}, expected {context['expected']}"
    if kind in ("greater_than_equal", "less_than_equal"):
        side = "at least" if "ge" in context else "at most"
        return f"{given}, expected a whole number, {side} {next(iter(context.values()))}"
    expected = context["error"] if kind == "value_error" else EXPECTED.get(kind, error["msg"])
    return f"{given}, expected {expected}"


def shown(value: object) -> str:
    """Show a value of JSON as JSON, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return cut(text, LENGTH)


def to_json(value: object, **options: Any) -> str:
    """Write strict JSON, with options of ``json.dumps``; ValueError for a NaN or infinite loss."""
    return json.dumps(without_infinity(value), allow_nan=False, **options)


def may_be_infinite(name: str) -> bool:
    """Whether a number of this name may be infinite, as exp of a finite loss is."""
    return name.endswith("perplexity")


def without_infinity(value: Any) -> Any:
    """Replace infinite perplexities by null, at any depth."""
    if isinstance(value, Mapping):
        return {
            key: None if item == math.inf and may_be_infinite(str(key)) else without_infinity(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_infinity(item) for item in value]
    return value
