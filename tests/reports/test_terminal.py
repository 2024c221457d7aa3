"""The report fits a terminal of 80 columns, shows the right numbers and leaves nothing unsaid."""

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from lrbo.files.tables import Table, columns
from lrbo.layers.options import Cost, Measure, ModelAccount, account
from lrbo.reports.terminal import print_report, print_table
from lrbo.study.journal import Study
from tests.reports.test_gains import lost
from tests.reports.test_results import timed_front
from tests.support.journal import BYTES, Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "mine")


def terminal(out: io.StringIO, width: int = 80) -> Console:
    return Console(width=width, file=out, highlight=False, force_terminal=True, color_system=None)


def printed(study: Study, width: int = 80) -> str:
    out = io.StringIO()
    print_report(study, terminal(out, width))
    return out.getvalue()


def part(text: str, title: str) -> list[list[str]]:
    """Return the cells of the part below a title."""
    lines = text.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(title)]
    body = lines[start + 1 :]
    end = next((number for number, line in enumerate(body) if not line.strip()), len(body))
    return [re.split(r"\s{1,}", line.strip()) for line in body[:end] if "──" not in line]


def test_a_narrow_terminal_has_fewer_columns_and_whole_numbers(journal: Journal) -> None:
    study = with_everything(journal)
    wide, narrow = printed(study), printed(study, 50)
    assert "no room" not in wide
    assert "no room here for MACs, size, params" in narrow
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= 50
    rows = [cells for cells in part(narrow, "Results") if cells[0] == "best"]
    assert rows[0] == [cell for cell in row(wide, "Results", "best") if cell in rows[0]]
    assert rows[0][-1] == row(wide, "Results", "best")[-1]


def test_a_weight_on_the_divergence_is_said(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "mine", "search.kl_weight=0.5")
    assert "nll + 0.5 KL(dense || compressed)" in printed(with_everything(journal))


def row(text: str, title: str, first: str) -> list[str]:
    """Return the one row of a part that begins with a cell."""
    (match,) = [cells for cells in part(text, title) if cells[0] == first]
    return match


def with_everything(journal: Journal) -> Study:
    journal.score_dense(2.0)
    journal.complete(0, 3.0, "uniform")
    journal.complete(1, 2.75, "start")
    journal.fail(2, "NonFiniteError: loss is nan")
    journal.complete(3, 2.25, kl_dense_to_compressed=0.375)
    journal.complete(4, 2.5, "model")
    journal.suggest(5, "model")
    journal.tested("dense", None, 2.125)
    journal.tested("best", 3, 2.375)
    return journal.study


def test_results_show_dense_baseline_start_and_best_with_their_numbers(journal: Journal) -> None:
    text = printed(with_everything(journal))
    title = "Results"
    # Sizes of the whole model: counted from the layers by hand, head and embeddings included.
    counted = {
        index: journal.counted(record.request.allocation)
        for index, record in journal.study.state.trials.items()
    }
    best, uniform, start = counted[3], counted[0], counted[1]
    sizes = {
        "dense": best.model_dense,
        "uniform": uniform.model,
        "start": start.model,
        "best": best.model,
    }

    def share(counted: ModelAccount) -> str:
        return f"{100 * counted.units.parameters / counted.units_dense.parameters:.2f}%"

    measured = {
        "dense": ["2.0000", "7.39", "0.0000", "100.00%"],
        "uniform": ["0", "3.0000", "20.09", "0.3750", share(uniform)],
        "start": ["1", "2.7500", "15.64", "0.3438", share(start)],
        "best": ["3", "2.2500", "9.49", "0.3750", share(best)],
    }
    tested = {"dense": "8.37", "uniform": "-", "start": "-", "best": "10.75"}
    for name, cost in sizes.items():
        cells = row(text, title, name)
        head, (shown_parameters, shown_size, unit, shown_macs, test) = cells[1:-5], cells[-5:]
        assert head == measured[name]
        assert shown_parameters.endswith("k")
        assert float(shown_parameters[:-1]) == round(cost.parameters / 1000, 3)
        assert (float(shown_size), unit) == (round(cost.bytes / 1024, 1), "KiB")
        assert float(shown_macs[:-1]) == round(cost.macs / 1000, 3)
        assert test == tested[name]
    assert "test: words[test]" in text  # brackets are text, not markup


def test_the_header_counts_the_trials_by_their_ends(journal: Journal) -> None:
    text = printed(with_everything(journal))
    head = text.split("Results")[0]
    assert "4 completed, 1 without a value, 1 not ended, 3.84k tokens scored" in head
    for name in ("mine", "tiny (float32 on cpu)", "bolaco, space per_kind", "0.8 of the"):
        assert name in head
    assert f"{journal.space.problem.budget.limit:,} parameters" in head


