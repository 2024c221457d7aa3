"""Kill searches at random moments, and compare what becomes of them with a search left alone."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

TRIALS, INITIAL = (8, 5) if os.environ.get("LRBO_SMOKE") else (26, 13)
LINES = 4  # of a trial in the journal
# Of a kill, in the order in which a search passes through them.
PLACES = ("set-up", "trials", "proposals", "afterwards")
# Seconds that a single run may take at most before it counts as stuck, on a busy machine.
PATIENCE = 300.0
# Proposals are repeated by the same operations on the same numbers, which Ax and BoTorch round
# alike on one machine; what is left is their linear algebra, whose sums may be split otherwise.
VARIABLES_WITHIN = 1e-6  # of a keep ratio
LOSS_WITHIN = 1e-9  # nats per token

# A process that has imported what a search imports (10 s) and forks once for each line that it
# reads: the child is a process of its own, with its own locks and files, which is killed.
NURSERY = """
import json, os, sys
import lrbo.commands.search, lrbo.optimization.loop, lrbo.reports.plots
import mlflow.store.tracking.sqlalchemy_store, matplotlib.backends.backend_agg
from lrbo.cli import main
print("ready", flush=True)
for line in sys.stdin:
    folder, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os.environ["LRBO_CACHE"] = os.path.join(folder, "cache")
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        status = 0
        try:
            main(arguments)
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 1
        os._exit(status)
    print(child, flush=True)
    sys.stdin.readline()  # until it is asked for, the child keeps its number, dead or alive
    print(os.waitpid(child, 0)[1], flush=True)
"""


def search(seed: int) -> list[str]:
    """Return the command line of a search on the tiny model, of ratios or, if odd, of weights."""
    sizes = [f"search.trials={TRIALS}", f"search.initial={INITIAL}"]
    weights = ["method=loss_aware", "space=weights"] if seed % 2 else []
    return ["search", "experiment=tiny", *weights, *sizes, f"seed={seed}"]


def journal_of(folder: Path) -> Path:
    """Return the journal of the search that runs in a folder."""
    return folder / "studies" / "tiny" / "journal.jsonl"


def content(folder: Path) -> bytes:
    """Return the journal as it is now."""
    journal = journal_of(folder)
    return journal.read_bytes() if journal.exists() else b""


def events(folder: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a journal."""
    return [json.loads(line) for line in content(folder).split(b"\n")[:-1]]


