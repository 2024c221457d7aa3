"""A real search, killed by the system again and again, ends with every trial once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

TRIALS, INITIAL = 24, 11
SEED = 20
# Seconds that a single run may take at most before the test gives up, on a busy machine.
PATIENCE = 180.0
SEARCH = ["search", "experiment=tiny", f"search.trials={TRIALS}", f"search.initial={INITIAL}"]
COMMAND = "from lrbo.cli import main; main()"

# A process that has imported what a search imports (10 s) and forks once for each line that it
# reads: the child is a process of its own, with its own locks and files, which is killed.
NURSERY = """
import os, sys
import lrbo.commands.search, lrbo.search.loop, lrbo.plots, mlflow
from lrbo.cli import main
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        status = 0
        try:
            main(line.split())
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 1
        os._exit(status)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Nursery:
    """Starts searches in a folder."""

    def __init__(self, folder: Path, process: "subprocess.Popen[str]") -> None:
        self.journal = folder / "studies" / "tiny" / "journal.jsonl"
        self.process = process

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self) -> int:
        """Start a search and return the id of its process."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(SEARCH) + "\n")
        self.process.stdin.flush()
        return int(self.read())

    def kill(self, process: int) -> bool:
        """Kill a search; return whether it was alive until then."""
        os.kill(process, signal.SIGKILL)  # a zombie at worst: its parent has not waited for it
        status = int(self.read())
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed by itself"
        return os.WIFSIGNALED(status)

    def content(self) -> bytes:
        return self.journal.read_bytes() if self.journal.exists() else b""


@contextmanager
def nursery(folder: Path, environment: dict[str, str]) -> Iterator[Nursery]:
    arguments = [sys.executable, "-c", NURSERY]
    with subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        found = Nursery(folder, process)
        assert found.read() == "ready"
        try:
            yield found
        finally:
            process.kill()


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE} s"
        time.sleep(0.001)


def moments(chooser: random.Random) -> Iterator[tuple[int, bytes, float]]:
    """Yield for each kill: lines to wait for, what they hold, seconds more."""
    for _ in range(4):  # while the study is set up: model, statistics, tokens, dense model
        yield 0, b"", chooser.uniform(0.0, 2.0)
    for _ in range(11):  # among the trials of the initial design, some in the middle of a line
        yield chooser.randint(1, 7), b"", chooser.choice([0.0, chooser.uniform(0.0, 0.1)])
    for _ in range(3):  # while the surrogate proposes, which takes some tenths of a second
        yield 1, b'"origin": "model"', chooser.uniform(0.0, 0.5)
    for _ in range(2):  # after the last trial: test text, figures, the parent run
        yield 1, b'"event": "tested"', chooser.uniform(0.0, 0.5)


@pytest.mark.slow
def test_a_search_killed_20_times_has_every_trial_once(tmp_path: Path) -> None:
    environment = os.environ | {"LRBO_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    kills = 0
    with nursery(tmp_path, environment) as nest:
        for lines, mark, delay in moments(random.Random(SEED)):
            before = nest.content()
            process = nest.start()

            def reached(before: bytes = before, lines: int = lines, mark: bytes = mark) -> bool:
                new = nest.content()[len(before) :]
                return sum(mark in line for line in new.split(b"\n")[:-1]) >= lines

            # What has been tested is not tested again: then there is only the delay.
            if lines and (b"tested" not in mark or mark not in before):
                wait_until(reached, f"{lines} more lines with {mark!r}")
            time.sleep(delay)
            kills += nest.kill(process)
            # What was there stays there, but for half a line that was cut off.
            assert nest.content().startswith(before[: before.rfind(b"\n") + 1])
    assert kills == 20

    # The last one is continued by the plain command, to its end.
    arguments = [sys.executable, "-c", COMMAND, *SEARCH, "output=json"]
    done = subprocess.run(
        arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    arguments = [sys.executable, "-c", COMMAND, "report", "study=tiny", "output=json"]
    report = subprocess.run(
        arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert report.returncode == 0, report.stderr
    found, expected = (json.loads(run.stdout.splitlines()[-1]) for run in (report, done))
    assert found == expected

    folder = tmp_path / "studies"
    lines = (folder / "tiny" / "journal.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    events = [json.loads(line) for line in lines]
    once = dict.fromkeys(range(TRIALS), 1)
    for kind in ("suggested", "ended"):
        assert Counter(e["trial"] for e in events if e["event"] == kind) == once, kind
    assert [e["trial"] for e in events if e["event"] == "suggested"] == list(range(TRIALS))
    assert sum(e["event"] == "started" for e in events) > TRIALS  # some had to begin again
    ended = {e["trial"]: e for e in events if e["event"] == "ended"}
    assert {e["outcome"] for e in ended.values()} == {"completed"}
    assert [e["label"] for e in events if e["event"] == "tested"] == ["dense", "uniform", "best"]

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'lrbo'")
    runs = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ACTIVE_ONLY)
    parents = [run for run in runs if run.data.tags["lrbo.role"] == "study"]
    assert [run.info.status for run in parents] == ["FINISHED"]
    children = [run for run in runs if run.data.tags["lrbo.role"] == "trial"]
    assert Counter(int(run.data.tags["lrbo.trial"]) for run in children) == once
    for run in children:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        metrics = ended[int(run.data.tags["lrbo.trial"])]["metrics"]
        assert run.data.metrics["nll"] == metrics["nll"]
