"""Overrides that cannot be taken, and why: all of them, where Hydra stops at the first."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from itertools import product
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from lrbo.config.compose import MAPPINGS, cause_of, error_of, groups, hydra_at_conf, register
from lrbo.config.options import flatten, no_such_option
from lrbo.config.schema import SCHEMAS, flat
from lrbo.config.shell import assigned, key_of, quoted
from lrbo.errors import ConfigError


def jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every job of a sweep, such as ``seed=0,1`` or ``seed=range(4)``.

    ConfigError lists the overrides that Hydra cannot read, or that are no list of values.
    """
    problems = [f"{one}: {why}" for one in overrides if (why := _unreadable(one)) is not None]
    if problems:
        raise ConfigError(problems)
    choices: list[list[str]] = []
    with hydra_at_conf():  # which knows the options that fit glob(*)
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for one in parser.parse_overrides(list(overrides)):
            line, key = str(one.input_line), one.get_key_element()
            values = [line]
            if one.is_sweep_override():
                try:
                    values = [f"{key}={value}" for value in one.sweep_string_iterator()]
                except HydraException:  # interval(0, 1)
                    problems.append(
                        f"{line}: expected values one by one, as {key}=1,2 or {key}=range(3)"
                    )
            if not values:
                problems.append(f"{line}: no value fits; see --help")
            choices.append(values)
    if problems:
        raise ConfigError(problems)
    return [list(job) for job in product(*choices)]


def find_problems(command: str, overrides: Sequence[str]) -> dict[str, str]:
    """Return every override that cannot be taken, as typed, with the reason."""
    register()
    reasons = {o: why for o in overrides if (why := _problem_alone(command, o)) is not None}
    known = [override for override in overrides if override not in reasons]
    if (together := error_of(command, known)) is not None:
        # Each beside the options of groups, for a key may only exist with one of them.
        options = [o for o in known if "." not in o and error_of(command, [o]) is None]
        for override in known:
            others = [o for o in options if o != override]
            if error := error_of(command, [*others, override]):
                reasons[override] = _explained(command, options, override, error)
    problems = {o: f"{o}: {reasons[o]}" for o in overrides if o in reasons}
    if together is not None and not any(override in reasons for override in known):
        problems[" ".join(known)] = together
    return problems


def _problem_alone(command: str, override: str) -> str | None:
    key = key_of(override).partition("@")[0]
    keys = list(flat(SCHEMAS[command]()))
    keys += {key.partition(".")[0] for key in keys if "." in key}
    keys += groups()
    free = tuple(f"{name}." for name in MAPPINGS if name in keys)
    if key not in keys and not key.startswith((*free, "hydra.", "hydra/")):
        close = difflib.get_close_matches(key, keys, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see lrbo {command} --help"
        return f"{key} is no key; {hint}"
    if unreadable := _unreadable(override):
        return unreadable
    parsed = OverridesParser.create().parse_override(override)
    if parsed.is_delete() or parsed.is_sweep_override():
        return None
    group, value = str(parsed.key_or_group), parsed.value()
    return _unknown_options(group, value) or _no_boolean(command, group, value)


def _explained(command: str, options: Sequence[str], override: str, error: str) -> str:
    """Give a remedy for a key that is missing below a free mapping; else Hydra's message."""
    if "is not in struct" not in error:
        return error
    section, name, *_ = [*override.split("."), ""]
    if section == "protocols":  # which are selected, not added
        return f"{name} is not selected; type protocols=[{name}]"
    if section == "method":
        with hydra_at_conf():
            method = compose(command, list(options))[section]
        return no_such_option(method["name"], [key for key in method if key != "name"])
    return f"to add an entry, type +{override}"


def _unreadable(override: str) -> str | None:
    """Give a remedy for an override outside Hydra's grammar, as are blanks and brackets."""
    try:
        OverridesParser.create().parse_override(override)
    except ValueError:  # Python reads no number of more than some thousand digits
        return "the number has more digits than Python reads; type a smaller one"
    except HydraException as error:
        key, _, value = override.partition("=")
        if not value or value[0] in "'\"[{":
            return cause_of(error)
        typed = f"{key}='{value}'" if "'" not in value else assigned(key, value)
        apart = "; if it is several, give each by itself" if re.search(r"\s\S+=", value) else ""
        return f"Hydra cannot read it; if that is one value, quote it: {quoted(typed)}{apart}"
    return None


def _unknown_options(group: str, value: Any) -> str | None:
    known = groups().get(group, [])
    names = value if isinstance(value, list) else [value]
    unknown = ["null" if name is None else str(name) for name in names if name not in known]
    if not known or not unknown or isinstance(value, dict):
        return None
    near = difflib.get_close_matches(unknown[0], known, n=len(known), cutoff=0.0)
    return (
        f"no {group} of the name {', '.join(unknown)}; known, the nearest first: {', '.join(near)}"
    )


def _no_boolean(command: str, group: str, given: Any) -> str | None:
    """Refuse what OmegaConf would take for true or false: any number, and some words."""
    for key, value in flatten(given, f"{group}.").items():
        kinds = _kinds(_hint(command, key))
        is_reference = isinstance(value, str) and "${" in value
        if bool in kinds and not isinstance(value, kinds) and not is_reference:
            values = "true, false or null" if type(None) in kinds else "true or false"
            return f"expected {values} for {key}"
    return None


def text_hint(command: str, key: str) -> tuple[bool, bool]:
    """Look up in the schema whether a dotted key holds text, or lists of it, and may be null."""
    hint = _hint(command, key)
    if hint is Any:  # a text or several
        name = key.rpartition(".")[2]
        return name in ("study", "path"), name == "path"
    kinds = _kinds(hint)
    while get_origin(kinds[0]) is list:
        kinds = (*get_args(kinds[0]), *kinds[1:])
    return str in kinds, type(None) in kinds


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _hint(command: str, key: str) -> Any:
    hint: Any = SCHEMAS[command]
    for name in key.split("."):
        if is_dataclass(hint):
            hint = get_type_hints(hint).get(name)
        else:
            hint = get_args(hint)[1] if get_origin(hint) is dict else None
    return hint
