"""Factor every layer of a model once, and keep the factors on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.calibration.statistics import Statistic
from lrbo.errors import CacheError, StatisticsError, reading
from lrbo.factorization.base import FactorizationMethod, Statistics, factor_layer
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.prediction import predicted_loss, with_rounding
from lrbo.factorization.prepared import BasedWeight, Prepared, UnitFactors, is_alone, prepared_of
from lrbo.files.caches import fingerprint_of, opened, read_part, save_parts
from lrbo.linalg import float64_device
from lrbo.models.blockwise import OpenBlock
from lrbo.models.model_map import linear_bias, linear_weight
from lrbo.models.specs import LayerSpec, ModelMap


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
    open_block: OpenBlock | None = None,
    device: torch.device | None = None,
    on_layer: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Prepared]]:
    """Factor every compressible layer, for every rank below the full one, which is dense.

    With ``bases``, these are made too, and what each leaves is factored. With
    statistics of output gradients, losses are predicted. ``open_block`` brings the weights
    of a block into the model for the length of a ``with``; by default they are there. ``device``,
    by default that of the weights, decomposes if it has float64, else the CPU does. ``on_layer`` is
    called with the name of each finished layer.

    Yields:
        Factors by layer name, a block at a time: made in float64, given in float32 on the CPU.

    Raises:
        StatisticsError: Naming the layer.
    """
    for block, members in groupby(layers.compressible, key=lambda spec: spec.block):
        assert block is not None
        made: dict[str, Prepared] = {}
        with open_block(block) if open_block else nullcontext():
            for spec in members:
                if min(spec.out_features, spec.in_features) > 1:
                    module = model.get_submodule(spec.name)
                    own = method.for_kind(spec.kind)
                    with _naming(spec.name):
                        made[spec.name] = _prepared(module, own, statistics.of(spec), device, bases)
                if on_layer is not None:
                    on_layer(spec.name)
        yield made


def _prepared(
    module: nn.Module,
    method: FactorizationMethod,
    given: Statistics,
    device: torch.device | None,
    bases: BasePlan | None,
) -> Prepared:
    """Factor one layer at full rank, and what its weight in integers leaves."""
    stored, bias = linear_weight(module), linear_bias(module)
    work = float64_device(stored.device if device is None else device)
    statistics = {statistic: tensor.to(work) for statistic, tensor in given.items()}
    weight = stored.to(work, torch.float64)
    offset = None if bias is None else bias.to(work)

    full = factor_layer(method, weight, offset, statistics)
    if Statistic.OUTPUT_GRADIENT in statistics:
        full = replace(full, loss=predicted_loss(full, statistics))
    cpu, single = torch.device("cpu"), torch.float32
    low_rank = full.to(dtype=single, device=cpu, max_rank=min(weight.shape) - 1)
    if bases is None:
        return low_rank
    based = {}
    factored = method.remainders(offset, statistics)
    for base in bases.make(weight, statistics, stored.dtype):
        if is_alone(base.form):
            rounded = replace(full, loss=with_rounding(full, statistics))
            factors = rounded.to(dtype=single, device=cpu, max_rank=low_rank.max_rank)
        else:
            rest = weight - base.weight(torch.float64)
            factors = factored(rest, base.form.largest_rank(*base.shape))
        own = BasedWeight(base.to(cpu), factors.to(dtype=single, device=cpu))
        based[base.family] = own
    return UnitFactors(low_rank, based)


@contextmanager
def _naming(layer: str) -> Iterator[None]:
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
) -> str:
    """Return the digest of everything that the factors depend on."""
    options = {  # sets have another order in every process
        name: sorted(value) if isinstance(value, frozenset) else repr(value)
        for name, value in vars(method).items()
    }
    return fingerprint_of(
        {
            "format": 6,
            "model": model_fingerprint,
            "calibration": calibration_fingerprint,
            "method": {"type": type(method).__name__, **options},
            "bases": None if bases is None else asdict(bases),
        }
    )


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
