"""Name -> method; lists the names when it does not know one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from lrbo.errors import ConfigError
from lrbo.factorization.base import FactorizationMethod
from lrbo.factorization.loss_aware import LossAware
from lrbo.factorization.pooled import Bolaco
from lrbo.factorization.weighted import Asvd, Drone, Fwsvd, Svd, SvdLlm

METHODS: dict[str, FactorizationMethod] = {
    method.name: method
    for method in (Svd(), Fwsvd(), Asvd(), Drone(), SvdLlm(), Bolaco(), LossAware())
}


def options_of(name: str) -> dict[str, Any]:
    """Return the options of a method with their defaults."""
    method: Any = METHODS[name]
    return {
        field.name: getattr(method, field.name)
        for field in fields(method)
        if field.name not in ("name", "needs")
    }


def method_named(name: str, options: Mapping[str, Any] | None = None) -> FactorizationMethod:
    """Return a factorization method.

    Args:
        name: In the registry.
        options: Of the method, other than its defaults.

    Raises:
        ConfigError: If there is none of that name, or it has no such option; the message lists
            those there are.
    """
    if name not in METHODS:
        raise ConfigError([f"method.name={name!r} is unknown; known: {', '.join(METHODS)}."])
    known = options_of(name)
    problems = [
        f"method.{option}: {name} has no such option; it has {', '.join(known) or 'none'}"
        for option in options or {}
        if option not in known
    ]
    if problems:
        raise ConfigError(problems)
    method: Any = METHODS[name]
    chosen: FactorizationMethod = replace(method, **(options or {}))
    return chosen
