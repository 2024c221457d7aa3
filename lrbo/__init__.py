"""Compress language models by feature-based low-rank factorization, ranks found by search."""

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
    from lrbo.api import search as search
    from lrbo.calibration.collect import Calibration as Calibration
    from lrbo.calibration.collect import CalibrationSettings as CalibrationSettings
    from lrbo.errors import LrboError as LrboError
    from lrbo.export import load as load
    from lrbo.steps import Factorization as Factorization
    from lrbo.steps import calibrate as calibrate
    from lrbo.steps import factorize as factorize
    from lrbo.steps import score as score
    from lrbo.studies import StudyResults as StudyResults
    from lrbo.studies import compare as compare
    from lrbo.studies import open_study as open_study

__version__ = "0.1.0"

# Found when they are asked for: `import lrbo` must not cost the seconds that torch takes.
_HOMES = {
    "Calibration": "lrbo.calibration.collect",
    "CalibrationSettings": "lrbo.calibration.collect",
    "Factorization": "lrbo.steps",
    "LrboError": "lrbo.errors",
    "StudyResults": "lrbo.studies",
    "calibrate": "lrbo.steps",
    "compare": "lrbo.studies",
    "compress": "lrbo.api",
    "evaluate": "lrbo.api",
    "factorize": "lrbo.steps",
    "load": "lrbo.export",
    "open_study": "lrbo.studies",
    "score": "lrbo.steps",
    "search": "lrbo.api",
}
__all__ = ["__version__", *_HOMES]


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


def __dir__() -> list[str]:
    """Return the public names, also those that nobody asked for yet."""
    return __all__
