"""Values back into the command line that gives them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml  # type: ignore[import-untyped]  # has no types

from lrbo.config import MAPPINGS, composed, conf_folder, flat, flatten, is_free
from lrbo.errors import ConfigError
from lrbo.schema import SCHEMAS, SearchConfig
from lrbo.shell import assigned


def repeating(searched: SearchConfig) -> dict[str, Any]:
    """Return what begins the same search again, by dotted key, for :func:`command_line`."""
    kept = ("search.trials", "study")
    return {key: value for key, value in flat(searched).items() if key in kept or not is_free(key)}


def command_line(command: str, values: Mapping[str, Any], study: str) -> str:
    """Return what to type in a shell to get some values.

    Args:
        command: Name of the command.
        values: By dotted key.
        study: Whose values they are, for a remark in place of the line where they cannot be
            typed, such as those of an older version.
    """
    try:
        return shlex.join(["lrbo", command, *typed(command, values)])
    except ConfigError:
        return f"# lrbo {command} with the config.yaml of the study {study}"


def typed(command: str, values: Mapping[str, Any]) -> list[str]:
    """Return what to type after a command's name to get these values.

    A group is chosen by its option where one has the name that the values have; what then still
    differs is typed key by key.

    Args:
        command: Name of the command.
        values: By dotted key, as :func:`flat` has them; keys that are not there may be anything.

    Raises:
        ConfigError: If the values cannot be typed, such as those of an older version.
    """
    chosen = []
    for folder in sorted(path for path in conf_folder().iterdir() if path.is_dir()):
        group = folder.name
        file = folder / f"{values.get(f'{group}.name')}.yaml"
        if values.get(f"{group}.source") == "hf" and not file.is_file():
            file = folder / "hf.yaml"  # whose models are called what their path ends with
        if file.is_file():
            chosen.append(f"{group}={file.stem}")
            own = flatten(yaml.safe_load(file.read_text("utf-8")), f"{group}.")
            chosen += [assigned(key, values[key]) for key, v in own.items() if v == "???"]
    required = [k for k, v in flatten(asdict(SCHEMAS[command]())).items() if v == "???"]
    top = [assigned(key, values[key]) for key in required if "." not in key and key in values]
    before = flat(composed(command, [*chosen, *top]))
    more = [
        ("" if key in before else "+") + assigned(key, value)
        for key, value in values.items()
        if before.get(key, ...) != value and value != {}
    ]
    given = {key if value == {} else key.rpartition(".")[0] for key, value in values.items()}
    less = [
        f"~{key}"
        for key in before
        if key not in values and key.rpartition(".")[0] in given & set(MAPPINGS)
    ]
    found = [*chosen, *top, *more, *less]
    after = flat(composed(command, found))
    if wrong := [key for key, value in values.items() if after.get(key, ...) != value]:
        raise ConfigError([f"{key}={values[key]!r} cannot be typed" for key in wrong])
    return found
