"""Running in the same process: at once, one after the other, defects straight through."""

import pytest

from lrbo.allocation import Allocation, Budget
from lrbo.executors.base import Executor, Job
from lrbo.executors.inline import FinishedJob, InlineExecutor
from lrbo.trial import TrialRequest, TrialResult


def request(index: int) -> TrialRequest:
    allocation = Allocation({"layer": 3}, 30, Budget(40))
    return TrialRequest(index, "sobol", {"q_proj": 0.5}, allocation, seed=index)


def test_a_job_holds_what_the_worker_said() -> None:
    said: list[TrialResult] = []

    def worker(asked: TrialRequest) -> TrialResult:
        said.append(TrialResult(asked.trial_index, "completed", {"nll": asked.seed / 2}, 0.1))
        return said[-1]

    executor: Executor = InlineExecutor()  # the type checker holds the protocol
    jobs: list[Job] = [executor.submit(worker, request(index)) for index in (4, 2, 7)]
    assert [result.trial_index for result in said] == [4, 2, 7]  # run as they are submitted
    assert all(job.done() for job in jobs)
    assert all(job.result() is result for job, result in zip(jobs, said, strict=True))
    assert len({job.job_id for job in jobs}) == 3
    assert all(str(index) in job.job_id for index, job in zip((4, 2, 7), jobs, strict=True))


def test_the_worker_gets_the_request_itself() -> None:
    got: list[TrialRequest] = []

    def worker(asked: TrialRequest) -> TrialResult:
        got.append(asked)
        return TrialResult(asked.trial_index, "completed")

    asked = request(0)
    InlineExecutor().submit(worker, asked)
    assert got[0] is asked


def test_a_failed_trial_is_a_result() -> None:
    def worker(asked: TrialRequest) -> TrialResult:
        return TrialResult(asked.trial_index, "failed", error="MemoryError: ")

    job = InlineExecutor().submit(worker, request(1))
    assert job.done()
    assert job.result().outcome == "failed"
    assert job.result().error == "MemoryError: "


def test_a_defect_of_the_worker_is_not_swallowed() -> None:
    def worker(asked: TrialRequest) -> TrialResult:
        raise TypeError("a defect")

    with pytest.raises(TypeError, match="a defect"):
        InlineExecutor().submit(worker, request(0))


def test_cancelling_a_finished_job_keeps_its_result() -> None:
    result = TrialResult(3, "completed", {"nll": 1.0})
    job = FinishedJob("trial-3", result)
    job.cancel()
    assert job.done()
    assert job.result() is result


def test_one_process_runs_one_trial_at_a_time() -> None:
    assert InlineExecutor().capacity == 1
