"""Trials show how predictions err: weights that were hidden in the losses are recovered."""

import numpy as np
import pytest

from lrbo.optimization.correction import Correction
from lrbo.optimization.space import sobol_point
from lrbo.optimization.variables import EXPONENT, WeightSpace
from tests.support.fakes import make_layers, make_weight_space

SHAPES = {"q_proj": (40, 48), "up_proj": (56, 48), "down_proj": (48, 56)}


def hidden_losses(space: WeightSpace, point: dict[str, float], scale: float, power: float):
    """Return what allocations lose in a model of which a point of the space is right."""
    weights = np.array([0.0 if name == EXPONENT else point[name] for name in space.names])

    def lost(allocation) -> float:
        total = 0.0
        for name, option in allocation.options.items():
            menu = space.problem.menus[name]
            predicted = float(menu.losses[menu.index(option)])
            own = weights[space.names.index(f"kind.{menu.unit.kind}")]
            blocks = max(unit.block for unit in space.problem.units)
            depths = [weights[space.names.index(f"depth.{knot}")] for knot in range(space.knots)]
            own += np.interp(menu.unit.block / blocks, np.linspace(0, 1, space.knots), depths)
            total += np.exp(own) * predicted ** np.exp(point[EXPONENT])
        return float(scale * total**power)

    return lost


def test_the_weights_behind_trials_are_recovered_and_give_better_options() -> None:
    space = make_weight_space(0.6, make_layers(4, SHAPES))
    truth = dict.fromkeys(space.names, 0.0) | {"kind.q_proj": 0.4, "kind.down_proj": -0.3}
    lost = hidden_losses(space, truth, scale=1.5, power=1.2)
    points = [sobol_point(space, index, seed=1) for index in range(40)]
    trials = [(allocation, lost(allocation)) for allocation in map(space.allocate, points)]
    correction = Correction.of(space, trials)
    fitted = dict(zip(correction.names, correction.mean, strict=True))
    # All weights together are a scale, which says nothing of one against another.
    assert fitted["kind.q_proj"] - fitted["kind.down_proj"] == pytest.approx(0.7, abs=0.15)
    assert np.abs(correction.errors).max() < 0.02
    corrected, analytic = (lost(space.allocate(p)) for p in (fitted, dict.fromkeys(truth, 0.0)))
    best = lost(space.allocate(truth))
    assert corrected - best < 0.2 * (analytic - best)


def test_few_trials_say_little_and_draws_spread_as_far_as_is_not_known() -> None:
    space = make_weight_space(0.6, make_layers(4, SHAPES))
    allocation = space.problem.by_loss()
    correction = Correction.of(space, [(allocation, 2 * space.problem.predicted(allocation))])
    assert np.abs(correction.mean).max() < 0.1  # a scale explains it
    draws = np.array([[*correction.draw(seed).values()] for seed in range(400)])
    np.testing.assert_allclose(draws.std(0), np.full(len(space.names), 0.3), rtol=0.2)
    assert correction.draw(3) == correction.draw(3)


def test_losses_below_those_of_the_dense_model_are_refused() -> None:
    space = make_weight_space()
    with pytest.raises(ValueError, match="more than the dense model"):
        Correction.of(space, [(space.problem.by_loss(), 0.0)])
