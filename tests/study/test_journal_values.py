"""Values that nobody can have measured or allocated are neither read nor written."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrbo.allocation.allocate import Allocation
from lrbo.errors import StudyError
from lrbo.files.parsing import ContentError
from lrbo.layers.options import DENSE, Budget, Option
from lrbo.study.events import fields_of
from lrbo.study.journal import Study
from lrbo.trials.records import TrialRequest
from tests.support.allocations import decided
from tests.support.small_study import (
    ABOUT,
    ALLOCATION,
    CONFIG,
    LAYERS,
    Q,
    V,
    allocated,
    fill,
    line_of,
    metrics,
    request,
    suggest,
)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("trial", 10**23, r"trial is 100000000000000000000000, expected a whole number, at most"),
        ("seed", 2**63, r"seed is 9223372036854775808, expected a whole number, at most"),
        ("seed", -(2**63), r"seed is -9223372036854775808, expected a whole number, at least"),
    ],
)
def test_a_number_beyond_what_tables_take_is_refused(
    study: Study, field: str, value: int, message: str
) -> None:
    fill(study, trials=1)
    content = study.journal.read_bytes()
    line = json.loads(line_of(content, b'"suggested"')) | {"trial": 1} | {field: value}
    study.journal.write_bytes(content + json.dumps(line).encode() + b"\n")
    with pytest.raises(StudyError, match=message):
        Study(study.folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("keep_ratio", -0.5), ("tokens", -1), ("tokens", 1.5), ("parameters", -1.0)),
        *(("model_parameters", 0.5), ("model_bytes", 1e300), ("macs_per_token", -3)),
    ],
)
def test_a_metric_that_nobody_can_have_measured_is_refused(
    study: Study, name: str, value: float
) -> None:
    suggest(study, 0)
    study.record("started", trial=0)
    content = study.journal.read_bytes()
    with pytest.raises(ContentError, match=rf"metrics\.{name} is .*expected a "):
        study.record(
            "ended", trial=0, outcome="completed", metrics=metrics(1.0) | {name: value},
            error=None, seconds={"scoring": 1.0},
        )  # fmt: skip
    assert study.journal.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", 0), ("model_parameters", 0), ("model_bytes", 0), ("macs_per_token", 0)],
)
def test_a_model_of_no_size_is_refused(study: Study, name: str, value: float) -> None:
    """Reports divide by them."""
    suggest(study, 0)
    with pytest.raises(ContentError, match=rf"metrics\.{name} is 0, expected a .* from 1 on"):
        study.record(
            "ended", trial=0, outcome="completed", metrics=metrics(1.0) | {name: value},
            error=None, seconds={"scoring": 1.0},
        )  # fmt: skip


# What every report reads of a line: a change of it, and what is said.
READ: dict[str, tuple[bytes, Callable[[dict[str, Any]], object], str]] = {
    "a dense model without perplexity": (
        b'"dense"', lambda line: line["metrics"].pop("perplexity"), "metrics lack perplexity",
    ),
    "a test without perplexity": (
        b'"tested"', lambda line: line["metrics"].pop("perplexity"), "metrics lack perplexity",
    ),
    "a test of fewer windows": (
        b'"tested"', lambda line: line["example_losses"].pop(),
        "example_losses has 11 values, expected 12",
    ),
    "a test without windows": (
        b'"tested"', lambda line: line.pop("example_losses"), "the field example_losses is missing",
    ),
    "a test of what no search tests": (
        b'"tested"', lambda line: line.update(label="mine"), 'label is "mine", expected',
    ),
    "a latency without its error": (
        b'"completed"', lambda line: line["metrics"].update(decode_latency_ratio=1.0),
        "metrics of a completed trial lack decode_latency_ratio_sem",
    ),
    "a ratio that is no number": (
        b'"compressed"', lambda line: line["tags"].update(keep_ratio="abc"),
        r'tags\.keep_ratio is "abc", expected text that is a finite number',
    ),
    "a ratio beyond all": (
        b'"compressed"', lambda line: line["tags"].update(keep_ratio="inf"),
        r'tags\.keep_ratio is "inf", expected text that is a finite number',
    ),
    "a perplexity that is NaN": (
        b'"compressed"', lambda line: line["tags"].update(test="nan"),
        r'tags\.test is "nan", expected text that is a finite number',
    ),
    "a checkpoint of no dtype": (
        b'"compressed"', lambda line: line["tags"].pop("dtype"), r"field tags\.dtype is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", READ)
def test_a_line_lacks_nothing_that_reports_read(study: Study, damage: str) -> None:
    fill(study)
    tags = {
        "keep_ratio": "0.8",
        "validation": "inf",
        "format": "lrbo",
        "dtype": "float32",
    }
    study.record("compressed", id="a", trial=0, folder="/x", register="none", tags=tags)
    event, change, message = READ[damage]
    lines = study.journal.read_bytes().splitlines()
    number = next(i for i, line in enumerate(lines) if event in line)
    line = json.loads(lines[number])
    change(line)
    lines[number] = json.dumps(line).encode()
    study.journal.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(StudyError, match=rf"line {number + 1} is damaged: .*{message}"):
        Study(study.folder)


def factored(rank: int) -> Option:
    return Option("factored", (rank,))


OTHER = "expected 460 parameters, the budget of the study"
SIZES: dict[str, tuple[Allocation, str]] = {
    "another option than its cost": (
        allocated(factored(4), cost=ALLOCATION.costs[Q]),
        r"q_proj costs \[168, 672, 144\], and factored 4 costs 216 parameters, 864 bytes, 192 mul",
    ),
    "dense at the cost of a rank": (
        allocated(DENSE, cost=ALLOCATION.costs[Q]),
        r"q_proj costs \[168, 672, 144\], and dense costs 576 parameters, 2304 bytes, 576 multi",
    ),
    "a rank larger than dense": (
        allocated(factored(12)),
        "q_proj is factored 12, which costs 600 parameters; expected less than dense does, 576",
    ),
    "above its budget": (
        allocated(factored(4)),
        "units cost 504, above their budget of 460 parameters",
    ),
    "a larger budget": (
        allocated(factored(3), Budget("parameters", 461)),
        f"is 461 parameters, {OTHER}",
    ),
    "a smaller budget": (
        allocated(factored(3), Budget("parameters", 459)),
        f"is 459 parameters, {OTHER}",
    ),
    "a budget of another measure": (
        allocated(factored(3), Budget("bytes", 460)),
        f"is 460 bytes, {OTHER}",
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_trial_of_another_size_is_neither_read_nor_written(study: Study, case: str) -> None:
    """A model was written whose card said 80 %, and which was dense."""
    allocation, message = SIZES[case]
    fill(study, trials=1)
    refused(study, dataclasses.replace(request(1), allocation=allocation), message)


def refused(study: Study, other: TrialRequest, message: str) -> None:
    """Hold that a suggestion is neither written nor read."""
    content = study.journal.read_bytes()
    with pytest.raises(StudyError, match=message):
        study.record_suggestion(other, {})
    assert study.journal.read_bytes() == content
    line = json.loads(line_of(content, b'"suggested"'))
    line |= {"trial": other.trial_index, "allocation": fields_of(other.allocation)}
    study.journal.write_bytes(content + json.dumps(line).encode() + b"\n")
    number = content.count(b"\n") + 1
    with pytest.raises(StudyError, match=rf"line {number} is damaged: .*{message}"):
        Study(study.folder)


def test_a_form_that_the_study_does_not_offer_is_refused(none: Study) -> None:
    none.begin(ABOUT | {"forms": ["factored"]}, CONFIG)
    suggest(none, 0)
    other = dataclasses.replace(request(1), allocation=allocated(Option("pivoted", (3,))))
    refused(none, other, 'q_proj is "pivoted 3", expected one of factored, dense')


def test_what_is_dearer_than_dense_depends_on_the_measure(none: Study, tmp_path: Path) -> None:
    """575 of 576 parameters; the indices take 96 bytes more than that saves."""
    options = {Q: Option("pivoted", (23,)), V: factored(1)}
    made = decided(LAYERS, options)
    start = ABOUT | {"added_biases": []}
    none.begin(start | {"budget": {"measure": "parameters", "limit": 864}}, CONFIG)
    whole = Allocation(made.options, made.costs, Budget("parameters", 864))
    none.record_suggestion(dataclasses.replace(request(0), allocation=whole), {})
    assert Study(none.folder).state.trials[0].request.allocation == whole
    other = Study(tmp_path / "bytes")
    other.begin(start | {"budget": {"measure": "bytes", "limit": 3456}}, CONFIG)
    dear = Allocation(made.options, made.costs, Budget("bytes", 3456))
    with pytest.raises(
        StudyError, match=r"pivoted 23, which costs 2_396 bytes; .* dense does, 2_3"
    ):
        other.record_suggestion(dataclasses.replace(request(0), allocation=dear), {})


def test_trials_of_a_front_have_budgets_up_to_the_ceiling(none: Study) -> None:
    variables = {"qk": [0.0, 1.0], "keep_ratio": [0.5, 0.9]}
    none.begin(ABOUT | {"variables": variables}, CONFIG)

    def under(limit: int, index: int) -> TrialRequest:
        allocation = allocated(factored(3), Budget("parameters", limit))
        return TrialRequest(index, "between", {}, allocation, index)

    for index, limit in enumerate((456, 460)):
        none.record_suggestion(under(limit, index), {})
    with pytest.raises(StudyError, match="is 461 parameters, expected at most 460 parameters"):
        none.record_suggestion(under(461, 2), {})
    assert list(Study(none.folder).state.trials) == [0, 1]
