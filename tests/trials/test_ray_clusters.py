"""Real Ray: two actors on this machine, actors that are killed, nodes that join and leave."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lrbo.study.journal import Study
from lrbo.study.state import StudyState
from lrbo.trials import ray_executor
from lrbo.trials.ray_executor import RayExecutor, RaySettings, connected
from lrbo.trials.records import TrialRequest, TrialResult
from tests.support import forks
from tests.support.commands import in_folder, lrbo_command
from tests.trials.test_executors import request

pytestmark = pytest.mark.slow
pytest.importorskip("ray")

RAY = ["executor=ray", "executor.workers=2", "executor.oversubscribe=true"]
TINY = ["experiment=tiny", "output=json"]
ROUNDING = 1e-5  # nats: threads may add in another order


def search(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a search in a process of its own, as a user would, and return its summary."""
    process = forks.start_lrbo(["search", *arguments], folder)
    status, out, err = forks.ended(process, folder, seconds=240)
    assert status == 0, err
    summary: dict[str, Any] = json.loads(out.splitlines()[-1])
    return summary


def search_here(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a search without Ray in this process, which has imported what it needs."""
    ran = in_folder(folder, lambda: lrbo_command("search", *arguments))
    assert ran.status == 0, ran.err
    return ran.json


def state_of(folder: Path, study: str) -> StudyState:
    return Study(folder / "studies" / study).state


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def actors_of(search_: int) -> list[int]:
    """Return the processes of the actors that a search started.

    Ray names them after what they do: ``ray::Actor``, and ``ray::Actor.evaluate`` in a trial.
    """
    pids = []
    for child in psutil.Process(search_).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # short-lived ones of Ray
            if "".join(child.cmdline()[:1]).startswith("ray::Actor"):
                pids.append(child.pid)
    return pids


def test_two_actors_score_what_one_process_scores_and_lose_no_trial_if_killed(
    tmp_path: Path,
) -> None:
    """Where trials run may change: from one process to actors, and back after kills of both."""
    search_here(tmp_path, *TINY, "study=together", "search.trials=1")
    arguments = ["search", "study=together", "search.trials=200", *RAY, "output=json"]
    process = forks.start_lrbo(arguments, tmp_path)
    assert process.pid is not None
    search_here(tmp_path, *TINY, "study=alone", "search.trials=4")
    wait_for(lambda: len(state_of(tmp_path, "together").ended) >= 5)
    wait_for(lambda: len(actors_of(process.pid)) == 2)
    os.kill(actors_of(process.pid)[0], signal.SIGKILL)
    before = len(state_of(tmp_path, "together").ended)
    wait_for(lambda: len(state_of(tmp_path, "together").ended) >= before + 6)
    assert process.exitcode is None
    process.kill()
    process.join()
    ended = len(state_of(tmp_path, "together").ended)
    summary = search_here(
        tmp_path, "study=together", f"search.trials={ended + 4}", "executor=inline", "output=json"
    )
    assert summary["trials_completed"] == ended + 4
    state, alone = (state_of(tmp_path, name) for name in ("together", "alone"))
    assert sorted(state.trials) == list(range(ended + 4))
    assert not state.open
    for index in range(4):
        one, other = state.trials[index], alone.trials[index]
        assert one.request == other.request
        assert one.metrics["nll"] == pytest.approx(other.metrics["nll"], abs=ROUNDING)
    lines = (tmp_path / "studies/together/journal.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    once = sorted(event["trial"] for event in events if event["event"] == "ended")
    assert once == list(range(ended + 4))


def slow_worker() -> Callable[[TrialRequest], TrialResult]:
    def worker(trial: TrialRequest) -> TrialResult:
        time.sleep(1.0)
        return TrialResult(trial.trial_index, "completed", {"pid": float(os.getpid())})

    return worker


def not_used(_: TrialRequest) -> TrialResult:
    raise AssertionError("actors have workers of their own")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes of one core each, in processes of this machine."""
    utils = pytest.importorskip("ray.cluster_utils")
    before = signal.getsignal(signal.SIGTERM)  # which a node of Ray takes for itself
    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files of Ray
def test_nodes_of_a_cluster_leave_and_join(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_executor, "JOIN_S", 0.5)
    with connected(RaySettings(address=cluster.address)) as module:
        executor = RayExecutor(module, RaySettings(address=cluster.address), slow_worker)
        wait_for(lambda: executor.capacity == 2)
        jobs = [executor.submit(not_used, request(index)) for index in range(2)]
        wait_for(lambda: all(job.done() for job in jobs))
        assert len({job.result().metrics["pid"] for job in jobs}) == 2
        jobs = [executor.submit(not_used, request(index)) for index in range(4)]
        gone = next(iter(cluster.worker_nodes))
        threading.Thread(target=cluster.remove_node, args=(gone,)).start()
        wait_for(lambda: all(job.done() for job in jobs))
        assert [job.result().trial_index for job in jobs] == [0, 1, 2, 3]
        assert "was lost; the trial runs again" in caplog.text
        wait_for(lambda: len(executor.seats) == 1)
        cluster.add_node(num_cpus=1)
        wait_for(lambda: executor.capacity == 2)
        executor.shut_down()
