"""The only file that imports ax: what was seen in, the next point out."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
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

from lrbo.optimization.base import LinearConstraint, Space
from lrbo.trial import TrialRecord

# botorch compiles a kernel for fronts on first use, behind a lock file in the home folder: a search
# that is killed meanwhile leaves the lock, and every later one waits for it for ever. Without the
# kernel proposals do not depend on a compiler either.
logei._load_attempted = True

METRIC, SIZE = "loss", "size"
LEAST_TO_JUDGE = 4  # trials of which each is predicted from the others
SOBOL_SAMPLES = 2048
_ALONE = threading.Lock()  # Ax takes random numbers from the state of the process


@dataclass(frozen=True)
class Observation:
    """What the surrogate is told about a trial.

    Attributes:
        point: The point that was evaluated.
        loss: The objective, to be minimised; ``None`` while the trial runs.
        size: What is minimised as well, where a front is searched.
        error: Standard error of the loss, of a trial that was given up early.
        size_error: Standard error of the size, where that is measured.
    """

    point: Mapping[str, float]
    loss: float | None
    size: float | None = None
    error: float = 0.0
    size_error: float = 0.0


def observations_of(records: Sequence[TrialRecord], size: str | None) -> list[Observation]:
    """Return what the surrogate may know: ended trials with a value, and running ones.

    Args:
        records: Of the study.
        size: Metric that is minimised beside the loss, where a front is searched.
    """
    seen = []
    for record in records:
        if not record.request.variables:
            continue  # the baseline compresses layers that the space keeps dense
        if record.is_completed:
            found = {} if size is None else _size_of(record, size)
            loss = record.metrics["objective"]
            seen.append(Observation(record.request.variables, loss, **found))
        elif record.is_stopped:
            loss, error = record.metrics["objective"], record.metrics["objective_sem"]
            seen.append(Observation(record.request.variables, loss, error=error))
        elif record.result is None:
            seen.append(Observation(record.request.variables, None))
    return seen


def _size_of(record: TrialRecord, size: str) -> dict[str, float]:
    """Return the size of a trial, and its standard error where it was measured."""
    error = record.metrics.get(f"{size}_sem", 0.0)
    return {"size": record.metrics[size], "size_error": error}


@dataclass(frozen=True)
class _Variables:
    """What Ax is told of a space."""

    bounds: Mapping[str, tuple[float, float]]
    constraint: LinearConstraint | None = None

    @property
    def ids(self) -> dict[str, str]:
        """Return plain identifiers by name: a dot in a constrained name is an error in Ax."""
        return {name: f"r_{i:03d}" for i, name in enumerate(self.bounds)}


@dataclass(frozen=True)
class Diagnosis:
    """What the surrogate model says of the loss, and how far it can be believed.

    Attributes:
        importance: By variable, the share of the variance of the loss over the bounds that it
            takes part in (total Sobol index); negative where the loss falls as it rises.
        observed: Loss of each trial.
        predicted: What a model without that trial predicts for it.
        errors: Standard errors of these predictions.
        fit: Squared correlation of both, on the scale that the model works on, where outlying
            losses are drawn in.
    """

    importance: Mapping[str, float]
    observed: tuple[float, ...]
    predicted: tuple[float, ...]
    errors: tuple[float, ...]
    fit: float


class CappedSingleTaskGP(SingleTaskGP):  # type: ignore[misc]
    """Ax's default Gaussian process with the number of fitting steps capped.

    L-BFGS runs on for over a thousand steps at 20 variables and 200 trials without a better
    model (held-out R^2 0.9962 after 100 steps, 0.9972 after 1318, for 20 times the seconds).
    Ax has no option for the cap; ``botorch.fit`` calls ``custom_fit`` where a model has one.
    """

    STEPS = 75

    def custom_fit(
        self,
        mll: Any,
        closure: Any = None,
        closure_kwargs: Any = None,
        optimizer_kwargs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Fit as botorch does, with at most ``STEPS`` steps of L-BFGS."""
        capped = dict(optimizer_kwargs or {})
        capped["options"] = {"maxiter": self.STEPS, **capped.get("options", {})}
        return _fit_fallback(
            mll,
            closure=closure,
            closure_kwargs=closure_kwargs,
            optimizer_kwargs=capped,
            **kwargs,
        )


class SearchClient:
    """Proposes the next point from everything that was seen, and keeps no state of its own.

    Ax is rebuilt from the observations for every proposal (10 ms), so a proposal is a function
    of observations, seed and trial number alone: a search that was killed and continued
    proposes what the uninterrupted one would have, to rounding (4e-10 measured).
    """

    def __init__(self, space: Space, *, seed: int) -> None:
        """Take the space to search and the seed of the study."""
        self.space = space
        self.seed = seed

    def ask(
        self,
        trial_index: int,
        observations: Sequence[Observation],
        reference: tuple[float, float] | None = None,
    ) -> dict[str, float]:
        """Return the point that Ax proposes for a trial.

        Where the budget is a linear constraint of the search space, the point meets it exactly.

        Args:
            trial_index: Seeds this proposal, together with the seed of the study.
            observations: All that is known; at least one must have a loss.
            reference: Loss and size beyond which a trial is of no use: the proposal is for the
                whole front below it (expected hypervolume improvement). ``None`` minimises the
                loss alone.

        Raises:
            ValueError: If no observation has a loss.
        """
        if not any(observation.loss is not None for observation in observations):
            raise ValueError("the surrogate needs at least one trial with a value.")
        seed = (self.seed * 100_003 + trial_index) % 2**32  # numpy takes no larger one
        variables = _Variables(self.space.bounds, self.space.constraint)
        with _quiet(seed):
            client = _rebuilt(variables, observations, reference, seed)
            client.set_generation_strategy(_strategy())
            (parameters,) = client.get_next_trials(max_trials=1).values()
        return {name: float(parameters[key]) for name, key in variables.ids.items()}