def test_time_is_shared_out_over_the_stages(journal: Journal) -> None:
    text = printed(with_everything(journal))
    # Six trials were suggested, five of them scored and logged.
    assert row(text, "Time", "suggestion") == ["suggestion", "3.0", "0.50", "20%"]
    assert row(text, "Time", "allocation") == ["allocation", "1.5", "0.25", "10%"]
    assert row(text, "Time", "scoring") == ["scoring", "10.0", "2.00", "66%"]
    assert row(text, "Time", "logging") == ["logging", "0.6", "0.12", "4%"]


def test_failures_are_told_by_reason_with_their_trials(journal: Journal) -> None:
    journal.complete(0, 2.0)
    for index, reason in enumerate(["loss is nan", "no memory", "loss is nan"], start=1):
        journal.fail(index, reason + "\nand a traceback nobody wants here")
    journal.fail(4, "loss is nan", outcome="failed")
    journal.fail(5, None)
    journal.fail(6, " \n ")
    rows = part(printed(journal.study), "Trials without a value")
    assert [" ".join(cells) for cells in rows] == [
        "trials outcome reason",
        "1, 3 abandoned loss is nan",
        "2 abandoned no memory",
        "4 failed loss is nan",
        "5, 6 abandoned no reason given",
    ]


def test_a_long_reason_wraps_and_loses_nothing(journal: Journal) -> None:
    reason = "StatisticsError: " + " ".join(f"layer[{number}] is [bad]" for number in range(30))
    unbroken = "x" * 200
    journal.fail(0, reason)
    journal.fail(1, unbroken)
    text = printed(journal.study)
    assert max(map(len, text.splitlines())) <= 80
    cells = [cell for line in part(text, "Trials without a value")[1:] for cell in line]
    assert " ".join(cells).startswith(f"0 abandoned {reason} 1 abandoned x")
    assert "".join(cells).endswith(unbroken)


def test_many_trials_with_one_reason_wrap_too(journal: Journal) -> None:
    for index in range(40):
        journal.fail(index, "loss is nan")
    text = printed(journal.study)
    assert max(map(len, text.splitlines())) <= 80
    numbers = re.findall(r"\d+(?=,|$|\s)", text.split("Trials without a value")[1].split("Time")[0])
    assert [int(number) for number in numbers] == list(range(40))


def test_a_study_that_only_began_says_so(journal: Journal) -> None:
    text = printed(journal.study)
    assert "0 completed" in text
    assert "No trial has a value yet." in text
    for title in ("Results", "Front", "Share of", "Weights of", "Trials without a value", "Time"):
        assert title not in text


def test_a_study_with_failures_only_shows_why(journal: Journal) -> None:
    journal.score_dense(2.0)
    journal.fail(0, "loss is nan")
    text = printed(journal.study)
    dense = account(journal.layers, Cost(0, 0, 0), itemsize=BYTES).model_dense
    cells = row(text, "Results", "dense")
    assert cells[:5] == ["dense", "2.0000", "7.39", "0.0000", "100.00%"]
    assert float(cells[5].removesuffix("k")) == round(dense.parameters / 1000, 3)
    assert (float(cells[6]), cells[7]) == (round(dense.bytes / 1024, 1), "KiB")
    assert float(cells[8].removesuffix("k")) == round(dense.macs / 1000, 3)
    assert cells[9:] == ["-"]
    assert [cells[0] for cells in part(text, "Results")][:2] == ["model", "dense"]
    assert "0 completed, 1 without a value" in text
    assert part(text, "Trials without a value")[1:] == [["0", "abandoned", "loss", "is", "nan"]]
    assert "Front" not in text
    assert row(text, "Time", "scoring") == ["scoring", "2.0", "2.00", "70%"]


@pytest.mark.parametrize(("points", "left"), [(10, 0), (11, 1), (14, 4)])
def test_a_long_front_says_how_many_were_left_out(tmp_path: Path, points: int, left: int) -> None:
    journal = Journal(tmp_path / "mine", "budget=front", "search.size=keep_ratio")
    for index in range(points):  # each one larger and better than the one before
        journal.complete(
            index, 3.0 - index / 8, parameters=1000 + index, keep_ratio=0.5 + index / 100
        )
    rows = part(printed(journal.study), "Front")
    shown = [cells for cells in rows[1:] if cells[0].isdecimal()]
    assert [int(cells[0]) for cells in shown] == list(range(min(points, 10)))
    assert shown[1] == ["1", f"{math.exp(2.875):.2f}", "2.8750", "51.000%", "1,001"]
    assert rows[11:12] == ([["and", str(left), "larger"]] if left else rows[11:12])
    assert ("larger" in " ".join(map(" ".join, rows))) == bool(left)


