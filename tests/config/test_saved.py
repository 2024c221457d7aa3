"""A study is continued with its own configuration, read from text as it was written."""

from typing import Any

import pytest
import yaml

from lrbo.config import compose, saved
from lrbo.config.saved import overrides_for, repeating
from lrbo.config.schema import SearchConfig
from lrbo.errors import StudyError
from tests.pipeline.test_checks import RATIOS, search


def continued(text: str, overrides: list[str], typed: SearchConfig | None = None) -> SearchConfig:
    """Return a stored configuration with some keys changed."""
    return saved.continued(saved.from_yaml(text, "it"), overrides, typed)


def differences(text: str, other: SearchConfig) -> list[str]:
    """Return what differs from a stored configuration."""
    return saved.differences(saved.from_yaml(text, "it"), other)


def test_a_stored_configuration_comes_back_as_it_was() -> None:
    config = search("space=per_kind_and_depth", "data.window=256", "seed=3", "search.trials=9")
    text = saved.to_yaml(config)
    assert continued(text, []) == config
    assert yaml.safe_load(text)["space"]["start"]["qk"] == [0.332, 0.473, 0.199, 0.320]


TEXTS = (
    "v${oc.env:HOME}", "${seed}", "${", "}${x", "a\\${b}", "a\\\\${b}\\", "\\", "1e3", "on", "",
    " a: #b", "2026-11-28", "${oc.env:NO_SUCH_VARIABLE}",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_stored_text_is_only_a_text(text: str) -> None:
    written = search()
    written.model.name = written.studies = written.data.test.path = text
    written.space.start = {"qk": 0.5, text: text}
    written.method["one_sided"] = [text]
    stored = saved.to_yaml(written)
    assert yaml.safe_load(stored)["model"]["name"] == text
    assert continued(stored, []) == written
    assert differences(stored, written) == []
    typed = search()
    typed.tracking.experiment = text
    going_on = continued(stored, ["tracking.experiment=x"], typed)
    assert (going_on.tracking.experiment, going_on.studies) == (text, text)


def test_a_study_whose_name_looks_like_a_reference_is_begun_again_by_its_name() -> None:
    written = search(r"study='v\${oc.env:HOME}'")
    assert written.study == "v${oc.env:HOME}"
    values = repeating(continued(saved.to_yaml(written), []))
    assert compose.composed("search", overrides_for("search", values)).study == written.study  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["a: [", "text", "- a", ""])
def test_a_stored_configuration_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(StudyError, match=r"^it( is no YAML)?: "):
        saved.from_yaml(text, "it")


def test_free_keys_may_change_when_a_study_is_continued() -> None:
    text = saved.to_yaml(search())
    config = continued(
        text, ["search.trials=99", "tracking.uri=http://elsewhere:5000", "tracking.enabled=false"]
    )
    assert config.search.trials == 99
    assert config.tracking.uri == "http://elsewhere:5000"
    assert config.tracking.enabled is False
    assert differences(text, config) == []


def test_the_mlflow_store_follows_the_folder_of_the_studies() -> None:
    text = saved.to_yaml(search("studies=here"))
    assert "sqlite:///here/mlflow.db" in text
    moved = continued(text, ["studies=there"])
    assert moved.tracking.uri == "sqlite:///there/mlflow.db"
    text = saved.to_yaml(search("tracking.uri=http://server:5000"))
    assert continued(text, ["studies=x"]).tracking.uri == "http://server:5000"


def test_every_other_difference_is_listed_with_both_values() -> None:
    text = saved.to_yaml(search())
    other = search("budget.keep_ratio=0.7", "seed=2", "search.trials=99", "data.window=256")
    assert differences(text, other) == [
        "data.window: the study has 512, the command has 256",
        "budget.keep_ratio: the study has 0.8, the command has 0.7",
        "seed: the study has 0, the command has 2",
    ]


def test_an_entry_of_a_mapping_is_one_difference() -> None:
    text = saved.to_yaml(search("+space.variables={exponent:0.5}"))
    expected = ["space.variables.exponent: the study has 0.5, the command has None"]
    assert differences(text, search()) == expected


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("sensitivity", {"enabled": "maybe"}, r'sensitivity\.enabled is "maybe", expected'),
        ("sensitivity", {"sparsity": 0.5}, r"there is no key sensitivity\.sparsity"),
        ("budget", {"keep_ratio": "0.8"}, r'budget\.keep_ratio is "0\.8", expected 0\.8'),
        ("search", {"trials": 3.0}, None),
    ],
)
def test_a_study_that_this_version_does_not_understand_is_refused(
    section: str, change: dict[str, Any], message: str | None
) -> None:
    stored = yaml.safe_load(saved.to_yaml(search(*RATIOS)))
    stored[section] |= change
    text = yaml.safe_dump(stored)
    if message is None:  # a number like any other
        assert saved.from_yaml(text, "it").search.trials == 3
        return
    with pytest.raises(StudyError, match=rf"^it: {message}.*; use the version of lrbo that wrote"):
        saved.from_yaml(text, "it")


def test_no_default_of_today_stands_for_what_a_study_was_begun_with() -> None:
    stored = yaml.safe_load(saved.to_yaml(search(*RATIOS)))
    del stored["sensitivity"], stored["budget"]["measure"]
    with pytest.raises(StudyError, match=r"budget\.measure is missing; sensitivity\.enabled is mi"):
        saved.from_yaml(yaml.safe_dump(stored), "it")


def test_a_key_that_came_later_means_what_there_was_before() -> None:
    stored = yaml.safe_load(saved.to_yaml(search(*RATIOS, "bases.factor_bits=16")))
    assert saved.from_yaml(yaml.safe_dump(stored), "it").bases.factor_bits == 16
    del stored["bases"]["factor_bits"]
    assert saved.from_yaml(yaml.safe_dump(stored), "it").bases.factor_bits == 8


def test_where_trials_run_may_change_by_the_name_of_a_group() -> None:
    stored = saved.to_yaml(search("method=bolaco", "space=per_kind", "seed=3"))
    typed = ["executor=ray", "executor.workers=2", "search.trials=9"]
    config = continued(stored, typed, search(*typed))
    assert (config.executor.name, config.executor.workers) == ("ray", 2)
    assert (config.search.trials, config.seed, config.method["name"]) == (9, 3, "bolaco")
    assert differences(stored, config) == []
    back = continued(saved.to_yaml(config), ["executor=inline"], search("executor=inline"))
    assert (back.executor.name, back.executor.workers) == ("inline", 1)
    assert back.search.trials == 9
