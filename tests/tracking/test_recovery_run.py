"""The run of a recovery is made again from what a journal has, once."""

from tests.support.mlflow_runs import Store, record

NUMBERS = {"validation_before_nll": 3.0, "validation_after_nll": 2.5}


def test_a_recovery_that_ended_is_written_once_below_the_study(store: Store) -> None:
    tracker = store.tracker(strict=True)
    tracker.start({})
    tracker.trial(record(0))
    settings = {"trial": 0, "recover.minutes": 1.0}
    for _ in range(2):
        tracker.recovery("mine", "recovery-trial-000", settings, NUMBERS)
    tracker.recovery("mine", "recovery-trial-000", settings, NUMBERS | {"test_after_nll": 2.75})
    tracker.recovery("other", "recovery-trial-001", settings, NUMBERS)
    runs = [run for run in store.runs() if run.data.tags["lrbo.role"] == "recovery"]
    assert {run.info.run_name for run in runs} == {"recovery-trial-000", "recovery-trial-001"}
    assert len(runs) == 2
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == store.parent.info.run_id
        assert run.data.params == {"trial": "0", "recover.minutes": "1.0"}
        assert run.data.metrics.items() >= NUMBERS.items()
    assert sum("test_after_nll" in run.data.metrics for run in runs) == 1
