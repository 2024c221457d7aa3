"""The only file that imports ax: observations in, the next point out."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from ax.adapter.cross_validation import cross_validate
from ax.adapter.registry import Generators
from ax.api.client import Client
from ax.core.arm import Arm
from ax.core.data import Data
from ax.core.experiment import Experiment
from ax.core.generator_run import GeneratorRun
from ax.core.parameter import ParameterType, RangeParameter
from ax.core.parameter_constraint import ParameterConstraint
from ax.core.search_space import SearchSpace as AxSearchSpace
from ax.generation_strategy.generation_node import GenerationNode
from ax.generation_strategy.generation_strategy import GenerationStrategy
from ax.generation_strategy.generator_spec import GeneratorSpec
from ax.generators.torch.botorch_modular.surrogate import ModelConfig, SurrogateSpec
from ax.utils.common.logger import set_ax_logger_levels
from ax.utils.sensitivity.sobol_measures import ax_parameter_sens
from botorch.acquisition.multi_objective import logei
from botorch.fit import _fit_fallback
from botorch.models import SingleTaskGP

from lrbo.optimization.space import LinearConstraint, Space
from lrbo.trials.records import TrialRecord

# botorch compiles a kernel for fronts on first use, behind a lock file in the home folder: a search
# that is killed meanwhile leaves the lock, and every later one waits for it for ever.
logei._load_attempted = True

METRIC, SIZE = "loss", "size"
COLUMNS = ["trial_index", "arm_name", "metric_name", "metric_signature", "mean", "sem"]
MIN_TRIALS = 4  # trials of which each is predicted from the others
SOBOL_SAMPLES = 2048
_LOCK = threading.Lock()  # Ax takes random numbers from the state of the process


@dataclass(frozen=True)
class Observation:
    """A trial as the surrogate sees it, with standard errors of what was estimated."""

    point: Mapping[str, float]
    loss: float | None  # the objective, to be minimised; None while the trial runs
    size: float | None = None  # the second objective, where a front is searched
    error: float = 0.0  # of the loss, of a trial that was given up early
    size_error: float = 0.0


def observations_of(records: Sequence[TrialRecord], size: str | None) -> list[Observation]:
    """Return the observations of trials with a value, and of those that run.

    ``size`` is the metric that is minimised beside the loss, where a front is searched.
    """
    observations = []
    for record in records:
        point, metrics = record.request.variables, record.metrics
        if not point or (record.result is not None and not metrics):
            continue  # it stands at no point, or ended without a value
        observations.append(
            Observation(
                point,
                metrics.get("objective"),
                None if size is None else metrics.get(size),
                metrics.get("objective_sem", 0.0),
                metrics.get(f"{size}_sem", 0.0),
            )
        )
    return observations


def _ids(names: Iterable[str]) -> dict[str, str]:
    """A dot in a constrained name is an error in Ax."""
    return {name: f"r_{i:03d}" for i, name in enumerate(names)}


@dataclass(frozen=True)
class Diagnosis:
    """Importance of the variables, and leave-one-out predictions of the surrogate model.

    ``importance`` is the total Sobol index of the loss over the bounds, by variable; negative where
    the loss falls as the variable rises. ``fit`` is the squared correlation of losses and
    predictions on the model's scale, where outlying losses are drawn in.
    """

    importance: Mapping[str, float]
    observed: tuple[float, ...]  # loss of each trial
    predicted: tuple[float, ...]  # by a model without that trial
    errors: tuple[float, ...]  # standard errors of these
    fit: float


class CappedSingleTaskGP(SingleTaskGP):  # type: ignore[misc]
    """Ax's default Gaussian process with the number of fitting steps capped.

    At 20 variables and 200 trials, L-BFGS takes 1318 steps for a held-out R^2 of 0.9972; after 100
    it was 0.9962. Ax has no option for a cap; ``botorch.fit`` calls a model's ``custom_fit``.
    """

    STEPS = 75

    def custom_fit(self, mll: Any, *, optimizer_kwargs: Any = None, **kwargs: Any) -> Any:
        """Fit as botorch does, with at most ``STEPS`` steps of L-BFGS."""
        capped = dict(optimizer_kwargs or {})
        capped["options"] = {"maxiter": self.STEPS, **capped.get("options", {})}
        return _fit_fallback(mll, optimizer_kwargs=capped, **kwargs)


@dataclass
class SearchClient:
    """Proposes the next point from observations, seed and trial number alone.

    Ax is rebuilt for every proposal (10 ms), so a search that was killed and continued proposes
    what the uninterrupted one would have, to rounding (4e-10 measured).
    """

    space: Space
    seed: int

    def ask(
        self,
        trial_index: int,
        observations: Sequence[Observation],
        reference: tuple[float, float] | None = None,
    ) -> dict[str, float]:
        """Return the point that Ax proposes for a trial; it meets the constraint of the space.

        With a ``reference``, the loss and size beyond which a trial is of no use, it is for the
        whole front below it (expected hypervolume improvement), else for the loss alone.

        Raises:
            ValueError: If no observation has a loss.
        """
        if all(observation.loss is None for observation in observations):
            raise ValueError("the surrogate needs at least one trial with a value.")
        seed = (self.seed * 100_003 + trial_index) % 2**32  # numpy takes no larger one
        bounds = self.space.bounds
        with _quiet(seed):
            client = _rebuilt(bounds, self.space.constraint, observations, reference, seed)
            client.set_generation_strategy(_strategy())
            (parameters,) = client.get_next_trials(max_trials=1).values()
        return {name: float(parameters[key]) for name, key in _ids(bounds).items()}


def _rebuilt(
    bounds: Mapping[str, tuple[float, float]],
    constraint: LinearConstraint | None,
    observations: Sequence[Observation],
    reference: tuple[float, float] | None,
    seed: int,
) -> Client:
    ids = _ids(bounds)
    constraints = []
    if constraint is not None:
        terms = (f"{weight:.12f} * {ids[name]}" for name, weight in constraint.weights.items())
        kind, relation = ("equality", "==") if constraint.is_equality else ("inequality", "<=")
        whole = f"{' + '.join(terms)} {relation} {constraint.bound:.12f}"
        constraints.append(ParameterConstraint(**{kind: whole}))
    parameters = [
        RangeParameter(ids[name], ParameterType.FLOAT, lower, upper)
        for name, (lower, upper) in bounds.items()
    ]
    experiment = Experiment(AxSearchSpace(parameters, constraints), name="lrbo")
    rows = []
    for observation in observations:
        point = {ids[name]: value for name, value in observation.point.items()}
        trial = experiment.new_trial(generator_run=GeneratorRun(arms=[Arm(parameters=point)]))
        trial.mark_running(no_runner_required=True)
        if observation.loss is not None:
            trial.mark_completed()
        # Without noise where nothing was estimated, which also makes Ax repeatable.
        values = [(METRIC, observation.loss, observation.error)]
        if reference is not None:
            values.append((SIZE, observation.size, observation.size_error))
        rows += [
            (trial.index, trial.arm.name, metric, metric, value, error)
            for metric, value, error in values
            if value is not None
        ]
    client = Client(random_seed=seed)
    client.set_experiment(experiment)
    if reference is None:
        client.configure_optimization(objective=f"-{METRIC}")
    else:  # constraints on objectives are the reference point of their hypervolume
        limits = [f"{METRIC} <= {reference[0]:.12f}", f"{SIZE} <= {reference[1]:.12f}"]
        client.configure_optimization(objective=f"-{METRIC}, -{SIZE}", outcome_constraints=limits)
    experiment.attach_data(Data(df=pd.DataFrame(rows, columns=COLUMNS)))
    return client


def diagnose(
    bounds: Mapping[str, tuple[float, float]], observations: Sequence[Observation], *, seed: int
) -> Diagnosis | None:
    """Return the surrogate's diagnosis; ``None`` if trials are too few, or all have one loss."""
    ended = [observation for observation in observations if observation.loss is not None]
    if len(ended) < MIN_TRIALS or len({observation.loss for observation in ended}) < 2:
        return None
    with _quiet(seed):
        experiment = _rebuilt(bounds, None, ended, None, seed)._experiment
        adapter = Generators.BOTORCH_MODULAR(
            experiment=experiment, data=experiment.lookup_data(), surrogate_spec=_surrogate()
        )
        indices = ax_parameter_sens(adapter, [METRIC], order="total", num_mc_samples=SOBOL_SAMPLES)
        # Each trial left out once: in nats for people, and as the model sees losses.
        plain = cross_validate(adapter, untransform=True)
        scaled = cross_validate(adapter, untransform=False)
    pairs = [[fold.observed.data.means[0], fold.predicted.means[0]] for fold in scaled]
    return Diagnosis(
        importance={name: float(indices[METRIC][key]) for name, key in _ids(bounds).items()},
        observed=tuple(float(fold.observed.data.means[0]) for fold in plain),
        predicted=tuple(float(fold.predicted.means[0]) for fold in plain),
        errors=tuple(math.sqrt(fold.predicted.covariance[0, 0]) for fold in plain),
        fit=float(torch.corrcoef(torch.tensor(pairs).T)[0, 1] ** 2),
    )


