"""Run trials on Ray actors, one per device; ray is imported only when it is used."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lrbo.cores import available_cores
from lrbo.errors import Collecting, ConfigError, WorkerError
from lrbo.interrupts import handlers_restored
from lrbo.trials.records import Evaluate, TrialRequest, TrialResult

log = logging.getLogger(__name__)

MAX_LOSSES = 3  # lost workers until the trial is taken for the cause
REACH_S = 5.0  # wait for a cluster to answer
JOIN_S = 5.0  # between two checks for new devices


@dataclass(frozen=True)
class RaySettings:
    """The cluster and the devices that trials run on: accelerators, or cores without them."""

    address: str | None = None
    workers: int | None = None
    devices: int | None = None
    oversubscribe: bool = False
    uses_gpu: bool = False


class Actor:
    """Lives in a Ray process: builds its worker once, then evaluates requests."""

    # No constructor: its errors would reach the caller as text only.
    def start(self, build: Callable[[], Evaluate], threads: int | None) -> None:
        """Load model and factors."""
        if threads is not None:
            torch.set_num_threads(threads)
        self.worker = build()

    def evaluate(self, request: TrialRequest) -> TrialResult:
        """Evaluate one allocation."""
        return self.worker(request)


@dataclass
class RayJob:
    """A submitted trial."""

    request: TrialRequest
    executor: RayExecutor
    finished: TrialResult | None = None
    losses: int = 0

    def done(self) -> bool:
        """Whether :meth:`result` returns at once."""
        self.executor.poll()
        return self.finished is not None

    def result(self) -> TrialResult:
        """Wait for the result and return it."""
        while not self.done():
            time.sleep(0.01)
        assert self.finished is not None
        return self.finished


@dataclass
class Seat:
    """An actor, its current call (``None`` when idle) and trial (``None`` while it starts)."""

    actor: Any
    call: Any
    job: RayJob | None = None


@dataclass
class RayExecutor:
    """Gives trials to actors; the trial of a lost actor returns to the front of the queue."""

    ray: Any  # the module, connected
    settings: RaySettings
    build: Callable[[], Evaluate]  # in the process of each actor
    queue: deque[RayJob] = field(default_factory=deque)
    seats: list[Seat] = field(default_factory=list)
    _last_check: float = -math.inf
    _has_started: bool = False

    @property
    def capacity(self) -> int:
        """The number of actors that have started, at least 1."""
        self.poll()
        return max(sum(seat.job is not None or seat.call is None for seat in self.seats), 1)

    def submit(self, worker: Evaluate, request: TrialRequest) -> RayJob:
        """Queue a trial, for the worker of an actor instead of ``worker``."""
        del worker
        job = RayJob(request, self)
        self.queue.append(job)
        self.poll()
        return job

    def poll(self) -> None:
        """Collect results, replace lost actors, start trials on idle ones; or raise WorkerError."""
        calls = {seat.call: seat for seat in self.seats if seat.call is not None}
        if calls:
            ended, _ = self.ray.wait(list(calls), num_returns=len(calls), timeout=0)
            for call in ended:
                self._collect(calls[call])
        self._start_missing()
        for seat in self.seats:
            if seat.call is None and self.queue:
                seat.job = self.queue.popleft()
                seat.call = seat.actor.evaluate.remote(seat.job.request)

    def shut_down(self) -> None:
        """Stop all actors; a continued search runs their trials again."""
        for seat in self.seats:
            self.ray.kill(seat.actor)
        self.seats.clear()

    def _collect(self, seat: Seat) -> None:
        job, call = seat.job, seat.call
        seat.job = seat.call = None
        try:
            result = self.ray.get(call)
        except self.ray.exceptions.RayActorError as error:
            self.seats.remove(seat)
            self._last_check = -math.inf  # start another one now
            self._requeue(job, error)
        except self.ray.exceptions.RayTaskError as error:
            if job is None:
                raise WorkerError(f"a worker cannot start: {error.cause}") from error
            raise error.as_instanceof_cause() from None
        else:
            if job is None:
                self._has_started = True
            else:
                job.finished = result

    def _requeue(self, job: RayJob | None, error: Exception) -> None:
        if job is None and not self._has_started:
            raise WorkerError(f"a worker was lost while it started: {error}") from error
        if job is None:
            log.warning("A worker was lost while it started; another one starts.")
            return
        job.losses += 1
        index = job.request.trial_index
        if job.losses < MAX_LOSSES:
            log.warning("The worker of trial %d was lost; the trial runs again elsewhere.", index)
            self.queue.appendleft(job)
        else:
            last = str(error).strip().partition("\n")[0]
            reason = f"its worker was lost {job.losses} times, last: {last}"
            job.finished = TrialResult(index, "failed", error=reason)

    def _start_missing(self) -> None:
        if time.monotonic() - self._last_check < JOIN_S:
            return
        self._last_check = time.monotonic()
        workers, options, threads = seating(self.settings, self.ray)
        while len(self.seats) < workers:
            actor = self.ray.remote(Actor).options(**options).remote()
            self.seats.append(Seat(actor, actor.start.remote(self.build, threads)))


def seating(settings: RaySettings, ray: Any) -> tuple[int, dict[str, Any], int | None]:
    """Return the number of actors, each one's Ray options, and its number of threads."""
    devices, nodes = _count_devices(settings, ray)
    devices = min(devices, settings.devices or devices)
    workers = settings.workers or max(devices if settings.uses_gpu else min(nodes, devices), 1)
    share = max(devices, 1) / workers
    share = float(int(share)) if share >= 1 else share
    if settings.uses_gpu:
        return workers, {"num_gpus": min(share, 1.0), "num_cpus": 0}, None
    threads = max(int(share), 1)
    return workers, {"num_cpus": min(share, threads), "scheduling_strategy": "SPREAD"}, threads


