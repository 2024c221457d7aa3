"""The journal is the truth: whole after every accident, and damage is named, never guessed at."""

import dataclasses
import errno
import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lrbo.allocation import Allocation, Budget
from lrbo.errors import StudyError
from lrbo.optimization import study as module
from lrbo.optimization.events import FORMAT, MEASURED, event_of
from lrbo.optimization.study import Study, StudyState
from lrbo.parsing import ContentError
from lrbo.trial import TrialRequest
from tests.fakes import FakeWorker, fixed_clock, make_about, make_layers

# No tolerances: what is read must be what was written, to the last bit.

NLL = 0.1 + 0.2  # 0.30000000000000004: not a short decimal
LAYERS = make_layers(blocks=1, shapes={"q_proj": (24, 24), "v_proj": (12, 24)})
ALLOCATION = Allocation({"layers.0.q_proj": 3, "layers.0.v_proj": None}, 456, Budget(460))
ABOUT = make_about(LAYERS, variables={"qk": [0.0, 1.0]}, budget_parameters=460)
CONFIG = "a: 1\nb: 2\n"


def request(index: int) -> TrialRequest:
    return TrialRequest(index, "sobol", {"qk": 1 / 3}, ALLOCATION, seed=7 + index)


def metrics(nll: float) -> dict[str, float]:
    """Everything that a trial with a value must have measured."""
    return dict.fromkeys(MEASURED["completed"], 1.0) | {"nll": nll, "objective": nll}


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
        window_nll=[2.0, 3.0] * (FakeWorker.WINDOWS // 2),
    )


@pytest.fixture
def none(tmp_path: Path) -> Study:
    return Study(tmp_path / "study")


@pytest.fixture
def study(none: Study) -> Study:
    none.begin(ABOUT, CONFIG)
    return none


