"""Trials on actors of Ray, one per device; the only file that imports ray, and only when used."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lrbo.errors import ConfigError, WorkerError
from lrbo.executors.base import Evaluate
from lrbo.interrupts import kept
from lrbo.trial import TrialRequest, TrialResult

log = logging.getLogger(__name__)

MAX_LOSSES = 3  # of one trial: what kills its worker every time is the trial
REACH_S = 5.0  # for a cluster to answer
JOIN_S = 5.0  # between two looks for devices that joined


@dataclass(frozen=True)
class RaySettings:
    """Where trials run.

    Attributes:
        address: ``host:port`` or ``auto`` of a cluster that runs; ``None`` starts a local one.
        workers: How many trials run at the same time; ``None`` is one per device, or one per node
            without accelerators, and more as nodes join.
        devices: At most so many accelerators (cores, without accelerators) are used; ``None`` is
            all that there are.
        oversubscribe: Whether several workers may share a device.
        uses_gpu: Whether the model runs on accelerators.
    """

    address: str | None = None
    workers: int | None = None
    devices: int | None = None
    oversubscribe: bool = False
    uses_gpu: bool = False


class Actor:
    """Lives in a process of Ray: builds its worker once, then evaluates what it is given."""

    def start(self, build: Callable[[], Evaluate], threads: int | None) -> None:
        """Load model and factors.

        Not in the constructor, whose errors reach the caller as text only.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.worker = build()

    def evaluate(self, request: TrialRequest) -> TrialResult:
        """Evaluate one allocation."""
        return self.worker(request)


@dataclass
class RayJob:
    """A trial that was handed out; which actor has it is the executor's business."""

    request: TrialRequest
    executor: RayExecutor
    finished: TrialResult | None = None
    losses: int = 0

    @property
    def job_id(self) -> str:
        """Return a name for messages."""
        return f"trial-{self.request.trial_index}"

    def done(self) -> bool:
        """Return whether :meth:`result` will answer at once."""
        self.executor.poll()
        return self.finished is not None

    def result(self) -> TrialResult:
        """Wait for the result and return it."""
        while not self.done():
            time.sleep(0.01)
        assert self.finished is not None
        return self.finished

    def cancel(self) -> None:
        """Take the trial out of the queue; one that runs may still finish."""
        with contextlib.suppress(ValueError):
            self.executor.queue.remove(self)


@dataclass
class Seat:
    """An actor and what it does.

    Attributes:
        actor: Handle of Ray.
        call: What it was asked last; ``None`` while it waits for a trial.
        job: The trial that the call is about; ``None`` while the actor starts.
    """

    actor: Any
    call: Any
    job: RayJob | None = None


@dataclass
class RayExecutor:
    """Hands trials to actors; a trial whose actor was lost goes back to the front of the queue.

    Attributes:
        ray: The module, connected.
        settings: How many actors, and on what.
        build: Makes the worker of an actor, in its process.
        queue: Trials that wait for an actor.
    """

    ray: Any
    settings: RaySettings
    build: Callable[[], Evaluate]
    queue: deque[RayJob] = field(default_factory=deque)
    seats: list[Seat] = field(default_factory=list)
    _looked: float = -float("inf")
    _started: int = 0

    @property
    def capacity(self) -> int:
        """Return how many trials can run at the same time: one per actor that is ready."""
        self.poll()
        ready = sum(seat.job is not None or seat.call is None for seat in self.seats)
        return max(ready, 1)

    def submit(self, worker: Evaluate, request: TrialRequest) -> RayJob:
        """Hand out a trial; ``worker`` is not used, because actors have their own."""
        del worker
        job = RayJob(request, self)
        self.queue.append(job)
        self.poll()
        return job

    def poll(self) -> None:
        """Take in what ended, replace actors that were lost, and give out what waits.

        Raises:
            WorkerError: If an actor cannot start: no other will.
        """
        calls = {seat.call: seat for seat in self.seats if seat.call is not None}
        if calls:
            ended, _ = self.ray.wait(list(calls), num_returns=len(calls), timeout=0)
            for call in ended:
                self._take_in(calls[call])
        self._look_for_devices()
        for seat in self.seats:
            if seat.call is None and self.queue:
                seat.job = self.queue.popleft()
                seat.call = seat.actor.evaluate.remote(seat.job.request)

    def shut_down(self) -> None:
        """Stop all actors; trials that ran are not ended, and run again when continued."""
        for seat in self.seats:
            self.ray.kill(seat.actor)
        self.seats.clear()

    def _take_in(self, seat: Seat) -> None:
        """Take in the answer to a call, or the loss of its actor."""
        job, call = seat.job, seat.call
        seat.job = seat.call = None
        try:
            answer = self.ray.get(call)
        except self.ray.exceptions.RayActorError as error:
            self._replace(seat, job, error)
        except self.ray.exceptions.RayTaskError as error:
            if job is None:
                raise WorkerError(f"a worker cannot start: {error.cause}") from error
            raise error.as_instanceof_cause() from None
        else:
            if job is None:
                self._started += 1
            else:
                job.finished = answer

    def _replace(self, seat: Seat, job: RayJob | None, error: Exception) -> None:
        """Give up an actor that was lost, and put what it had back into the queue."""
        self.seats.remove(seat)
        reason = str(error).strip().splitlines()[0]
        if job is None:
            if not self._started:
                raise WorkerError(f"a worker was lost while it started: {error}") from error
            log.warning("A worker was lost while it started; another one is.")
        else:
            job.losses += 1
            if job.losses < MAX_LOSSES:
                log.warning(
                    "The worker of trial %d was lost; the trial runs again on another one.",
                    job.request.trial_index,
                )
                self.queue.appendleft(job)
            else:
                job.finished = TrialResult(
                    job.request.trial_index,
                    "failed",
                    error=f"its worker was lost {job.losses} times, last: {reason}",
                )
        self._looked = -float("inf")  # and start another one now

    def _look_for_devices(self) -> None:
        """Start the actors that are missing, as far as there are devices for them."""
        if time.monotonic() - self._looked < JOIN_S:
            return
        self._looked = time.monotonic()
        wanted, options, threads = seating(self.settings, self.ray)
        while len(self.seats) < wanted:
            actor = self.ray.remote(Actor).options(**options).remote()
            self.seats.append(Seat(actor, actor.start.remote(self.build, threads)))


