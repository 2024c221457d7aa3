"""What is said of recovered trials is what the journal has, by set and in their order."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lrbo.reports.mlflow_view import show_recoveries
from lrbo.reports.recoveries import recovered_rows, recoveries, recovery_tables
from lrbo.reports.terminal import print_report
from lrbo.tracking.tracker import Tracker
from tests.support.journal import Journal

MINUTE = {"recover.minutes": 1.0, "recover.tokens": None, "recover.stages": ["blocks", "distill"]}
LONGER = MINUTE | {"recover.minutes": 10.0, "recover.tokens": 4096}


def scores(nll: float) -> dict[str, float]:
    return {"nll": nll, "perplexity": math.exp(nll)}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "mine")
    journal.score_dense(2.0)
    for index in range(4):
        journal.complete(index, 3.0 + index)
    return journal


def recover(
    journal: Journal, trial: int, before: float, after: float, settings: Any = MINUTE
) -> None:
    journal.study.record(
        "recovered", id=f"{trial} {settings['recover.minutes']}", trial=trial,
        folder=f"recovered/a/trial-{trial:03d}", settings=settings, stages=[],
        validation={"before": scores(before), "after": scores(after)},
    )  # fmt: skip


def rank(journal: Journal, trial: int, settings: Any = MINUTE) -> None:
    journal.study.record(
        "reranked", trial=trial, settings=settings, text="words",
        test={"before": scores(5.0), "after": scores(4.5)},
    )  # fmt: skip


def said(journal: Journal) -> list[str]:
    return [each.sentence for each in recoveries(journal.study)]


def test_the_order_after_recovery_decides_and_what_changed_is_said(journal: Journal) -> None:
    recover(journal, 0, 3.0, 2.75)
    assert said(journal) == ["trial 0 is the best after recovery, as before"]
    recover(journal, 1, 4.0, 2.875)
    assert said(journal) == ["trial 0 is the best after recovery, as before; the order is the same"]
    recover(journal, 2, 5.0, 2.5)
    assert said(journal) == [
        "trial 2 is the best after recovery; before it was trial 0; order 0, 1, 2 before, "
        "2, 0, 1 after"
    ]
    recover(journal, 3, 6.0, 2.625)
    (own,) = recoveries(journal.study)
    assert (own.before, own.after) == ([0, 1, 2, 3], [2, 3, 0, 1])
    recover(journal, 3, 6.0, 6.5, LONGER)
    assert said(journal)[1] == (
        "trial 3 is the best after recovery, as before; none is better than trial 3 was before it"
    )


def test_rows_have_a_best_per_set_once_it_was_tested(journal: Journal) -> None:
    recover(journal, 0, 3.0, 2.75)
    recover(journal, 1, 4.0, 2.5)
    recover(journal, 0, 3.0, 2.25, LONGER)
    rank(journal, 0)  # before trial 1 was recovered too
    rows = recovered_rows(journal.study)
    assert [(row["trial"], row["is_best"]) for row in rows] == [
        (1, False), (0, False), (0, False),
    ]  # fmt: skip
    assert rows[0]["test"] is None
    assert rows[1]["test"] == {"before": scores(5.0), "after": scores(4.5)}
    rank(journal, 1)
    rank(journal, 0, LONGER)
    rows = recovered_rows(journal.study)
    assert [row["is_best"] for row in rows] == [True, False, True]
    assert rows[2]["settings"] == LONGER
    folder = journal.study.folder / "recovered/a/trial-001"
    assert (rows[0]["folder"], rows[0]["exists"]) == (str(folder), False)
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    assert recovered_rows(journal.study)[0]["exists"]


def test_the_report_has_a_table_per_set(journal: Journal) -> None:
    assert recovery_tables(journal.study) == []
    recover(journal, 0, 3.0, 2.75)
    recover(journal, 1, 4.0, 2.5)
    rank(journal, 1)
    recover(journal, 2, 5.0, 2.0, LONGER)
    titles = [table.title for table in recovery_tables(journal.study)]
    assert titles == [
        "Recovered, blocks and distill, 1 min each",
        "Recovered, blocks and distill, 10 min each, at most 4,096 tokens a stage",
    ]
    out = io.StringIO()
    print_report(journal.study, Console(file=out))
    lines = out.getvalue().splitlines()
    start = lines.index(titles[0])
    assert lines[start + 1] == "trial\tbefore\tafter\ttest before\ttest after\tfolder"
    before, after = f"{math.exp(4.0):.2f}", f"{math.exp(2.5):.2f}"
    tested = f"{math.exp(5.0):.2f}", f"{math.exp(4.5):.2f}"
    row = ["1", before, after, *tested, "recovered/a/trial-001"]
    assert lines[start + 2].split("\t") == row
    assert lines[start + 3].split("\t")[3:5] == ["-", "-"]


def test_every_recovery_is_shown_with_its_settings_and_scores(journal: Journal) -> None:
    shown: dict[str, tuple[str, Any, Any]] = {}

    class Noting(Tracker):
        def recovery(self, identity: str, name: str, params: Any, metrics: Any) -> None:
            shown[identity] = name, params, metrics

    recover(journal, 0, 3.0, 2.75)
    recover(journal, 1, 4.0, 2.5)
    rank(journal, 1)
    show_recoveries(journal.study, Noting())
    assert set(shown) == {"0 1.0", "1 1.0"}
    name, params, metrics = shown["1 1.0"]
    assert (name, params) == ("recovery-trial-001", {"trial": 1, **MINUTE})
    assert metrics == {
        f"{text}_{model}_{key}": value
        for text, models in (("validation", (4.0, 2.5)), ("test", (5.0, 4.5)))
        for model, nll in zip(("before", "after"), models, strict=True)
        for key, value in scores(nll).items()
    }
    assert not any(key.startswith("test") for key in shown["0 1.0"][2])
