"""What was fixed when a study was begun: ``study.json`` as a typed record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from typing_extensions import TypedDict  # that of Python 3.11 pydantic does not take

from lrbo.allocation.transfer import Donor
from lrbo.config.choices import STORED_ITEMSIZES
from lrbo.errors import StudyError
from lrbo.files.parsing import ContentError, Count, Flag, Number, Positive, Whole, checked, shown
from lrbo.layers.options import Budget
from lrbo.models.specs import LayerSpec
from lrbo.study.events import (
    FORMAT,
    RECOVERED_FORMAT,
    BudgetFields,
    NonEmpty,
    exact,
    made_of,
)
from lrbo.tasks.metrics import TASKS, Task

READ = f"{FORMAT} and {RECOVERED_FORMAT}"


@exact
class LayerFields(TypedDict):
    """A layer of the dense model: the fields of :class:`lrbo.models.specs.LayerSpec`."""

    name: str
    kind: str
    block: Count | None
    out_features: Positive
    in_features: Positive
    has_bias: Flag
    site: str
    tied_to: str | None
    is_lookup: Flag
    closing: str | None
    neurons: Count


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
    profile: dict[str, NonEmpty[tuple[Number, Number]]]


@exact
class DonorFields(TypedDict):
    """Another study that the search begins with."""

    name: str
    trials: NonEmpty[LentFields]


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"one of {', '.join(TASKS)}")
    return TASKS[name]


def _by_name(layers: Sequence[LayerFields]) -> dict[str, LayerSpec]:
    by_name = {layer["name"]: LayerSpec(**layer) for layer in layers}
    if len(by_name) < len(layers):
        raise ValueError("layers of different names, and two have one name")
    return by_name


@exact
@dataclass(kw_only=True)
class About:
    """What was fixed when a study was begun: ``study.json``, and its JSON in ``fields``."""

    format: Whole
    study: str
    study_id: str
    seed: Whole
    model_fingerprint: str
    model_parameters: Positive  # with a base, of what changed alone
    dtype: Literal["float32", "bfloat16", "float16"]  # that the model runs in
    stored_dtype: Literal[
        "float32", "bfloat16", "float16", "float64"
    ]  # that of its files, which bytes count
    device: str
    timed: Flag
    task: Annotated[Task, made_of(str, _task)]
    data: Annotated[dict[str, TextFields], made_of(DataFields, dict)]
    budget: Annotated[Budget, made_of(BudgetFields, lambda fields: Budget(**fields))]
    include: NonEmpty[str]  # the parts of the model that the budget covers
    forms: NonEmpty[str]
    added_biases: list[str]
    layers: Annotated[dict[str, LayerSpec], made_of(NonEmpty[LayerFields], _by_name)]
    variables: dict[str, tuple[Number, Number]]
    donors: Annotated[
        tuple[Donor, ...],
        made_of(list[DonorFields], lambda each: tuple(map(Donor.from_dict, each))),
    ]
    versions: dict[str, str]
    config: Annotated[str, made_of(list[str], "\n".join)]
    base_fingerprint: str | None = None  # of the weights of model.base
    fields: Mapping[str, Any] = field(init=False, repr=False)

    @property
    def itemsize(self) -> int:
        """Bytes per parameter of the dense model in its files."""
        return STORED_ITEMSIZES[self.stored_dtype]

    @cached_property
    def units(self) -> dict[str, LayerSpec]:
        """The layers that an allocation has an option for, by name."""
        return {name: spec for name, spec in self.layers.items() if spec.part in self.include}


def about_of(value: object, where: str) -> About:
    """Check the JSON value of the file ``where``.

    Raises:
        ContentError: If it is not that, or a StudyError if another version of lrbo wrote it.
    """
    if not isinstance(value, dict):
        raise ContentError(f"{where}: it is {shown(value)}, expected an object")
    version = value.get("format")
    if type(version) is not int:
        raise ContentError(f"{where} has format {shown(version)}, this lrbo reads {READ}")
    if version not in (FORMAT, RECOVERED_FORMAT):
        todo = "a newer lrbo began it: upgrade lrbo"
        if version < FORMAT:
            todo = (
                "an older lrbo began it: go on with that version, or begin again under another "
                "study=NAME"
            )
        raise StudyError(f"{where} has format {version}, this lrbo reads {READ}; {todo}")
    about: About = checked(value, About, where)
    about.fields = value
    return about