def test_a_front_of_latency_shows_ratios_with_their_errors(tmp_path: Path) -> None:
    text = printed(timed_front(tmp_path / "mine").study)
    assert max(map(len, text.splitlines())) <= 80
    assert part(text, "Front")[1][-3:] == ["0.800", "+-", "0.010"]
    assert part(text, "Front")[2][-3:] == ["0.900", "+-", "0.010"]
    words = " ".join(text.split())
    assert (
        "prefill_latency_ratio, compressed to dense: uniform 1.100 +- 0.010, best 0.900 +- 0.010"
        in words
    )
    assert "hypervolume" in words


@pytest.mark.parametrize(
    ("size", "shown"),
    [("model_bytes", "2.0 KiB"), ("macs_per_token", "2.048k"), ("keep_ratio", "")],
)
def test_a_front_has_a_column_of_what_it_is_minimised_in(
    tmp_path: Path, size: str, shown: str
) -> None:
    journal = Journal(tmp_path / "mine", "budget=front", f"search.size={size}")
    journal.complete(0, 2.0, "uniform", model_bytes=2048.0, macs_per_token=2048.0, keep_ratio=0.5)
    head, first, *_ = part(printed(journal.study), "Front")
    columns = ["trial", "perplexity", "nll", "kept", "parameters", *([size] if shown else [])]
    assert head == columns
    assert " ".join(first).endswith(shown or first[4])


@pytest.mark.parametrize(
    ("measure", "words"),
    [("parameters", "parameters"), ("bytes", "bytes"), ("macs", "multiply-adds")],
)
@pytest.mark.parametrize("space", ["per_kind", "per_kind_and_depth", "per_layer", "weights"])
def test_the_allocation_shows_what_kinds_keep_by_depth(
    tmp_path: Path, space: str, measure: Measure, words: str
) -> None:
    journal = Journal(tmp_path / "mine", f"space={space}", f"budget.measure={measure}")
    record = journal.complete(7, 2.0)
    text = printed(journal.study)
    assert f"kept: share of the {words} of the compressible layers" in " ".join(text.split())
    title = f"Share of the {words} kept in the best trial, 7"
    stored = {name: cost.of(measure) for name, cost in record.request.allocation.costs.items()}
    rows = part(text, title)
    assert rows[0] == ["kind", "block", "0", "block", "1", "all"]
    kinds = dict.fromkeys(spec.kind for spec in journal.layers.compressible)
    assert [cells[0] for cells in rows[1 : len(kinds) + 2]] == [*kinds, "all"]
    for kind in [*kinds, "all"]:
        shares = []
        for blocks in ([0], [1], [0, 1]):
            specs = [
                spec
                for spec in journal.layers.compressible
                if kind in (spec.kind, "all") and spec.block in blocks
            ]
            size = sum(stored[spec.name] for spec in specs)
            dense = Cost.total(
                Cost(s.parameters, BYTES * s.parameters, s.out_features * s.in_features)
                for s in specs
            )
            shares.append(f"{size / dense.of(measure):.1%}")
        assert row(text, title, kind) == [kind, *shares]
    is_dense = any(
        line.strip().startswith("dense in every block: v_proj") for line in text.split("\n")
    )
    assert is_dense == (space != "weights")


def test_weights_stand_apart_from_shares_with_their_factors(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "mine", "space=weights")
    journal.complete(0, 3.0, "uniform")
    assert "Weights of" not in printed(journal.study)  # the baseline has none
    record = journal.complete(3, 2.0)
    text = printed(journal.study)
    rows = part(text, "Weights of the best trial, 3")
    assert rows[0] == ["variable", "weight", "factor"]
    assert rows[1 : len(journal.space.names) + 1] == [
        [name, f"{value:+.3f}", f"{math.exp(value):.3f}"]
        for name, value in record.request.variables.items()
    ]
    assert "-" in "".join(cells[1] for cells in rows[1:])
    assert "exp(weight)" in text
    assert "Weights of" not in printed(with_everything(Journal(tmp_path / "other")))


def test_how_well_losses_were_predicted_is_said_where_it_was_measured(journal: Journal) -> None:
    study = with_everything(journal)
    assert "rank correlation" not in printed(study)
    calibration = journal.measured([(0.1, 0.2), (0.3, 0.1), (0.5, 0.6)])
    line = f"single layers, 3 points: rank correlation {calibration.rank_correlation:.3f}"
    assert line in " ".join(printed(study).split())
    journal.measured([(0.1, 0.2)])  # one point has no correlation
    assert "rank correlation" not in printed(study)


def test_the_analytic_trial_has_its_row(journal: Journal) -> None:
    with_everything(journal)
    assert "analytic" not in printed(journal.study)
    journal.complete(6, 2.375, "analytic")
    text = printed(journal.study)
    assert row(text, "Results", "analytic")[:3] == ["analytic", "6", "2.3750"]
    assert "analytic: the options of least predicted loss" in text


