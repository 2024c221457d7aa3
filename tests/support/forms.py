"""Forms of modules."""

from torch import nn

from lrbo.layers.based import BasedLinear
from lrbo.layers.frequency import GroupedLinear
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.joint import SkippedLinear, ThinLinear
from lrbo.layers.joint_form import SharedFactored
from lrbo.layers.kronecker import KroneckerLinear
from lrbo.layers.kronecker_form import Kronecker
from lrbo.layers.modules import PRODUCTS
from lrbo.layers.shared import SharedLinear


def form_of(module: nn.Module) -> str:
    """Return the name of the form that a module runs."""
    if isinstance(module, BasedLinear):
        return module.form.name
    if isinstance(module, ThinLinear | SkippedLinear):
        return "neurons" if isinstance(module, ThinLinear) else "skip"
    if isinstance(module, SharedLinear):
        return SharedFactored.name
    if isinstance(module, KroneckerLinear):
        return Kronecker.name
    if isinstance(module, GroupedLinear):
        return FrequencyGroups.name
    return next(name for name, kind in PRODUCTS.items() if isinstance(module, kind))
