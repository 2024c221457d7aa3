"""Running in the same process: at once, one after the other, defects straight through."""

import pytest

from lrbo.allocation.allocate import Allocation
from lrbo.layers.options import Budget, Cost, Option
from lrbo.trials.records import Executor, InlineExecutor, Job, TrialRequest, TrialResult


def request(index: int) -> TrialRequest:
    allocation = Allocation(
        {"layer": Option("pivoted", (3,))},
        {"layer": Cost(30, 140, 30)},
        Budget("parameters", 40),
    )
    return TrialRequest(index, "sobol", {"q_proj": 0.5}, allocation, seed=index)


def test_a_job_holds_what_the_worker_said() -> None:
    results: list[TrialResult] = []

    def worker(trial: TrialRequest) -> TrialResult:
        results.append(TrialResult(trial.trial_index, "completed", {"nll": trial.seed / 2}, 0.1))
        return results[-1]

    executor: Executor = InlineExecutor()  # the type checker holds the protocol
    jobs: list[Job] = [executor.submit(worker, request(index)) for index in (4, 2, 7)]
    assert [result.trial_index for result in results] == [4, 2, 7]  # run as they are submitted
    assert all(job.done() for job in jobs)
    assert all(job.result() is result for job, result in zip(jobs, results, strict=True))


def test_the_worker_gets_the_request_itself() -> None:
    requests: list[TrialRequest] = []

    def worker(trial: TrialRequest) -> TrialResult:
        requests.append(trial)
        return TrialResult(trial.trial_index, "completed")

    first = request(0)
    InlineExecutor().submit(worker, first)
    assert requests[0] is first


def test_a_failed_trial_is_a_result() -> None:
    def worker(trial: TrialRequest) -> TrialResult:
        return TrialResult(trial.trial_index, "failed", error="MemoryError: ")

    job = InlineExecutor().submit(worker, request(1))
    assert job.done()
    assert job.result().outcome == "failed"
    assert job.result().error == "MemoryError: "


def test_a_defect_of_the_worker_is_not_swallowed() -> None:
    def worker(trial: TrialRequest) -> TrialResult:
        raise TypeError("a defect")

    with pytest.raises(TypeError, match="a defect"):
        InlineExecutor().submit(worker, request(0))


def test_one_process_runs_one_trial_at_a_time() -> None:
    assert InlineExecutor().capacity == 1
