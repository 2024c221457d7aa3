"""Ctrl-C and SIGTERM: stop where it is safe and say how to go on; a second one ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

SHOW_CURSOR = "\x1b[?25h\n"
SOON_S = 0.05  # until an import is asked again whether it is done
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop.

    It is an interrupt from the keyboard also where a scheduler sent it, so that everything that
    leaves files whole after the one does so after the other.

    Attributes:
        status: To leave with, as a shell counts: 128 and the number of the signal.
    """

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(signal.Signals(number).name)


def leave(number: int, _: FrameType | None) -> None:
    """End the process with the status of a signal, and without a word."""
    os._exit(128 + number)


FREE = (signal.default_int_handler, signal.SIG_DFL, leave)  # `nohup` and its like ignore some


def is_program(arguments: Sequence[str], typed: Sequence[str]) -> bool:
    """Return whether ``lrbo`` or ``python -m lrbo`` was typed, not a program that imports it.

    Args:
        arguments: ``sys.argv``, whose first is ``-m`` until Python has looked the module up.
        typed: ``sys.orig_argv``, where the module stands before the arguments of the program.
    """
    if arguments[:1] == ["-m"]:
        return typed[-len(arguments)].removeprefix("-m") == "lrbo"
    return bool(arguments) and arguments[0].rpartition("/")[2] == "lrbo"


def starting() -> None:
    """End at once on a signal, until :func:`listening`: nothing was begun yet."""
    for number in SIGNALS:
        if signal.getsignal(number) in FREE:
            signal.signal(number, leave)


def status_of(error: KeyboardInterrupt) -> int:
    """Return what to leave with after an interrupt, from whoever raised it."""
    return error.status if isinstance(error, Interrupted) else 128 + signal.SIGINT


@contextmanager
def listening(signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Turn the first signal to stop into :class:`Interrupted`; a second one ends the process.

    What holds signals already keeps them, and threads cannot.
    """
    mine = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in signals} if mine else {}
    taken = [number for number, handler in handlers.items() if handler in FREE]
    waiting: list[threading.Timer] = []
    handle = _handler(waiting)
    for number in taken:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for timer in waiting:
            timer.cancel()
        for number in taken:
            signal.signal(number, handlers[number])


@contextmanager
def kept() -> Iterator[None]:
    """Give signals back to who had them, after a library that takes them for itself."""
    mine = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS} if mine else {}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def is_importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported by what runs in a frame.

    Modules in C make other errors of an interrupt there, or swallow it, and one that was imported
    by half may end everything later: it is raised when they are done.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
            return True
        frame = frame.f_back
    return False


def _handler(waiting: list[threading.Timer]) -> Callable[[int, FrameType | None], Any]:
    """Return what a signal calls, with a memory of whether it is the first.

    Args:
        waiting: Gets the timers of signals that came during an import.
    """
    asked = due = False

    def remind(number: int) -> None:
        nonlocal due
        due = True
        signal.raise_signal(number)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked, due
        reminded, due = due, False
        if asked and not reminded:
            if number == signal.SIGHUP:  # shell and system both tell of a terminal that is gone
                return
            if sys.stderr.isatty():  # a bar hides it
                os.write(2, SHOW_CURSOR.encode())
            os._exit(128 + number)
        asked = True
        if not is_importing(frame):
            raise Interrupted(number)
        soon = threading.Timer(SOON_S, remind, [number])
        soon.daemon = True
        waiting.append(soon)
        soon.start()

    return handle
