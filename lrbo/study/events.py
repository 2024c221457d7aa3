"""What stands in a study's files: the lines of its journal and ``study.json``, as typed records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, WrapValidator, with_config
from typing_extensions import TypedDict  # that of Python 3.11 pydantic does not take

from lrbo.accounting import Storage
from lrbo.allocation import Allocation, Budget
from lrbo.errors import Outcome
from lrbo.optimization.front import LATENCIES
from lrbo.parsing import (
    LARGEST,
    ContentError,
    Count,
    Flag,
    Number,
    Positive,
    Whole,
    checked,
    shown,
)
from lrbo.strict_json import may_be_infinite
from lrbo.trial import Origin

FORMAT = 2  # of study.json and the journal beside it


def _with_infinity(value: object, check: Callable[[object], Any]) -> Any:
    """Take a perplexity that is null as infinite, which JSON has no number for."""
    if not isinstance(value, dict):
        return check(value)
    infinite = {n: math.inf for n, item in value.items() if item is None and may_be_infinite(n)}
    return value | infinite | check({n: i for n, i in value.items() if n not in infinite})


Metrics = Annotated[dict[str, Number], WrapValidator(_with_infinity)]

SCORED = ("nll", "perplexity")  # what every model that is scored on a text has

# What a trial with a value must have measured.
MEASURED: Mapping[str, tuple[str, ...]] = {
    "completed": (
        *SCORED, "kl_dense_to_compressed", "objective", "tokens", "keep_ratio", "parameters",
        "model_parameters", "model_bytes", "macs_per_token",
    ),
    "stopped": ("objective", "objective_sem"),
}  # fmt: skip

# Whole numbers: the smallest that a model can have.
COUNTS = {"tokens": 1, "parameters": 0, "model_parameters": 1, "model_bytes": 1,
          "macs_per_token": 1}  # fmt: skip

exact = with_config(ConfigDict(extra="forbid"))


@exact
class BudgetFields(TypedDict):
    """A ceiling on parameters."""

    parameters: Count


@exact
class AllocationFields(TypedDict):
    """The ranks of a trial."""

    ranks: dict[str, Count | None]
    parameters: Count
    budget: BudgetFields


@exact
class ScoringFields(TypedDict):
    """Where the time of a worker went."""

    scoring: Number


@exact
@dataclass(frozen=True, kw_only=True)
class Event:
    """A line of the journal.

    Attributes:
        event: Its name.
        time: Unix time, seconds.
    """

    event: str
    time: Number


@dataclass(frozen=True, kw_only=True)
class Dense(Event):
    """The dense model was scored on the validation text."""

    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class Suggested(Event):
    """A trial was chosen."""

    trial: Count
    origin: Origin
    variables: dict[str, Number]
    allocation: AllocationFields
    seed: Whole
    seconds: dict[str, Number]
    rival: Count | None = None

    def decision(self) -> Allocation:
        """Return the ranks as the rest of the package has them."""
        found = self.allocation
        return Allocation(
            dict(found["ranks"]), found["parameters"], Budget(found["budget"]["parameters"])
        )


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """A trial was begun, perhaps again."""

    trial: Count


@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """A trial is over."""

    trial: Count
    outcome: Outcome
    metrics: Metrics
    error: str | None
    seconds: ScoringFields
    window_nll: tuple[Number, ...] = ()
    window_kl: tuple[Number, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Logged(Event):
    """A trial was shown to MLflow."""

    trial: Count
    seconds: Number


@dataclass(frozen=True, kw_only=True)
class Tested(Event):
    """A model was scored on the test text."""

    label: Literal["dense", "uniform", "analytic", "best"]
    trial: Count | None
    text: str
    metrics: Metrics
    window_nll: tuple[Number, ...]


@dataclass(frozen=True, kw_only=True)
class Pooled(Event):
    """An allocation was scored on every window of the pool."""

    place: Count
    losses: list[Number] | None
    error: str | None
    seconds: Number


@dataclass(frozen=True, kw_only=True)
class Chosen(Event):
    """Validation windows were chosen out of the pool."""

    windows: Annotated[list[Count], Field(min_length=1)]
    pool: Positive
    text: str
    digest: str


def _finite_text(value: str) -> str:
    """Take a finite number as it is printed."""
    try:
        is_finite = math.isfinite(float(value))
    except ValueError:
        is_finite = False
    if not is_finite:
        raise ValueError("text that is a finite number")
    return value


def _perplexity_text(value: str) -> str:
    """Take a perplexity as it is printed, which may be infinite."""
    return value if value == "inf" else _finite_text(value)


FiniteText = Annotated[str, AfterValidator(_finite_text)]
PerplexityText = Annotated[str, AfterValidator(_perplexity_text)]


@exact
class TagFields(TypedDict):
    """What is to be read of a checkpoint in MLflow, where every value is text."""

    keep_ratio: FiniteText
    validation_perplexity: PerplexityText
    test_perplexity: NotRequired[PerplexityText]
    format: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Compressed(Event):
    """A checkpoint was written."""

    id: str
    trial: Count
    folder: str
    register: Literal["link", "copy", "none"]
    tags: TagFields


@dataclass(frozen=True, kw_only=True)
class Versions(Event):
    """The study went on with other versions of packages."""

    versions: dict[str, str]


EVENTS: Mapping[str, type[Event]] = {
    "dense": Dense,
    "suggested": Suggested,
    "started": Started,
    "ended": Ended,
    "logged": Logged,
    "tested": Tested,
    "pooled": Pooled,
    "chosen": Chosen,
    "compressed": Compressed,
    "versions": Versions,
}


def event_of(value: object, where: str) -> Event:
    """Take a JSON value as an event.

    Args:
        value: Of a line.
        where: The line, for messages.

    Raises:
        ContentError: If it is none, naming the fields.
    """
    if not isinstance(value, dict):
        raise ContentError(f"{where}: it is {shown(value)}, expected an object")
    name = value.get("event")
    kind = EVENTS.get(name) if isinstance(name, str) else None
    if kind is None:
        known = ", ".join(EVENTS)
        raise ContentError(f"{where}: event is {shown(name)}, expected one of {known}")
    found: Event = checked(value, kind, where)
    if isinstance(found, Ended):
        needed, whose = MEASURED.get(found.outcome, ()), f" of a {found.outcome} trial"
    elif isinstance(found, Dense | Tested):
        needed, whose = SCORED, ""
    else:
        return found
    metrics = found.metrics
    needed += tuple(f"{name}_sem" for name in LATENCIES if name in metrics)
    if lacking := [name for name in needed if name not in metrics]:
        raise ContentError(f"{where}: metrics{whose} lack {', '.join(lacking)}")
    if problem := _problem_of_metrics(metrics):
        raise ContentError(f"{where}: {problem}")
    return found


def _problem_of_metrics(metrics: Mapping[str, float]) -> str | None:
    """Say which metric nobody can have measured, if there is one."""
    for name, value in metrics.items():
        lowest = COUNTS.get(name)
        if lowest is not None and not (lowest <= value <= LARGEST and value == int(value)):
            return f"metrics.{name} is {shown(value)}, expected a whole number from {lowest} on"
        if name == "keep_ratio" and value < 0:
            return f"metrics.{name} is {shown(value)}, expected a number from 0 on"
    return None


@exact
class LayerFields(TypedDict):
    """A layer of the dense model: the fields of :class:`lrbo.model.LayerSpec`."""

    name: str
    kind: str
    block: Count | None
    out_features: Positive
    in_features: Positive
    has_bias: Flag
    site: str
    tied_to: str | None


@exact
class TextFields(TypedDict):
    """The token windows of a role."""

    text: str
    windows: Positive
    digest: str


@exact
class DataFields(TypedDict):
    """The token windows of a study; of validation the whole pool."""

    calibration: TextFields
    validation: TextFields
    test: TextFields


@exact
class LentFields(TypedDict):
    """A trial of another study that the search begins with."""

    keep_ratio: Number
    variables: dict[str, Number]
    profile: dict[str, Annotated[list[tuple[Number, Number]], Field(min_length=1)]]


@exact
class DonorFields(TypedDict):
    """Another study that the search begins with."""

    name: str
    trials: Annotated[list[LentFields], Field(min_length=1)]


@exact
class About(TypedDict):
    """``study.json``: what was fixed when the study was begun."""

    format: Whole
    study: str
    study_id: str
    seed: Whole
    model_fingerprint: str
    model_parameters: Positive
    dtype: Literal["float32", "bfloat16", "float16"]
    device: str
    timed: Flag
    data: DataFields
    budget_parameters: Count
    storage: Storage
    adds_bias: Flag
    layers: Annotated[list[LayerFields], Field(min_length=1)]
    variables: dict[str, tuple[Number, Number]]
    donors: list[DonorFields]
    versions: dict[str, str]
    config: list[str]


def about_of(value: object, where: str) -> dict[str, Any]:
    """Take a JSON value as what was fixed at the start.

    Args:
        value: Of ``study.json``.
        where: The file, for messages.

    Raises:
        ContentError: If it is not that, or of another format.
    """
    if not isinstance(value, dict):
        raise ContentError(f"{where}: it is {shown(value)}, expected an object")
    if (found := value.get("format")) != FORMAT or isinstance(found, bool):
        raise ContentError(
            f"{where} has format {shown(found)}, this lrbo reads {FORMAT}; use the version that "
            "made it"
        )
    about: dict[str, Any] = checked(value, About, where)
    names = [layer["name"] for layer in about["layers"]]
    if len(set(names)) < len(names):
        raise ContentError(f"{where}: two of layers have one name")
    return about