def test_every_event_comes_back_as_it_was_written(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "time", fixed_clock(start=100.0))
    fill(study, trials=2)
    again = Study(study.folder).state
    assert again == study.state
    assert again.dense == {"nll": 1.5, "perplexity": 4.5}
    assert again.tests == {
        "best": {
            "trial": 0,
            "text": "words[test]",
            "metrics": {"nll": 2.5, "perplexity": 12.0},
            "window_nll": (2.0, 3.0) * (FakeWorker.WINDOWS // 2),
        },
    }
    first, second = again.records
    assert first.request == request(0)
    assert list(first.request.allocation.ranks) == list(ALLOCATION.ranks)
    assert first.metrics == metrics(NLL)
    assert (first.started, first.ended, first.attempts) == (102.0, 103.0, 1)
    assert first.seconds == {
        "suggestion": 0.25,
        "allocation": 0.125,
        "scoring": 2.5,
        "logging": 0.5,
    }
    assert first.result is not None
    assert (first.result.seconds, first.result.error) == (2.5, None)
    assert second.result is not None
    assert (second.result.outcome, second.result.error) == ("failed", "why 1")
    assert again.completed == [first]
    assert again.best() == first


def test_the_state_after_each_event_is_what_a_reader_finds(study: Study) -> None:
    seen = []

    class Watched(Study):
        def record(self, event: str, **fields: Any) -> None:
            super().record(event, **fields)
            assert Study(self.folder).state == self.state
            seen.append(event)

    fill(Watched(study.folder), trials=1)
    assert seen == ["dense", "suggested", "started", "ended", "logged", "tested"]


def test_an_open_trial_has_no_end_and_counts_its_starts(study: Study) -> None:
    fill(study, trials=2)
    suggest(study, 2)
    study.record("started", trial=2)
    study.record("started", trial=2)
    (record,) = Study(study.folder).state.open
    assert record.request == request(2)
    assert record.attempts == 2
    assert [r.request.trial_index for r in study.state.ended] == [0, 1]


def test_of_equal_objectives_the_first_is_best(study: Study) -> None:
    for index in range(3):
        suggest(study, index)
        end(study, index, nll=1.0 if index else 2.0)
    best = study.state.best()
    assert best is not None
    assert best.request.trial_index == 1
    assert StudyState().best() is None
    assert StudyState().uniform is None


def test_a_value_that_is_not_finite_never_reaches_the_journal(study: Study) -> None:
    fill(study, trials=1)
    content = study.journal.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        study.record("dense", metrics={"nll": float("nan"), "perplexity": 1.0})
    assert study.journal.read_bytes() == content


def test_a_line_torn_at_any_byte_is_cut_off_and_kept(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    fill(study, trials=1)
    whole = study.journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    expected = StudyState(about=study.about())
    for line in lines[:-1]:
        expected.apply(event_of(json.loads(line), "a line"))
    for cut in range(1, len(lines[-1])):
        torn = lines[-1][:cut]
        study.journal.write_bytes(b"".join(lines[:-1]) + torn)
        (study.folder / "journal.torn").unlink(missing_ok=True)
        with caplog.at_level(logging.WARNING):
            reader = Study(study.folder)
        assert "half a line" in caplog.text
        caplog.clear()
        assert reader.state == expected
        assert study.journal.read_bytes().endswith(torn)  # only who holds the lock may repair
        with reader.locked():
            assert reader.state == expected
            assert study.journal.read_bytes() == b"".join(lines[:-1])
            assert (study.folder / "journal.torn").read_bytes() == torn + b"\n"
        assert not caplog.records  # it is mended, nothing to warn of any more


def test_a_search_goes_on_after_a_torn_line(study: Study) -> None:
    fill(study, trials=1)
    suggest(study, 1)
    with study.journal.open("rb+") as file:
        file.truncate(study.journal.stat().st_size - 5)
    with study.locked():
        assert list(study.state.trials) == [0]
        suggest(study, 1)
    assert Study(study.folder).state.trials[1].request == request(1)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda line: line[: len(line) // 2],
    "empty": lambda line: b"",
    "not an object": lambda line: b"[1, 2]",
    "no event": lambda line: b'{"time": 1.0}',
    "zeros": lambda line: b"\0" * len(line),
    "not UTF-8": lambda line: b'\xff{"event": "dense"}',
    "a field missing": lambda line: line.replace(b'"trial"', b'"tired"'),
    "a trial that was never suggested": lambda line: line.replace(b'"trial": 1', b'"trial": 9'),
    "a field of another type": lambda line: line.replace(b'"seconds": {', b'"seconds": 3, "x": {'),
    "a field twice": lambda line: line.replace(b'"trial": 1', b'"trial": 1, "trial": 1'),
    "a field too many": lambda line: line.replace(b'"trial": 1', b'"trial": 1, "more": 1'),
    "a number that is none": lambda line: line.replace(b'"scoring": 2.5', b'"scoring": NaN'),
    "a number beyond all": lambda line: line.replace(b'"scoring": 2.5', b'"scoring": 1e999'),
    "an integer beyond all": lambda line: line.replace(b'"trial": 1', b'"trial": ' + b"9" * 5000),
    "a number as text": lambda line: line.replace(b'"scoring": 2.5', b'"scoring": "2.5"'),
    "a flag as number": lambda line: line.replace(b'"trial": 1', b'"trial": true'),
    "nothing for a number": lambda line: line.replace(b'"scoring": 2.5', b'"scoring": null'),
    "another event": lambda line: line.replace(b'"ended"', b'"stopped"'),
    "an event that is a list": lambda line: line.replace(b'"ended"', b'["ended"]'),
    "another outcome": lambda line: line.replace(b'"failed"', b'"great"'),
    "a value without metrics": lambda line: line.replace(b'"failed"', b'"completed"'),
    "deep lists": lambda line: b"[" * 100_000,
    "deep values": lambda line: line.replace(b'"metrics": {', b'"metrics": {"x": ' + b"[" * 500
                                             + b"]" * 500),
}  # fmt: skip

# A line that is in order by itself, but not where it is: the line it follows, and what is said.
ORDER: dict[str, tuple[bytes, Callable[[bytes], bytes], str]] = {
    "suggested twice": (b'"ended"', lambda lines: suggested(lines, 1), "1 was suggested already"),
    "ended twice": (b'"ended"', lambda lines: last(lines), "trial 1 has ended already"),
    "started after its end": (b'"ended"', lambda lines: before(lines, 1), "has ended already"),
    "dense twice": (b'"ended"', lambda lines: first(lines), "dense model was scored already"),
    "a layer that is none": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b"layers.0.q_proj", b"layers.5.q_proj"),
        r"allocation.ranks has layers.5.q_proj, which is no layer",
    ),
    "a layer that is missing": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b'"layers.0.q_proj": 3, ', b""),
        r"allocation.ranks lacks the layer layers.0.q_proj",
    ),
    "a rank beyond the layer": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b'_proj": 3', b'_proj": 25'),
        r"allocation.ranks.layers.0.q_proj is 25, expected at most 24",
    ),
    "a negative rank": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b'_proj": 3', b'_proj": -5'),
        r"allocation.ranks.layers.0.q_proj is -5, expected a whole number, at least 0",
    ),
    "other variables": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b'"qk"', b'"kq"'),
        "variables are kq, expected qk",
    ),
    "a rival that is none": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b'"rival": null', b'"rival": 1'),
        "rival is 1, which no line before it gives a value",
    ),
    "a test of a trial without value": (
        b'"ended"',
        lambda lines: the_test(lines).replace(b'"trial": 0', b'"trial": 1'),
        "no line before it gives trial 1 a value",
    ),
    "a test of the dense model as a trial": (
        b'"ended"',
        lambda lines: the_test(lines).replace(b'"best"', b'"dense"'),
        'label is "dense" and trial 0',
    ),
}


