"""Compress language models to a budget, an option per layer, by Bayesian optimization."""

import importlib
import sys

from lrbo.interrupts import is_program, starting

# The program, not the library, is ready for Ctrl-C before anything is imported that takes time.
if is_program(sys.argv, sys.orig_argv):
    starting()

from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from lrbo.api import compress as compress
    from lrbo.api import evaluate as evaluate
    from lrbo.api import recover as recover
    from lrbo.api import search as search
    from lrbo.calibration.collect import Calibration as Calibration
    from lrbo.calibration.collect import CalibrationSettings as CalibrationSettings
    from lrbo.checkpoints.export import load as load
    from lrbo.errors import LrboError as LrboError
    from lrbo.pipeline.in_memory import Factorization as Factorization
    from lrbo.pipeline.in_memory import calibrate as calibrate
    from lrbo.pipeline.in_memory import factorize as factorize
    from lrbo.pipeline.in_memory import score as score
    from lrbo.reports.studies import StudyResults as StudyResults
    from lrbo.reports.studies import compare as compare
    from lrbo.reports.studies import open_study as open_study

__version__ = "0.1.0"

# Imported on their first use: `import lrbo` must not cost the seconds that torch takes.
_HOMES = {
    name: f"lrbo.{module}"
    for module, names in {
        "api": ("compress", "evaluate", "recover", "search"),
        "calibration.collect": ("Calibration", "CalibrationSettings"),
        "checkpoints.export": ("load",),
        "errors": ("LrboError",),
        "pipeline.in_memory": ("Factorization", "calibrate", "factorize", "score"),
        "reports.studies": ("StudyResults", "compare", "open_study"),
    }.items()
    for name in names
}
__all__ = ["__version__", *_HOMES]


@wrapt.when_imported("transformers.modeling_utils")
def _register(_: object) -> None:
    """Let transformers open checkpoints: now or once it is imported, which takes seconds."""
    importlib.import_module("lrbo.checkpoints.quantizer")


def __getattr__(name: str) -> Any:
    """Import a public name on its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lrbo' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return __all__
