"""A damaged line, and one that cannot be where it is, is named by its number, never guessed at."""

from collections.abc import Callable
from typing import Any

import pytest

from lrbo.errors import StudyError
from lrbo.study.journal import Study
from tests.support.fakes import FakeWorker
from tests.support.small_study import end, fill, line_of, metrics, request, suggest

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
        r"allocation.units has layers.5.q_proj, which is no layer",
    ),
    "a layer that is missing": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(
            b'"layers.0.q_proj": ["factored 3", [168, 672, 144]], ', b""
        ),
        r"allocation.units lacks the layer layers.0.q_proj",
    ),
    "a rank beyond the layer": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b"factored 3", b"factored 25"),
        r"allocation.units.layers.0.q_proj: factored has one rank from 0 to 24, got \[25\]",
    ),
    "a negative rank": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b"factored 3", b"factored -5"),
        r"allocation.units.layers.0.q_proj: 'factored -5' is no option: expected one of dense, f",
    ),
    "no rank": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b"factored 3", b"factored"),
        r"allocation.units.layers.0.q_proj: factored has one rank from 0 to 24, got \[\]",
    ),
    "a dense unit with a rank": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b'"dense"', b'"dense 3"'),
        r"allocation.units.layers.0.v_proj: dense has no level, got \[3\]",
    ),
    "a form that is none": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b"factored 3", b"woven 3"),
        r"allocation.units.layers.0.q_proj: 'woven 3' is no option: expected one of dense, factor",
    ),
    "an option that is no text": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b'"factored 3"', b"3"),
        r"allocation.units.layers.0.q_proj.0 is 3, expected text",
    ),
    "an option without its cost": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b", [168, 672, 144]]", b"]"),
        r"allocation.units.layers.0.q_proj.1 is missing",
    ),
    "a cost that its form does not count": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b"[168, 672, 144]", b"[168, 671, 144]"),
        r"allocation.units.layers.0.q_proj costs \[168, 671, 144\], and factored 3 costs 168 "
        r"parameters, 672 bytes, 144 multiply-adds",
    ),
    "a budget of another measure": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b'"measure": "parameters"', b'"measure": "macs"'),
        r"allocation.budget is 460 multiply-adds, expected 460 parameters, the budget",
    ),
    "a budget of no measure": (
        b'"ended"',
        lambda lines: suggested(lines, 7).replace(b'"measure": "parameters"', b'"measure": "gold"'),
        r'allocation.budget.measure is "gold", expected \'parameters\', \'bytes\' or \'macs\'',
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


def suggested(lines: bytes, trial: int) -> bytes:
    line = line_of(lines, b'"suggested"', b'"trial": 1')
    return line.replace(b'"trial": 1', b'"trial": %d' % trial)


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


def test_windows_of_a_pool_are_those_of_the_pool(study: Study) -> None:
    count = FakeWorker.WINDOWS
    choice: dict[str, Any] = {"pool": count, "text": "words", "digest": "d"}
    study.record("pooled", allocation=0, losses=[1.0] * count, error=None, seconds=1.0)
    for event, fields, message in (
        ("pooled", {"allocation": 0, "losses": None}, "allocation 0 was scored already"),
        ("pooled", {"allocation": 1, "losses": [1.0]}, f"losses has 1 values, expected {count}"),
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
    with pytest.raises(StudyError, match="example_losses has 3 values, expected 2"):
        study.record(
            "ended", trial=0, outcome="completed", metrics=metrics(1.0), error=None,
            seconds={"scoring": 1.0}, example_losses=(1.0, 2.0, 3.0),
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
    rest = [line for line in lines if not (b'"ended"' in line and b'"trial": 1' in line)]
    assert len(rest) == len(lines) - 1
    study.journal.write_bytes(b"".join(rest))
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
