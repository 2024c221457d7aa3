"""Figures hold what the tables say: data of the lines, labels, places."""

import itertools
import math
from typing import get_args

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lrbo.reports import plots, style
from lrbo.tasks.metrics import CAUSAL_LM, COSTS
from lrbo.trials.records import Origin

PERPLEXITY = CAUSAL_LM.headline
COLUMNS = [
    "trial",
    "origin",
    "outcome",
    "perplexity",
    "keep_ratio",
    "best_perplexity",
    "on_front",
]


@pytest.fixture
def trials() -> pd.DataFrame:
    """Seven trials of one budget, one of which has no value."""
    return pd.DataFrame(
        [
            (0, "uniform", "completed", 30.0, 0.6995, 30.0, True),
            (1, "start", "completed", 35.0, 0.6999, 30.0, False),
            (2, "sobol", "completed", 28.0, 0.6998, 28.0, True),
            (3, "sobol", "failed", math.nan, math.nan, 28.0, False),
            (4, "model", "completed", 29.0, 0.7000, 28.0, False),
            (5, "model", "completed", 26.0, 0.6999, 26.0, True),
            (6, "model", "completed", 27.0, 0.6999, 26.0, False),
        ],
        columns=COLUMNS,
    ).assign(objective=lambda table: table["perplexity"].map(math.log))


@pytest.fixture
def options() -> pd.DataFrame:
    """Three kinds over four blocks; ``v_proj`` is dense in block 2, and has no rank in block 3."""
    rows = [
        (f"{kind}.{block}", kind, block, "pivoted", 8, 0.1 * (block + 1) + index / 20)
        for block in range(4)
        for index, kind in enumerate(("q_proj", "v_proj", "down_proj"))
    ]
    table = pd.DataFrame(rows, columns=["name", "kind", "block", "form", "rank", "kept"])
    table = table.astype({"rank": "Int64", "block": "Int64"})
    is_dense = (table["kind"] == "v_proj") & (table["block"] == 2)
    table.loc[is_dense, ["form", "kept"]] = ["dense", 1.0]
    table.loc[(table["kind"] == "v_proj") & (table["block"] > 1), "rank"] = pd.NA
    return table


def lines(axes: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axes.lines}


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def legend(figure: Figure) -> list[str]:
    assert len(figure.legends) == 1
    return [text.get_text() for text in figure.legends[0].get_texts()]


