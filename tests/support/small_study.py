"""A study of one block, two layers and a few events, for tests of its files."""

import dataclasses

from lrbo.allocation.allocate import Allocation
from lrbo.layers.options import Budget, Cost, Option
from lrbo.study.events import MEASURED
from lrbo.study.journal import Study
from lrbo.tasks.metrics import CAUSAL_LM
from lrbo.trials.records import TrialRequest
from tests.support.allocations import decided
from tests.support.fakes import FakeWorker, make_about, make_layers

NLL = 0.1 + 0.2  # 0.30000000000000004: not a short decimal
LAYERS = make_layers(blocks=1, shapes={"q_proj": (24, 24), "v_proj": (12, 24)})
Q, V = (layer.name for layer in LAYERS)
BUDGET = Budget("parameters", 460)
FORMS = ["factored", "pivoted"]
ABOUT = make_about(
    LAYERS, variables={"qk": [0.0, 1.0]}, budget=dataclasses.asdict(BUDGET), forms=FORMS
)
CONFIG = "a: 1\nb: 2\n"


def allocated(option: Option, budget: Budget = BUDGET, cost: Cost | None = None) -> Allocation:
    """Decide what the query projection is, with biases added; the values stay dense."""
    made = decided(LAYERS, {Q: option}, adds_bias=True)
    costs = dict(made.costs) | ({} if cost is None else {Q: cost})
    return Allocation(made.options, costs, budget)


ALLOCATION = allocated(Option("factored", (3,)))  # 456 of the 460 parameters


def request(index: int) -> TrialRequest:
    return TrialRequest(index, "sobol", {"qk": 1 / 3}, ALLOCATION, seed=7 + index)


def metrics(nll: float) -> dict[str, float]:
    """Everything that a trial with a value must have measured."""
    names = [*MEASURED["completed"], *(metric.name for metric in CAUSAL_LM.metrics)]
    return dict.fromkeys(names, 1.0) | {"nll": nll, "objective": nll}


def suggest(study: Study, index: int) -> None:
    study.record_suggestion(request(index), {"suggestion": 0.25, "allocation": 0.125})


def end(study: Study, index: int, nll: float = NLL, outcome: str = "completed") -> None:
    study.record(
        "ended",
        trial=index,
        outcome=outcome,
        metrics=metrics(nll) if outcome == "completed" else {},
        error=None if outcome == "completed" else f"why {index}",
        seconds={"scoring": 2.5},
    )


def fill(study: Study, trials: int = 3) -> None:
    """Write every kind of event."""
    study.record("dense", metrics={"nll": 1.5, "perplexity": 4.5})
    for index in range(trials):
        suggest(study, index)
        study.record("started", trial=index)
        end(study, index, NLL + index, "failed" if index == 1 else "completed")
        study.record("logged", trial=index, seconds=0.5)
    study.record(
        "tested",
        label="best",
        trial=0,
        text="words[test]",
        metrics={"nll": 2.5, "perplexity": 12.0},
        example_losses=[2.0, 3.0] * (FakeWorker.WINDOWS // 2),
    )


def line_of(lines: bytes, *parts: bytes) -> bytes:
    return next(line for line in lines.splitlines() if all(part in line for part in parts))
