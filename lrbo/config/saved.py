"""Values of a search as YAML and as a command line, and what of them may change when it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, reduce
from operator import getitem
from typing import Any

import yaml  # type: ignore[import-untyped]  # has no types
from omegaconf import DictConfig, OmegaConf

from lrbo.config.compose import MAPPINGS, composed, conf_folder, groups, read_value, to_object
from lrbo.config.options import flatten
from lrbo.config.recovery import SearchRecovery
from lrbo.config.schema import MISSING, SCHEMAS, Config, EvaluateConfig, SearchConfig, flat
from lrbo.config.shell import assigned, joined, key_of, literal
from lrbo.errors import ConfigError, StudyError, reading
from lrbo.files.parsing import SHOWN, ContentError, checked, shown

RECOVER = "recover"  # section of what is done after the trials

# What may differ when a study is continued: where and how long it runs, not what it measures.
FREE_KEYS = (
    "search.trials",
    "search.other_versions",
    RECOVER,
    "tracking",
    "executor",
    "model.device",
    "output",
    "study",
    "studies",
)

# Keys that came when there were studies already, and what those of before were begun with.
ADDED: Mapping[str, Any] = {
    "model.base": None,
    "bases.factor_bits": 8,
    "bases.frequency_groups": [8],
    "bases.bands": [[2, 32]],
    "bases.sweeps": 0,
}


def is_free(key: str) -> bool:
    """Whether a key may differ when a study is continued."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def differences(stored: SearchConfig, config: SearchConfig) -> list[str]:
    """List the differences of a study's configuration from another one, but for free keys."""
    old, new = flat(stored), flat(config)
    keys = [key for key in dict.fromkeys([*old, *new]) if not is_free(key)]
    return [
        f"{key}: the study has {old.get(key)!r}, the command has {new.get(key)!r}"
        for key in keys
        if old.get(key) != new.get(key)
        # An empty mapping differs from one with entries in each of these, which are named.
        and not any(other.startswith(f"{key}.") for other in keys)
    ]


@lru_cache(maxsize=16)
def from_yaml(text: str, where: str) -> SearchConfig:
    """Return the configuration that :func:`to_yaml` wrote; shared, so not to be changed.

    A StudyError, which begins with ``where``, names keys that are missing or unknown and values of
    another kind: no default of today stands for what a study was begun with, but ``ADDED`` does.
    """
    with reading(StudyError, f"{where} is no YAML"):
        values = yaml.safe_load(text)
    for key, value in ADDED.items():
        group, _, name = key.partition(".")
        if isinstance(values, dict) and isinstance(values.get(group), dict):
            values[group].setdefault(name, value)
    if isinstance(values, dict):  # which a study that recovers nothing does not have
        values.setdefault(RECOVER, asdict(SearchRecovery()))
    advice = "use the version of lrbo that wrote it"
    try:
        config: SearchConfig = checked(values, SearchConfig, where)
    except ContentError as error:
        raise StudyError(f"{error}; {advice}") from error
    stored, read = flatten(values), flat(config)
    problems = [f"{key} is missing" for key in read if key not in stored]
    problems += [f"there is no key {key}" for key in stored if key not in read]
    problems += [
        f"{key} is {shown(stored[key])}, expected {shown(value)}"
        for key, value in read.items()
        if stored.get(key, value) != value
    ]
    if problems:
        raise StudyError(f"{where}: {'; '.join(problems[:SHOWN])}; {advice}")
    return config


def to_yaml(config: Config) -> str:
    """Return a configuration as YAML, each text as it is; of a recovery only one that is wanted."""
    values = asdict(config)
    if isinstance(config, SearchConfig) and not config.recover.enabled:
        del values[RECOVER]
    return str(OmegaConf.to_yaml(OmegaConf.create(_escaped(values)), resolve=True))


