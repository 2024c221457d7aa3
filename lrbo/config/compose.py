"""Compose conf/ into values; what the command line cannot mean is refused, all at once."""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
import shlex
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from textwrap import fill
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]  # has no types
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lrbo.errors import ConfigError, StudyError, reading
from lrbo.options import SQLITE, STUDY
from lrbo.parsing import SHOWN, ContentError, checked, shown
from lrbo.schema import (
    PATHS,
    SCHEMAS,
    Config,
    EvaluateConfig,
    SearchConfig,
)
from lrbo.shell import assigned, literal

# What may differ when a study is continued: where and how long it runs, not what it measures.
FREE_KEYS = (
    "search.trials",
    "search.other_versions",
    "tracking",
    "executor",
    "model.device",
    "output",
    "study",
    "studies",
)

# Below these every key is taken.
MAPPINGS = ("space.groups", "space.start", "space.variables", "search.thresholds", "protocols")

_HYDRA = threading.Lock()  # there is one in a process, which composes for one thread at a time


def register() -> None:
    """Give Hydra the schemas and the resolvers that conf/ uses; may be called twice.

    Resolvers are of the whole process, where a program may have a ``range`` of its own.
    """
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)
    OmegaConf.register_new_resolver(
        "lrbo.basename", lambda path: Path(str(path)).name or str(path), replace=True
    )
    OmegaConf.register_new_resolver(
        "lrbo.range", lambda low, high: f"{high}" if low is None else f"{low}-{high}", replace=True
    )
    OmegaConf.register_new_resolver("lrbo.home", _at_home, replace=True)
    OmegaConf.register_new_resolver("lrbo.options", _options, replace=True)


def _options(*groups: str) -> str:
    """Return the options of configuration groups for a help page, which is 80 columns wide."""
    found = []
    for group in groups:
        names = sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
        line = f"  {group}: {', '.join(names)}"
        found.append(fill(line, 80, subsequent_indent="    ", break_on_hyphens=False))
    return "\n".join(found)


def conf_folder() -> Path:
    """Return the folder of the configuration: beside the package in a checkout, inside a wheel.

    Raises:
        ConfigError: If neither is there: a broken installation.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "search.yaml").is_file():
            return folder
    raise ConfigError([f"no conf/ in or beside {package}; install lrbo again"])


def group_keys(group: str) -> dict[str, list[str]]:
    """Return the top keys of every option of a configuration group, by its name."""
    return {
        file.stem: [str(key) for key in OmegaConf.load(file)]
        for file in sorted((conf_folder() / group).glob("*.yaml"))
    }


def jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every job of a sweep, as Hydra's own sweeper makes them.

    Args:
        overrides: As typed: ``seed=0,1`` or ``seed=range(4)`` stands for several values.

    Raises:
        ConfigError: Listing the overrides that Hydra cannot read, or that are no list of values.
    """
    unread = [f"{one}: {why}" for one in overrides if (why := _unreadable(one)) is not None]
    if unread:
        raise ConfigError(unread)
    choices: list[list[str]] = []
    with _conf():  # which knows the options that fit glob(*)
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for one in parser.parse_overrides(list(overrides)):
            line, key = str(one.input_line), one.get_key_element()
            if not one.is_sweep_override():
                choices.append([line])
                continue
            try:
                choices.append([f"{key}={value}" for value in one.sweep_string_iterator()])
            except HydraException:  # interval(0, 1)
                unread.append(f"{line}: expected values one by one, as {key}=1,2 or {key}=range(3)")
            else:
                if not choices[-1]:
                    unread.append(f"{line}: no value fits; see --help")
    if unread:
        raise ConfigError(unread)
    return [list(job) for job in product(*choices)]


