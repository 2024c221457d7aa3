"""Where predicted losses are known, a search begins at the allocation of least loss."""

from pathlib import Path

import pytest

from lrbo.optimization.space import sobol_point
from tests.optimization.test_loop import SEED, Search
from tests.support.fakes import make_curves, make_layers, make_space, make_weight_space, predicted


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrbo.study.journal.os.fsync", lambda _: None)


def test_where_losses_are_known_trial_1_is_the_analytic_allocation(tmp_path: Path) -> None:
    layers = make_layers()
    space = make_space(layers=layers)
    space = space.of(predicted(space.problem, make_curves(layers)))
    search = Search(tmp_path, trials=6, initial=5, space=space)
    search.run()
    records = search.study.state.records
    origins = [record.request.origin for record in records]
    assert origins == ["uniform", "analytic", "start", "sobol", "sobol", "model"]
    assert records[1].request.allocation == space.problem.by_loss()
    assert records[2].request.allocation == space.allocate(space.start_point())
    assert records[3].request.allocation == space.allocate(sobol_point(space, 2, SEED))
    # Units that share a ratio have options of their own there: no point, nothing to learn from.
    assert records[1].request.variables == {}
    assert len(search.client.observations[5]) == 3  # of five trials, neither uniform nor analytic


def test_weights_begin_at_the_analytic_allocation_and_learn_from_it(tmp_path: Path) -> None:
    space = make_weight_space()
    search = Search(tmp_path, trials=6, initial=4, space=space)
    search.run()
    records = search.study.state.records
    origins = [record.request.origin for record in records]
    assert origins == ["uniform", "analytic", "sobol", "sobol", "model", "model"]
    origin = dict.fromkeys(space.names, 0.0)
    assert records[0].request.variables == {}
    assert records[1].request.variables == origin
    assert records[1].request.allocation == space.allocate(origin)
    for record in records[1:]:
        # The allocation is a function of the point, and the point is what the surrogate is told.
        assert record.request.allocation == space.allocate(record.request.variables)
    observations = search.client.observations[4]
    assert [o.point for o in observations] == [r.request.variables for r in records[1:4]]
    assert observations[0].point == origin
    assert observations[0].loss == records[1].metrics["objective"]


def test_a_weight_point_whose_options_were_tried_is_moved_within_bounds(tmp_path: Path) -> None:
    layers = make_layers(1, {"q_proj": (24, 24), "o_proj": (24, 24)})
    space = make_weight_space(0.6, layers, knots=0, exponent=False)
    search = Search(tmp_path, trials=6, initial=6, space=space)
    search.run()
    for record in search.study.state.records[1:]:
        point = record.request.variables
        assert all(low <= point[name] <= high for name, (low, high) in space.bounds.items())
        assert record.request.allocation == space.allocate(point)