def line_of(lines: bytes, *parts: bytes) -> bytes:
    return next(line for line in lines.splitlines() if all(part in line for part in parts))


def suggested(lines: bytes, trial: int) -> bytes:
    found = line_of(lines, b'"suggested"', b'"trial": 1')
    return found.replace(b'"trial": 1', b'"trial": %d' % trial)


def last(lines: bytes) -> bytes:
    return line_of(lines, b'"ended"', b'"trial": 1')


def before(lines: bytes, trial: int) -> bytes:
    return line_of(lines, b'"started"', b'"trial": %d' % trial)


def first(lines: bytes) -> bytes:
    return line_of(lines, b'"dense"')


def the_test(lines: bytes) -> bytes:
    return line_of(lines, b'"tested"')


@pytest.mark.parametrize("damage", ORDER)
def test_a_line_that_cannot_be_where_it_is_is_refused(study: Study, damage: str) -> None:
    """It would discard a result, invent one, or stop the search in the middle."""
    fill(study)
    content = study.journal.read_bytes()
    after, make, message = ORDER[damage]
    lines = content.splitlines()
    number = next(i for i, line in enumerate(lines) if after in line and b'"trial": 1' in line) + 1
    made = make(content)
    assert damage in ("suggested twice", "ended twice", "dense twice", "started after its end") or (
        made not in lines
    )
    lines.insert(number, made)
    study.journal.write_bytes(b"\n".join(lines) + b"\n")
    wanted = rf"journal\.jsonl, line {number + 1} is damaged: .*{message}"
    with pytest.raises(StudyError, match=wanted):
        Study(study.folder)


