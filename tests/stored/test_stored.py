"""What an earlier version wrote keeps opening, and says the same; see ``make.py`` beside it."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, dynamic_module_utils

import lrbo
from lrbo.layers.forms import FORMS
from lrbo.layers.options import Option
from lrbo.study.journal import Study
from tests.checkpoints.test_export import options_of
from tests.stored.make import EXPECTED, PLAIN, STUDY, WITH_CODE, logits_of, make_study, options_in
from tests.support import reference
from tests.support.commands import lrbo_command

TOLERANCE = {
    "report": 1e-9,  # relative: sums of a few float64 numbers, printed with all digits
    "logits": 1e-4,  # of logits up to about 10: float32 on another processor, two blocks deep
}
SAID: dict[str, Any] = json.loads(EXPECTED.read_text(encoding="utf-8"))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Return a copy of the stored study, which a report or a search adds to."""
    return Path(shutil.copytree(STUDY, tmp_path / "study"))


def assert_says(actual: Any, expected: Any, where: str = "") -> None:
    """Hold that all that was said is said again, with its numbers; more may be."""
    if isinstance(expected, dict):
        assert set(expected) <= set(actual), where
        for key, value in expected.items():
            assert_says(actual[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for index, value in enumerate(expected):
            assert_says(actual[index], value, f"{where}.{index}")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=TOLERANCE["report"]), where
    else:
        assert actual == expected, where


def test_the_report_of_a_stored_study_says_the_same(study: Path) -> None:
    ran = lrbo_command("report", f"study={study}", "output=json")
    assert ran.status == 0, ran.err
    assert_says(ran.json, SAID["report"])
    assert SAID["report"]["trials_completed"] == 5
    opened = Study(study)
    assert options_in(opened) == SAID["trials"]
    used = {Option.parse(o).form for trial in SAID["trials"].values() for o in trial.values()}
    assert used == {"dense", "factored", "pivoted"} <= set(FORMS)
    budgets = {str(r.request.allocation.budget) for r in opened.state.records}
    assert budgets == {str(opened.state.records[0].request.allocation.budget)}
    assert opened.state.records[0].request.allocation.budget.measure == "bytes"


def test_a_stored_study_goes_on(study: Path) -> None:
    opened = Study(study)
    (left,) = opened.state.open
    assert left.request.trial_index == 6
    before = opened.journal.read_bytes()
    with opened.locked():
        opened.record("started", trial=6)
        opened.record_suggestion(_with_index(left.request, 7), {})
    assert opened.journal.read_bytes().startswith(before)
    state = Study(study).state
    assert state.trials[6].attempts == 1
    assert state.trials[7].request.allocation == left.request.allocation


def _with_index(request: Any, index: int) -> Any:
    return type(request)(**{**vars(request), "trial_index": index})


def with_its_code(folder: Path) -> PreTrainedModel:
    """Open a checkpoint by its own modelling file."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model


LOADERS: dict[str, tuple[Path, Callable[[Path], PreTrainedModel]]] = {
    "lrbo.load": (PLAIN, lrbo.load),
    "transformers": (PLAIN, AutoModelForCausalLM.from_pretrained),
    "lrbo.load, beside code": (WITH_CODE, lrbo.load),
    "its own code": (WITH_CODE, with_its_code),
}


@pytest.mark.parametrize("how", LOADERS)
def test_a_stored_checkpoint_says_the_same(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, opened = LOADERS[how]
    model = opened(folder)
    assert reference.count_parameters(model) == SAID["parameters"]
    if how == "its own code":
        assert type(model).__module__.startswith("transformers_modules")
    else:
        assert {n: str(option) for n, option in options_of(model).items()} == SAID["units"]
    logits = np.array(logits_of(model))
    assert np.abs(logits).max() > 100 * TOLERANCE["logits"]
    np.testing.assert_allclose(logits, SAID["logits"], rtol=0, atol=TOLERANCE["logits"])
    assert AutoTokenizer.from_pretrained(folder).decode([35, 36]) == "DE"


def test_the_script_still_makes_such_a_study(tmp_path: Path) -> None:
    make_study(tmp_path / "study")
    assert len(Study(tmp_path / "study").state.records) == len(SAID["trials"])
