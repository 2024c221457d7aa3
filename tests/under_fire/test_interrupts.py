"""Ctrl-C and SIGTERM end a command in order, wherever it is, and it says how to go on."""

import fcntl
import importlib
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lrbo import cli, interrupts
from lrbo.interrupts import Interrupted, handlers_restored, listening, status_of
from tests.support import forks
from tests.support.commands import lrbo_command

ROOT = Path(__file__).resolve().parents[2]
# What a shell does for a program in its foreground: a terminal of its own, interrupts on.
PROGRAM = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from lrbo.__main__ import main
main()
"""


@pytest.fixture(autouse=True)
def _interrupts_on() -> Iterator[None]:
    """Have the handlers of a program in the foreground, whatever runs the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_an_interrupt_that_knows_its_status(number: int, status: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as caught, listening():
        signal.raise_signal(number)
    assert isinstance(caught.value, Interrupted)
    assert status_of(caught.value) == status
    assert signal.getsignal(number) == before


def test_an_interrupt_that_somebody_else_raised_is_one_of_the_keyboard() -> None:
    assert status_of(KeyboardInterrupt()) == 130


def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(interrupts.os, "_exit", ended.append)
    with listening():
        with pytest.raises(Interrupted), listening():  # __main__ has cli.main inside of it
            signal.raise_signal(signal.SIGTERM)
        assert ended == []
        with suppress(Interrupted):
            signal.raise_signal(signal.SIGINT)
    assert ended == [130]


def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # by nohup, or a shell's & in a script
    with listening():
        signal.raise_signal(signal.SIGINT)


def test_a_terminal_that_is_gone_may_say_so_twice() -> None:
    with listening((signal.SIGHUP,)):
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # ends nothing: what the first one began goes on


def test_a_library_that_takes_signals_gives_them_back() -> None:
    with listening():
        mine = signal.getsignal(signal.SIGTERM)
        with handlers_restored():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) == mine


HANDLER = "import signal; print(signal.getsignal(signal.SIGINT) is lrbo.interrupts.leave)"


def test_a_program_that_imports_the_library_keeps_its_own_signals(tmp_path: Path) -> None:
    """A package that ``python -m`` names is imported while ``sys.argv`` begins with ``-m``."""
    package = tmp_path / "mypackage"
    package.mkdir()
    (package / "__init__.py").write_text(f"import lrbo\n{HANDLER}\n", encoding="utf-8")
    (package / "__main__.py").touch()
    line = [sys.executable, "-m", "mypackage", "-m", "lrbo"]
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    ran = subprocess.run(line, env=path, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "False\n"


@pytest.mark.parametrize(
    ("arguments", "typed", "expected"),
    [
        (["/usr/bin/lrbo", "search"], ["python", "/usr/bin/lrbo", "search"], True),
        (["-m", "search"], ["python", "-X", "dev", "-m", "lrbo", "search"], True),
        (["-m", "search", "-m"], ["python", "-mlrbo", "search", "-m"], True),
        (["-m"], ["python", "-m", "pytest"], False),
        (["-m", "-m", "lrbo"], ["python", "-m", "mine", "-m", "lrbo"], False),
        (["mine.py", "lrbo"], ["python", "mine.py", "lrbo"], False),
        ([""], ["python"], False),
        ([], ["embedding"], False),
    ],
)
def test_the_program_is_told_from_programs_that_import_it(
    arguments: list[str], typed: list[str], expected: bool
) -> None:
    assert interrupts.is_program(arguments, typed) is expected


@pytest.mark.parametrize("command", [name for name in cli.NAMES if name != "dashboard"])
@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_command_that_is_stopped_says_how_to_go_on(
    command: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(cli, "run", interrupted)
    typed = ["donor=a", "study=my study", "warm_start=[uniform,study:b]"][command != "transfer" :]
    ran = lrbo_command(command, *typed[:2])
    assert ran.status == 128 + number
    message, continuation = ran.err.splitlines()
    assert message == f"Stopped. {cli.LEFT[command]} Go on with:"
    assert shlex.split(continuation) == ["lrbo", command, *typed[:2]]


def test_an_interrupt_without_a_command_has_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "fail", lambda _: signal.raise_signal(signal.SIGINT))
    ran = lrbo_command("--completion", "fish")
    assert (ran.status, ran.out, ran.err) == (130, "", "")


# --- on a real terminal ------------------------------------------------------------------------


def on_terminal(
    folder: Path, arguments: list[str], moment: str, number: int = signal.SIGINT
) -> tuple[int, str]:
    """Run a command on a terminal of 80 columns, and stop it when it shows something.

    Args:
        folder: To stand in.
        arguments: Of lrbo.
        moment: What is waited for, a regular expression; ``""`` lets the command end by itself.
        number: SIGINT is typed, which reaches all processes; another signal is sent to one.

    Returns:
        Its status, and all that it wrote.
    """
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "LRBO_CACHE": str(folder / "cache")}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    process = start(folder, arguments, its, environment, imports=moment == "Starting")
    written, stop_sent, deadline = b"", not moment, time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if select.select([mine], [], [], 0.1)[0]:
                try:
                    written += os.read(mine, 65536)
                except OSError:  # the other end is closed
                    break
                if its is not None:  # by now it has it open
                    os.close(its)
                    its = None
            if not stop_sent and re.search(moment, written.decode(errors="replace")):
                stop_sent = True
                if number == signal.SIGINT:
                    os.write(mine, b"\x03")
                else:
                    os.kill(process.pid, number)
        if isinstance(process, subprocess.Popen):
            status = process.wait(timeout=10)
        else:
            process.join(10)
            assert process.exitcode is not None, "it still runs"
            status = process.exitcode
        return status, written.decode(errors="replace")
    finally:
        process.kill()
        os.close(mine)


