"""The page holds every number, needs no network, and its command begins the same search again."""

import html
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lrbo.config import compose, saved
from lrbo.files import rendering
from lrbo.files.rendering import render
from lrbo.files.tables import Table, columns
from lrbo.layers.options import DENSE
from lrbo.reports.mlflow_view import write_page
from lrbo.reports.page import Drawing, diagnosed, study_page
from lrbo.study.journal import Study
from tests.reports.test_gains import lost
from tests.support.journal import BYTES, Journal


def figures(page: str) -> list[list[dict[str, Any]]]:
    """Return the traces of every figure, in the order of the page."""
    decoder = json.JSONDecoder()
    return [
        decoder.raw_decode(page[match.end() :])[0]
        for match in re.finditer(r"Plotly\.newPlot\(\s*\"[\w-]+\",\s*", page)
    ]


def traces(page: str, title: str) -> dict[str, dict[str, Any]]:
    """Return the traces of the figure under a title, by name."""
    (figure,) = figures(page[page.index(f"<h2>{title}") :].split("<h2>")[1])
    return {trace.get("name", ""): trace for trace in figure}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    journal = Journal(tmp_path_factory.mktemp("studies") / "a <b> & c", "space=weights")
    journal.score_dense(2.0)
    journal.complete(0, 3.0, "uniform")
    for index, nll in enumerate((2.75, 2.5, 2.25, 2.625, 2.375, 2.125), start=1):
        journal.complete(index, nll, "model" if index > 2 else "sobol")
    journal.fail(7, "NonFiniteError: <loss> is nan")
    journal.tested("best", 6, 2.375)
    return journal.study


@pytest.fixture(scope="module")
def page(study: Study) -> str:
    return study_page(study)


def test_the_page_is_whole_in_itself(study: Study, page: str, pages: None) -> None:
    assert write_page(study).read_text(encoding="utf-8") == page
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "http" not in outside
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page[: page.index("Plotly")])
    assert not re.search(r"<script[^>]+src=", page)


def test_names_and_reasons_are_text_and_not_markup(page: str) -> None:
    assert "a <b>" not in page
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in page
    assert "NonFiniteError: &lt;loss&gt; is nan" in page


