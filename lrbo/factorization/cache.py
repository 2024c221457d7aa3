"""Factor every layer of a model once, and keep the factors on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.calibration.statistics import Statistic
from lrbo.errors import CacheError, StatisticsError, reading
from lrbo.factorization.base import FactorizationMethod
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.joint import prepare_joint
from lrbo.factorization.prepare_unit import prepared_unit
from lrbo.factorization.prepared import Prepared, UnitFactors, prepared_of
from lrbo.factorization.shared import SHARED, prepare_shared
from lrbo.factorization.tables import prepared_table
from lrbo.files.caches import fingerprint_of, opened, read_part, save_parts
from lrbo.layers.joint_form import WHOLE_PARTS
from lrbo.linalg import float64_device
from lrbo.models.blockwise import OpenBlock
from lrbo.models.model_map import linear_weight
from lrbo.models.specs import LayerSpec, ModelMap, sharing


@runtime_checkable
class LayerStatistics(Protocol):
    """Where the statistics of layers are: in memory or in a folder."""

    def of(self, spec: LayerSpec) -> Mapping[Statistic, Tensor]:
        """Return the statistics of a layer and of its input."""


def factor_model(
    model: PreTrainedModel,
    layers: ModelMap,
    method: FactorizationMethod,
    statistics: LayerStatistics,
    *,
    bases: BasePlan | None = None,
    errors: bool = False,
    joint: Collection[str] = (),
    open_block: OpenBlock | None = None,
    base: PreTrainedModel | None = None,
    device: torch.device | None = None,
    on_layer: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Prepared]]:
    """Factor every compressible layer, for every rank below the full one, which is dense.

    Those of blocks by the method; embedding and head as of
    :class:`lrbo.factorization.tables.TableMetric`, whatever it is.

    With ``bases``, these are made too, and what each leaves is factored. With statistics of output
    gradients, losses are predicted; with ``errors``, relative errors of outputs are worked out from
    mean and covariance of the inputs; ``joint`` names forms that several layers take together.
    ``open_block`` brings the weights of a block into the model for the length of a ``with``; by
    default they are there. With the model ``base``, in memory, the changes of its weights are
    factored. ``device``, by default that of the
    weights, decomposes if it has float64, else the CPU does. ``on_layer`` is called with the name
    of each finished layer.

    Yields:
        Factors by layer name, a block at a time: made in float64, given in float32 on the CPU.

    Raises:
        StatisticsError: Naming the layer.
    """
    for block, grouped in groupby(layers.compressible, key=lambda spec: spec.block):
        members = list(grouped)
        made: dict[str, Prepared] = {}
        with open_block(block) if open_block and block is not None else nullcontext():
            for spec in members:
                if min(spec.out_features, spec.in_features) > 1:
                    module = model.get_submodule(spec.name)
                    with naming(spec.name):
                        given = statistics.of(spec)
                        if block is None:
                            own = prepared_table(spec, module, given, device, bases=bases)
                        else:
                            how = method.for_kind(spec.kind)
                            own = prepared_unit(
                                module,
                                how,
                                given,
                                device,
                                bases=bases,
                                errors=errors,
                                shared=base and linear_weight(base.get_submodule(spec.name)),
                            )
                    made[spec.name] = own
                if on_layer is not None:
                    on_layer(spec.name)
            whole = [form for form in joint if form in WHOLE_PARTS]
            if whole:
                _add_joint(made, model, whole, members, statistics, device)
            if SHARED.form in joint and block is not None:
                _add_shared(made, model, method, members, statistics, device)
        yield made


def _add_joint(
    made: dict[str, Prepared],
    model: PreTrainedModel,
    forms: Collection[str],
    members: Sequence[LayerSpec],
    statistics: LayerStatistics,
    device: torch.device | None,
) -> None:
    """Add what the attention and the MLP of a block can become as a whole to their layers."""
    for end in [spec for spec in members if spec.is_closing]:
        specs = [spec for spec in members if spec.closing == end.name]
        if not all(spec.name in made for spec in specs):
            continue
        last = model.get_submodule(end.name)
        work = float64_device(linear_weight(last).device if device is None else device)
        with naming(end.name):
            parts = prepare_joint(forms, specs, last, statistics.of(end), work)
        for name, own in parts.items():
            made[name] = replace(_extensible(made[name]), joint=own)


def _add_shared(
    made: dict[str, Prepared],
    model: PreTrainedModel,
    method: FactorizationMethod,
    members: Sequence[LayerSpec],
    statistics: LayerStatistics,
    device: torch.device | None,
) -> None:
    """Add factors of which one is shared to the layers of a block that read the same input."""
    for specs in sharing(members):
        modules = [model.get_submodule(spec.name) for spec in specs]
        work = float64_device(linear_weight(modules[0]).device if device is None else device)
        with naming(specs[0].name):
            given = [statistics.of(spec) for spec in specs]
            parts = prepare_shared(specs, modules, method, given, work)
        for name, own in parts.items():
            unit = _extensible(made[name])
            made[name] = replace(unit, based={**unit.based, SHARED: own})


def _extensible(unit: Prepared) -> UnitFactors:
    """Return a unit to which more can be added."""
    if isinstance(unit, LowRankFactors):
        return UnitFactors(unit, {})
    assert isinstance(unit, UnitFactors)
    return unit


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Put the name of a layer before each warning and statistics error."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except StatisticsError as error:
        raise StatisticsError(f"{layer}: {error}") from error
    for warning in caught:
        warnings.warn(f"{layer}: {warning.message}", warning.category, stacklevel=3)


def factors_fingerprint(
    model_fingerprint: str,
    calibration_fingerprint: str | None,
    method: FactorizationMethod,
    bases: BasePlan | None = None,
    errors: bool = False,
    joint: Collection[str] = (),
    base: str | None = None,
) -> str:
    """Return the digest of everything that the factors depend on."""
    options = {  # sets have another order in every process
        name: sorted(value) if isinstance(value, frozenset) else repr(value)
        for name, value in vars(method).items()
    }
    return fingerprint_of(
        {
            "format": 9,
            "model": model_fingerprint,
            "calibration": calibration_fingerprint,
            "method": {"type": type(method).__name__, **options},
            "bases": None if bases is None else _stated(bases),
            "errors": errors,
            "joint": sorted(joint),
            **({} if base is None else {"base": base}),
        }
    )


def _stated(bases: BasePlan) -> dict[str, Any]:
    """Return a plan in plain values; without sweeps as before there were any, for old caches."""
    stated = asdict(bases)
    if not bases.options.sweeps:
        del stated["options"]["sweeps"]
    return stated


def save_factors(folder: Path, parts: Iterator[Mapping[str, Prepared]], fingerprint: str) -> None:
    """Write the parts of :func:`factor_model`, one file each; the folder appears complete."""
    tensors = ({name: each.tensors() for name, each in part.items()} for part in parts)
    save_parts(folder, tensors, fingerprint)


def load_factors(folder: Path, fingerprint: str) -> dict[str, Prepared]:
    """Open factors, memory-mapped; CacheError if they are damaged, or of another fingerprint."""
    factors: dict[str, Prepared] = {}
    for file in opened(folder, fingerprint):
        path = folder / file
        layers = read_part(path)
        with reading(CacheError, f"{path} is damaged"):
            factors |= {name: prepared_of(parts) for name, parts in layers.items()}
    return factors
