"""A study is continued with its own configuration, also one from before some keys existed."""

import pytest
import yaml

from lrbo import config
from lrbo.checks import check
from lrbo.command_lines import repeating, typed
from lrbo.errors import ConfigError
from lrbo.schema import SearchConfig
from tests.test_checks import RATIOS, search


def test_a_stored_configuration_comes_back_as_it_was() -> None:
    found = search("space=per_kind_and_depth", "data.window=256", "seed=3", "search.trials=9")
    text = config.to_yaml(found)
    assert config.stored_config(text, []) == found
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
    written.method.one_sided = [text]
    stored = config.to_yaml(written)
    assert yaml.safe_load(stored)["model"]["name"] == text
    assert config.stored_config(stored, []) == written
    assert config.differences(stored, written) == []
    typed = search()
    typed.tracking.experiment = text
    going_on = config.stored_config(stored, ["tracking.experiment=x"], typed)
    assert (going_on.tracking.experiment, going_on.studies) == (text, text)


def test_a_study_whose_name_looks_like_a_reference_is_begun_again_by_its_name() -> None:
    written = search(r"study='v\${oc.env:HOME}'")
    assert written.study == "v${oc.env:HOME}"
    again = repeating(config.stored_config(config.to_yaml(written), []))
    assert config.composed("search", typed("search", again)).study == written.study  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["a: [", "text", "- a", ""])
def test_a_stored_configuration_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        config.stored_config(text, [])


def test_free_keys_may_change_when_a_study_is_continued() -> None:
    text = config.to_yaml(search())
    found = config.stored_config(
        text, ["search.trials=99", "tracking.uri=http://elsewhere:5000", "tracking.enabled=false"]
    )
    assert found.search.trials == 99
    assert found.tracking.uri == "http://elsewhere:5000"
    assert found.tracking.enabled is False
    assert config.differences(text, found) == []


def test_the_mlflow_store_follows_the_folder_of_the_studies() -> None:
    text = config.to_yaml(search("studies=here"))
    assert "sqlite:///here/mlflow.db" in text
    moved = config.stored_config(text, ["studies=there"])
    assert moved.tracking.uri == "sqlite:///there/mlflow.db"
    text = config.to_yaml(search("tracking.uri=http://server:5000"))
    assert config.stored_config(text, ["studies=x"]).tracking.uri == "http://server:5000"


def test_every_other_difference_is_listed_with_both_values() -> None:
    text = config.to_yaml(search())
    other = search("budget.keep_ratio=0.7", "seed=2", "search.trials=99", "data.window=256")
    assert config.differences(text, other) == [
        "data.window: the study has 512, the command has 256",
        "budget.keep_ratio: the study has 0.8, the command has 0.7",
        "seed: the study has 0, the command has 2",
    ]


def test_an_entry_of_a_mapping_is_one_difference() -> None:
    text = config.to_yaml(search("+space.variables={exponent:0.5}"))
    expected = ["space.variables.exponent: the study has 0.5, the command has None"]
    assert config.differences(text, search()) == expected


OLD_KEYS: dict[str, set[str]] = {
    "method": {"name"},
    "space": {
        "name", "granularity", "depth_groups", "groups", "dense", "bounds", "start",
        "rank_multiple",
    },
    "budget": {"keep_ratio"},
    "calibration": {"groups", "batch_windows"},
}  # fmt: skip


def as_before(found: SearchConfig) -> str:
    """Return a configuration as it was stored before methods had options and spaces a type."""
    stored = yaml.safe_load(config.to_yaml(found))
    del stored["sensitivity"]
    for section, keys in OLD_KEYS.items():
        stored[section] = {k: v for k, v in stored[section].items() if k in keys}
    text: str = yaml.safe_dump(stored, sort_keys=False)
    return text


def test_a_study_from_before_is_continued_as_it_was_begun() -> None:
    text = as_before(search("method=bolaco", "space=per_kind_and_depth", "seed=3"))
    found = config.stored_config(text, ["search.trials=99"])
    assert check(found) == []
    assert found.search.trials == 99
    assert (found.space.type, found.space.granularity) == ("ratios", "depth")
    # No loss curves, so no analytic trial and no statistics that it did not have.
    assert found.sensitivity.enabled is False
    assert found.budget.storage == "factored"
    assert config.differences(text, found) == []


def test_what_a_study_from_before_did_otherwise_is_listed_and_nothing_else() -> None:
    text = as_before(search(*RATIOS))
    assert config.differences(text, search(*RATIOS)) == [
        "budget.storage: the study has 'factored', the command has 'pivoted'",
        "sensitivity.enabled: the study has False, the command has True",
        "sensitivity.apply: the study has True, the command has False",
    ]
    same = search(
        *RATIOS, "budget.storage=factored", "sensitivity.enabled=false", "sensitivity.apply=true"
    )
    assert config.differences(text, same) == []


@pytest.mark.parametrize(
    ("line", "word"), [("sensitivity: {enabled: maybe}", "maybe"), ("sparsity: 0.5", "sparsity")]
)
def test_a_study_that_this_version_does_not_understand_is_refused(line: str, word: str) -> None:
    text = as_before(search(*RATIOS)) + line + "\n"
    for read in (
        lambda: config.stored_config(text, []),
        lambda: config.differences(text, search(*RATIOS)),
    ):
        with pytest.raises(ConfigError, match=rf"config\.yaml: .*{word}.*version of lrbo"):
            read()


def test_where_trials_run_may_change_by_the_name_of_a_group() -> None:
    stored = config.to_yaml(search("method=bolaco", "space=per_kind", "seed=3"))
    typed = ["executor=ray", "executor.workers=2", "search.trials=9"]
    found = config.stored_config(stored, typed, search(*typed))
    assert (found.executor.name, found.executor.workers) == ("ray", 2)
    assert (found.search.trials, found.seed, found.method.name) == (9, 3, "bolaco")
    assert config.differences(stored, found) == []
    back = config.stored_config(
        config.to_yaml(found), ["executor=inline"], search("executor=inline")
    )
    assert (back.executor.name, back.executor.workers) == ("inline", 1)
    assert back.search.trials == 9
