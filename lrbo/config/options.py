"""What a value must be, as a test and in words: a rule, on its own or of a field of a dataclass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

COUNT = 2**31 - 1  # of anything; more would overflow in one library or another
REPEATED = 10_000  # times that something is done over; more would not end


@dataclass(frozen=True)
class Rule:
    """What a value must be."""

    expected: str  # in words, for a message
    holds: Callable[[Any], object]
    most: int = COUNT  # the largest whole number that the libraries behind the key can take
    each: bool = False  # test each element of a list, or each entry of a mapping, by itself

    def problems(self, key: str, value: Any) -> list[str]:
        """Report each part of a value that is not as expected."""
        parts: Iterable[tuple[str, Any]] = [(key, value)]
        if self.each and isinstance(value, Mapping):
            parts = flatten(value, f"{key}.").items() if value else ()
        elif self.each:
            parts = [(key, element) for element in value]
        return [mismatch(name, part, self.expected) for name, part in parts if not self.holds(part)]

    def or_null(self) -> Rule:
        """Return the rule for a key that may be null."""
        expected = f"{self.expected}, or null"
        return replace(self, expected=expected, holds=lambda v: v is None or self.holds(v))


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into dotted keys; an empty one is a value."""
    if not isinstance(node, Mapping) or not node:
        return {prefix.rstrip("."): node}
    return {
        key: value
        for name, child in node.items()
        for key, value in flatten(child, f"{prefix}{name}.").items()
    }


def mismatch(key: str, value: object, expected: str) -> str:
    """Write the message about a value that cannot be."""
    return f"{key}={value!r}: expected {expected}"


def one_of(values: Iterable[str]) -> Rule:
    """Return the rule for a key that takes one of a few words."""
    known = tuple(values)
    return Rule(" or ".join(known), lambda value: value in known)


def at_least(least: int, unit: str = "", *, most: int = COUNT) -> Rule:
    """Return the rule for a number with a minimum; a unit or a reason may follow it."""
    return Rule(f"at least {least}{unit}", lambda value: value >= least, most)


def is_number(value: object) -> bool:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


FROM_0 = Rule("a number from 0 on", lambda v: is_number(v) and 0 <= v < float("inf"))
WHOLE_FROM_0 = Rule("a whole number from 0 on", lambda v: v >= 0)
ABOVE_0 = Rule("a number above 0", lambda v: 0 < v < float("inf"))
FROM_0_TO_1 = Rule("a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1)
ABOVE_0_TO_1 = Rule("a number above 0 and up to 1", lambda v: is_number(v) and 0 < v <= 1)
BELOW_1 = Rule("a number from 0 on and below 1", lambda v: is_number(v) and 0 <= v < 1)
ANY_COUNT = at_least(1)
FLAG = Rule("true or false", lambda v: isinstance(v, bool))
NAMES = Rule(
    "a list of names",
    lambda v: isinstance(v, list | tuple) and all(isinstance(name, str) for name in v),
)


def option(default: Any, rule: Rule) -> Any:
    """Declare a field with a rule, and a default or, as a function, what makes it."""
    if callable(default):
        return field(default_factory=default, metadata={"rule": rule})
    return field(default=default, metadata={"rule": rule})


def rules_of(kind: Any) -> dict[str, Rule]:
    """Return the rules of a dataclass by field; fields without one are left out."""
    return {one.name: one.metadata["rule"] for one in fields(kind) if "rule" in one.metadata}


@dataclass(frozen=True)
class Options:
    """Options that raise ValueError about the first of them that breaks its rule."""

    def __post_init__(self) -> None:
        for name, rule in rules_of(self).items():
            for problem in rule.problems(name, getattr(self, name)):
                raise ValueError(problem)


def with_options(default: Any, changes: Mapping[str, Any]) -> Any:
    """Change some options of a dataclass; ValueError if one breaks its rule.

    Values take the type of the default, so that 1 is written down as 1.0, and a list as a tuple.
    """
    rules, values = rules_of(default), dict(changes)
    for name, value in changes.items():
        if rules[name].holds(value):
            values[name] = type(getattr(default, name))(value)
    return replace(default, **values)


def check_options(group: str, values: Mapping[str, Any], kinds: Mapping[str, Any]) -> list[str]:
    """Find the problems of a name and its options in a group of the configuration.

    No default stands in for an option, so that a study states all that it was begun with.

    Args:
        group: Key of the group.
        values: ``name``, and every option of what it names.
        kinds: Dataclasses by name.
    """
    name = values.get("name")
    if not isinstance(name, str) or name not in kinds:
        return [f"{group}.name={name!r}: expected one of {', '.join(kinds)}"]
    rules = rules_of(kinds[name])
    problems = [
        f"{group}.{key} is missing: expected {rule.expected}"
        for key, rule in rules.items()
        if key not in values
    ]
    for key, value in values.items():
        if key in rules:
            problems += rules[key].problems(f"{group}.{key}", value)
        elif key != "name":
            problems.append(f"{group}.{key}={value!r}: {no_such_option(name, rules)}")
    return problems


def no_such_option(name: str, known: Collection[str]) -> str:
    """Write the message about an option that is not among the known ones of a name."""
    return f"{name} has no such option; it has {', '.join(known) or 'none'}"
