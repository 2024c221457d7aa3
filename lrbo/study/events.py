"""What stands in a study's files: the lines of its journal and ``study.json``, as typed records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    WrapValidator,
    with_config,
)
from typing_extensions import TypedDict  # that of Python 3.11 pydantic does not take

from lrbo.allocation.allocate import Allocation
from lrbo.config.choices import KEEP_RATIO, LATENCIES, SIZES
from lrbo.errors import Outcome
from lrbo.files.parsing import (
    LARGEST,
    ContentError,
    Count,
    Number,
    Positive,
    Whole,
    checked,
    may_be_infinite,
    shown,
)
from lrbo.layers.options import Budget, Cost, Measure, Option
from lrbo.tasks.metrics import Task
from lrbo.trials.records import Origin

FORMAT = 5  # of study.json and the journal beside it
RECOVERED_FORMAT = 6  # from the first line on that says that a trial was recovered

Element = TypeVar("Element")
NonEmpty = Annotated[list[Element], Field(min_length=1)]


def _with_infinity(value: object, check: Callable[[object], Any]) -> Any:
    """Take a perplexity that is null as infinite, which JSON has no number for."""
    if not isinstance(value, dict):
        return check(value)
    infinite = {n: math.inf for n, item in value.items() if item is None and may_be_infinite(n)}
    return value | infinite | check({n: i for n, i in value.items() if n not in infinite})


Metrics = Annotated[dict[str, Number], WrapValidator(_with_infinity)]

# What a trial with a value must have measured, beside the metrics of its task.
MEASURED: Mapping[str, tuple[str, ...]] = {
    "completed": ("objective", "tokens", KEEP_RATIO, "parameters", *SIZES[1:]),
    "stopped": ("objective", "objective_sem"),
}

# Whole numbers: the smallest that a model can have.
COUNTS = {"tokens": 1, "parameters": 0, "model_parameters": 1, "model_bytes": 1,
          "macs_per_token": 1}  # fmt: skip

exact = with_config(ConfigDict(extra="forbid"))


def made_of(kind: Any, make: Callable[[Any], object]) -> GetPydanticSchema:
    """Annotate a value that ``make`` makes of JSON of a kind; its ValueError says the expected."""
    checked_kind = Annotated[kind, AfterValidator(make)]
    return GetPydanticSchema(lambda _, handler: handler.generate_schema(checked_kind))


@exact
class BudgetFields(TypedDict):
    """A ceiling on what the units cost together."""

    measure: Measure
    limit: Count


# Option and cost: parameters, bytes, multiply-adds per token.
UnitFields = tuple[str, tuple[Count, Count, Count]]


@exact
class AllocationFields(TypedDict):
    """The options of a trial, by unit."""

    units: dict[str, UnitFields]
    budget: BudgetFields


def fields_of(allocation: Allocation) -> AllocationFields:
    """Return an allocation as its line of the journal has it."""
    units: dict[str, Any] = {
        name: (str(option), astuple(allocation.costs[name]))
        for name, option in allocation.options.items()
    }
    budget: Any = asdict(allocation.budget)
    return {"units": units, "budget": budget}


def allocation_of(fields: AllocationFields) -> Allocation:
    """Return the allocation that :func:`fields_of` gave."""
    units = fields["units"].items()
    return Allocation(
        {name: Option.parse(option) for name, (option, _) in units},
        {name: Cost(*cost) for name, (_, cost) in units},
        Budget(**fields["budget"]),
    )


@exact
class ScoringFields(TypedDict):
    """Where the time of a worker went."""

    scoring: Number


@exact
@dataclass(frozen=True, kw_only=True)
class Event:
    """A line of the journal, at a Unix time in seconds."""

    event: str
    time: Number


@dataclass(frozen=True, kw_only=True)
class Dense(Event):
    """The dense model was scored on the validation text."""

    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class Suggested(Event):
    """A trial was proposed."""

    trial: Count
    origin: Origin
    variables: dict[str, Number]
    allocation: AllocationFields
    seed: Whole
    seconds: dict[str, Number]
    rival: Count | None = None


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
    example_losses: tuple[Number, ...] = ()
    example_divergences: tuple[Number, ...] = ()


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
    example_losses: tuple[Number, ...]


@dataclass(frozen=True, kw_only=True)
class Pooled(Event):
    """An allocation was scored on every window of the pool."""

    allocation: Count
    losses: list[Number] | None
    error: str | None
    seconds: Number


@dataclass(frozen=True, kw_only=True)
class Chosen(Event):
    """Validation windows were selected from the pool."""

    windows: NonEmpty[Count]
    pool: Positive
    text: str
    digest: str


def _finite_text(value: str) -> str:
    with suppress(ValueError):
        if math.isfinite(float(value)):
            return value
    raise ValueError("text that is a finite number")


FiniteText = Annotated[str, AfterValidator(_finite_text)]
# A perplexity may be infinite.
PerplexityText = Annotated[str, AfterValidator(lambda v: v if v == "inf" else _finite_text(v))]


@exact
class TagFields(TypedDict):
    """What is to be read of a checkpoint in MLflow, where every value is text."""

    keep_ratio: FiniteText
    validation: PerplexityText
    test: NotRequired[PerplexityText]
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


@exact
class RecoveryScores(TypedDict):
    """What a model scored before and after it was recovered, and the dense one if it was scored."""

    dense: NotRequired[Metrics]
    before: Metrics
    after: Metrics


# Values of `recover` and the seed, by dotted key; others with these come and go with versions.
RecoverySettings = TypedDict(
    "RecoverySettings", {"recover.minutes": Number, "recover.stages": NonEmpty[str]}
)
with_config(ConfigDict(extra="allow"))(RecoverySettings)


@dataclass(frozen=True, kw_only=True)
class Recovered(Event):
    """The model of a trial was written and trained."""

    id: str  # of its run in MLflow, and of its checkpoint
    trial: Count
    folder: str  # in that of the study
    settings: RecoverySettings  # which make those of one set comparable
    validation: RecoveryScores
    stages: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Reranked(Event):
    """The best of recovered trials was scored on the test text."""

    trial: Count
    settings: RecoverySettings
    text: str
    test: RecoveryScores


EVENTS: Mapping[str, type[Event]] = {
    kind.__name__.lower(): kind
    for kind in (Dense, Suggested, Started, Ended, Logged, Tested, Pooled, Chosen, Compressed,
                 Versions, Recovered, Reranked)
}  # fmt: skip


def event_of(value: object, where: str, task: Task) -> Event:
    """Check a JSON value as an event of a study of a task; ``where`` begins a ContentError."""
    if not isinstance(value, dict):
        raise ContentError(f"{where}: it is {shown(value)}, expected an object")
    name = value.get("event")
    if not isinstance(name, str) or name not in EVENTS:
        known = ", ".join(EVENTS)
        raise ContentError(f"{where}: event is {shown(name)}, expected one of {known}")
    event: Event = checked(value, EVENTS[name], where)
    if isinstance(event, Ended):
        needed, whose = MEASURED.get(event.outcome, ()), f" of a {event.outcome} trial"
        if event.outcome == "completed":
            needed = (*(metric.name for metric in task.metrics), *needed)
    elif isinstance(event, Dense | Tested):
        needed, whose = tuple(metric.name for metric in task.scores), ""
    elif isinstance(event, Recovered | Reranked):
        text = "validation" if isinstance(event, Recovered) else "test"
        for model, scores in getattr(event, text).items():
            if lacking := [m.name for m in task.scores if m.name not in scores]:
                raise ContentError(f"{where}: {text}.{model} lacks {', '.join(lacking)}")
        return event
    else:
        return event
    metrics = event.metrics
    needed += tuple(f"{name}_sem" for name in LATENCIES if name in metrics)
    if lacking := [name for name in needed if name not in metrics]:
        raise ContentError(f"{where}: metrics{whose} lack {', '.join(lacking)}")
    for name, value in metrics.items():  # that cannot have been measured
        lowest, given = COUNTS.get(name), f"{where}: metrics.{name} is {shown(value)}"
        if lowest is not None and not (lowest <= value <= LARGEST and value == int(value)):
            raise ContentError(f"{given}, expected a whole number from {lowest} on")
        if name == KEEP_RATIO and value < 0:
            raise ContentError(f"{given}, expected a number from 0 on")
    return event
