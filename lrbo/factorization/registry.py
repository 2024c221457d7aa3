"""Name -> method; lists the names when it does not know one."""

from __future__ import annotations

from lrbo.errors import ConfigError
from lrbo.factorization.base import FactorizationMethod
from lrbo.factorization.pooled import Bolaco
from lrbo.factorization.weighted import Svd

METHODS: dict[str, FactorizationMethod] = {method.name: method for method in (Svd(), Bolaco())}


def method_named(name: str) -> FactorizationMethod:
    """Return a factorization method.

    Raises:
        ConfigError: If there is none of that name; the message lists those there are.
    """
    if name not in METHODS:
        raise ConfigError([f"method.name={name!r} is unknown; known: {', '.join(METHODS)}."])
    return METHODS[name]