def start(
    folder: Path, arguments: list[str], terminal: int, environment: dict[str, str], *, imports: bool
) -> Any:
    """Start a command, in a process that imports what it needs itself or has it already."""
    if not imports:
        return forks.start_lrbo(arguments, folder, environment, terminal=os.ttyname(terminal))
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        env=environment,
    )  # fmt: skip


def continued(written: str) -> list[str]:
    """Return the arguments of the command that a stopped one names."""
    assert "Traceback" not in written
    assert written.rfind("\x1b[?25h") >= written.rfind("\x1b[?25l"), "the cursor is hidden"
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written)
    program, *arguments = shlex.split(text.rstrip().splitlines()[-1])
    assert program == "lrbo"
    return arguments


SEARCH = ["search", "experiment=tiny", "search.trials=6", "search.initial=6"]


@pytest.mark.slow
def test_a_search_that_is_stopped_in_all_its_phases_goes_on_to_its_end(tmp_path: Path) -> None:
    arguments = SEARCH
    for moment, number in (
        ("Starting", signal.SIGINT),
        ("Calibration", signal.SIGTERM),
        (r"\(2/6\)", signal.SIGINT),
        ("Test text", signal.SIGTERM),
    ):
        status, written = on_terminal(tmp_path, arguments, moment, number)
        assert status == 128 + number, written
        arguments = continued(written)
        assert arguments == SEARCH
    assert "6 of 6 trials are in studies/tiny/journal.jsonl" in " ".join(written.split())
    status, written = on_terminal(tmp_path, arguments, "")
    assert status == 0, written
    assert "its 6 trials are done" in " ".join(written.split())
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written)
    assert max(map(len, re.split(r"[\r\n]+", text))) <= 80


@pytest.mark.slow
def test_commands_on_a_study_that_are_stopped_leave_nothing_half_done(tmp_path: Path) -> None:
    assert on_terminal(tmp_path, SEARCH, "")[0] == 0
    compress = ["compress", "study=tiny", "out=best"]
    for arguments, moment in (
        (compress, "Refit of trial"),
        (["report", "study=tiny", "format=html"], "Results"),
        (["evaluate", "model=tiny", "data=generated"], "Reading texts"),
    ):
        status, written = on_terminal(tmp_path, arguments, moment)
        assert status == 130, written
        assert continued(written) == arguments
    assert not (tmp_path / "best").exists()
    assert not (tmp_path / "studies" / "evaluations.jsonl").exists()
    assert on_terminal(tmp_path, compress, "")[0] == 0


@pytest.mark.slow
def test_a_search_on_ray_is_stopped_by_its_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # a cluster that was not asked for
    search = [*SEARCH, "executor=ray", "executor.workers=1", "search.trials=400"]
    status, written = on_terminal(tmp_path, search, r"\(1/400\)", signal.SIGTERM)
    assert status == 143, written
    assert continued(written) == search


# --- during imports ----------------------------------------------------------------------------

SLOW = """
import signal, time
signal.raise_signal(signal.SIGINT)
try:
    time.sleep(0.3)
except BaseException as error:  # as modules in C do
    raise ImportError("swallowed") from error
whole = True
"""


def test_an_interrupt_waits_for_an_import_and_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_import.py").write_text(SLOW, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def import_and_wait() -> None:
        assert importlib.import_module("slow_to_import").whole
        time.sleep(60)

    begun = time.monotonic()
    with listening(), pytest.raises(Interrupted, match="SIGINT"):
        import_and_wait()
    assert time.monotonic() - begun < 60, "it did not wake what waited"


def test_a_second_signal_ends_an_import_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(interrupts.os, "_exit", ended.append)
    monkeypatch.setattr(interrupts, "is_importing", lambda _: True)
    monkeypatch.setattr(interrupts, "RETRY_S", 100.0)
    with listening():
        signal.raise_signal(signal.SIGINT)
        assert ended == []
        signal.raise_signal(signal.SIGTERM)
    assert ended == [143]
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)


def test_the_program_leaves_without_a_word_before_it_has_begun() -> None:
    code = "import sys; sys.argv = ['/bin/lrbo']; import lrbo, os; os.kill(os.getpid(), {})"
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        done = subprocess.run(
            [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, "
             f"signal.default_int_handler); {code.format(int(number))}"],
            capture_output=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (status, b"")


def test_importing_the_library_takes_no_signals() -> None:
    code = "import signal; before = signal.getsignal(2), signal.getsignal(15); import lrbo;"
    code += "print(before == (signal.getsignal(2), signal.getsignal(15)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n"