def find_problems(command: str, overrides: Sequence[str]) -> dict[str, str]:
    """Return every override that cannot be taken, with the reason, in one go.

    Hydra stops at the first one, so each is tried alone where all together fail.

    Args:
        command: Name of the command, which is that of its primary file.
        overrides: As typed.
    """
    register()
    problems = {}
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        if not _is_key(command, key):
            close = difflib.get_close_matches(key, _keys(command), n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; see lrbo {command} --help"
            problems[override] = f"{override}: {key} is no key{hint}"
        elif unread := _unreadable(override):
            problems[override] = f"{override}: {unread}"
        elif unknown := _unknown_options(override):
            problems[override] = f"{override}: {unknown}"
        elif wrong := _no_boolean(command, override):
            problems[override] = f"{override}: expected {wrong}"
    known = [override for override in overrides if override not in problems]
    if _compose_error(command, known) is not None:
        # Beside the chosen options, for a key may only be there with one of them.
        options = [o for o in known if "." not in o and _compose_error(command, [o]) is None]
        alone = {
            override: _compose_error(command, [*(o for o in options if o != override), override])
            for override in known
        }
        found = {override: f"{override}: {error}" for override, error in alone.items() if error}
        for override in found:
            if "is not in struct" in found[override]:  # a key below a free mapping
                section, name, *_ = [*override.split("."), ""]
                found[override] = f"{override}: to add an entry, type +{override}"
                if section == "protocols":  # which are chosen, not added
                    found[override] = f"{override}: {name} is not chosen; type protocols=[{name}]"
        together = {" ".join(known): str(_compose_error(command, known))}
        problems |= found or together
    typed = {override: problems[override] for override in overrides if override in problems}
    return typed | problems


def composed(command: str, overrides: Sequence[str]) -> Config:
    """Compose the values of a command.

    Raises:
        ConfigError: Listing required values that are missing.
    """
    register()
    with _conf():
        return to_object(compose(command, list(overrides)))


@contextmanager
def _conf() -> Iterator[None]:
    """Let Hydra compose from conf/, also within a command that Hydra runs.

    It refuses to be initialized twice, and puts back what it found only where that was nothing.
    """
    with _HYDRA:
        running = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(conf_folder()), version_base="1.3"):
                yield
        finally:
            GlobalHydra.instance().hydra = running


def _keys(command: str) -> list[str]:
    """Return every dotted key and every group that a command takes."""
    keys = list(flatten(asdict(SCHEMAS[command]())))
    sections = {key.partition(".")[0] for key in keys if "." in key}
    groups = {folder.name for folder in conf_folder().iterdir() if folder.is_dir()}
    return [*keys, *sections, *groups]


def read_value(text: str) -> Any:
    """Read a value as Hydra's grammar has it; a text that is none in it stays as it is."""
    try:
        return OverridesParser.create().parse_override(f"x={text}").value()
    except HydraException:
        return text


def _unreadable(override: str) -> str | None:
    """Return what to do about an override that Hydra's grammar has no place for, if it has none.

    Names of folders have blanks, brackets and letters of other alphabets in them.
    """
    try:
        OverridesParser.create().parse_override(override)
    except ValueError:  # Python reads no number of more than some thousand digits
        return "a number of so many digits is none that can be meant; type a smaller one"
    except HydraException as error:
        key, _, value = override.partition("=")
        if not value or value[0] in "'\"[{":
            return _plain(error)
        quoted = f"\"{key}='{value}'\"" if "'" not in value else shlex.quote(assigned(key, value))
        apart = "; if it is several, give each by itself" if re.search(r"\s\S+=", value) else ""
        return f"Hydra cannot read it; if that is one value, quote it: {quoted}{apart}"
    return None


def _unknown_options(override: str) -> str | None:
    """Return what is wrong if an override chooses options that its group does not have."""
    parsed = OverridesParser.create().parse_override(override)
    folder = conf_folder() / str(parsed.key_or_group)
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if not known or parsed.is_delete() or parsed.is_sweep_override():
        return None
    chosen = parsed.value()
    names = chosen if isinstance(chosen, list) else [chosen]
    unknown = ["null" if name is None else str(name) for name in names if name not in known]
    if not unknown or isinstance(chosen, dict):
        return None
    near = difflib.get_close_matches(unknown[0], known, n=len(known), cutoff=0.0)
    return (
        f"no {parsed.key_or_group} of the name {', '.join(unknown)}; "
        f"known, the nearest first: {', '.join(near)}"
    )


def _no_boolean(command: str, override: str) -> str | None:
    """Say what is expected where a key is true or false and something else is given.

    OmegaConf would take any number but 0 for true, and some words.
    """
    parsed = OverridesParser.create().parse_override(override)
    if parsed.is_delete() or parsed.is_sweep_override():
        return None
    for key, value in flatten(parsed.value(), f"{parsed.key_or_group}.").items():
        hint = _hint(command, key)
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if bool not in kinds or isinstance(value, bool):
            continue
        may_be_null = type(None) in kinds
        if (value is None and may_be_null) or (isinstance(value, str) and "${" in value):
            continue
        return f"true, false or null for {key}" if may_be_null else f"true or false for {key}"
    return None