def _count_devices(settings: RaySettings, ray: Any) -> tuple[int, int]:
    """Return the number of devices, and of nodes that have one."""
    kind = "GPU" if settings.uses_gpu else "CPU"
    nodes = [node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]]
    return int(sum(nodes)), sum(count >= 1 for count in nodes)


def find_problems(settings: RaySettings) -> list[str]:
    """List what keeps trials from running there, without starting a local Ray."""
    problems: list[str] = []
    with Collecting(problems, ConfigError):
        if settings.address is None:
            _imported()
            devices = torch.cuda.device_count() if settings.uses_gpu else available_cores()
            _require_enough(settings, devices)
        else:
            with connected(settings):
                pass
    return problems


@contextlib.contextmanager
def connected(settings: RaySettings) -> Iterator[Any]:
    """Connect to Ray, or say what keeps it from that; yield the module, and leave it at the end."""
    ray = _imported()
    address = settings.address
    if address is not None and address != "auto":
        _require_answer(address)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    local = {"include_dashboard": False, "num_cpus": available_cores()}
    # Without an address Ray would join whatever cluster runs on this machine, or RAY_ADDRESS names.
    where = {"address": "local", **local} if address is None else {"address": address}
    try:
        with handlers_restored():  # Ray takes SIGTERM, and would exit before the run is ended
            ray.init(**where, **quiet)
    except (ConnectionError, ValueError, RuntimeError, SystemExit) as error:
        # Ray exits where something other than a cluster listens.
        reason = "no Ray answers" if isinstance(error, SystemExit) else str(error).splitlines()[0]
        raise ConfigError([f"executor.address={address!r}: {reason}"]) from error
    try:
        _require_enough(settings, _count_devices(settings, ray)[0])
        yield ray
    finally:
        ray.shutdown()


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a deprecation warning
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            ["executor.name='ray' needs the package ray; install it with: pip install 'lrbo[ray]'"]
        ) from error
    return ray


def _require_answer(address: str) -> None:
    """Refuse an address where nothing listens, where Ray would wait for minutes, then exit."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except (OSError, ValueError) as error:
        problem = (
            f"executor.address={address!r}: {error}; start a cluster with `ray start --head` and "
            "give HOST:PORT as it prints, or leave it null for a local one"
        )
        raise ConfigError([problem]) from error


def _require_enough(settings: RaySettings, devices: int) -> None:
    """Refuse more workers than usable devices, unless they may share."""
    devices = min(devices, settings.devices or devices)
    what = "accelerators" if settings.uses_gpu else "cores"
    if devices < 1:
        raise ConfigError([f"executor: Ray has no {what}; see `ray status`"])
    if (settings.workers or 0) > devices and not settings.oversubscribe:
        problem = (
            f"executor.workers={settings.workers}: there are {devices} {what}; take at most that "
            "many, or let workers share them with executor.oversubscribe=true"
        )
        raise ConfigError([problem])
