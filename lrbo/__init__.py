"""Compress language models by feature-based low-rank factorization, ranks found by search."""

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from lrbo.export import load as load

__version__ = "0.1.0"

# Found when they are asked for: `import lrbo` must not cost the seconds that torch takes.
_HOMES = {"load": "lrbo.export"}
__all__ = ["__version__", "load"]


@wrapt.when_imported("transformers.modeling_utils")
def _register(_: object) -> None:
    """Let transformers open checkpoints: at once if it is there, else as soon as it comes.

    Importing it here would make every command line wait for it.
    """
    importlib.import_module("lrbo.checkpoint")


def __getattr__(name: str) -> Any:
    """Import a public name on its first use.

    Raises:
        AttributeError: If there is no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'lrbo' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOMES[name]), name)