def _is_key(command: str, key: str) -> bool:
    """Return whether a command takes a key; below a free mapping every key is taken."""
    free = [name for name in MAPPINGS if name in _keys(command)]
    below = any(key.startswith(f"{name}.") for name in [*free, "hydra"])
    return below or key.startswith("hydra/") or key in _keys(command)


def _compose_error(command: str, overrides: Sequence[str]) -> str | None:
    """Return why the overrides cannot be composed, or ``None``."""
    try:
        with _conf():
            compose(command, list(overrides))
    except (HydraException, OmegaConfBaseException, OverflowError) as error:
        return _plain(error)
    return None


def _plain(error: Exception) -> str:
    """Return the first cause of an error in one line, without the names of classes."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    internal = ("object_type=", "full_key:", "reference_type=")
    return " ".join(line for line in lines if not line.startswith(internal))


def to_object(config: DictConfig) -> Config:
    """Turn a composed configuration into plain dataclasses.

    Raises:
        ConfigError: Listing required values that are missing and keys that are no fields
            (``+key=value`` passes Hydra's schema and would be carried along unread).
    """
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError([f"{key} is required; give {key}=VALUE" for key in missing])
        found = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError([_plain(error)]) from error
    assert isinstance(found, Config)
    _expand(found)
    strays = list(_strays(found))
    if strays:
        raise ConfigError(
            [f"{key} is no key of this configuration; remove +{key}=" for key in strays]
        )
    return found


def _expand(node: Any, prefix: str = "") -> None:
    """Put home folders in place of ``~`` in every path of a configuration, in place.

    No shell does it behind ``key=``, and one key must not mean another folder than the next.
    """
    items = vars(node) if is_dataclass(node) else node
    for name, value in items.items():
        key = f"{prefix}{name}"
        if is_dataclass(value) or isinstance(value, dict):
            _expand(value, f"{key}.")
        elif any(fnmatch.fnmatchcase(key, pattern) for pattern in PATHS):
            items[name] = [*map(_at_home, value)] if isinstance(value, list) else _at_home(value)


def _at_home(value: Any) -> Any:
    """Put the home folder in place of ``~`` in a path, also behind what says what it is of."""
    if not isinstance(value, str):
        return value
    scheme = next((scheme for scheme in (SQLITE, STUDY) if value.startswith(scheme)), "")
    return scheme + os.path.expanduser(value.removeprefix(scheme))  # noqa: PTH111  # keeps a/./b


def text_hint(command: str, key: str) -> tuple[bool, bool]:
    """Look up in the schema whether a key holds text, or lists of it, and whether null is a value.

    Args:
        command: Name of the command.
        key: Dotted, without ``+`` or ``~``.
    """
    hint = _hint(command, key)
    *_, last = key.split(".")
    if hint is Any:  # a text or several
        return last in ("study", "path"), last == "path"
    members = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    while get_origin(members[0]) is list:
        members = (*get_args(members[0]), *members[1:])
    return str in members, type(None) in members


def _hint(command: str, key: str) -> Any:
    """Look up the type of a dotted key in the schema of a command; ``None`` where it has none."""
    hint: Any = SCHEMAS[command]
    for name in key.split("."):
        if is_dataclass(hint):
            hint = get_type_hints(hint).get(name)
        else:
            hint = get_args(hint)[1] if get_origin(hint) is dict else None
    return hint


def _strays(node: object, prefix: str = "") -> Iterable[str]:
    """Yield attributes that are no fields of their dataclass."""
    if not is_dataclass(node):
        return
    known = {f.name for f in fields(node)}
    yield from (f"{prefix}{name}" for name in vars(node) if name not in known)
    for name in known:
        yield from _strays(getattr(node, name), f"{prefix}{name}.")


def differences(stored: SearchConfig, config: SearchConfig) -> list[str]:
    """Return what differs between a study's configuration and another one, key by key.

    Where it runs, how long it runs and how it is shown may differ.
    """
    begun, given = flat(stored), flat(config)
    keys = [key for key in dict.fromkeys([*begun, *given]) if not is_free(key)]
    return [
        f"{key}: the study has {begun.get(key)!r}, the command has {given.get(key)!r}"
        for key in keys
        if begun.get(key) != given.get(key)
        # An empty mapping differs from one with entries in each of these, which are named.
        and not any(other.startswith(f"{key}.") for other in keys)
    ]


def is_free(key: str) -> bool:
    """Return whether a key may differ when a study is continued."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


@lru_cache(maxsize=16)
def from_yaml(text: str, where: str) -> SearchConfig:
    """Return the configuration that :func:`to_yaml` wrote; shared, so not to be changed.

    Args:
        text: YAML, in which nothing is looked up.
        where: Begins the message.

    Raises:
        StudyError: If it is no YAML, or lacks keys, has others or values of another kind, naming
            them: no default of today stands for what a study was begun with.
    """
    with reading(StudyError, f"{where} is no YAML"):
        values = yaml.safe_load(text)
    advice = "use the version of lrbo that wrote it"
    try:
        taken: SearchConfig = checked(values, SearchConfig, where)
    except ContentError as error:
        raise StudyError(f"{error}; {advice}") from error
    given, known = flatten(values), flat(taken)
    problems = [f"{key} is missing" for key in known if key not in given]
    problems += [f"there is no key {key}" for key in given if key not in known]
    problems += [
        f"{key} is {shown(given[key])}, expected {shown(value)}"
        for key, value in known.items()
        if given.get(key, value) != value
    ]
    if problems:
        raise StudyError(f"{where}: {'; '.join(problems[:SHOWN])}; {advice}")
    return taken


def continued(
    stored: SearchConfig, overrides: Sequence[str], typed: SearchConfig | None = None
) -> SearchConfig:
    """Return the configuration of a study with some free keys changed.

    Args:
        stored: Of the study.
        overrides: ``key=value``, as typed; only free keys.
        typed: What Hydra composed of them, which knows what a group's option stands for.
    """
    values = _escaped(asdict(stored))
    default_uri = SearchConfig().tracking.uri.replace("${studies}", stored.studies)
    if stored.tracking.uri == default_uri:
        del values["tracking"]["uri"]  # it follows the folder of the studies, which may move
    merged = OmegaConf.merge(OmegaConf.structured(SearchConfig), values)
    assert isinstance(merged, DictConfig)
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~")
        if typed is None:
            OmegaConf.update(merged, key, read_value(value))
        else:
            OmegaConf.update(merged, key, _escaped(_at(asdict(typed), key)))
    found = to_object(merged)
    assert isinstance(found, SearchConfig)
    return found


def _at(values: Any, key: str) -> Any:
    """Look up a dotted key in nested mappings; ``None`` where there is none."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _literal(config: Config) -> DictConfig:
    """Give OmegaConf values that were composed already."""
    created = OmegaConf.create(_escaped(asdict(config)))
    assert isinstance(created, DictConfig)
    return created


def _escaped(node: Any) -> Any:
    """Escape ``${`` in every text of plain values, which OmegaConf would take for a reference."""
    if isinstance(node, Mapping):
        return {key: _escaped(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_escaped(value) for value in node]
    return literal(node) if isinstance(node, str) else node


def protocol_changes(config: EvaluateConfig) -> dict[str, list[str]]:
    """Return how the protocols differ from what their files say, by name.

    A number under another rule must not pass for the protocol's. Where the text lies may differ.
    """
    changes = {}
    for name, found in config.protocols.items():
        stated = OmegaConf.load(conf_folder() / "protocols" / f"{name}.yaml")
        assert isinstance(stated, DictConfig)
        changes[name] = [
            f"{key}={value!r}, not {stated[key]!r}"
            for key, value in asdict(found).items()
            if key in stated and stated[key] != value
        ]
    return changes


def to_yaml(config: Config) -> str:
    """Return a configuration as YAML, each text as it is."""
    text: str = OmegaConf.to_yaml(_literal(config), resolve=True)
    return text


def flat(config: Config) -> dict[str, Any]:
    """Return a configuration as one level of dotted keys."""
    return flatten(asdict(config))


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into dotted keys."""
    if not isinstance(node, Mapping) or not node:
        return {prefix.rstrip("."): node}
    return {
        key: value
        for name, child in node.items()
        for key, value in flatten(child, f"{prefix}{name}.").items()
    }
