"""What a search shows while it runs: a line per trial that ended, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from lrbo.progress import Reporter, ShowTrials
from lrbo.reports.gains import gains
from lrbo.reports.results import first_reason, front, size_metric
from lrbo.study.study_record import StudyRecord
from lrbo.tasks.metrics import LATENCIES, with_error
from lrbo.trials.records import Evaluate, TrialRecord, TrialRequest, TrialResult
from lrbo.trials.worker import Worker

RECENT = 10  # trials whose seconds say how long the next ones take


@dataclass
class LiveSearch:
    """The view of a search that is running."""

    reporter: Reporter
    study: StudyRecord
    count: int  # trials that the search is to have
    show: ShowTrials  # updates the line about the search as a whole
    capacity: Callable[[], int]  # number of trials that run at the same time

    def ended(self, record: TrialRecord) -> None:
        """Show a trial that ended."""
        self.reporter.say(self._line(record))
        self.update()

    def update(self) -> None:
        """Show how far the search is."""
        done = len(self.study.state.searched)
        left = seconds_left(self.study.state.ended, self.count - done, self.capacity)
        self.show(done, self._best(), left)

    def proposing(self, index: int) -> AbstractContextManager[None]:
        """Show that the next trial is being proposed, which takes seconds."""
        return self.reporter.waiting(f"Trial {index}", "proposing")

    def scoring(self, worker: Worker) -> Evaluate:
        """Wrap a worker of this process so that it shows how far a trial is."""
        tokens = worker.windows.numel() - len(worker.windows)

        def evaluate(request: TrialRequest) -> TrialResult:
            name = f"Trial {request.trial_index}"
            with self.reporter.step(name, tokens, "tokens", leaves_line=False) as worker.on_tokens:
                return worker(request)

        return evaluate

    def _best(self) -> str:
        if (best := self.study.state.best()) is None:
            return ""
        if size_metric(self.study) is not None:
            return f"front of {len(front(self.study))}"
        ratio = self.study.config.budget.kept(self.study.about.itemsize)
        differences = [
            f"best - analytic {gain.differences['validation']}"
            for gain in gains(self.study.state)
            if gain.best is not gain.analytic
        ]
        return ", ".join([f"best {self._headline_of(best)} at keep ratio {ratio:g}", *differences])

    def _headline_of(self, record: TrialRecord) -> str:
        headline = self.study.task.headline
        return headline.precise(record.metrics[headline.name])

    def _line(self, record: TrialRecord) -> str:
        """Write one line about a trial that ended; a star marks a new best, or one of the front."""
        state, metrics = self.study.state, record.metrics
        index, result = record.request.trial_index, record.result
        progress = f"({len(state.searched)}/{self.count})".ljust(2 * len(str(self.count)) + 3)
        head = f"Trial {index:>3} {progress} {record.request.origin:<8}"
        seconds = f"{sum(record.seconds.values()):6.1f} s"
        if record.is_stopped:
            loss = with_error(metrics["objective"], metrics["objective_sem"])
            return f"{head} stopped after {metrics['tokens']:,.0f} tokens: loss {loss} {seconds}"
        if not record.is_completed:
            assert result is not None
            return f"{head} {result.outcome}: {first_reason(record)}"
        measured = f"{self.study.task.headline.label} {self._headline_of(record):>9}"
        best = front(self.study)
        if size_metric(self.study) is None:
            best = [state.best() or record]
            measured += f"  best {self._headline_of(best[0]):>9}"
        else:
            measured += f" at {metrics['keep_ratio']:.1%}"
        for latency in LATENCIES:
            if latency.name in metrics:
                phase = latency.name.partition("_")[0]
                measured += f", {phase} {latency.precise(metrics[latency.name])}"
        star = " *" if index in [each.request.trial_index for each in best] else ""
        return f"{head} {measured} {seconds}{star}"


def seconds_left(ended: list[TrialRecord], count: int, capacity: Callable[[], int]) -> float | None:
    """Estimate the seconds of ``count`` more trials, proposed one by one, once some have ended."""
    recent = [record.seconds for record in ended[-RECENT:]]
    if not recent:
        return None
    scoring = sum(seconds.get("scoring", 0.0) for seconds in recent)
    total = sum(sum(seconds.values()) for seconds in recent)
    return count * (total - scoring + scoring / capacity()) / len(recent)