@contextmanager
def _quiet(seed: int) -> Iterator[None]:
    """Run Ax with a random state of its own, without its warnings, and on one thread.

    Beside other busy processes a proposal took 4 to 8 s with more threads, and 1 s with one.
    """
    set_ax_logger_levels(logging.ERROR)
    with _LOCK, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # numerical ones of gpytorch and ax
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _surrogate() -> SurrogateSpec:
    return SurrogateSpec(
        model_configs=[ModelConfig(botorch_model_class=CappedSingleTaskGP, name="capped")]
    )


def _strategy() -> GenerationStrategy:
    """Return one node: a Gaussian process and log-noisy expected improvement, kept lean.

    Ax's default restarts, samples and burn-in take 6 to 90 seconds per proposal here.
    """
    options = {"maxiter": 100, "n_burnin": 500, "n_thinning": 4}
    optimizer = {"num_restarts": 4, "raw_samples": 128, "options": options}
    node = GenerationNode(
        name="bayesian",
        should_deduplicate=False,  # it raises where all is tried; the loop moves known ranks
        generator_specs=[
            GeneratorSpec(
                generator_enum=Generators.BOTORCH_MODULAR,
                generator_kwargs={
                    "surrogate_spec": _surrogate(),
                    "warm_start_refit": False,
                    "fit_tracking_metrics": False,
                },
                generator_gen_kwargs={"model_gen_options": {"optimizer_kwargs": optimizer}},
            )
        ],
    )
    return GenerationStrategy(name="lean", nodes=[node])
