"""The journal is the truth: whole after every accident, and damage is named, never guessed at."""

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
from lrbo.optimization.study import FORMAT, Study, StudyState
from lrbo.trial import TrialRequest
from tests.fakes import fixed_clock

# No tolerances: what is read must be what was written, to the last bit.

NLL = 0.1 + 0.2  # 0.30000000000000004: not a short decimal
ALLOCATION = Allocation({"layers.0.q_proj": 3, "layers.0.v_proj": None}, 400, Budget(410))


def request(index: int) -> TrialRequest:
    return TrialRequest(index, "sobol", {"qk": 1 / 3}, ALLOCATION, seed=7 + index)


def suggest(study: Study, index: int) -> None:
    study.record_suggestion(request(index), {"suggestion": 0.25, "allocation": 0.125})


def end(study: Study, index: int, nll: float = NLL, outcome: str = "completed") -> None:
    study.record(
        "ended",
        trial=index,
        outcome=outcome,
        metrics={"nll": nll, "objective": nll} if outcome == "completed" else {},
        error=None if outcome == "completed" else f"why {index}",
        seconds={"scoring": 2.5},
    )


def fill(study: Study, trials: int = 3) -> None:
    """Write every kind of event."""
    study.folder.mkdir(exist_ok=True)
    study.record("dense", metrics={"nll": 1.5})
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
        metrics={"nll": 2.5},
        window_nll=[2.0, 3.0],
    )


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "study")


def test_every_event_comes_back_as_it_was_written(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "time", fixed_clock(start=100.0))
    fill(study, trials=2)
    again = Study(study.folder).state
    assert again == study.state
    assert again.dense == {"nll": 1.5}
    assert again.tests == {
        "best": {
            "trial": 0,
            "text": "words[test]",
            "metrics": {"nll": 2.5},
            "window_nll": [2.0, 3.0],
        },
    }
    first, second = again.records
    assert first.request == request(0)
    assert list(first.request.allocation.ranks) == list(ALLOCATION.ranks)
    assert first.metrics == {"nll": NLL, "objective": NLL}
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


def test_of_several_ends_the_first_counts(study: Study) -> None:
    fill(study, trials=1)
    before = study.state.trials[0]
    end(study, 0, nll=-1.0)
    end(study, 0, outcome="failed")
    assert study.state.trials[0] == before
    assert Study(study.folder).state.trials[0] == before


def test_of_equal_objectives_the_first_is_best(study: Study) -> None:
    study.folder.mkdir()
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
        study.record("dense", metrics={"nll": float("nan")})
    assert study.journal.read_bytes() == content


def test_a_line_torn_at_any_byte_is_cut_off_and_kept(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    fill(study, trials=1)
    whole = study.journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    expected = StudyState()
    for line in lines[:-1]:
        expected.apply(json.loads(line))
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
}


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
        with pytest.raises(StudyError, match=rf"line {number + 1} .*no 'suggestion of trial 1"):
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


def test_study_json_is_written_last(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def dying(path: Path, text: str) -> None:
        written.append(path.name)
        if path.name == "study.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text(text)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_text", dying)
        with pytest.raises(OSError, match="No space left"):
            study.begin({"device": "cpu"}, "a: 1\n")
    assert written == ["config.yaml", "study.json"]
    assert not study.exists
    study.begin({"device": "cpu"}, "a: 2\n")
    assert study.exists
    assert study.config_yaml() == "a: 2\n"
    about = study.about()
    assert about["storage"] == "factored"  # studies from before there was a choice do not say
    assert about == {"format": FORMAT, "study": "study", "device": "cpu", "storage": "factored"}
    assert sorted(path.name for path in study.folder.iterdir()) == ["config.yaml", "study.json"]


def test_a_folder_without_a_study_says_how_to_start_one(study: Study) -> None:
    assert not study.exists
    with pytest.raises(StudyError, match=r"no study at .*lrbo search study=study"):
        study.about()
    assert not study.folder.exists()  # asking leaves no trace


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1', "study.json is not JSON"),
        ('{"format": 2}', "format 2, this lrbo reads 1"),
        ('{"study": "x"}', "format None"),
        ("[1]", "study.json has format None"),
    ],
)
def test_a_study_file_that_cannot_be_read_is_named(study: Study, text: str, message: str) -> None:
    study.begin({}, "")
    (study.folder / "study.json").write_text(text)
    with pytest.raises(StudyError, match=message):
        study.about()