class Nursery:
    """Starts searches, one at a time, each in a folder of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Take the process that forks."""
        self._process = process

    def read(self) -> str:
        """Return the next line that it says."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, folder: Path, arguments: Sequence[str]) -> int:
        """Start a command in a folder and return the id of its process."""
        self._say(json.dumps([str(folder), list(arguments)]))
        return int(self.read())

    def kill(self, process: int) -> bool:
        """Kill a command; return whether it was alive until then."""
        os.kill(process, signal.SIGKILL)  # a zombie at worst: its parent has not waited for it
        status = self._status()
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed by itself"
        return os.WIFSIGNALED(status)

    def run(self, folder: Path, arguments: Sequence[str]) -> None:
        """Run a command to its end."""
        self.start(folder, arguments)
        status = self._status()
        assert status == 0, f"{folder / 'log.txt'}: it ended with {status}"

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _status(self) -> int:
        """Return what the system says of the last command, once it is over."""
        self._say("")
        return int(self.read())


@contextmanager
def nursery() -> Iterator[Nursery]:
    """Yield a nursery, which ends with the block."""
    # Sums over several threads may be split otherwise where a machine is busy.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        nest = Nursery(process)
        assert nest.read() == "ready"
        try:
            yield nest
        finally:
            process.kill()


@dataclass(frozen=True)
class Pace:
    """How long a search that is left alone takes here, in seconds.

    Attributes:
        set_up: From its start to the first trial, with nothing made before.
        restart: The same of a study that exists.
        proposal: For one of the surrogate's.
        afterwards: From the end of the last trial to its own.
    """

    set_up: float
    restart: float
    proposal: float
    afterwards: float


def left_alone(nest: Nursery, folder: Path, seed: int) -> Pace:
    """Run a search without a kill, and once more, which finds that all is done."""
    start = time.time()
    nest.run(folder, search(seed))
    end, entries = time.time(), events(folder)
    nest.run(folder, search(seed))
    afterwards = end - max(event["time"] for event in entries if event["event"] == "logged")
    suggested = [event for event in entries if event["event"] == "suggested"]
    return Pace(
        set_up=suggested[0]["time"] - start,
        restart=max(time.time() - end - afterwards, 0.0),
        proposal=statistics.median(
            event["seconds"]["suggestion"] for event in suggested if event["origin"] == "model"
        ),
        afterwards=afterwards,
    )


def moments(chooser: random.Random, kills: int, pace: Pace) -> Iterator[tuple[int, bytes, float]]:
    """Yield for each kill: lines to wait for, what they hold, seconds more."""
    set_up, proposals, afterwards = (round(kills * share) for share in (0.25, 0.2, 0.1))
    for number in range(set_up):  # model, statistics, tokens, dense model, and all of it again
        yield 0, b"", chooser.uniform(0.0, pace.restart if number % 2 else pace.set_up)
    among = kills - set_up - proposals - afterwards
    for _ in range(among):  # trials of the initial design
        lines = chooser.randint(0, 2 * LINES * INITIAL // among)
        more = chooser.uniform(0.0, 0.1 if lines else pace.restart)
        yield lines, b"", chooser.choice([0.0, more])
    for _ in range(proposals):  # while the surrogate is fitted and asked
        yield 1, b'"origin": "model"', chooser.uniform(0.0, 1.5 * pace.proposal)
    for _ in range(afterwards):  # test text, figures, the parent run
        yield 1, b'"event": "tested"', chooser.uniform(0.0, pace.afterwards)


def killed(
    nest: Nursery, folder: Path, seed: int, plan: Iterator[tuple[int, bytes, float]]
) -> list[str]:
    """Start the same search again and again, kill it each time, and return where kills fell."""
    places = []
    for lines, mark, delay in plan:
        before = content(folder)
        process = nest.start(folder, search(seed))
        # What has been tested is not tested again: then there is only the delay.
        if lines and b'"event": "tested"' not in before:
            _wait(folder, process, len(before), lines, mark)
        time.sleep(delay)
        alive = nest.kill(process)
        after = content(folder)
        # What was there stays there, but for half a line that was cut off.
        assert after.startswith(before[: before.rfind(b"\n") + 1]), "the journal was rewritten"
        if alive:
            places.append(_place(before, after, events(folder)))
    return places


def _wait(folder: Path, process: int, start: int, lines: int, mark: bytes) -> None:
    """Wait until a search wrote so many more lines that hold a mark, or is over."""
    deadline = time.monotonic() + PATIENCE
    while sum(mark in line for line in content(folder)[start:].split(b"\n")[:-1]) < lines:
        if _is_over(process):
            return
        assert time.monotonic() < deadline, f"no {lines} more lines of {mark!r} in {PATIENCE} s"
        time.sleep(0.002)


def _place(before: bytes, after: bytes, entries: Sequence[Mapping[str, Any]]) -> str:
    """Return where a search was when it died, as far as its journal says."""
    ended = {event["trial"] for event in entries if event["event"] == "ended"}
    if len(ended) == TRIALS:
        return "afterwards"
    if len(after) <= len(before):
        return "set-up"  # it had not written anything yet
    kind = entries[-1]["event"] if entries else "dense"
    if kind == "dense":
        return "set-up"
    return "proposals" if kind == "logged" and len(ended) >= INITIAL else "trials"


def _is_over(process: int) -> bool:
    """Return whether a process has ended; its parent waits for it only later."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@dataclass(frozen=True)
class Verdict:
    """What a search came to, beside the same one left alone.

    Attributes:
        problems: One sentence each; empty if there is none.
        again: Trials that were begun more than once.
        variables: Largest difference of a variable of any trial.
        loss: Largest difference of a trial's loss, nats per token.
    """

    problems: list[str]
    again: int
    variables: float
    loss: float