def _rebuilt(
    variables: _Variables,
    observations: Sequence[Observation],
    reference: tuple[float, float] | None,
    seed: int,
) -> Client:
    """Return an Ax client that holds exactly these observations."""
    ids, constraint = variables.ids, variables.constraint
    constraints = []
    if constraint is not None:
        terms = (f"{weight:.12f} * {ids[name]}" for name, weight in constraint.weights.items())
        relation = "==" if constraint.is_equality else "<="
        whole = f"{' + '.join(terms)} {relation} {constraint.bound:.12f}"
        kind = "equality" if constraint.is_equality else "inequality"
        constraints.append(ParameterConstraint(**{kind: whole}))
    experiment = Experiment(
        name="lrbo",
        search_space=AxSearchSpace(
            parameters=[
                RangeParameter(
                    name=identifier,
                    parameter_type=ParameterType.FLOAT,
                    lower=variables.bounds[name][0],
                    upper=variables.bounds[name][1],
                )
                for name, identifier in ids.items()
            ],
            parameter_constraints=constraints,
        ),
    )
    rows = []
    for observation in observations:
        point = {ids[name]: value for name, value in observation.point.items()}
        trial = experiment.new_trial(generator_run=GeneratorRun(arms=[Arm(parameters=point)]))
        trial.mark_running(no_runner_required=True)
        values = {
            METRIC: (observation.loss, observation.error),
            SIZE: (observation.size, observation.size_error),
        }
        rows += [
            {
                "trial_index": trial.index,
                "arm_name": trial.arm.name,
                "metric_name": metric,
                "metric_signature": metric,
                "mean": value,
                # Without noise where nothing was estimated, which also makes Ax repeatable.
                "sem": error,
            }
            for metric, (value, error) in values.items()
            if value is not None and (reference is not None or metric == METRIC)
        ]
    client = Client(random_seed=seed)
    client.set_experiment(experiment)
    if reference is None:
        client.configure_optimization(objective=f"-{METRIC}")
    else:  # constraints on objectives are the reference point of their hypervolume
        bounds = [f"{METRIC} <= {reference[0]:.12f}", f"{SIZE} <= {reference[1]:.12f}"]
        client.configure_optimization(objective=f"-{METRIC}, -{SIZE}", outcome_constraints=bounds)
    experiment.attach_data(Data(df=pd.DataFrame(rows)))
    for trial, observation in zip(experiment.trials.values(), observations, strict=True):
        if observation.loss is not None:
            trial.mark_completed()
    return client


def diagnose(
    bounds: Mapping[str, tuple[float, float]], observations: Sequence[Observation], *, seed: int
) -> Diagnosis | None:
    """Return what the surrogate model makes of the trials of a search.

    Args:
        bounds: Smallest and largest value of each variable.
        observations: What it is told.
        seed: Of the samples that importance is estimated with.

    Returns:
        The diagnosis, or ``None`` where there are too few trials, or all have one loss.
    """
    known = [observation for observation in observations if observation.loss is not None]
    if len(known) < LEAST_TO_JUDGE or len({observation.loss for observation in known}) < 2:
        return None
    variables = _Variables(bounds)
    with _quiet(seed):
        experiment = _rebuilt(variables, known, None, seed)._experiment
        adapter = Generators.BOTORCH_MODULAR(
            experiment=experiment, data=experiment.lookup_data(), surrogate_spec=_surrogate()
        )
        shares = ax_parameter_sens(adapter, [METRIC], order="total", num_mc_samples=SOBOL_SAMPLES)[
            METRIC
        ]
        # Each trial left out once: in nats for people, and as the model sees losses.
        plain = cross_validate(adapter, untransform=True)
        own = cross_validate(adapter, untransform=False)
    predictions = [found.predicted for found in plain]
    pairs = [[found.observed.data.means[0], found.predicted.means[0]] for found in own]
    return Diagnosis(
        importance={name: float(shares[key]) for name, key in variables.ids.items()},
        observed=tuple(float(found.observed.data.means[0]) for found in plain),
        predicted=tuple(float(found.means[0]) for found in predictions),
        errors=tuple(math.sqrt(found.covariance[0, 0]) for found in predictions),
        fit=float(torch.corrcoef(torch.tensor(pairs).T)[0, 1] ** 2),
    )


@contextmanager
def _quiet(seed: int) -> Iterator[None]:
    """Run Ax with a random state of its own, on one thread, without its chatter."""
    set_ax_logger_levels(logging.ERROR)
    with _ALONE, warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _one_thread():
        warnings.simplefilter("ignore")  # numerical chatter of gpytorch and ax
        torch.manual_seed(seed)
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: matrices of a few hundred rows gain nothing from more.

    Where other processes keep the cores busy, threads that wait for each other took 4 to 8 s for
    a proposal instead of about 1 s.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _surrogate() -> SurrogateSpec:
    """Return the Gaussian process of proposals and diagnoses."""
    return SurrogateSpec(
        model_configs=[ModelConfig(botorch_model_class=CappedSingleTaskGP, name="capped")]
    )


def _strategy() -> GenerationStrategy:
    """Return one node: a Gaussian process and log-noisy expected improvement, kept lean.

    Restarts, raw samples and the hit-and-run burn-in under a linear constraint are cut to what
    a trial of seconds can afford; Ax's defaults take 6 to 90 seconds per proposal here.
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
