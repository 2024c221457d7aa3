"""What is reported is what the journal says: counted again by other means, nothing made up."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from lrbo.allocation.allocate import Allocation
from lrbo.layers.options import DENSE, MEASURES, Cost, Measure, Option, cost_of
from lrbo.reports import allocations, results
from lrbo.reports.pictures import draw_figures
from lrbo.reports.study_tables import detail_tables
from lrbo.tasks.metrics import CAUSAL_LM
from tests.support.journal import BYTES, SECONDS, TOKENS, Journal

# Ratios are divided once here and once there, in another order of the same sums.
RATIO = {"rel": 1e-12}
METRICS = results.metric_columns(CAUSAL_LM)
STAGES = [f"{stage}_s" for stage in SECONDS]
COLUMNS = (
    "trial", "origin", "outcome", "error", *METRICS, "seconds", *STAGES, "best_perplexity",
    "is_best", "on_front",
)  # fmt: skip


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "mine")


@pytest.fixture
def full(journal: Journal) -> Journal:
    """Six trials: one without a value, one that still runs, the best neither first nor last."""
    journal.score_dense(2.0)
    journal.complete(0, 3.0, "uniform")
    journal.complete(1, 2.75, "start")
    journal.fail(2, "NonFiniteError: loss is nan")
    journal.complete(3, 2.25)
    journal.complete(4, 2.5, "model")
    journal.suggest(5, "model")
    journal.tested("dense", None, 2.125)
    journal.tested("best", 3, 2.375)
    return journal


# --- summary -----------------------------------------------------------------------------------


def covered_of(journal: Journal, best: int | None) -> dict[str, object]:
    """Return what a study says of the parts that its budget covers; all is stored in one dtype."""
    inside = sum(spec.parameters for spec in journal.layers.compressible)
    whole = journal.layers.parameters
    share = None if best is None else best / (BYTES * (whole - inside) + best)
    return {
        "include": ["blocks"],
        "parameters": inside / whole,
        "bytes": inside / whole,
        "best_bytes": share,
    }


def test_a_study_that_only_began_has_every_key_and_no_value(journal: Journal) -> None:
    assert results.summary(journal.study) == {
        "study": "mine",
        "trials_completed": 0,
        "trials_stopped": 0,
        "trials_failed": 0,
        "tokens_scored": 0,
        "validation_windows": None,
        "dense": None,
        "uniform": None,
        "analytic": None,
        "best": None,
        "covered": covered_of(journal, None),
        "gains": [],
        "front": [],
        "hypervolume": None,
        "checkpoints": [],
        "recovered": [],
        "seconds": dict.fromkeys(SECONDS, 0.0),
        "test": {},
    }


def test_summary_says_what_was_written(full: Journal) -> None:
    records = full.study.state.trials
    parameters = {index: records[index].request.allocation.cost.parameters for index in records}
    total = sum(spec.parameters for spec in full.layers.compressible)
    assert results.summary(full.study) == {
        "study": "mine",
        "trials_completed": 4,
        "trials_stopped": 0,
        "trials_failed": 1,
        "tokens_scored": 4 * TOKENS,
        "validation_windows": None,
        "dense": {"nll": 2.0, "perplexity": math.exp(2.0)},
        "uniform": {
            "trial": 0,
            "nll": 3.0,
            "perplexity": math.exp(3.0),
            "keep_ratio": parameters[0] / total,
        },
        "analytic": None,
        "best": {
            "trial": 3,
            "nll": 2.25,
            "perplexity": math.exp(2.25),
            "keep_ratio": parameters[3] / total,
            "parameters": parameters[3],
        },
        "covered": covered_of(full, records[3].request.allocation.cost.bytes),
        "gains": [],
        "front": [],  # of one budget there is none
        "hypervolume": None,
        "checkpoints": [],
        "recovered": [],
        # The trial that runs was suggested and allocated, so its seconds count too.
        "seconds": {"suggestion": 3.0, "allocation": 1.5, "scoring": 10.0, "logging": 0.625},
        "test": {
            "dense": {
                "trial": None,
                "text": "words[test]",
                "nll": 2.125,
                "perplexity": math.exp(2.125),
            },
            "best": {
                "trial": 3,
                "text": "words[test]",
                "nll": 2.375,
                "perplexity": math.exp(2.375),
            },
        },
    }


def test_summary_comes_back_from_json_unchanged(full: Journal) -> None:
    summary = results.summary(full.study)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_the_best_trial_has_the_lowest_objective_not_the_lowest_loss(journal: Journal) -> None:
    journal.complete(0, 2.0, objective=3.0)
    journal.complete(1, 2.5, objective=2.75)
    assert results.summary(journal.study)["best"]["trial"] == 1
    table = results.frame(journal.study)
    assert list(table["is_best"]) == [False, True]
    assert list(table["best_perplexity"]) == [math.exp(2.0), math.exp(2.5)]


def test_a_baseline_without_a_value_is_none(journal: Journal) -> None:
    journal.suggest(0, "uniform")
    journal.study.record(
        "ended", trial=0, outcome="failed", metrics={}, error="gone", seconds={"scoring": 1.0}
    )
    summary = results.summary(journal.study)
    assert summary["uniform"] is None
    assert summary["best"] is None
    assert (summary["trials_completed"], summary["trials_failed"]) == (0, 1)


# --- frame -------------------------------------------------------------------------------------


def test_frame_has_a_row_per_ended_trial_in_the_order_of_numbers(journal: Journal) -> None:
    for index in (2, 0, 1):
        journal.complete(index, 3.0 - index / 4)
    journal.suggest(3, "model")
    table = results.frame(journal.study)
    assert list(table["trial"]) == [0, 1, 2]
    assert list(table["nll"]) == [3.0, 2.75, 2.5]


def test_frame_has_the_same_columns_and_types_with_and_without_trials(
    journal: Journal, tmp_path: Path
) -> None:
    empty = results.frame(journal.study)
    assert len(empty) == 0
    assert tuple(empty.columns) == COLUMNS
    journal.fail(0, "why")
    only_failed = results.frame(journal.study)
    journal.complete(1, 2.0)
    some = results.frame(journal.study)
    numbers = set(COLUMNS) - {
        "trial", "origin", "outcome", "error", "is_best", "on_front"
    }  # fmt: skip
    for table in (empty, only_failed, some):
        assert tuple(table.columns) == COLUMNS
        assert table["trial"].dtype == "int64"
        assert {str(table[name].dtype) for name in numbers} == {"float64"}
        assert {str(table[name].dtype) for name in ("is_best", "on_front")} == {"bool"}


def test_frame_marks_the_best_so_far_and_misses_what_failed_trials_lack(full: Journal) -> None:
    table = results.frame(full.study).set_index("trial")
    assert list(table.index) == [0, 1, 2, 3, 4]
    assert list(table["best_perplexity"]) == [math.exp(n) for n in (3.0, 2.75, 2.75, 2.25, 2.25)]
    assert list(table["is_best"]) == [False, False, False, True, False]
    on_front = {point["trial"] for point in results.summary(full.study)["front"]}
    assert set(table.index[table["on_front"]]) == on_front
    assert table.loc[2, METRICS].isna().all()
    assert table.loc[2, "outcome"] == "abandoned"
    assert table.loc[2, "error"] == "NonFiniteError: loss is nan"
    for index in (0, 1, 3, 4):
        metrics = full.study.state.trials[index].metrics
        measured = {name: metrics[name] for name in METRICS if name in metrics}
        assert {c: table.loc[index, c] for c in measured} == measured
        unmeasured = set(METRICS) - set(measured)
        assert unmeasured == {n for n in METRICS if "latency" in n}
        assert table.loc[index, sorted(unmeasured)].isna().all()
        assert pd.isna(table.loc[index, "error"])
    assert list(table["seconds"]) == [sum(SECONDS.values())] * 5
    assert table.loc[0, "origin"] == "uniform"
    assert {stage: table.loc[0, f"{stage}_s"] for stage in SECONDS} == SECONDS


def test_before_the_first_value_there_is_no_best_so_far(journal: Journal) -> None:
    journal.fail(0, "why")
    journal.complete(1, 2.0)
    assert list(results.frame(journal.study)["best_perplexity"].isna()) == [True, False]


def timed_front(folder: Path) -> Journal:
    """Four trials: the smallest is the slowest, and of the others one is beaten."""
    journal = Journal(
        folder, "budget=front", "latency.enabled=true", "search.size=prefill_latency_ratio"
    )
    journal.score_dense(2.0)
    for index, (nll, keep_ratio, ratio) in enumerate(
        [(3.0, 0.9, 1.1), (2.5, 0.8, 0.9), (2.75, 0.7, 0.95), (2.875, 0.6, 0.8)]
    ):
        metrics = {"prefill_latency_ratio": ratio, "prefill_latency_ratio_sem": 0.01}
        origin = "uniform" if index in (0, 3) else "model"
        journal.complete(index, nll, origin, keep_ratio=keep_ratio, **metrics)
    return journal


def test_a_front_of_latency_is_one_of_measured_times(tmp_path: Path) -> None:
    journal = timed_front(tmp_path / "mine")
    summary = results.summary(journal.study)
    assert summary["front"] == [
        {"trial": 3, "nll": 2.875, "keep_ratio": 0.6, "prefill_latency_ratio": 0.8},
        {"trial": 1, "nll": 2.5, "keep_ratio": 0.8, "prefill_latency_ratio": 0.9},
    ]
    area = summary["hypervolume"]
    assert area["size"] == "prefill_latency_ratio"
    # A tenth of the range of the baselines beyond the worse of them, in loss and in time.
    loss, ratio = 3.0 + 0.0125, 1.1 + 0.03
    assert area["reference"] == pytest.approx({"loss": loss, "prefill_latency_ratio": ratio})
    expected = (ratio - 0.8) * (loss - 2.875) + (ratio - 0.9) * (2.875 - 2.5)
    assert area["value"] == pytest.approx(expected)
    table = results.frame(journal.study)
    assert list(table["on_front"]) == [False, True, False, True]
    assert list(table["prefill_latency_ratio_sem"]) == [0.01] * 4
    assert "front.png" in [path.name for path in draw_figures(journal.study)]


def test_of_trials_of_several_sizes_those_are_on_the_front_that_no_other_beats(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path / "mine", "budget=front", "search.size=keep_ratio")
    losses = {0: (3.0, 0.5), 1: (2.75, 0.6), 2: (2.875, 0.65), 3: (2.5, 0.7), 4: (2.5, 0.8)}
    for index, (nll, ratio) in losses.items():
        journal.complete(index, nll, keep_ratio=ratio)
    expected = [
        index
        for index, (nll, ratio) in losses.items()
        if not any(a <= nll and b <= ratio and (a, b) != (nll, ratio) for a, b in losses.values())
    ]
    front = results.summary(journal.study)["front"]
    assert [point["trial"] for point in front] == expected == [0, 1, 3]
    assert front[1] == {"trial": 1, "nll": 2.75, "keep_ratio": 0.6}


def test_checkpoints_are_told_with_what_is_left_of_them(journal: Journal, tmp_path: Path) -> None:
    for trial in (0, 3):
        journal.complete(trial, 2.0)
    for trial, name in ((0, "here"), (0, "gone"), (3, "here")):
        journal.compressed(trial, tmp_path / name, **({"test": "8.5"} if trial else {}))
    (tmp_path / "here").mkdir()
    (tmp_path / "here/config.json").write_text("{}", encoding="utf-8")
    here, gone = results.summary(journal.study)["checkpoints"]
    assert here == {
        "trial": 3, "folder": str(tmp_path / "here"), "exists": True, "format": "lrbo",
        "dtype": "float32", "keep_ratio": 0.799, "validation_perplexity": 7.3891,
        "test_perplexity": 8.5,
    }  # fmt: skip
    assert (gone["folder"], gone["exists"]) == (str(tmp_path / "gone"), False)
    assert gone["test_perplexity"] is None


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama_untied", "llama_tied", "llama_biased"])
@pytest.mark.parametrize("method", ["bolaco", "svd"])
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("forms", ["factored", "pivoted", "factored,pivoted"])
def test_sizes_agree_with_the_accountant(
    case: str, method: str, forms: str, measure: Measure, tmp_path: Path
) -> None:
    journal = Journal(
        tmp_path / "mine",
        f"method={method}",
        f"space.forms=[{forms}]",
        f"budget.measure={measure}",
        "space=weights",
        case=case,
    )
    record = journal.complete(0, 2.0)
    allocation = record.request.allocation
    counted = journal.counted(allocation)
    table = allocations.options_frame(journal.study.about, record.request.allocation).set_index(
        "name"
    )
    assert set(table["form"]) <= {*forms.split(","), "dense"}
    for spec in journal.layers.compressible:
        bias = spec.has_bias or journal.method.adds_bias
        cost = cost_of(spec, allocation.options[spec.name], bias=bias, itemsize=BYTES)
        assert table.loc[spec.name, "stored"] == cost.of(measure)
    assert table["stored"].sum() == allocation.cost.of(measure) == counted.units.of(measure)
    assert table["dense"].sum() == counted.units_dense.of(measure)
    assert allocations.dense_size(journal.study.about) == {
        "model_parameters": counted.model_dense.parameters,
        "model_bytes": counted.model_dense.bytes,
        "macs_per_token": counted.model_dense.macs,
    }


def test_options_frame_has_a_row_per_layer_with_no_rank_where_dense(journal: Journal) -> None:
    record = journal.complete(0, 2.0)
    table = allocations.options_frame(journal.study.about, record.request.allocation)
    assert list(table.columns) == [
        "name", "kind", "block", "form", "option", "rank", "stored", "dense", "kept"
    ]  # fmt: skip
    assert list(table["name"]) == [spec.name for spec in journal.layers.compressible]
    assert list(table["kind"]) == [spec.kind for spec in journal.layers.compressible]
    assert list(table["block"]) == [spec.block for spec in journal.layers.compressible]
    options = record.request.allocation.options
    for row in table.itertuples():
        level = () if pd.isna(row.rank) else (int(row.rank),)
        assert Option(row.form, level) == options[row.name]
        assert row.option == ("dense" if row.form == "dense" else f"rank {row.rank}")
        assert row.kept == row.stored / row.dense
        assert row.kept == 1.0 if options[row.name] == DENSE else row.kept < 1.0
    assert 0 < len(record.request.allocation.compressed) < len(options)


def test_the_dense_size_is_known_before_any_trial(journal: Journal) -> None:
    layers = journal.layers
    assert allocations.dense_size(journal.study.about) == {
        "model_parameters": layers.parameters,
        "model_bytes": BYTES * layers.parameters,
        "macs_per_token": sum(
            spec.out_features * spec.in_features for spec in layers.layers if spec.multiplies
        ),
    }


def test_dense_kinds_are_dense_in_every_block(journal: Journal) -> None:
    record = journal.complete(0, 2.0)
    problem = journal.space.problem
    dense = {
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
    }
    form = problem.menus["model.layers.0.self_attn.v_proj"].sections[0].form
    options = {
        name: DENSE if name in dense else Option(form, (3,))
        for name in record.request.allocation.options
    }
    costs: dict[str, Cost] = {
        name: cost_of(
            problem.menus[name].unit, option, bias=journal.method.adds_bias, itemsize=BYTES
        )
        for name, option in options.items()
    }
    decided = Allocation(options, costs, problem.budget)
    journal.complete(1, 1.5, allocation=decided)
    (table,) = [t for t in detail_tables(journal.study) if "best trial, 1" in t.title]
    assert "dense in every block: v_proj" in table.notes


# --- figures and header ------------------------------------------------------------------------


def test_without_a_value_nothing_is_drawn(journal: Journal) -> None:
    journal.score_dense(2.0)
    journal.fail(0, "why")
    assert draw_figures(journal.study) == []
    assert not (journal.study.folder / "figures").exists()


def test_one_value_is_enough_to_draw_without_baseline_and_dense(journal: Journal) -> None:
    journal.complete(0, 2.0)
    paths = draw_figures(journal.study)
    assert [path.name for path in paths] == ["convergence.png", "ranks.png"]
    for path in paths:
        assert path.parent == journal.study.folder / "figures"
        assert path.read_bytes().startswith(b"\x89PNG")


def test_predictions_are_drawn_where_they_were_measured(journal: Journal) -> None:
    journal.complete(0, 2.0)
    assert results.sensitivity(journal.study) is None
    calibration = journal.measured([(0.1, 0.2), (0.3, 0.1), (0.5, 0.6)])
    assert results.sensitivity(journal.study) == calibration
    names = [path.name for path in draw_figures(journal.study)]
    assert names == ["convergence.png", "ranks.png", "sensitivity.png"]


def test_figures_replace_the_older_ones_whole_or_not_at_all(
    full: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = draw_figures(full.study)
    before = [path.read_bytes() for path in paths]

    def dying(self: Figure, target: Path, **_: object) -> None:
        target.write_bytes(b"half a picture")
        raise OSError("No space left on device")

    full.complete(6, 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", dying)
        with pytest.raises(OSError, match="No space left"):
            draw_figures(full.study)
    assert [path.read_bytes() for path in paths] == before
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(p.name for p in paths)
    assert draw_figures(full.study) == paths
    assert all(path.read_bytes() != old for path, old in zip(paths, before, strict=True))


def test_the_header_names_model_method_space_and_budget(journal: Journal) -> None:
    assert results.described(journal.study) == {
        "Model": "tiny (float32 on cpu)",
        "Method": "bolaco, space per_kind",
        "Budget": (
            f"{journal.space.problem.budget.limit:,} parameters, 0.8 of the compressible ones"
        ),
        "Covered": "blocks: 64.3% of the dense model's parameters and bytes",
        "Trials": "0 completed",
    }


@pytest.mark.parametrize(
    ("measure", "words"),
    [("parameters", "parameters"), ("bytes", "bytes"), ("macs", "multiply-adds")],
)
def test_the_header_says_what_the_budget_counts(measure: str, words: str, tmp_path: Path) -> None:
    one = Journal(tmp_path / "one", f"budget.measure={measure}")
    limit = one.space.problem.budget.limit
    assert results.described(one.study)["Budget"] == (
        f"{limit:,} {words}, 0.8 of the compressible ones"
    )
    front = Journal(tmp_path / "front", f"budget.measure={measure}", "budget.lowest=0.5")
    assert results.described(front.study)["Budget"] == (
        f"from 0.5 to 0.8 of the {words} of compressible layers"
    )
