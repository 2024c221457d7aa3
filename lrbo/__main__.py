"""What `lrbo` and `python -m lrbo` start: ready for Ctrl-C before anything slow is imported."""

from __future__ import annotations

import importlib
import os
import sys

from lrbo.interrupts import listening, status_of


def _open_streams() -> None:
    """Open what the shell closed (``2>&-``), or the next file takes its number and its output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: the closed one
            setattr(sys, name, open(descriptor, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


def main() -> None:
    """Import the command line and run it."""
    _open_streams()
    with listening():
        try:
            importlib.import_module("lrbo.cli").main()
        except KeyboardInterrupt as error:  # before a command was known
            raise SystemExit(status_of(error)) from None


if __name__ == "__main__":
    main()