def headings(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def assert_inside(figure: Figure) -> None:
    """No text is cut off at the border, and none of the annotations lies over another."""
    FigureCanvasAgg(figure).draw()
    written = [text for axes in figure.axes if axes.get_visible() for text in axes.texts]
    labels = [
        label
        for axes in figure.axes
        if axes.get_visible()
        for label in (axes.xaxis.label, axes.yaxis.label)
    ]
    everything = [*figure.texts, *figure.legends, *written, *(x for x in labels if x.get_text())]
    assert len(everything) > 3
    for each in everything:
        box = each.get_window_extent()
        assert box.x0 >= 0, each
        assert box.x1 <= figure.bbox.x1, each
        assert box.y0 >= 0, each
        assert box.y1 <= figure.bbox.y1, each
    for one, other in itertools.combinations(written, 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent()), (one, other)


def test_convergence_shows_every_trial_in_the_colour_of_its_origin(trials: pd.DataFrame) -> None:
    figure = plots.convergence(
        trials, PERPLEXITY, {"dense": 17.0, "uniform": 30.0}, subtitle="a study"
    )
    (axes,) = figure.axes
    drawn = lines(axes)
    assert points(drawn["uniform baseline"]) == [(0, 30.0)]
    assert points(drawn["start of the space"]) == [(1, 35.0)]
    assert points(drawn["Sobol"]) == [(2, 28.0)]
    assert points(drawn["surrogate model"]) == [(4, 29.0), (5, 26.0), (6, 27.0)]
    assert [x for x, _ in points(drawn["no value"])] == [3]
    looks = {
        (drawn[s.label].get_marker(), drawn[s.label].get_color())
        for origin, s in plots.ORIGINS.items()
        if origin not in ("analytic", "between", "transfer")
    }
    assert len(looks) == len({marker for marker, _ in looks}) == len({c for _, c in looks}) == 4
    assert headings(figure) == ["Perplexity over 7 trials", "a study"]
    assert axes.get_xlabel() == "trial"
    assert axes.get_ylabel() == "validation perplexity"
    assert_inside(figure)


def test_every_origin_of_a_trial_has_a_look_of_its_own(trials: pd.DataFrame) -> None:
    assert set(plots.ORIGINS) == set(get_args(Origin))
    styles = plots.ORIGINS.values()
    for values in zip(*styles, strict=True):
        assert len(set(values)) == len(plots.ORIGINS)
    trials.loc[1, "origin"] = "analytic"
    (axes,) = plots.convergence(trials, PERPLEXITY, {"dense": 17.0, "uniform": 30.0}).axes
    assert points(lines(axes)["least predicted loss"]) == [(1, 35.0)]


def test_convergence_running_best_is_a_step_line_to_the_edge(trials: pd.DataFrame) -> None:
    (axes,) = plots.convergence(trials, PERPLEXITY, {}).axes
    best = lines(axes)["best so far"]
    assert best.get_drawstyle() == "steps-post"
    values = points(best)
    assert values[:-1] == [(0, 30.0), (1, 30.0), (2, 28.0), (4, 28.0), (5, 26.0), (6, 26.0)]
    assert values[-1] == (axes.get_xlim()[1], 26.0)


def test_convergence_labels_the_lines_themselves(trials: pd.DataFrame) -> None:
    figure = plots.convergence(trials, PERPLEXITY, {"dense": 17.0, "uniform": 30.0})
    (axes,) = figure.axes
    level = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert level == [17.0, 30.0]
    assert texts(axes) == ["dense 17.00", "best 26.00", "uniform 30.00"]
    names = legend(figure)
    assert names == [
        "best so far",
        "uniform baseline",
        "start of the space",
        "Sobol",
        "surrogate model",
        "no value",
    ]
    top_of_data = axes.get_window_extent().y1
    FigureCanvasAgg(figure).draw()
    assert figure.legends[0].get_window_extent().y0 > top_of_data


def test_a_legend_of_every_origin_takes_lines_and_covers_nothing(trials: pd.DataFrame) -> None:
    every = pd.concat([trials.iloc[[0]].assign(origin=one) for one in plots.ORIGINS])
    lost = pd.concat([trials.iloc[[3]], trials.iloc[[3]].assign(trial=4, outcome="stopped")])
    figure = plots.convergence(
        pd.concat([every, lost]), PERPLEXITY, {"dense": 17.0, "uniform": 30.5}
    )
    (axes,) = figure.axes
    assert len(legend(figure)) == len(plots.ORIGINS) + 3
    assert [x for x, _ in points(lines(axes)["stopped early"])] == [4]
    assert [x for x, _ in points(lines(axes)["no value"])] == [3]
    assert_inside(figure)
    assert figure.legends[0].get_window_extent().y0 > axes.get_window_extent().y1


def test_convergence_leaves_out_what_is_not_known(trials: pd.DataFrame) -> None:
    first = trials.iloc[:1]
    figure = plots.convergence(first, PERPLEXITY, {"uniform": 30.0})
    (axes,) = figure.axes
    assert headings(figure)[0] == "Perplexity over 1 trial"
    assert texts(axes) == ["uniform 30.00"]  # the best is the baseline: one label, not two
    assert legend(figure) == ["best so far", "uniform baseline"]
    assert_inside(figure)


@pytest.mark.parametrize(
    ("worst", "scale", "label"),
    [
        (67.0, "linear", "validation perplexity"),
        (69.0, "log", "validation perplexity (log scale)"),
        (400_000.0, "log", "validation perplexity (log scale)"),
    ],
)
def test_convergence_takes_a_log_axis_where_the_range_asks_for_it(
    trials: pd.DataFrame, worst: float, scale: str, label: str
) -> None:
    trials.loc[1, "perplexity"] = worst
    figure = plots.convergence(trials, PERPLEXITY, {"dense": 17.0, "uniform": 30.0})
    (axes,) = figure.axes
    assert axes.get_yscale() == scale
    assert axes.get_ylabel() == label
    low, high = axes.get_ylim()
    assert low < 17.0
    assert high > worst
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3
    assert_inside(figure)


def test_labels_of_lines_that_lie_close_do_not_overlap(trials: pd.DataFrame) -> None:
    trials.loc[5, ["perplexity", "best_perplexity"]] = 29.99
    trials.loc[6, "best_perplexity"] = 29.99
    figure = plots.convergence(trials, PERPLEXITY, {"dense": 29.98, "uniform": 30.0})
    assert len(figure.axes[0].texts) == 3
    assert_inside(figure)


def test_front_over_budgets_reaches_to_the_dense_model(trials: pd.DataFrame) -> None:
    smaller = trials.assign(
        keep_ratio=trials["keep_ratio"] - 0.2, perplexity=trials["perplexity"] * 2
    )
    figure = plots.front(pd.concat([trials, smaller]), PERPLEXITY, 17.0)
    (axes,) = figure.axes
    drawn = lines(axes)
    low, high = axes.get_xlim()
    assert 0.4 < low < 0.4995
    assert 1.0 < high < 1.1
    assert points(drawn["Pareto front"]) == [
        (pytest.approx(0.4995), 60.0),
        (pytest.approx(0.4998), 56.0),
        (pytest.approx(0.4999), 52.0),
        (0.6995, 30.0),
        (0.6998, 28.0),
        (0.6999, 26.0),
    ]
    assert points(drawn["uniform baseline"]) == [(pytest.approx(0.4995), 60.0), (0.6995, 30.0)]
    assert points(drawn["dense model"]) == [(1.0, 17.0)]
    assert len(points(drawn["trial"])) == 6
    assert "compressible layers" in axes.get_xlabel()
    assert headings(figure)[0] == "Perplexity against size"
    assert_inside(figure)


def test_a_front_is_drawn_over_what_it_was_minimised_in(trials: pd.DataFrame) -> None:
    """The front is a line from left to right, and not along the parameters."""
    sizes = [0.5, 0.55, 0.8, math.nan, 0.6, 0.7, 0.9]
    front = trials.assign(keep_ratio=sizes, macs_per_token=[200 * (2 - x) for x in sizes])
    figure = plots.front(front, PERPLEXITY, 17.0, COSTS["macs_per_token"], 250.0)
    (axes,) = figure.axes
    drawn = points(lines(axes)["Pareto front"])
    keep_ratios = {30.0: 0.5, 28.0: 0.8, 26.0: 0.7}
    assert [y for _, y in drawn] == [28.0, 26.0, 30.0]
    assert [x for x, _ in drawn] == pytest.approx(
        [200 * (2 - keep_ratios[y]) / 250 for _, y in drawn]
    )
    assert axes.get_xlabel() == "multiply-adds per token (dense = 100%)"
    assert axes.get_xlim()[1] > 1.2  # what takes longer than the dense model is drawn too
    assert points(lines(axes)["dense model"]) == [(1.0, 17.0)]
    assert_inside(figure)
    (label,) = axes.texts
    assert label.get_text() == "dense 17.00"
    assert label.get_window_extent().x0 > axes.get_window_extent().x1


def test_options_over_depth_have_a_panel_per_kind(options: pd.DataFrame) -> None:
    uniform = options.assign(kept=0.7)
    figure = plots.options_over_depth(options, uniform, subtitle="a study, best trial 5")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["q_proj", "v_proj", "down_proj"]
    heights = [[bar.get_height() for bar in axes.patches] for axes in panels]
    assert heights[0] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert heights[1] == pytest.approx([0.15, 0.25, 1.0, 0.45])
    centres = [bar.get_x() + bar.get_width() / 2 for bar in panels[2].patches]
    assert centres == pytest.approx([0, 1, 2, 3])
    colours = [to_hex(bar.get_facecolor()).upper() for bar in panels[1].patches]
    assert colours == [style.SKY, style.SKY, style.GREEN, style.SKY]
    for axes in panels:
        (dashed,) = axes.lines
        assert points(dashed) == [(block, 0.7) for block in range(4)]
        assert dashed.is_dashed()
        assert axes.get_ylim()[0] == 0.0
        assert axes.get_ylim()[1] > 1.0
        assert axes.get_xlabel() == "block"
    assert legend(figure) == ["compressed", "kept dense", "uniform baseline"]
    assert headings(figure)[:2] == [
        "What each layer keeps, by depth",
        "a study, best trial 5",
    ]
    assert_inside(figure)


def test_options_over_depth_name_only_what_is_there(options: pd.DataFrame) -> None:
    figure = plots.options_over_depth(options[options["kind"] == "q_proj"])
    assert legend(figure) == ["compressed"]
    assert_inside(figure)


def test_seven_kinds_take_two_rows_and_hide_the_spare_panel(options: pd.DataFrame) -> None:
    kinds = [f"kind_{index}" for index in range(7)]
    figure = plots.options_over_depth(
        pd.concat([options[options["kind"] == "q_proj"].assign(kind=kind) for kind in kinds])
    )
    assert [axes.get_visible() for axes in figure.axes] == [True] * 7 + [False]
    named = [axes.get_xlabel() for axes in figure.axes[:7]]
    assert named == ["", "", "", *["block"] * 4]
    assert_inside(figure)


@pytest.fixture
def losses() -> pd.DataFrame:
    """Three points of each of seven kinds."""
    kinds = ["q_proj", "k_proj", "v_proj", "query_key_value", "gate_proj", "up_proj", "down_proj"]
    rows = [
        (kind, 10.0 ** (point - 5), 3.0 * 10.0 ** (point - 5) * (1 + index))
        for index, kind in enumerate(kinds)
        for point in range(3)
    ]
    return pd.DataFrame(rows, columns=["kind", "predicted", "measured"])


def test_predictions_have_a_look_per_kind_and_a_line_of_equality(losses: pd.DataFrame) -> None:
    figure = plots.predicted_and_measured(losses, 0.875, subtitle="a study")
    (axes,) = figure.axes
    title = "Predicted and measured loss of single layers: rank correlation 0.875"
    assert headings(figure) == [title, "a study"]
    drawn = lines(axes)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlim() == axes.get_ylim()  # so that equal is the diagonal
    low, high = axes.get_xlim()
    assert low < losses[["predicted", "measured"]].min().min()
    assert high > losses[["predicted", "measured"]].max().max()
    assert points(drawn["equal"]) == [(low, low), (high, high)]
    for kind, some in losses.groupby("kind"):
        assert points(drawn[str(kind)]) == list(
            zip(some["predicted"], some["measured"], strict=True)
        )
        assert drawn[str(kind)].get_linestyle() == "None"
    looks = [
        (line.get_marker(), line.get_color()) for name, line in drawn.items() if name != "equal"
    ]
    assert len({marker for marker, _ in looks}) == len({colour for _, colour in looks}) == 7
    assert axes.get_xlabel() == "predicted loss, nats per token (21 points)"
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named == ["equal", *dict.fromkeys(losses["kind"])]
    assert_inside(figure)
    box = axes.get_legend().get_window_extent()
    assert box.x0 > axes.get_window_extent().x1
    assert box.x1 <= figure.bbox.x1


def test_losses_at_or_below_0_have_no_place_on_log_axes_and_are_counted(
    losses: pd.DataFrame,
) -> None:
    losses.loc[0, "measured"] = -1e-9
    losses.loc[4, "predicted"] = 0.0
    figure = plots.predicted_and_measured(losses, math.nan)
    (axes,) = figure.axes
    shown = sum(len(points(line)) for name, line in lines(axes).items() if name != "equal")
    assert shown == 19
    assert axes.get_xlabel().endswith("(21 points, 2 at or below 0 not shown)")
    assert headings(figure)[0] == "Predicted and measured loss of single layers"
    assert_inside(figure)


def test_losses_close_together_have_ticks_whose_labels_do_not_overlap() -> None:
    rows = [("q_proj", 0.011, 0.012), ("k_proj", 0.02, 0.03), ("v_proj", 0.05, 0.04)]
    close = pd.DataFrame(rows, columns=["kind", "predicted", "measured"])
    figure = plots.predicted_and_measured(close, math.nan)
    assert_inside(figure)
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        assert not axis.get_minor_ticks()
        ticks = [tick.label1.get_window_extent() for tick in axis.get_major_ticks()]
        drawn = [box for box in ticks if box.width]
        assert len(drawn) >= 3
        assert not any(one.overlaps(other) for one, other in itertools.combinations(drawn, 2))


@pytest.mark.parametrize("measured", [0.5, -0.5])
def test_one_measured_loss_or_none_is_enough_for_a_picture(measured: float) -> None:
    one = pd.DataFrame([("q_proj", 0.1, measured)], columns=["kind", "predicted", "measured"])
    figure = plots.predicted_and_measured(one, math.nan)
    assert_inside(figure)
    (axes,) = figure.axes
    assert len(points(lines(axes)["q_proj"])) == (measured > 0)


def test_figures_are_1200_pixels_wide(
    losses: pd.DataFrame, trials: pd.DataFrame, options: pd.DataFrame
) -> None:
    figures = [
        plots.convergence(trials, PERPLEXITY, {"dense": 17.0, "uniform": 30.0}),
        plots.front(trials, PERPLEXITY, 17.0),
        plots.options_over_depth(options),
        plots.predicted_and_measured(losses, 0.9),
    ]
    assert [figure.bbox.width for figure in figures] == [1200.0] * 4


def test_a_long_or_mathematical_name_stays_within_the_figure(trials: pd.DataFrame) -> None:
    figure = plots.convergence(
        trials, PERPLEXITY, {"dense": 17.0, "uniform": 30.0}, subtitle="costs_$1_and_$2 " * 20
    )
    assert headings(figure)[1].startswith("costs_$1_and_$2 costs")
    assert headings(figure)[1].endswith("…")
    assert_inside(figure)


@pytest.mark.parametrize(
    ("value", "text"), [(7.0, "7"), (1000.0, "1000"), (20_000.0, "20k"), (5e6, "5M"), (1e10, "10B")]
)
def test_ticks_of_a_log_axis_are_short(value: float, text: str) -> None:
    axes = Figure().subplots()
    style.metric_axis(axes, PERPLEXITY, [1.0, 1e12])
    assert axes.yaxis.get_major_formatter()(value) == text
