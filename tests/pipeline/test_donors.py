"""What a study lends is looked up in one way, whoever asks, and refused with one message."""

from pathlib import Path

import pytest

from lrbo.config.compose import composed
from lrbo.config.schema import SearchConfig
from lrbo.errors import ConfigError
from lrbo.pipeline.feasibility import donor_problems, donor_records
from lrbo.pipeline.search_space import build_starts
from lrbo.study.journal import Study
from tests.support.journal import Journal


@pytest.fixture
def lender(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "mine")
    journal.complete(0, 2.5, "uniform")
    journal.fail(1, "no memory")
    journal.complete(2, 2.25)
    return journal


@pytest.mark.parametrize(("name", "trial"), [("study:mine", 2), ("study:mine:0", 0)])
def test_the_best_is_lent_or_the_trial_that_is_named(
    lender: Journal, tmp_path: Path, name: str, trial: int
) -> None:
    study, records = donor_records(name, str(tmp_path))
    assert study.name == "mine"
    assert [record.request.trial_index for record in records] == [trial]


def test_a_front_is_lent_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "mine", "budget=front")
    for index, nll in enumerate((2.5, 2.25, 2.75)):
        journal.complete(index, nll, keep_ratio=0.5 + index / 10)
    _, records = donor_records("study:mine", str(tmp_path))
    assert [record.request.trial_index for record in records] == [0, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:1", "donor mine:1: study mine has no completed trial 1; it has the trials [0, 2]"),
        ("empty", "donor empty: study empty has no completed trial; it has the trials []"),
        ("none", "donor none: there is no study at "),
        ("mine:" + "9" * 5000, "donor mine:9999"),
    ],
)
def test_the_values_and_the_search_refuse_a_donor_with_one_message(
    lender: Journal, tmp_path: Path, name: str, message: str
) -> None:
    Journal(tmp_path / "empty")
    config = composed("search", ["experiment=tiny", f"studies={tmp_path}"])
    assert isinstance(config, SearchConfig)
    config.warm_start = ["uniform", f"study:{name}"]
    (problem,) = donor_problems(config, Study(tmp_path / "new"))
    assert problem.startswith(message)
    layers = lender.layers.compressible
    with pytest.raises(ConfigError) as caught:
        build_starts(config.warm_start, layers, config.studies)
    assert caught.value.problems == [problem]