class Tags(HTMLParser):
    """The tags of a page with their attributes, and all of its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "</pre></td></script><img src=x onerror=alert(1)> \"'&amp;{{ 1 }}\u2028"


def test_nothing_that_is_put_into_the_page_is_markup() -> None:
    def filled(value: str) -> Tags:
        table = Table(value, columns(value), [[value]], [value])
        page = render(
            "report.html", study=value, plotly="", lines=[value], head_tables=[table],
            has_best=True, figures=[Drawing(value, value, "")], detail_tables=[table],
            trials=table, command=value, origins=[value], config_yaml=value,
        )  # fmt: skip
        return Tags(page)

    plain, hostile = filled("plain"), filled(HOSTILE)
    assert hostile.tags == plain.tags
    assert hostile.text == plain.text.replace("plain", HOSTILE)


def test_only_the_library_and_what_it_draws_go_in_as_they_are() -> None:
    (folder,) = Path(rendering.__file__).parent.glob("templates")
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"{{([^}]*safe[^}]*)}}", text) == [" plotly|safe ", " figure.drawn|safe "]


def test_names_of_layers_are_text_in_figures(study: Study, page: str, tmp_path: Path) -> None:
    hostile = shutil.copytree(study.folder, tmp_path / study.name)
    for name in ("study.json", "journal.jsonl"):
        text = (hostile / name).read_text(encoding="utf-8")
        (hostile / name).write_text(text.replace("q_proj", "q</script><i>&lt;"), encoding="utf-8")
    hostile_page = study_page(Study(hostile))
    assert [tag for tag, _ in Tags(hostile_page).tags] == [tag for tag, _ in Tags(page).tags]
    (drawn,) = traces(hostile_page, "What the best trial keeps").values()
    kinds = [kind for kind in drawn["y"] if kind.startswith("q")]
    assert kinds == ["q&lt;/script&gt;&lt;i&gt;&amp;lt;"]  # as plotly's own markup has it
    assert sum("q&lt;/script&gt;&lt;i&gt;&amp;lt;<br>" in text for text in drawn["text"][-1]) > 0


def test_the_trials_are_drawn_in_order_with_the_best_so_far(study: Study, page: str) -> None:
    by_name = traces(page, "Trials in order")
    assert by_name["uniform baseline"]["x"] == [0]
    assert by_name["Sobol"]["x"] == [1, 2]
    assert by_name["surrogate model"]["x"] == [3, 4, 5, 6]
    assert "Not drawn, but in the table below: 1 no value." in page
    best = [record.metrics["perplexity"] for record in study.state.completed]
    assert by_name["best so far"]["y"] == [min(best[: k + 1]) for k in range(7)]


def test_the_heat_map_holds_what_each_layer_keeps(study: Study, page: str) -> None:
    best = study.state.best()
    assert best is not None
    (drawn,) = traces(page, "What the best trial keeps").values()
    options, costs = best.request.allocation.options, best.request.allocation.costs
    for kind, row, texts in zip(drawn["y"], drawn["z"], drawn["text"], strict=True):
        for share, text in zip(row, texts, strict=True):
            name = text.split("<br>")[0]
            assert name.endswith(kind)
            option = options[name]
            assert (share == 1.0) == (option == DENSE)
            label = "dense" if option == DENSE else f"{option.form}, rank {option.level[0]}"
            assert f"<br>{label}<br>{costs[name].parameters:,} of" in text
            assert text.endswith(" parameters")
    assert sum(map(len, drawn["z"])) == len(options)


def test_the_heat_map_names_every_form_and_what_the_budget_counts(tmp_path: Path) -> None:
    journal = Journal(
        tmp_path / "mine",
        "space=weights",
        "space.forms=[factored,pivoted]",
        "budget.measure=bytes",
    )
    journal.score_dense(2.0)
    record = journal.complete(0, 2.5)
    page = study_page(journal.study)
    (drawn,) = traces(page, "What the best trial keeps").values()
    texts = {text.split("<br>")[0]: text for row in drawn["text"] for text in row}
    allocation = record.request.allocation
    for name, option in allocation.options.items():
        spec = journal.layers.by_name[name]
        dense = BYTES * spec.parameters
        assert texts[name].endswith(f"<br>{allocation.costs[name].bytes:,} of {dense:,} bytes")
        assert f"<br>{option.form}" in texts[name]
    assert "kept: share of the bytes of the compressible layers" in page


def test_a_front_is_drawn_where_one_was_searched(tmp_path: Path, page: str) -> None:
    assert "Loss against size" not in page
    assert "Front:" not in page
    journal = Journal(tmp_path / "front", "budget.lowest=0.5", "search.trials=9")
    journal.score_dense(2.0)
    for index, nll in enumerate((3.0, 2.5, 2.75)):
        journal.complete(index, nll)
    by_name = traces(study_page(journal.study), "Loss against size")
    assert by_name["front"]["y"]
    assert set(by_name["front"]["y"]) <= {
        record.metrics["perplexity"] for record in journal.study.state.completed
    }


def test_the_surrogate_is_judged_only_where_there_is_enough_to_judge(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "short")
    journal.score_dense(2.0)
    page = study_page(journal.study)
    assert "No trial has a value yet" in page
    for index in range(3):
        journal.complete(index, 2.5 + index / 8)
    assert diagnosed(journal.study) is None
    assert "Which variables matter" not in study_page(journal.study)


def test_the_command_on_the_page_begins_the_same_search_again(study: Study, page: str) -> None:
    (shown,) = re.findall(r"<h2>To repeat it</h2>\n<pre>(.*?)</pre>", page)
    name, command, *typed = shlex.split(html.unescape(shown))
    assert (name, command) == ("lrbo", "search")
    assert saved.differences(study.config, compose.composed("search", typed)) == []  # type: ignore[arg-type]


def test_the_head_has_the_analytic_trial_and_what_the_search_adds(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "mine")
    journal.score_dense(2.0)
    journal.complete(0, 3.0, "uniform")
    journal.complete(1, 2.5, "analytic", windows=lost(2.5))
    journal.complete(2, 2.25, "model", windows=lost(2.25, 0.125, -0.125, 0.0, 0.0))
    journal.tested("analytic", 1, 2.0, lost(2.0))
    journal.tested("best", 2, 2.0625, lost(2.0625, 0.25, -0.25, 0.25, -0.25))
    journal.compressed(2, "/no/<where>")
    page = study_page(journal.study)
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]
    (analytic,) = [row for row in cells if row[0] == "analytic"]
    assert [*analytic[2:4], *analytic[-2:]] == ["2.5000", "12.18", "2.0000", "7.39"]
    added = [row for row in cells if row[0] == "2 - 1"]
    assert [row[2:] for row in added] == [
        ["validation", "-0.250 +- 0.051"],
        ["test", "no measurable difference: 0.06 +- 0.14"],
    ]
    assert "analytic 12.18" in traces(page, "Trials in order")
    assert ["/no/&lt;where&gt;", "2", "79.90%", "7.39", "-", "lrbo", "float32", "gone"] in cells
