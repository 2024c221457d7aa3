"""The journal is the truth: whole after every accident, held by one process at a time."""

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

from lrbo.errors import StudyError
from lrbo.study import journal as module
from lrbo.study.about import READ
from lrbo.study.events import FORMAT, RECOVERED_FORMAT, event_of
from lrbo.study.journal import Study
from lrbo.study.state import StudyState
from lrbo.tasks.metrics import CAUSAL_LM
from tests.support.fakes import FakeWorker, fixed_clock
from tests.support.small_study import (
    ABOUT,
    ALLOCATION,
    CONFIG,
    NLL,
    Q,
    V,
    end,
    fill,
    metrics,
    request,
    suggest,
)

# No tolerances: what is read must be what was written, to the last bit.


def test_every_event_comes_back_as_it_was_written(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "time", fixed_clock(start=100.0))
    fill(study, trials=2)
    state = Study(study.folder).state
    assert state == study.state
    assert state.dense == {"nll": 1.5, "perplexity": 4.5}
    assert state.tests == {
        "best": {
            "trial": 0,
            "text": "words[test]",
            "metrics": {"nll": 2.5, "perplexity": 12.0},
            "example_losses": (2.0, 3.0) * (FakeWorker.WINDOWS // 2),
        },
    }
    first, second = state.records
    assert first.request == request(0)
    assert list(first.request.allocation.options) == list(ALLOCATION.options)
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
    assert state.completed == [first]
    assert state.best() == first


def test_the_state_after_each_event_is_what_a_reader_finds(study: Study) -> None:
    events = []

    class Watched(Study):
        def record(self, event: str, **fields: Any) -> None:
            super().record(event, **fields)
            assert Study(self.folder).state == self.state
            events.append(event)

    fill(Watched(study.folder), trials=1)
    assert events == ["dense", "suggested", "started", "ended", "logged", "tested"]


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
    expected = StudyState(about=study.about)
    for line in lines[:-1]:
        expected.apply(event_of(json.loads(line), "a line", CAUSAL_LM))
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
    new_study = Study(none.folder)  # nothing was begun, and nothing is lost
    assert not new_study.exists
    new_study.begin(ABOUT, "a: 2\n")
    assert new_study.exists
    assert new_study.config_yaml() == "a: 2\n"
    whole = ABOUT | {"format": FORMAT, "study": "study", "config": ["a: 2", ""]}
    assert json.loads(json.dumps(new_study.about.fields)) == json.loads(json.dumps(whole))
    names = ["config.yaml", "journal.jsonl", "study.json"]
    assert sorted(path.name for path in none.folder.iterdir()) == names


def test_a_folder_without_a_study_says_how_to_start_one(none: Study) -> None:
    assert not none.exists
    with pytest.raises(StudyError, match=r"no study at .*lrbo search study=\S*/study"):
        _ = none.about
    assert not none.folder.exists()  # asking leaves no trace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], r"study\.json: it is not JSON"),
        (lambda text: "", r"study\.json: it is not JSON"),
        (lambda text: "[1]", r"study\.json: it is \[1\], expected an object"),
        (lambda text: "{}", rf"study\.json has format null, this lrbo reads {FORMAT}"),
        (lambda text: text.replace(f'"format": {FORMAT}', f'"format": "{FORMAT}"'),
         f'has format "{FORMAT}", .* reads {FORMAT}'),
        (lambda text: text.replace(f'"format": {FORMAT}', '"format": true'),
         "has format true, .* reads"),
        (lambda text: text.replace('"seed": 0', '"seed": "0"'), 'seed is "0", expected a whole'),
        (lambda text: text.replace('"seed": 0,', ""), "the field seed is missing"),
        (lambda text: text.replace('"seed"', '"seed": 1, "seed"'), '"seed" is there twice'),
        (lambda text: text.replace('"seed"', '"sead": 1, "seed"'), "there is no field sead"),
        (lambda text: text.replace('"dtype": "float32"', '"dtype": "int8"'),
         r'json: dtype is "int8", expected'),
        (lambda text: text.replace('"stored_dtype": "float32"', '"stored_dtype": "int8"'),
         r'json: stored_dtype is "int8", expected'),
        (lambda text: text.replace('"factored"', '["factored"]'), r"forms\.0 is \[\"factored\"\]"),
        (lambda text: text.replace('"measure": "parameters"', '"measure": "gold"'),
         r'budget\.measure is "gold", expected'),
        (lambda text: text.replace('"limit": 460', '"limit": -1'), r"budget\.limit is -1, exp"),
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


# What was fixed at the start, and a suggestion, in the words of format 2.
OLD_ABOUT = {"format": 2, "budget_parameters": 460, "storage": "pivoted", "adds_bias": True}
OLD_LINE = {
    "event": "suggested", "time": 1.0, "trial": 0, "origin": "sobol", "variables": {"qk": 0.5},
    "allocation": {"ranks": {Q: 3, V: None}, "parameters": 456, "budget": {"parameters": 460}},
    "seed": 0, "seconds": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            OLD_ABOUT,
            f"has format 2, this lrbo reads {READ}; an older lrbo began it: .* another study=NAME",
        ),
        ({"format": 3}, f"has format 3, this lrbo reads {READ}; an older lrbo began it: .*"),
        (
            {"format": RECOVERED_FORMAT + 1},
            f"has format {RECOVERED_FORMAT + 1}, this lrbo reads {READ}; a newer lrbo began it: "
            "upgrade",
        ),
    ],
)
def test_a_study_of_another_format_is_refused_by_version(
    study: Study, changes: dict[str, object], message: str
) -> None:
    """Before its lines, which are of another format too."""
    path = study.folder / "study.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    if changes is OLD_ABOUT:
        for name in ("budget", "forms", "added_biases"):
            del about[name]
    path.write_text(json.dumps(about | changes), encoding="utf-8")
    study.journal.write_text(json.dumps(OLD_LINE) + "\n", encoding="utf-8")
    with pytest.raises(StudyError, match=rf"study\.json {message}") as caught:
        Study(study.folder)
    assert str(path) in str(caught.value)
    assert "Restore" not in str(caught.value)  # it is whole


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
        ("a: 1\nb: 2\n\n", 'line 4 is "", and the study was begun with nothing'),
        ("a: 1\nb: 2", 'line 3 is nothing, and the study was begun with ""'),
    ],
)
def test_a_configuration_that_was_changed_is_refused_by_line(
    study: Study, text: str, message: str
) -> None:
    (study.folder / "config.yaml").write_text(text)
    with pytest.raises(StudyError, match=rf"config\.yaml, {message}: restore the line, or delete"):
        Study(study.folder).config_yaml()