def test_what_cannot_follow_is_not_written(study: Study) -> None:
    fill(study, trials=1)
    content = study.journal.read_bytes()
    with pytest.raises(StudyError, match="trial 0 has ended already"):
        end(study, 0)
    with pytest.raises(StudyError, match="trial 0 was suggested already"):
        suggest(study, 0)
    assert study.journal.read_bytes() == content


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
        b'"tested"', lambda line: line["window_nll"].pop(), "window_nll has 11 values, expected 12",
    ),
    "a test without windows": (
        b'"tested"', lambda line: line.pop("window_nll"), "the field window_nll is missing",
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
        b'"compressed"', lambda line: line["tags"].update(test_perplexity="nan"),
        r'tags\.test_perplexity is "nan", expected text that is a finite number',
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
        "validation_perplexity": "inf",
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


SIZES: dict[str, tuple[dict[str, int], int, int, str]] = {
    "other ranks than parameters": ({"q": 4}, 456, 460, "is 456, and its ranks have 504"),
    "no rank at all": ({}, 456, 460, "is 456, and its ranks have 864"),
    "a rank larger than dense": ({"q": 12}, 888, 460, "q_proj is 12, which has 600 param"),
    "above its budget": ({"q": 4}, 504, 460, "is 504, above its budget of 460"),
    "a larger budget": ({"q": 3}, 456, 461, "is 461, expected 460, the budget of the study"),
    "a smaller budget": ({"q": 3}, 456, 459, "is 459, expected 460, the budget of the study"),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_trial_of_another_size_is_neither_read_nor_written(study: Study, case: str) -> None:
    """A model was written whose card said 80 %, and which was dense."""
    ranks, parameters, budget, message = SIZES[case]
    names = {"layers.0.q_proj": ranks.get("q"), "layers.0.v_proj": None}
    other = dataclasses.replace(
        request(1), allocation=Allocation(names, parameters, Budget(budget))
    )
    fill(study, trials=1)
    content = study.journal.read_bytes()
    with pytest.raises(StudyError, match=message):
        study.record_suggestion(other, {})
    assert study.journal.read_bytes() == content
    line = json.loads(line_of(content, b'"suggested"'))
    line |= {"trial": 1, "allocation": dataclasses.asdict(other.allocation)}
    study.journal.write_bytes(content + json.dumps(line).encode() + b"\n")
    number = content.count(b"\n") + 1
    with pytest.raises(StudyError, match=rf"line {number} is damaged: .*{message}"):
        Study(study.folder)


def test_trials_of_a_front_have_budgets_up_to_the_ceiling(none: Study) -> None:
    variables = {"qk": [0.0, 1.0], "keep_ratio": [0.5, 0.9]}
    none.begin(ABOUT | {"variables": variables}, CONFIG)
    ranks = ALLOCATION.ranks
    for index, budget in enumerate((456, 460)):
        fits = TrialRequest(index, "between", {}, Allocation(ranks, 456, Budget(budget)), index)
        none.record_suggestion(fits, {})
    above = TrialRequest(2, "between", {}, Allocation(ranks, 456, Budget(461)), 2)
    with pytest.raises(StudyError, match="is 461, expected at most 460"):
        none.record_suggestion(above, {})
    assert list(Study(none.folder).state.trials) == [0, 1]


def test_windows_of_a_pool_are_those_of_the_pool(study: Study) -> None:
    count = FakeWorker.WINDOWS
    choice: dict[str, Any] = {"pool": count, "text": "words", "digest": "d"}
    study.record("pooled", place=0, losses=[1.0] * count, error=None, seconds=1.0)
    for event, fields, message in (
        ("pooled", {"place": 0, "losses": None}, "place 0 was scored already"),
        ("pooled", {"place": 1, "losses": [1.0]}, f"losses has 1 values, expected {count}"),
        ("chosen", choice | {"windows": [0, 0]}, "windows are not some of"),
        ("chosen", choice | {"windows": [count]}, "windows are not some of"),
        ("chosen", choice | {"windows": [0], "pool": 99}, f"pool is 99, expected {count}"),
    ):
        rest = {"error": None, "seconds": 1.0} if event == "pooled" else {}
        with pytest.raises(StudyError, match=message):
            study.record(event, **rest, **fields)
    study.record("chosen", **choice, windows=[3, 1])
    with pytest.raises(StudyError, match="chosen already"):
        study.record("chosen", **choice, windows=[3, 1])
    suggest(study, 0)
    study.record("started", trial=0)
    with pytest.raises(StudyError, match="window_nll has 3 values, expected 2"):
        study.record(
            "ended", trial=0, outcome="completed", metrics=metrics(1.0), error=None,
            seconds={"scoring": 1.0}, window_nll=(1.0, 2.0, 3.0),
        )  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_before_the_last_line_is_refused_by_line_number(study: Study, damage: str) -> None:
    fill(study)
    lines = study.journal.read_bytes().splitlines()
    number = next(i for i, line in enumerate(lines) if b'"ended"' in line and b'"trial": 1' in line)
    lines[number] = DAMAGE[damage](lines[number])
    content = b"\n".join(lines) + b"\n"
    study.journal.write_bytes(content)
    with pytest.raises(StudyError, match=rf"journal\.jsonl, line {number + 1} ") as caught:
        Study(study.folder)
    assert "Restore" in str(caught.value)
    with pytest.raises(StudyError, match=f"line {number + 1} "), study.locked():
        pass
    assert study.journal.read_bytes() == content
    with Study(study.folder / "other").locked():  # and the lock of the first is free again
        pass


def test_removing_the_damaged_line_of_an_end_runs_its_trial_again(study: Study) -> None:
    """What the message advises."""
    fill(study)
    lines = study.journal.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if not (b'"ended"' in line and b'"trial": 1' in line)]
    assert len(kept) == len(lines) - 1
    study.journal.write_bytes(b"".join(kept))
    (record,) = Study(study.folder).state.open
    assert record.request == request(1)


def test_removing_a_damaged_suggestion_takes_the_later_lines_of_its_trial(study: Study) -> None:
    """Also what the message advises; the number is then free."""
    fill(study)
    lines = study.journal.read_bytes().splitlines(keepends=True)
    number = next(
        i for i, line in enumerate(lines) if b'"suggested"' in line and b'"trial": 1' in line
    )
    del lines[number]
    for _ in range(3):
        study.journal.write_bytes(b"".join(lines))
        with pytest.raises(
            StudyError, match=rf"line {number + 1} .*no line before it suggests trial 1"
        ):
            Study(study.folder)
        del lines[number]
    study.journal.write_bytes(b"".join(lines))
    assert list(Study(study.folder).state.trials) == [0, 2]


def test_a_second_process_is_refused_until_the_first_dies(study: Study) -> None:
    fill(study, trials=1)
    # filelock alone: importing lrbo would take seconds and shows nothing more.
    holder = (
        "import sys, time; from filelock import FileLock;"
        "lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", holder, str(study.folder / "lock")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(StudyError, match="another process is working on study study"):
                ExitStack().enter_context(study.locked())
        finally:
            process.kill()
    with study.locked():
        assert list(study.state.trials) == [0]


def test_what_the_other_process_wrote_is_seen_once_the_lock_is_held(study: Study) -> None:
    fill(study, trials=1)
    late = Study(study.folder)
    with study.locked():
        suggest(study, 1)
    assert list(late.state.trials) == [0]
    with late.locked():
        assert list(late.state.trials) == [0, 1]


def test_an_error_inside_releases_the_lock(study: Study) -> None:
    with pytest.raises(ZeroDivisionError), study.locked():
        raise ZeroDivisionError
    with Study(study.folder).locked():
        pass


def test_a_failing_sync_leaves_the_journal_as_it_was(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(study, trials=1)
    content = study.journal.read_bytes()
    state = Study(study.folder).state

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            suggest(study, 1)
    assert study.journal.read_bytes() == content
    assert study.state == state  # not on disk, so not known either
    suggest(study, 1)
    assert Study(study.folder).state.trials[1].request == request(1)


@contextmanager
def room_for(path: Path, more: int):
    """Let files grow to the size of one plus some bytes: the write that crosses it is cut."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("more", [0, 1, 40])
def test_a_line_that_does_not_fit_leaves_a_whole_journal(study: Study, more: int) -> None:
    """The system writes what fits and fails then, as on a full disk."""
    fill(study, trials=1)
    content = study.journal.read_bytes()
    with room_for(study.journal, more), pytest.raises(OSError, match="too large"):
        suggest(study, 1)
    assert study.journal.read_bytes() == content
    suggest(study, 1)
    assert Study(study.folder).state.trials[1].request == request(1)


def test_study_json_is_written_last(none: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def dying(path: Path, text: str) -> None:
        written.append(path.name)
        if path.name == "study.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text(text)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_text", dying)
        with pytest.raises(OSError, match="No space left"):
            none.begin(ABOUT, CONFIG)
    assert written == ["config.yaml", "study.json"]
    again = Study(none.folder)  # nothing was begun, and nothing is lost
    assert not again.exists
    again.begin(ABOUT, "a: 2\n")
    assert again.exists
    assert again.config_yaml() == "a: 2\n"
    whole = ABOUT | {"format": FORMAT, "study": "study", "config": ["a: 2", ""]}
    assert json.loads(json.dumps(again.about())) == json.loads(json.dumps(whole))
    names = ["config.yaml", "journal.jsonl", "study.json"]
    assert sorted(path.name for path in none.folder.iterdir()) == names


def test_a_folder_without_a_study_says_how_to_start_one(none: Study) -> None:
    assert not none.exists
    with pytest.raises(StudyError, match=r"no study at .*lrbo search study=\S*/study"):
        none.about()
    assert not none.folder.exists()  # asking leaves no trace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], r"study\.json: it is not JSON"),
        (lambda text: "", r"study\.json: it is not JSON"),
        (lambda text: "[1]", r"study\.json: it is \[1\], expected an object"),
        (lambda text: "{}", r"study\.json has format null, this lrbo reads 2"),
        (lambda text: text.replace('"format": 2', '"format": 3'), "has format 3, .* reads 2"),
        (lambda text: text.replace('"seed": 0', '"seed": "0"'), 'seed is "0", expected a whole'),
        (lambda text: text.replace('"seed": 0,', ""), "the field seed is missing"),
        (lambda text: text.replace('"seed"', '"seed": 1, "seed"'), '"seed" is there twice'),
        (lambda text: text.replace('"seed"', '"sead": 1, "seed"'), "there is no field sead"),
        (lambda text: text.replace('"float32"', '"int8"'), "dtype is \"int8\", expected"),
        (lambda text: text.replace('"factored"', '["factored"]'), r"storage is \[\"factored\"\]"),
        (lambda text: text.replace('"out_features": 24', '"out_features": -1'),
         r"layers\.0\.out_features is -1, expected a whole number, at least 1"),
        (lambda text: text.replace('"layers.0.v_proj"', '"layers.0.q_proj"'), "have one name"),
        (lambda text: text.replace('"windows": 12', '"windows": null'), r"\.windows is null"),
        (lambda text: "[" * 100_000, "nested too deep"),
        (lambda text: text.replace('"seed": 0', '"seed": NaN'), "NaN is no number of JSON"),
    ],
)  # fmt: skip
def test_a_study_file_that_cannot_be_right_is_refused_by_field(
    study: Study, change: Callable[[str], str], message: str
) -> None:
    fill(study)
    path = study.folder / "study.json"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(StudyError, match=message) as caught:
        Study(study.folder)
    assert str(path) in str(caught.value)
    assert "Restore" in str(caught.value)


@pytest.mark.parametrize("name", ["study.json", "journal.jsonl"])
def test_a_study_that_lacks_what_nobody_can_make_again_is_refused(study: Study, name: str) -> None:
    """Else it would begin again under the old trials, or search again under the old name."""
    fill(study)
    (study.folder / name).unlink()
    before = sorted(path.name for path in study.folder.iterdir())
    with pytest.raises(StudyError, match=rf"{name} is missing.* Restore the file"):
        Study(study.folder)
    assert sorted(path.name for path in study.folder.iterdir()) == before


def test_a_study_that_was_begun_and_has_no_trial_yet_goes_on(study: Study) -> None:
    assert Study(study.folder).state == StudyState()


def test_a_configuration_that_is_missing_is_written_again(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    path = study.folder / "config.yaml"
    path.unlink()
    with caplog.at_level(logging.WARNING):
        assert Study(study.folder).config_yaml() == CONFIG
    assert f"{path} was missing or damaged" in caplog.text
    assert path.read_text() == CONFIG


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 3\n", 'line 2 is "b: 3", and the study was begun with "b: 2"'),
        ("a: 1\nb: 2\nc: 3\n", 'line 3 is "c: 3", and the study was begun with ""'),
        ("a: 1\n", 'line 2 is "", and the study was begun with "b: 2"'),
        ("", 'line 1 is "", and the study was begun with "a: 1"'),
    ],
)
def test_a_configuration_that_was_changed_is_refused_by_line(
    study: Study, text: str, message: str
) -> None:
    (study.folder / "config.yaml").write_text(text)
    with pytest.raises(StudyError, match=rf"config\.yaml, {message}: restore the line, or delete"):
        Study(study.folder).config_yaml()
