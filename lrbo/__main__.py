"""What `lrbo` and `python -m lrbo` start: ready for Ctrl-C before anything slow is imported."""

from __future__ import annotations

import importlib

from lrbo.interrupts import listening, status_of


def main() -> None:
    """Import the command line and run it."""
    with listening():
        try:
            importlib.import_module("lrbo.cli").main()
        except KeyboardInterrupt as error:  # before a command was known
            raise SystemExit(status_of(error)) from None


if __name__ == "__main__":
    main()
