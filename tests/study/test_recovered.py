"""Lines about recovered trials: in their order, each once, and known by the format of a study."""

import json
from typing import Any

import pytest

from lrbo.errors import StudyError
from lrbo.study.events import FORMAT, RECOVERED_FORMAT
from lrbo.study.journal import Study
from tests.support.small_study import fill

SETTINGS = {"recover.minutes": 1.5, "recover.stages": ["blocks"], "seed": 0, "recover.new": None}
SCORES = {"nll": 1.25, "perplexity": 3.5}


def recovered(study: Study, trial: int, **changes: Any) -> None:
    scores = {"before": SCORES, "after": SCORES | {"perplexity": float("inf")}}
    fields = {
        "id": f"run {trial}", "folder": f"recovered/a/trial-{trial:03d}", "settings": SETTINGS,
        "validation": scores, "stages": [{"name": "blocks", "rows": []}],
    }  # fmt: skip
    study.record("recovered", trial=trial, **fields | changes)


def reranked(study: Study, trial: int, **changes: Any) -> None:
    fields = {"settings": SETTINGS, "text": "words", "test": {"before": SCORES, "after": SCORES}}
    study.record("reranked", trial=trial, **fields | changes)


def format_of(study: Study) -> int:
    version: int = json.loads((study.folder / "study.json").read_text("utf-8"))["format"]
    return version


def test_what_was_recovered_is_read_again_as_it_was_written(study: Study) -> None:
    fill(study)
    recovered(study, 0)
    recovered(study, 2)
    recovered(study, 0, settings=SETTINGS | {"seed": 1})
    reranked(study, 2)
    again = Study(study.folder)
    assert again.state == study.state
    assert [event["trial"] for event in again.state.recovered] == [0, 2, 0]
    event = again.state.recovery(0, SETTINGS)
    assert event is not None
    assert event["settings"] == SETTINGS
    assert event["validation"]["after"]["perplexity"] == float("inf")
    assert again.state.recovery(0, SETTINGS | {"seed": 2}) is None
    assert again.state.reranked[0]["test"]["before"] == SCORES


def test_the_format_of_a_study_rises_with_the_first_line_alone(study: Study) -> None:
    """So that an lrbo that knows no such line refuses the study by its version, and only then."""
    fill(study)
    assert format_of(study) == FORMAT
    before = json.loads((study.folder / "study.json").read_text("utf-8"))
    with pytest.raises(StudyError, match="no line before it gives trial 1 a value"):
        recovered(study, 1)
    assert format_of(study) == FORMAT
    recovered(study, 0)
    after = json.loads((study.folder / "study.json").read_text("utf-8"))
    assert after == before | {"format": RECOVERED_FORMAT}
    assert study.about.format == RECOVERED_FORMAT
    content = (study.folder / "study.json").read_bytes()
    recovered(study, 2)
    assert (study.folder / "study.json").read_bytes() == content


@pytest.mark.parametrize(
    ("trial", "changes", "message"),
    [
        (0, {}, "trial 0 was recovered with these settings already"),
        (9, {}, "no line before it gives trial 9 a value"),
        (2, {"settings": {"seed": 0}}, r"the field settings\.recover\.minutes is missing"),
        (2, {"validation": {"before": SCORES}}, r"validation\.after is missing"),
        (2, {"validation": {"before": {"nll": 1.0}, "after": SCORES}},
         r"validation\.before lacks perplexity"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_not_written(
    study: Study, trial: int, changes: dict[str, Any], message: str
) -> None:
    fill(study)
    recovered(study, 0)
    content = study.journal.read_bytes()
    with pytest.raises(Exception, match=message):
        recovered(study, trial, **changes)
    assert study.journal.read_bytes() == content


def test_only_what_was_recovered_is_ranked_again(study: Study) -> None:
    fill(study)
    recovered(study, 0)
    with pytest.raises(StudyError, match="no line before it recovers trial 2 with these settings"):
        reranked(study, 2)
    with pytest.raises(StudyError, match="no line before it recovers trial 0 with these settings"):
        reranked(study, 0, settings=SETTINGS | {"seed": 7})
