"""Compose conf/ and what is typed into the values of a command."""

from __future__ import annotations

import fnmatch
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lrbo.config.choices import FLOATS, FORM_PRESETS, REPAIRED, SQLITE, STUDY
from lrbo.config.schema import PATHS, SCHEMAS, Config, SearchConfig
from lrbo.errors import ConfigError

# Mappings of names that users choose: every key below them is accepted.
MAPPINGS = (
    "space.groups", "space.start", "space.variables", "search.thresholds", "protocols", "method"
)  # fmt: skip

_HYDRA = threading.Lock()  # there is one in a process, which composes for one thread at a time


@cache
def register() -> None:
    """Give Hydra the schemas and the resolvers that conf/ uses."""
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    resolvers: dict[str, Callable[..., Any]] = {
        "basename": lambda path: Path(str(path)).name or str(path),
        "range": lambda low, high: f"{high}" if low is None else f"{low}-{high}",
        "home": _at_home,
        "options": lambda *groups: "\n".join(map(_options, groups)),
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(f"lrbo.{name}", resolver, replace=True)


def _options(group: str) -> str:
    line = f"  {group}: {', '.join(groups()[group])}"
    return fill(line, 80, subsequent_indent="    ", break_on_hyphens=False)


def groups() -> dict[str, list[str]]:
    """Return the names of the options of every group."""
    folders = sorted(path for path in conf_folder().iterdir() if path.is_dir())
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def conf_folder() -> Path:
    """Return the folder of the configuration: inside a wheel, or beside the package."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "search.yaml").is_file():
            return folder
    raise ConfigError([f"no conf/ in or beside {package}; install lrbo again"])


def composed(command: str, overrides: Sequence[str]) -> Config:
    """Compose the values of a command; ConfigError lists required values that are missing."""
    register()
    with hydra_at_conf():
        return to_object(compose(command, list(overrides)))


@contextmanager
def hydra_at_conf() -> Iterator[None]:
    """Let Hydra compose from conf/, also within a command that Hydra runs.

    It refuses to be initialized twice, and restores no earlier state but an empty one.
    """
    with _HYDRA:
        outer = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(conf_folder()), version_base="1.3"):
                yield
        finally:
            GlobalHydra.instance().hydra = outer


def read_value(text: str) -> Any:
    """Read a value by Hydra's grammar; a text outside it stays as it is."""
    try:
        return OverridesParser.create().parse_override(f"x={text}").value()
    except HydraException:
        return text


def error_of(command: str, overrides: Sequence[str]) -> str | None:
    """Explain why overrides cannot be composed; ``None`` where they can."""
    try:
        with hydra_at_conf():
            compose(command, list(overrides))
    except (HydraException, OmegaConfBaseException, OverflowError) as error:
        return cause_of(error)
    return None


def cause_of(error: Exception) -> str:
    """Return the first cause of an error as one line, without the names of classes."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    internal = ("object_type=", "full_key:", "reference_type=")
    return " ".join(line for line in lines if not line.startswith(internal))


def to_object(config: DictConfig) -> Config:
    """Turn a composed configuration into plain dataclasses, with ``~`` in paths expanded.

    ConfigError lists required values that are missing and keys that are no fields, for
    ``+key=value`` passes Hydra's schema and would be carried along unread.
    """
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError([f"{key} is required; give {key}=VALUE" for key in missing])
        values = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError([cause_of(error)]) from error
    assert isinstance(values, Config)
    if isinstance(values, SearchConfig):
        presets = (FORM_PRESETS.get(name, (name,)) for name in values.space.forms)
        values.space.forms = [form for forms in presets for form in forms]
        if values.bases.factor_bits == 16:
            values.space.forms = [
                f"{form}{FLOATS}" if form in REPAIRED else form for form in values.space.forms
            ]
    strays = [f"{key} is no key of this configuration; remove +{key}=" for key in _settled(values)]
    if strays:
        raise ConfigError(strays)
    return values


def _settled(node: Any, prefix: str = "") -> Iterator[str]:
    """Expand ``~`` in every path, which no shell does behind ``key=``; yield unknown keys."""
    items = vars(node) if is_dataclass(node) else node
    known = {one.name for one in fields(node)} if is_dataclass(node) else set(items)
    for name, value in items.items():
        key = f"{prefix}{name}"
        if name not in known:
            yield key
        elif is_dataclass(value) or isinstance(value, dict):
            yield from _settled(value, f"{key}.")
        elif any(fnmatch.fnmatchcase(key, pattern) for pattern in PATHS):
            items[name] = [*map(_at_home, value)] if isinstance(value, list) else _at_home(value)


def _at_home(value: Any) -> Any:
    """Expand ``~`` in a path, also behind ``sqlite:///`` or ``study:``."""
    if not isinstance(value, str):
        return value
    scheme = next((scheme for scheme in (SQLITE, STUDY) if value.startswith(scheme)), "")
    return scheme + os.path.expanduser(value.removeprefix(scheme))  # noqa: PTH111  # keeps a/./b
