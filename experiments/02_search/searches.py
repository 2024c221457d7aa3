"""Searches of one surrogate: spaces, what proposes in them, and the loop that they share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
from botorch.models.map_saas import EnsembleMapSaasSingleTaskGP
from surrogate import MULTIPLE, Recorded, Surrogate

from lrbo.allocation.allocate import Allocation
from lrbo.layers.options import Menu
from lrbo.optimization.proposals import Observation, SearchClient
from lrbo.optimization.space import LinearConstraint, Problem, Space, sobol_point
from lrbo.optimization.variables import SpaceSettings, build_ratio_space, build_weight_space

INITIAL = 2 if os.environ.get("LRBO_SMOKE") else 7
GROUPS = {
    "qk": ["q_proj", "k_proj"], "o": ["o_proj"], "gate": ["gate_proj"], "up": ["up_proj"],
    "down": ["down_proj"],
}  # fmt: skip
PAPER = {"qk": 0.363, "o": 0.789, "gate": 0.841, "up": 0.807, "down": 1.0}
Losses = list[float]
Point = Mapping[str, float]
# The next point from what was seen, and from the losses of all trials in order.
Propose = Callable[[list[Observation], Losses], Point]


def spaces(recorded: Recorded) -> dict[str, Space]:
    """Return the spaces that are searched."""
    menus = {
        spec.name: Menu.of(spec, ["pivoted"], bias=False, itemsize=2, multiple=MULTIPLE)
        for spec in recorded.layers
    }
    predicted = {
        name: menu.with_losses([recorded.curves[name][menu.sections[0].levels[:, 0]]])
        for name, menu in menus.items()
    }
    plain, known = (Problem(each, recorded.budget) for each in (menus, predicted))
    ratios, deep, layers = (
        build_ratio_space(
            problem,
            SpaceSettings(
                groups=groups, dense=dense, granularity=granularity, depth_groups=4, start=PAPER
            ),
        )
        for problem, groups, dense, granularity in (
            (plain, GROUPS, ["v_proj"], "kind"),
            (plain, GROUPS, ["v_proj"], "depth"),
            # The allocation of least predicted loss compresses v as well.
            (known, {**GROUPS, "v": ["v_proj"]}, [], "layer"),
        )
    )
    weights = build_weight_space(known, SpaceSettings(bounds=[-0.5, 0.5]))
    return {
        "ratios": ratios,
        "ratios by depth": deep,
        "ratios by layer": layers,
        "weights": weights,
    }


@dataclass(frozen=True)
class Constrained:
    """A space as Ax sees it, with another constraint than its own."""

    inner: Space
    constraint: LinearConstraint | None

    def __getattr__(self, name: str) -> Any:
        """Return everything else from the space."""
        return getattr(self.inner, name)


def ax(space: Space, seed: int, budget: str = "equality", model: Any = None) -> Propose:
    """Return a search with Ax.

    Args:
        space: What is searched.
        seed: Of the first points and of the proposals.
        budget: How Ax is told of it: ``equality``, ``inequality``, or ``projection``, which tells
            it nothing and takes what it proposes onto the budget.
        model: Class of the Gaussian process instead of that of ``lrbo``.
    """
    told = space.constraint
    if budget == "inequality" and told is not None:
        told = LinearConstraint(told.weights, told.bound, is_equality=False)
    ax_space: Any = Constrained(space, None if budget == "projection" else told)
    client = SearchClient(ax_space, seed=seed)

    def propose(observations: list[Observation], losses: Losses) -> Point:
        if len(losses) < INITIAL:
            return sobol_point(space, len(losses), seed)
        with _model(model):
            point = client.ask(len(losses), observations)
        if budget == "projection":
            return space.project(point)
        return point

    return propose


@contextmanager
def _model(model: Any) -> Iterator[None]:
    """Let Ax use another class of Gaussian process."""
    if model is None:
        yield
        return
    with mock.patch("lrbo.optimization.proposals.CappedSingleTaskGP", model):
        yield


def saas(space: Space, seed: int) -> Propose:
    """Return a search with a model for many variables of which few matter."""
    return ax(space, seed, model=EnsembleMapSaasSingleTaskGP)


def random(space: Space, seed: int) -> Propose:
    """Return a search that draws points evenly."""
    generator = np.random.default_rng(seed)

    def propose(_: list[Observation], __: Losses) -> Point:
        drawn = {name: generator.uniform(*ends) for name, ends in space.bounds.items()}
        return space.project(drawn)

    return propose


def sobol(space: Space, seed: int) -> Propose:
    """Return a search along a Sobol sequence."""
    return lambda _, losses: sobol_point(space, len(losses), seed)


def tpe(space: Space, seed: int) -> Propose:
    """Return a search with Optuna; its points are taken onto the budget, as all others are."""
    import optuna  # type: ignore[import-not-found,unused-ignore]

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    trials: list[Any] = []

    def propose(_: list[Observation], losses: Losses) -> Point:
        if trials:
            study.tell(trials[-1], losses[-1])
        trials.append(study.ask())
        drawn = {n: trials[-1].suggest_float(n, *ends) for n, ends in space.bounds.items()}
        return space.project(drawn)

    return propose


@dataclass
class Trials:
    """What came of a search.

    Attributes:
        losses: Nats per token, trial by trial.
        allocations: Their decisions.
        seconds: That proposals took in all.
    """

    losses: Losses
    allocations: list[Allocation]
    seconds: float = 0.0


# What a trial tells Ax: the loss, and its standard error where it was given up.
Evaluate = Callable[[Allocation], tuple[float, float]]


def search(
    space: Space, starts: Sequence[str], propose: Propose, evaluate: Evaluate, trials: int
) -> Trials:
    """Run a search."""
    result = Trials([], [])
    observations: list[Observation] = []

    def tell(point: Point, allocation: Allocation) -> None:
        loss, error = evaluate(allocation)
        result.losses.append(loss)
        result.allocations.append(allocation)
        told = space.realised(allocation, point)
        if told:
            observations.append(Observation(told, loss, error=error))

    for start in space.warm_starts(starts):
        tell(start.point, start.allocation)
    while len(result.losses) < trials:
        begin = time.process_time()  # of one core, whatever else the machine does
        point = propose(observations, result.losses)
        result.seconds += time.process_time() - begin
        tell(point, space.allocate(point))
    return result


def exact(model: Surrogate) -> Evaluate:
    """Return the evaluation of whole trials."""
    return lambda allocation: (model(allocation), 0.0)


SEARCHES: dict[str, tuple[str, tuple[str, ...], Callable[[Space, int], Propose]]] = {
    "random ratios": ("ratios", (), random),
    "sobol ratios": ("ratios", ("start",), sobol),
    "tpe ratios": ("ratios", ("start",), tpe),
    "ax ratios (the paper's)": ("ratios", ("start",), ax),
    "random weights": ("weights", ("analytic",), random),
    "sobol weights": ("weights", ("analytic",), sobol),
    "tpe weights": ("weights", ("analytic",), tpe),
    "ax weights (lrbo)": ("weights", ("analytic",), ax),
    "5 ratios, inequality": ("ratios", ("start",), partial(ax, budget="inequality")),
    "5 ratios, projection": ("ratios", ("start",), partial(ax, budget="projection")),
    "20 ratios, equality": ("ratios by depth", ("start",), ax),
    "20 ratios, inequality": ("ratios by depth", ("start",), partial(ax, budget="inequality")),
    "20 ratios, projection": ("ratios by depth", ("start",), partial(ax, budget="projection")),
    "210 ratios, projection": ("ratios by layer", ("analytic",), partial(ax, budget="projection")),
    "210 ratios, projection, SAAS": (
        "ratios by layer", ("analytic",), partial(ax, budget="projection",
        model=EnsembleMapSaasSingleTaskGP),
    ),
}  # fmt: skip
RECIPE, OURS = "ax ratios (the paper's)", "ax weights (lrbo)"