def _escaped(node: Any) -> Any:
    """Escape ``${`` in every text of plain values, which OmegaConf would take for a reference."""
    if isinstance(node, Mapping):
        return {key: _escaped(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_escaped(value) for value in node]
    return literal(node) if isinstance(node, str) else node


def continued(
    stored: SearchConfig, overrides: Sequence[str], typed: SearchConfig | None = None
) -> SearchConfig:
    """Change free keys in the configuration of a study.

    Args:
        stored: Of the study.
        overrides: ``key=value``, as typed.
        typed: Composed of them by Hydra, which knows what a group's option stands for.
    """
    values = _escaped(asdict(stored))
    default_uri = SearchConfig().tracking.uri.replace("${studies}", stored.studies)
    if stored.tracking.uri == default_uri:
        del values["tracking"]["uri"]  # it follows the folder of the studies, which may move
    merged = OmegaConf.merge(OmegaConf.structured(SearchConfig), values)
    assert isinstance(merged, DictConfig)
    for override in overrides:
        key, value = key_of(override), read_value(override.partition("=")[2])
        if typed is not None:
            value = _escaped(reduce(getitem, key.split("."), asdict(typed)))
        OmegaConf.update(merged, key, value)
    config = to_object(merged)
    assert isinstance(config, SearchConfig)
    return config


def protocol_changes(config: EvaluateConfig) -> dict[str, list[str]]:
    """List by name how protocols differ from their files, in all but the location of the text."""
    changes = {}
    for name, protocol in config.protocols.items():
        file = conf_folder() / "protocols" / f"{name}.yaml"
        defaults = yaml.safe_load(file.read_text("utf-8"))
        changes[name] = [
            f"{key}={value!r}, not {defaults[key]!r}"
            for key, value in vars(protocol).items()
            if key in defaults and defaults[key] != value
        ]
    return changes


def repeating(searched: SearchConfig) -> dict[str, Any]:
    """Return the values that begin the same search again, by dotted key."""
    free = ("search.trials", "study")
    return {key: value for key, value in flat(searched).items() if key in free or not is_free(key)}


def command_line(command: str, values: Mapping[str, Any], study: str) -> str:
    """Return the line to type in a shell, or a remark where an older version took other values."""
    try:
        return joined(["lrbo", command, *overrides_for(command, values)])
    except ConfigError:
        return f"# lrbo {command} with the config.yaml of the study {study}"


def overrides_for(command: str, values: Mapping[str, Any]) -> list[str]:
    """Return the overrides that give values by dotted key; keys without a value may be anything.

    A group is selected by the name that the values have, if it has an option of that name; what
    still differs is typed key by key. What cannot be typed is a ConfigError.
    """
    overrides = []
    for group, options in groups().items():
        name = values.get(f"{group}.name")
        if name not in options and values.get(f"{group}.source") == "hf":
            name = "hf"  # whose models are called what their path ends with
        if name in options:
            file = conf_folder() / group / f"{name}.yaml"
            own = flatten(yaml.safe_load(file.read_text("utf-8")), f"{group}.")
            required = [key for key, value in own.items() if value == MISSING]
            overrides += [f"{group}={name}", *(assigned(key, values[key]) for key in required)]
    required = [key for key, value in vars(SCHEMAS[command]()).items() if value == MISSING]
    overrides += [assigned(key, values[key]) for key in required if key in values]
    defaults = flat(composed(command, overrides))
    overrides += [
        ("" if key in defaults else "+") + assigned(key, value)
        for key, value in values.items()
        if defaults.get(key, ...) != value and value != {}
    ]
    parents = {key if value == {} else key.rpartition(".")[0] for key, value in values.items()}
    overrides += [
        f"~{key}"
        for key in defaults
        if key not in values and key.rpartition(".")[0] in parents & set(MAPPINGS)
    ]
    result = flat(composed(command, overrides))
    if wrong := [key for key, value in values.items() if result.get(key, ...) != value]:
        raise ConfigError([f"{key}={values[key]!r} cannot be typed" for key in wrong])
    return overrides