def judge(
    folder: Path, reference: Path, expected: Sequence[Mapping[str, Any]] | None = None
) -> Verdict:
    """Compare journal and MLflow with each other, and the trials with those of a reference.

    Args:
        folder: That the search ran in.
        reference: That the same search ran in, left alone.
        expected: Events of the reference, where its journal is not to be read.
    """
    entries = events(folder)
    expected = events(reference) if expected is None else expected
    problems = [] if content(folder).endswith(b"\n") else ["the journal ends in half a line"]
    for kind, key in (("suggested", "trial"), ("ended", "trial"), ("tested", "label")):
        actual, wanted = (
            [e[key] for e in all_ if e["event"] == kind] for all_ in (entries, expected)
        )
        if actual != wanted:
            problems.append(f"{kind}: {key}s {actual} instead of {wanted}")
    ended = {event["trial"]: event for event in entries if event["event"] == "ended"}
    problems += _mlflow_problems(folder, ended)
    starts = Counter(event["trial"] for event in entries if event["event"] == "started")
    variables, loss = [0.0], [0.0]
    for event, other in _pairs(entries, expected):
        name = f"trial {event['trial']}"
        if event["event"] == "suggested":
            problems += [
                f"{name}, {key}: {event[key]} instead of {other[key]}"
                for key in ("origin", "allocation", "seed")
                if event[key] != other[key]
            ]
            mine, theirs = event["variables"], other["variables"]
            if mine.keys() != theirs.keys():
                problems.append(f"{name} has other variables")
            variables += [abs(mine[key] - theirs[key]) for key in mine.keys() & theirs.keys()]
        elif event["outcome"] != other["outcome"]:
            problems.append(f"{name} {event['outcome']}, not {other['outcome']}")
        else:
            loss.append(abs(event["metrics"]["nll"] - other["metrics"]["nll"]))
    if not max(variables) <= VARIABLES_WITHIN:
        problems.append(f"variables differ by {max(variables):.2g}")
    if not max(loss) <= LOSS_WITHIN:
        problems.append(f"losses differ by {max(loss):.2g}")
    restarts = sum(count > 1 for count in starts.values())
    return Verdict(problems, restarts, max(variables), max(loss))


def _pairs(
    entries: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield what was suggested and what came of it, beside the same of the reference."""
    for kind in ("suggested", "ended"):
        theirs = {event["trial"]: event for event in expected if event["event"] == kind}
        mine = (event for event in entries if event["event"] == kind)
        yield from ((event, theirs[event["trial"]]) for event in mine if event["trial"] in theirs)


def _mlflow_problems(folder: Path, ended: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Return what MLflow shows otherwise than the journal."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'studies' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'lrbo'")
    runs: list[Run] = list(client.search_runs([experiment.experiment_id]))
    parents = [run for run in runs if run.data.tags["lrbo.role"] == "study"]
    children = [run for run in runs if run.data.tags["lrbo.role"] == "trial"]
    problems = [
        f"run {run.info.run_name} is {run.info.status}"
        for run in runs
        if run.info.status != "FINISHED"
    ]
    problems += [
        f"run {run.info.run_name} ends before it begins"
        for run in runs
        if run.info.end_time is not None and run.info.end_time < run.info.start_time
    ]
    if len(parents) != 1:
        problems.append(f"{len(parents)} parent runs")
    shown = Counter(int(run.data.tags["lrbo.trial"]) for run in children)
    if shown != dict.fromkeys(ended, 1):
        problems.append(f"child runs: {dict(sorted(shown.items()))}")
    for run in children:
        index = int(run.data.tags["lrbo.trial"])
        metrics = ended[index]["metrics"]
        different = [name for name in metrics if run.data.metrics.get(name) != metrics[name]]
        if different:
            problems.append(f"MLflow has other metrics of trial {index}: {', '.join(different)}")
        if run.data.tags["mlflow.parentRunId"] not in {run.info.run_id for run in parents}:
            problems.append(f"the run of trial {index} is below another parent")
    best = min((event["metrics"].get("nll", math.inf) for event in ended.values()), default=None)
    problems += [
        f"the parent's best_nll is {run.data.metrics.get('best_nll')}, the journal's {best}"
        for run in parents
        if run.data.metrics.get("best_nll") != best
    ]
    return problems
