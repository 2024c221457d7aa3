"""Name -> method; lists the names when it does not know one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrbo.config.options import no_such_option, rules_of, with_options
from lrbo.errors import ConfigError
from lrbo.factorization.base import FactorizationMethod
from lrbo.factorization.methods import (
    Asvd,
    Bolaco,
    Drone,
    FirstOrder,
    Fwsvd,
    LossAware,
    Svd,
    SvdLlm,
)

METHODS: dict[str, FactorizationMethod] = {
    method.name: method
    for method in (
        Svd(),
        Fwsvd(),
        FirstOrder(),
        Asvd(),
        Drone(),
        SvdLlm(),
        Bolaco(),
        LossAware(),
    )
}


def method_named(name: str, options: Mapping[str, Any] | None = None) -> FactorizationMethod:
    """Return the factorization method of a name, with options other than its defaults.

    Raises:
        ConfigError: If the name or an option is unknown; lists the known ones.
        ValueError: If an option breaks its rule.
    """
    if name not in METHODS:
        raise ConfigError([f"method.name={name!r} is unknown; known: {', '.join(METHODS)}."])
    known, given = rules_of(METHODS[name]), options or {}
    unknown = [f"method.{one}: {no_such_option(name, known)}" for one in given if one not in known]
    if unknown:
        raise ConfigError(unknown)
    changed: FactorizationMethod = with_options(METHODS[name], given)
    return changed
