"""What a search shows while it runs: a line per trial that ended, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from lrbo.executors.base import Evaluate
from lrbo.gains import gains, with_error
from lrbo.optimization.front import LATENCIES, pareto_front
from lrbo.optimization.study import Study
from lrbo.progress import Reporter, Trials
from lrbo.schema import SearchConfig
from lrbo.trial import TrialRecord, TrialRequest, TrialResult
from lrbo.worker import Worker

RECENT = 10  # trials whose seconds say how long the next ones take


@dataclass
class LiveSearch:
    """The view of a search that is running.

    Attributes:
        reporter: Writes it.
        study: Which has the trial that ended already.
        chosen: The values of the search.
        trials: The line about the search as a whole.
        capacity: Asked how many trials run at the same time.
    """

    reporter: Reporter
    study: Study
    chosen: SearchConfig
    trials: Trials
    capacity: Callable[[], int]

    def ended(self, record: TrialRecord) -> None:
        """Tell of a trial that ended."""
        self.reporter.say(self._line(record))
        self.update()

    def update(self) -> None:
        """Show how far the search is."""
        done = self._done
        left = seconds_left(self.study.state.ended, self.chosen.search.trials - done, self.capacity)
        self.trials.show(done, self._best(), left)

    def proposing(self, index: int) -> AbstractContextManager[None]:
        """Show that the next trial is chosen, which takes seconds where Ax does it."""
        return self.reporter.waiting(f"Trial {index}", "proposing")

    def scoring(self, worker: Worker) -> Evaluate:
        """Return a worker of this process that shows how far a trial is."""
        tokens = worker.windows.numel() - len(worker.windows)

        def evaluate(request: TrialRequest) -> TrialResult:
            with self.reporter.step(
                f"Trial {request.trial_index}", tokens, "tokens", leaves_line=False
            ) as worker.on_tokens:
                return worker(request)

        return evaluate

    @property
    def _done(self) -> int:
        """Return how many trials of the search ended."""
        return len(self.study.state.searched)

    @property
    def _size(self) -> str | None:
        """Return what a front is minimised in; ``None`` at one budget."""
        return None if self.chosen.budget.lowest is None else self.chosen.search.size

    def _best(self) -> str:
        """Return what is found so far."""
        if self._size is not None:
            front = pareto_front(self.study.state.completed, self._size)
            return f"front of {len(front)}" if front else ""
        best = self.study.state.best()
        if best is None:
            return ""
        ratio = self.chosen.budget.keep_ratio
        found = gains(self.study.state)
        added = "".join(
            f", best - analytic {gain.validation}" for gain in found if not gain.adds_nothing
        )
        return f"best {best.metrics['perplexity']:.3f} at keep ratio {ratio:g}{added}"

    def _line(self, record: TrialRecord) -> str:
        """Return one line about a trial that ended; a star marks a new best, or one of the front.

        Its number is the one that it has everywhere, from 0; behind it is how many have ended. The
        seconds are all that it took: to choose, to score and to log it.
        """
        state, index = self.study.state, record.request.trial_index
        trials = str(self.chosen.search.trials)
        far = f"({self._done}/{trials})".ljust(2 * len(trials) + 3)
        head = f"Trial {index:>3} {far} {record.request.origin:<8}"
        seconds = f"{sum(record.seconds.values()):6.1f} s"
        if record.is_stopped:
            return (
                f"{head} stopped after {record.metrics['tokens']:,.0f} tokens: loss "
                f"{with_error(record.metrics['objective'], record.metrics['objective_sem'])} "
                f"{seconds}"
            )
        if not record.is_completed:
            assert record.result is not None
            reason = (record.result.error or "no reason given").strip().partition("\n")[0]
            return f"{head} {record.result.outcome}: {reason}"
        measured = f"perplexity {record.metrics['perplexity']:9.3f}"
        if self._size is None:
            best = state.best()
            assert best is not None
            measured += f"  best {best.metrics['perplexity']:9.3f}"
            is_good = best.request.trial_index == index
        else:
            front = pareto_front(state.completed, self._size)
            measured += f" at {record.metrics['keep_ratio']:.1%}"
            is_good = any(one.request.trial_index == index for one in front)
        measured += "".join(
            f", {name.partition('_')[0]} {record.metrics[name]:.3f}"
            for name in LATENCIES
            if name in record.metrics
        )
        return f"{head} {measured} {seconds}{' *' if is_good else ''}"


def seconds_left(ended: list[TrialRecord], count: int, capacity: Callable[[], int]) -> float | None:
    """Return how long some more trials will take, judged by the last ones.

    Args:
        ended: Trials by number, those of earlier runs included.
        count: How many are to come.
        capacity: Asked how many are scored at the same time; they are chosen one by one.

    Returns:
        Seconds; ``None`` if no trial has ended yet.
    """
    recent = [record.seconds for record in ended[-RECENT:]]
    if not recent:
        return None
    scoring = sum(seconds.get("scoring", 0.0) for seconds in recent)
    whole = sum(sum(seconds.values()) for seconds in recent)
    return count * (whole - scoring + scoring / capacity()) / len(recent)


@contextmanager
def live_search(
    reporter: Reporter, study: Study, chosen: SearchConfig, capacity: Callable[[], int]
) -> Iterator[LiveSearch]:
    """Show a search for as long as it runs.

    Args:
        reporter: Writes it.
        study: Locked.
        chosen: The values of the search.
        capacity: Asked how many trials run at the same time.
    """
    with reporter.trials(chosen.search.trials) as trials:
        live = LiveSearch(reporter, study, chosen, trials, capacity)
        live.update()
        yield live