@pytest.mark.parametrize("width", [80, 200, 50])
def test_no_line_is_wider_than_80_columns_or_the_terminal(journal: Journal, width: int) -> None:
    text = printed(with_everything(journal), width)
    assert max(map(len, text.splitlines())) <= min(width, 80)


def test_the_numbers_of_a_large_and_bad_model_fit(journal: Journal) -> None:
    journal.score_dense(17.5)
    large = {
        "model_parameters": 69_123_456_789,
        "model_bytes": 138_246_913_578,
        "macs_per_token": 68_123_456_789,
    }
    for index in range(101):
        journal.complete(index, 25.0, kl_dense_to_compressed=23.4567, **large)
    journal.complete(101, 24.5, kl_dense_to_compressed=23.4567, **large)
    journal.tested("best", 101, 25.5)
    text = printed(journal.study)
    assert row(text, "Results", "best")[:5] == ["best", "101", "24.5000", "4.4e+10", "23.4567"]
    assert row(text, "Results", "best")[-5:] == ["69.12B", "129", "GiB", "68.12B", "1.2e+11"]
    assert "…" not in text


def test_a_name_in_brackets_is_no_markup(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "[red]mine[")
    journal.complete(0, 2.0)
    assert "[red]mine[" in printed(journal.study)


def test_what_the_search_adds_is_printed_with_its_error(journal: Journal) -> None:
    assert "What the search adds" not in printed(with_everything(journal))
    journal.complete(6, 2.5, "analytic", windows=lost(2.5))
    journal.complete(7, 2.125, windows=lost(2.125, 0.125, -0.125, 0.0, 0.0))
    journal.tested("analytic", 6, 2.5, lost(2.5))
    journal.tested("best", 7, 2.5625, lost(2.5625, 0.25, -0.25, 0.25, -0.25))
    text = printed(journal.study)
    lines = [" ".join(cells) for cells in part(text, "What the search adds, nats per token")]
    keep_ratio = f"{journal.study.state.trials[6].metrics['keep_ratio']:.2%}"
    assert lines[0] == "trials kept text best - analytic"
    assert lines[1] == f"7 - 6 {keep_ratio} validation -0.375 +- 0.051"
    assert lines[2] == f"7 - 6 {keep_ratio} test no measurable difference: 0.06 +- 0.14"
    assert row(text, "Results", "analytic")[-1] == f"{math.exp(2.5):.2f}"


def test_one_budget_has_no_front(journal: Journal) -> None:
    assert "Front" not in printed(with_everything(journal))


def test_a_pipe_gets_whole_lines_with_tabs_between_the_cells(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "mine", "budget=front", "search.size=keep_ratio")
    for index in range(14):
        journal.complete(index, 3.0 - index / 8, keep_ratio=0.5 + index / 100)
    reason = " ".join(f"layer[{number}] is [bad]" for number in range(30))
    journal.fail(14, reason)
    out = io.StringIO()
    print_report(journal.study, Console(width=40, file=out))
    lines = out.getvalue().splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert f"14\tabandoned\t{reason}" in lines
    start = lines.index("Front: no other trial is both smaller and better")
    assert lines[start + 1].split("\t") == ["trial", "perplexity", "nll", "kept", "parameters"]
    shown = [line.split("\t")[0] for line in lines[start + 2 : start + 16]]
    assert shown == [str(index) for index in range(14)]  # all of them
    assert "larger" not in out.getvalue()


def test_checkpoints_are_listed_and_said_to_be_gone(journal: Journal, tmp_path: Path) -> None:
    with_everything(journal)
    folder = str(tmp_path / "[gone]")
    journal.compressed(3, folder)
    out = io.StringIO()
    print_report(journal.study, Console(file=out))
    assert f"{folder}\t3\t79.90%\t7.39\t-\tlrbo\tfloat32\tgone" in out.getvalue().splitlines()
    assert "gone" in printed(journal.study)


def test_cells_of_a_pipe_are_text_and_command_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    row = ["[red]mine[/] :smile:", "\x1b[31ma\tb\x07"]
    print_table(Table("title", columns("name", "value"), [row]))
    table = "\ntitle\nname\tvalue\n[red]mine[/] :smile:\t[31ma b\n"
    assert capsys.readouterr().out == table


def test_a_table_of_measurements_is_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "30")
    row = ["a" * 40, "b" * 40]
    print_table(Table("Speed", columns("name", "value"), [row], ["a note"]))
    (shown,) = [line for line in capsys.readouterr().out.splitlines() if row[0] in line]
    assert row[1] in shown
