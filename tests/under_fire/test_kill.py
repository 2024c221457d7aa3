"""A real search, killed by the system again and again, ends as if nothing had happened."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.bench_kill import kills

pytestmark = pytest.mark.slow

SEED = 20
KILLS = int(os.environ.get("LRBO_KILLS", "8"))  # experiments/bench_kill does 1,000
TRIALS, INITIAL = 12, 6
LAST = f"trial {TRIALS - 1}"
COMMAND = "from lrbo.cli import main; main()"


@pytest.fixture(scope="module")
def nest() -> Iterator[kills.Nursery]:
    with kills.nursery() as nursery, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kills, "TRIALS", TRIALS)
        patch.setattr(kills, "INITIAL", INITIAL)
        yield nursery


@pytest.fixture(scope="module")
def alone(nest: kills.Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, kills.Pace]:
    """A search without a kill."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, kills.left_alone(nest, folder, SEED)


def command(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a command in a process that imported nothing before, and return its JSON."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments, "output=json"],
        cwd=folder,
        env=os.environ | {"LRBO_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=kills.PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_search_killed_again_and_again_is_the_one_that_was_left_alone(
    nest: kills.Nursery, alone: tuple[Path, kills.Pace], tmp_path: Path
) -> None:
    reference, pace = alone
    plan = kills.moments(random.Random(SEED), KILLS, pace)
    places = kills.killed(nest, tmp_path, SEED, plan)
    assert len(places) >= 0.8 * KILLS  # one that comes when the search is over kills nothing
    assert "set-up" in places
    assert len(set(places)) >= 2  # and later, at moments that the machine decides
    # The last one is continued by the plain command, to its end.
    answer = command(tmp_path, *kills.search(SEED))
    assert command(tmp_path, "report", "study=tiny") == answer
    assert kills.judge(tmp_path, reference).problems == []


def of(kind: str, **fields: Any) -> Callable[[list[dict[str, Any]]], None]:
    """Return what changes the last event of a kind."""

    def change(events: list[dict[str, Any]]) -> None:
        event = [event for event in events if event["event"] == kind][-1]
        for name, value in fields.items():
            event[name] = event[name] | value if isinstance(value, dict) else value

    return change


DIFFERENCES: dict[str, Callable[[list[dict[str, Any]]], None]] = {
    "losses differ by": of("ended", metrics={"nll": 1.0}),
    f"MLflow has other metrics of {LAST}: perplexity": of("ended", metrics={"perplexity": 1.0}),
    "the journal's 1.0": of("ended", metrics={"nll": 1.0}),
    f"{LAST} failed, not completed": of("ended", outcome="failed"),
    "ended: trials [": lambda events: events.append(
        next(event for event in events if event["event"] == "ended")
    ),
    "tested: labels ['dense', 'uniform', 'analytic'] instead": lambda events: events.pop() and None,
    f"{LAST}, seed: 1 instead of": of("suggested", seed=1),
    f"{LAST}, origin: sobol instead of model": of("suggested", origin="sobol"),
    f"{LAST} has other variables": of("suggested", variables={"another": 0.5}),
    "variables differ by": of("suggested", variables={"qk": 0.123}),
}


@pytest.mark.parametrize("problem", DIFFERENCES)
def test_what_differs_is_seen(alone: tuple[Path, kills.Pace], problem: str) -> None:
    """The judge finds each kind of difference, so that its silence means something."""
    reference, _ = alone
    assert kills.judge(reference, reference) == kills.Verdict([], 0, 0.0, 0.0)
    journal = kills.journal_of(reference)
    expected, whole = kills.events(reference), journal.read_bytes()
    events = kills.events(reference)
    DIFFERENCES[problem](events)
    journal.write_bytes(b"".join(json.dumps(event).encode() + b"\n" for event in events))
    try:
        problems = kills.judge(reference, reference, expected).problems
    finally:
        journal.write_bytes(whole)
    assert problem in "\n".join(problems)
