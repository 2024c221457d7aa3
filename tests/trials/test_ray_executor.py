"""Trials on actors: who gets what, what happens to a trial whose actor is lost, who may join."""

import itertools
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from lrbo.errors import ConfigError, WorkerError
from lrbo.trials import ray_executor
from lrbo.trials.ray_executor import Actor, RayExecutor, RaySettings, connected, seating
from lrbo.trials.records import Executor, Job, TrialRequest, TrialResult
from tests.trials.test_executors import request


class ActorLostError(Exception):
    """Stands for ``RayActorError``."""


class TaskFailedError(Exception):
    """Stands for ``RayTaskError``, which carries what the actor raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause

    def as_instanceof_cause(self) -> Exception:
        return self.cause


@dataclass
class FakeRay:
    """Looks like the module: calls answer when a test lets them, actors die when it says so."""

    nodes_: list[dict[str, float]]
    answers: dict[int, Any] = field(default_factory=dict)
    calls: dict[int, tuple[Any, str, Callable[[], Any]]] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)
    killed: list[Any] = field(default_factory=list)
    options_: list[dict[str, Any]] = field(default_factory=list)
    exceptions: Any = field(
        default_factory=lambda: SimpleNamespace(
            RayActorError=ActorLostError, RayTaskError=TaskFailedError
        )
    )
    _count: Any = field(default_factory=itertools.count)

    def remote(self, kind: type) -> Any:
        def options(**given: Any) -> Any:
            def make() -> Any:
                self.options_.append(given)
                made = kind()
                handle = SimpleNamespace()
                for name in ("start", "evaluate"):
                    method = SimpleNamespace(remote=self._caller(handle, name, getattr(made, name)))
                    setattr(handle, name, method)
                self.alive.append(handle)
                return handle

            return SimpleNamespace(remote=make)

        return SimpleNamespace(options=options)

    def _caller(self, handle: Any, name: str, method: Any) -> Any:
        def call(*arguments: Any) -> int:
            number = next(self._count)
            self.calls[number] = (handle, name, lambda: method(*arguments))
            return number

        return call

    def answer(self, *names: str) -> None:
        """Let every open call of these methods run."""
        for number, (_, name, run) in list(self.calls.items()):
            if name in names and number not in self.answers:
                try:
                    self.answers[number] = run()
                except Exception as error:
                    self.answers[number] = TaskFailedError(error)

    def lose(self, handle: Any) -> None:
        """Let an actor die; what it was asked is answered by that."""
        self.alive.remove(handle)
        for number, (whose, _, _) in self.calls.items():
            if whose is handle:
                self.answers.setdefault(number, ActorLostError("The actor died\nmore"))

    def wait(self, calls: list[int], *, num_returns: int, timeout: float) -> tuple[list, list]:
        assert (num_returns, timeout) == (len(calls), 0)
        return [c for c in calls if c in self.answers], [c for c in calls if c not in self.answers]

    def get(self, call: int) -> Any:
        answer = self.answers[call]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, handle: Any) -> None:
        self.killed.append(handle)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self.nodes_]


def build() -> Callable[[TrialRequest], TrialResult]:
    def worker(trial: TrialRequest) -> TrialResult:
        if trial.trial_index == 99:
            raise TypeError("a defect")
        return TrialResult(trial.trial_index, "completed", {"nll": trial.seed / 2})

    return worker


def not_used(_: TrialRequest) -> TrialResult:
    raise AssertionError("actors have workers of their own")


@pytest.fixture(autouse=True)
def _looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "JOIN_S", 0.0)


def two_workers(**settings: Any) -> tuple[FakeRay, RayExecutor]:
    ray = FakeRay([{"CPU": 2.0}])
    executor = RayExecutor(ray, RaySettings(workers=2, **settings), build)
    assert executor.capacity == 1  # none is ready yet, but a trial may wait for one
    ray.answer("start")
    assert executor.capacity == 2
    return ray, executor


def test_each_ready_actor_has_one_trial_and_the_rest_waits() -> None:
    ray, executor = two_workers()
    assert isinstance(executor, Executor)
    jobs: list[Job] = [executor.submit(not_used, request(index)) for index in range(3)]
    assert not any(job.done() for job in jobs)
    assert [job.request.trial_index for job in executor.queue] == [2]
    ray.answer("evaluate")
    assert [job.done() for job in jobs] == [True, True, False]
    ray.answer("evaluate")
    assert [job.result().metrics["nll"] for job in jobs] == [0.0, 0.5, 1.0]


def test_the_trial_of_a_lost_actor_runs_again_first(caplog: pytest.LogCaptureFixture) -> None:
    ray, executor = two_workers()
    jobs = [executor.submit(not_used, request(index)) for index in range(4)]
    ray.lose(executor.seats[0].actor)
    assert not jobs[0].done()
    assert [job.request.trial_index for job in executor.queue] == [0, 2, 3]
    assert "worker of trial 0 was lost; the trial runs again" in caplog.text
    assert len(executor.seats) == 2  # another actor was asked for
    assert executor.capacity == 1
    ray.answer("start", "evaluate")
    while not all(job.done() for job in jobs):
        ray.answer("evaluate")
    assert [job.result().trial_index for job in jobs] == [0, 1, 2, 3]


def test_a_trial_that_kills_every_actor_fails() -> None:
    ray, executor = two_workers()
    job = executor.submit(not_used, request(0))
    for _ in range(ray_executor.MAX_LOSSES):
        assert not job.done()
        ray.lose(next(seat.actor for seat in executor.seats if seat.job is job))
        executor.poll()
        ray.answer("start")
    assert job.done()
    assert job.result().outcome == "failed"
    assert job.result().error == "its worker was lost 3 times, last: The actor died"


def test_an_actor_that_cannot_start_stops_the_search() -> None:
    ray = FakeRay([{"CPU": 1.0}])

    def broken() -> Any:
        raise ConfigError(["this machine does not see the study"])

    executor = RayExecutor(ray, RaySettings(workers=1), broken)
    executor.submit(not_used, request(0))
    ray.answer("start")
    with pytest.raises(WorkerError, match="cannot start: 1 problem"):
        executor.poll()
    new_executor = RayExecutor(ray, RaySettings(workers=1), build)
    new_executor.poll()
    ray.lose(new_executor.seats[0].actor)
    with pytest.raises(WorkerError, match="lost while it started: The actor died"):
        new_executor.poll()


def test_a_defect_of_the_worker_is_not_swallowed() -> None:
    ray, executor = two_workers()
    job = executor.submit(not_used, request(99))
    ray.answer("evaluate")
    with pytest.raises(TypeError, match="a defect"):
        job.done()


def test_nodes_may_join_and_leave() -> None:
    ray = FakeRay([{"CPU": 4.0}])
    executor = RayExecutor(ray, RaySettings(), build)
    executor.poll()
    assert len(executor.seats) == 1
    ray.nodes_ += [{"CPU": 4.0}, {"memory": 1.0}]
    executor.poll()
    assert len(executor.seats) == 2
    ray.answer("start")
    jobs = [executor.submit(not_used, request(index)) for index in range(2)]
    ray.nodes_.pop(0)
    ray.lose(executor.seats[0].actor)
    ray.answer("evaluate")
    executor.poll()
    assert len(executor.seats) == 1  # one node is left, and no other is asked for
    ray.answer("evaluate")
    assert all(job.done() for job in jobs)
    executor.shut_down()
    assert len(ray.killed) == 1
    assert executor.seats == []


@pytest.mark.parametrize(
    ("settings", "nodes", "expected"),
    [
        ({"workers": 2}, [{"CPU": 8.0}], (2, {"num_cpus": 4}, 4)),
        ({"workers": 2, "devices": 2}, [{"CPU": 8.0}], (2, {"num_cpus": 1}, 1)),
        ({"workers": 4}, [{"CPU": 2.0}], (4, {"num_cpus": 0.5}, 1)),
        ({}, [{"CPU": 8.0}, {"CPU": 8.0}], (2, {"num_cpus": 8}, 8)),
        ({"uses_gpu": True}, [{"GPU": 2.0}, {"GPU": 1.0}], (3, {"num_gpus": 1.0}, None)),
        ({"uses_gpu": True, "workers": 4}, [{"GPU": 2.0}], (4, {"num_gpus": 0.5}, None)),
        ({"uses_gpu": True, "devices": 1}, [{"GPU": 4.0}], (1, {"num_gpus": 1.0}, None)),
    ],
)
def test_actors_share_what_there_is(settings: Any, nodes: Any, expected: Any) -> None:
    workers, options, threads = seating(RaySettings(**settings), FakeRay(nodes))
    assert (workers, threads) == (expected[0], expected[2])
    assert expected[1].items() <= options.items()


def test_an_actor_builds_its_worker_once() -> None:
    built = []

    def counted() -> Any:
        built.append(1)
        return build()

    actor = Actor()
    actor.start(counted, None)
    assert [actor.evaluate(request(i)).trial_index for i in (1, 2)] == [1, 2]
    assert len(built) == 1


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for address in (f"127.0.0.1:{port}", "nonsense", "no.such.host.invalid:1"):
        with (
            pytest.raises(ConfigError, match=f"executor.address='{address}'.*ray start --head"),
            connected(RaySettings(address=address)),
        ):
            pass


def test_more_workers_than_devices_must_be_asked_for() -> None:
    check = ray_executor._require_enough
    check(RaySettings(workers=2), 2)
    check(RaySettings(workers=3, oversubscribe=True), 2)
    with pytest.raises(ConfigError, match=r"executor.workers=3: there are 2 cores.*oversubscribe"):
        check(RaySettings(workers=3), 2)
    with pytest.raises(ConfigError, match=r"executor.workers=3: there are 2 cores.*oversubscribe"):
        check(RaySettings(workers=3, devices=2), 8)
    with pytest.raises(ConfigError, match="Ray has no accelerators"):
        check(RaySettings(uses_gpu=True), 0)


def test_what_a_local_ray_would_lack_is_known_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "_imported", object)
    monkeypatch.setattr(ray_executor, "available_cores", lambda: 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    find = ray_executor.find_problems
    assert find(RaySettings(workers=2)) == find(RaySettings(workers=4, uses_gpu=True)) == []
    (problem,) = find(RaySettings(workers=3))
    assert "there are 2 cores" in problem
    (problem,) = find(RaySettings(workers=5, uses_gpu=True))
    assert "there are 4 accelerators" in problem


def test_a_cluster_is_asked_and_left_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ray = FakeRay([{"CPU": 3.0}])
    monkeypatch.setattr(ray, "init", lambda **given: calls.append(given["address"]), raising=False)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("left"), raising=False)
    monkeypatch.setattr(ray_executor, "_imported", lambda: ray)
    assert ray_executor.find_problems(RaySettings(address="auto", workers=3)) == []
    (problem,) = ray_executor.find_problems(RaySettings(address="auto", workers=4))
    assert "there are 3 cores" in problem
    assert calls == ["auto", "left"] * 2
