"""What a file says as typed records, or one error: where, which field, what came, what was due."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable
from functools import cache
from typing import Annotated, Any, NoReturn, TypeVar, cast

from pydantic import Field, PlainValidator, Strict, TypeAdapter, ValidationError

from lrbo.errors import LrboError, cut

SHOWN = 5  # problems of one record; the others are counted
LARGEST = 2**63 - 1  # whole number that tables and tensors take
LENGTH = 60  # characters of a value that came

Record = TypeVar("Record")


class ContentError(LrboError):
    """A file, or a line of it, does not say what it should; the message names file and field."""


def _number(value: object) -> float:
    """Take a finite number of JSON as it is: whole ones stay whole."""
    if type(value) not in (int, float):
        raise ValueError("a number")
    assert isinstance(value, int | float)
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        finite = False
    if not finite:
        raise ValueError("a finite number")
    return value


# Values of JSON, none of which is taken for another: no "3" for 3, no true for 1.
Number = Annotated[int | float, PlainValidator(_number)]
Whole = Annotated[int, Strict(), Field(ge=-LARGEST, le=LARGEST)]
Count = Annotated[int, Strict(), Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Strict(), Field(ge=1, le=LARGEST)]
Flag = Annotated[bool, Strict()]

# What a type of pydantic's errors means in the words of JSON.
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


class _NoValueError(ValueError):
    """What Python reads and JSON has not."""


def _refuse(constant: str) -> NoReturn:
    raise _NoValueError(f"{constant} is no number of JSON")


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise _NoValueError(f"the field {shown(name)} is there twice")
        fields[name] = value
    return fields


def parse_json(content: bytes | str, where: str) -> Any:
    """Read one JSON value, without what JSON has not: NaN, and two fields of one name.

    Raises:
        ContentError: If it is none.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except _NoValueError as error:
        raise ContentError(f"{where}: {error}") from None
    except UnicodeDecodeError as error:
        raise ContentError(f"{where}: byte {error.start + 1} is no UTF-8 text") from error
    except RecursionError as error:
        raise ContentError(f"{where}: lists or objects are nested too deep") from error
    except ValueError as error:  # of syntax, or a number of more digits than Python reads
        raise ContentError(f"{where}: it is not JSON: {error}") from error


def checked(value: object, kind: type[Record] | Any, where: str) -> Record:
    """Turn a JSON value into a typed record.

    Args:
        value: What :func:`parse_json` gives.
        kind: A dataclass, a TypedDict, or what else pydantic takes for a type.
        where: Begins the message: a file, and a line of it.

    Raises:
        ContentError: Listing the fields that are missing, too many, or of another kind.
    """
    try:
        record: Record = _adapter(cast(Any, kind)).validate_python(value)
    except ValidationError as error:
        problems = list(dict.fromkeys(map(_problem, error.errors(include_url=False))))
        more = f"; and {len(problems) - SHOWN} more" if problems[SHOWN:] else ""
        raise ContentError(f"{where}: {'; '.join(problems[:SHOWN])}{more}") from None
    return record


def parsed(content: bytes | str, kind: type[Record] | Any, where: str) -> Record:
    """Read one JSON value as a typed record.

    Args:
        content: The JSON.
        kind: As for :func:`checked`.
        where: Begins the message.

    Raises:
        ContentError: If it is no JSON, or does not fit the type.
    """
    record: Record = checked(parse_json(content, where), kind, where)
    return record


@cache
def _adapter(kind: Hashable) -> Any:
    """Build the validator of a type once: that takes milliseconds."""
    return TypeAdapter(cast(Any, kind))


def _problem(error: Any) -> str:
    """Say one of pydantic's errors: the field, what came, what was expected."""
    kind, context = error["type"], error.get("ctx", {})
    field = ".".join(str(part) for part in error["loc"])
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"the field {field} is missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"there is no field {field}"
    came = f"{field} is {shown(error['input'])}" if field else f"it is {shown(error['input'])}"
    if kind == "literal_error":
        return f"{came}, expected {context['expected']}"
    if kind in ("greater_than_equal", "less_than_equal"):
        side = "at least" if "ge" in context else "at most"
        return f"{came}, expected a whole number, {side} {next(iter(context.values()))}"
    expected = context["error"] if kind == "value_error" else EXPECTED.get(kind, error["msg"])
    return f"{came}, expected {expected}"


def shown(value: object) -> str:
    """Show a value of JSON as JSON, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return cut(text, LENGTH)