def seating(settings: RaySettings, ray: Any) -> tuple[int, dict[str, Any], int | None]:
    """Return how many actors there should be, what each asks Ray for, and its threads."""
    devices, nodes = count_devices(settings, ray)
    default = devices if settings.uses_gpu else min(nodes, devices)
    workers = max(settings.workers or default, 1)
    share = max(devices, 1) / workers
    share = float(int(share)) if share >= 1 else share
    if settings.uses_gpu:
        return workers, {"num_gpus": min(share, 1.0), "num_cpus": 0}, None
    threads = max(int(share), 1)
    return workers, {"num_cpus": min(share, threads), "scheduling_strategy": "SPREAD"}, threads


def count_devices(settings: RaySettings, ray: Any) -> tuple[int, int]:
    """Return how many devices may be used, and on how many nodes they are."""
    kind = "GPU" if settings.uses_gpu else "CPU"
    nodes = [node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]]
    found = int(sum(nodes))
    if settings.devices is not None:
        found = min(found, settings.devices)
    return found, sum(count >= 1 for count in nodes)


def find_problems(settings: RaySettings) -> list[str]:
    """Return why trials cannot run there; nothing is started for it.

    What a local Ray would have is known without one. A cluster is connected to and left again.
    """
    try:
        if settings.address is None:
            _imported()
            found = torch.cuda.device_count() if settings.uses_gpu else _cores()
            _require_enough(settings, found)
        else:
            with connected(settings):
                pass
    except ConfigError as error:
        return error.problems
    return []


@contextlib.contextmanager
def connected(settings: RaySettings) -> Iterator[Any]:
    """Connect to Ray, and leave it at the end.

    Yields:
        The module ``ray``.

    Raises:
        ConfigError: If Ray is not installed, the address does not answer, or there are fewer
            devices than workers.
    """
    ray = _imported()
    address = settings.address
    if address is not None and address != "auto":
        _require_answer(address)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    local = {"include_dashboard": False, "num_cpus": _cores()}
    try:
        with kept():  # it takes SIGTERM, and would leave without an end of the study's run
            ray.init(address=address, **quiet, **(local if address is None else {}))
    except (ConnectionError, ValueError, RuntimeError, SystemExit) as error:
        # Ray leaves with a number where something else than a cluster listens.
        reason = "no Ray answers" if isinstance(error, SystemExit) else str(error).splitlines()[0]
        raise ConfigError([f"executor.address={address!r}: {reason}"]) from error
    try:
        _require_enough(settings, count_devices(settings, ray)[0])
        yield ray
    finally:
        ray.shutdown()


def _cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def _imported() -> Any:
    """Return the module ``ray``."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends nothing home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of its future
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            ["executor.name='ray' needs the package ray; install it with: pip install 'lrbo[ray]'"]
        ) from error
    return ray


def _require_answer(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself would wait for minutes, then exit."""
    plain = address.removeprefix("ray://")
    host, _, port = plain.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            [
                f"executor.address={address!r}: {error}; start a cluster with `ray start --head` "
                "and give HOST:PORT as it prints, or leave it null for a local one"
            ]
        ) from error


def _require_enough(settings: RaySettings, found: int) -> None:
    """Refuse more workers than devices, unless they may share."""
    devices = found if settings.devices is None else min(found, settings.devices)
    what = "accelerators" if settings.uses_gpu else "cores"
    if devices < 1:
        raise ConfigError([f"executor: Ray has no {what}; see `ray status`"])
    if settings.workers is not None and settings.workers > devices and not settings.oversubscribe:
        raise ConfigError(
            [
                f"executor.workers={settings.workers}: there are {devices} {what}; take at most so "
                "many, or let workers share them with executor.oversubscribe=true"
            ]
        )
