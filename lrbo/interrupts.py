"""Ctrl-C and SIGTERM: the first stops where it is safe, a second one ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

SHOW_CURSOR = b"\x1b[?25h\n"
RETRY_S = 0.05  # until an interrupt that came within an import is raised again
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop, perhaps by a scheduler: the same clean-up runs."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number  # as shells count
        super().__init__(signal.Signals(number).name)


def leave(number: int, _: FrameType | None) -> None:
    """End the process at once, with the status of a signal."""
    os._exit(128 + number)


FREE = (signal.default_int_handler, signal.SIG_DFL, leave)  # `nohup` and its like ignore some


def is_program(arguments: Sequence[str], typed: Sequence[str]) -> bool:
    """Tell by ``sys.argv`` and ``sys.orig_argv`` lrbo from a program that imports it."""
    if arguments[:1] == ["-m"]:  # until Python has looked the module up
        return typed[-len(arguments)].removeprefix("-m") == "lrbo"
    return bool(arguments) and arguments[0].rpartition("/")[2] == "lrbo"


def starting() -> None:
    """End at once on a signal, until :func:`listening`: no work has begun."""
    for number in SIGNALS:
        if signal.getsignal(number) in FREE:
            signal.signal(number, leave)


def status_of(error: KeyboardInterrupt) -> int:
    """Return the exit status after an interrupt, whoever raised it."""
    return error.status if isinstance(error, Interrupted) else 128 + signal.SIGINT


@contextmanager
def handlers_restored(signals: Sequence[int] = SIGNALS) -> Iterator[dict[int, Any]]:
    """Restore signal handlers at the end, and yield them; only the main thread has any."""
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in signals} if is_main else {}
    try:
        yield handlers
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def is_importing(frame: FrameType | None) -> bool:
    """Tell whether a frame is inside an import, where an interrupt is delayed.

    Modules in C turn it into other errors or swallow it; a half-imported one may fail later.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def listening(signals: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Turn the first signal into :class:`Interrupted`; a second one ends. Other handlers stay."""
    timers: list[threading.Timer] = []
    stopping = is_retry = False

    def retry(number: int) -> None:
        nonlocal is_retry
        is_retry = True
        os.kill(os.getpid(), number)  # raise_signal would not wake a main thread that waits

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal stopping, is_retry
        is_first, is_retry = is_retry or not stopping, False
        if not is_first:
            if number == signal.SIGHUP:  # shell and system both send it when a terminal closes
                return
            if sys.stderr.isatty():  # a bar hides it
                os.write(2, SHOW_CURSOR)
            os._exit(128 + number)
        stopping = True
        if not is_importing(frame):
            raise Interrupted(number)
        timer = threading.Timer(RETRY_S, retry, [number])
        timer.daemon = True
        timers.append(timer)
        timer.start()

    with handlers_restored(signals) as handlers:
        for number, handler in handlers.items():
            if handler in FREE:
                signal.signal(number, handle)
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()
