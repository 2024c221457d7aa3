"""Programs in processes of their own, forked from one that has imported what they import.

That takes eight seconds of a core, for each of them otherwise. A fork has no time in which it
imports: where that matters, a test starts a program itself.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lrbo.__main__ import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "lrbo.commands.search",
        "lrbo.commands.compress",
        "lrbo.optimization.loop",
        "lrbo.reports.plots",
        "mlflow.store.tracking.sqlalchemy_store",
        "matplotlib.backends.backend_agg",
    ]
)


def start_lrbo(
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    terminal: str | None = None,
) -> BaseProcess:
    """Start a command as a shell does: in a session of its own, with interrupts on.

    Args:
        arguments: Of lrbo.
        folder: To stand in; what is written goes to the files ``out`` and ``err`` there.
        environment: Its variables, those of this process by default.
        terminal: What to read from and write to instead, a device.
    """
    return _started(_lrbo, list(arguments), folder, environment, terminal)


def start_script(script: Path, folder: Path, environment: Mapping[str, str]) -> BaseProcess:
    """Start a script as ``python script`` does; otherwise as :func:`start_lrbo`."""
    return _started(_script, script, folder, environment, None)


def ended(process: BaseProcess, folder: Path, seconds: float) -> tuple[int, str, str]:
    """Wait for a process, and return its status and what it wrote to stdout and stderr."""
    process.join(seconds)
    status = process.exitcode
    process.kill()
    assert status is not None, f"it still ran after {seconds} s"
    out, err = ((folder / name).read_text("utf-8") for name in ("out", "err"))
    return status, out, err


def _started(
    target: Callable[..., None],
    program: Any,
    folder: Path,
    environment: Mapping[str, str] | None,
    terminal: str | None,
) -> BaseProcess:
    # Those of now: the process that forks has those of when it began.
    variables = dict(os.environ if environment is None else environment)
    process = _CONTEXT.Process(target=target, args=(program, folder, variables, terminal))
    process.start()
    return process


def _lrbo(
    arguments: list[str], folder: Path, environment: dict[str, str], terminal: str | None
) -> None:
    _enter(folder, environment, terminal)
    sys.argv[:] = ["lrbo", *arguments]
    main()


def _script(script: Path, folder: Path, environment: dict[str, str], terminal: str | None) -> None:
    _enter(folder, environment, terminal)
    sys.argv[:] = [str(script)]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def _enter(folder: Path, environment: dict[str, str], terminal: str | None) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.setsid()  # the first terminal that is opened is its own
    names = [terminal] * 3 if terminal else [os.devnull, "out", "err"]
    for descriptor, name in enumerate(names):
        opened = os.open(name, os.O_RDWR if terminal else os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
