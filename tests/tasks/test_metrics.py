"""The tables of metrics: names once, values as people read them, no torch."""

import math
import subprocess
import sys

import pytest

from lrbo.config import choices
from lrbo.tasks import metrics
from lrbo.tasks.metrics import CAUSAL_LM, COSTS, LATENCIES, SIZES, Metric, Task

EVERY = [*CAUSAL_LM.metrics, *COSTS.values()]


def test_every_metric_has_a_name_and_words_of_its_own() -> None:
    for words in ("name", "label", "head"):
        assert len({getattr(metric, words) for metric in EVERY}) == len(EVERY)
    assert set(COSTS) >= {metric.name for metric in (*SIZES, *LATENCIES)}
    assert tuple(metric.name for metric in SIZES) == choices.SIZES
    assert tuple(metric.name for metric in LATENCIES) == choices.LATENCIES


@pytest.mark.parametrize("metric", EVERY, ids=lambda metric: metric.name)
@pytest.mark.parametrize("value", [0.0, 0.5, 960.0, 1e6, 1e30, math.inf])
def test_any_value_is_written_in_few_characters(metric: Metric, value: float) -> None:
    assert metric.text(value)
    assert metric.precise(value)
    assert metric.of({metric.name: value}) == metric.text(value)
    if metric.formatting is not None and "%" not in metric.text(value) and value < 1e15:
        assert len(metric.text(value)) <= 9


def test_what_is_not_known_is_a_dash() -> None:
    for metric in EVERY:
        assert metric.text(None) == metric.text(math.nan) == metric.of({}) == "-"
        assert metric.precise(None) == metric.precise(math.nan) == "-"


def test_a_value_with_a_standard_error_is_written_with_it() -> None:
    actual = LATENCIES[0].of({LATENCIES[0].name: 0.9012, f"{LATENCIES[0].name}_sem": 0.0123})
    assert actual == "0.901 +- 0.012"


def test_a_task_has_one_metric_to_minimize_and_one_to_read() -> None:
    assert CAUSAL_LM.minimized.name == "nll"
    assert CAUSAL_LM.headline.name == "perplexity"
    assert CAUSAL_LM.scores == CAUSAL_LM.metrics[:2]
    error = Metric("error", "error")
    assert Task("regression", (error,), "error", "error", "tabular").scores == (error,)
    assert all(task.minimized.lower_is_better for task in metrics.TASKS.values())


def test_names_and_formats_are_known_without_torch() -> None:
    code = "import sys, lrbo.tasks.metrics; print(sorted({'torch', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
