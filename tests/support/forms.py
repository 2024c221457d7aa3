"""Forms of modules."""

from torch import nn

from lrbo.layers.modules import MODULES


def form_of(module: nn.Module) -> str:
    """Return the name of the form that a module runs."""
    return next(name for name, kind in MODULES.items() if isinstance(module, kind))
