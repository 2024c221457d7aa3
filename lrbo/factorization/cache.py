"""Factor every layer of a model once, and keep the factors on disk."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.allocation import Cost, rungs
from lrbo.blockwise import OpenBlock
from lrbo.cache import opened, seal
from lrbo.errors import CacheError, StatisticsError, reading
from lrbo.factorization.base import FactorizationMethod, Statistic, factor_layer
from lrbo.factorization.loss_aware import predicted_loss
from lrbo.linalg import float64_device
from lrbo.model import linear_bias, linear_weight
from lrbo.nested import LowRankFactors
from lrbo.specs import LayerSpec, ModelMap
from lrbo.storage import new_folder

PARTS = ("left", "right", "tail", "offset", "center", "loss")


@runtime_checkable
class LayerStatistics(Protocol):
    """Where a layer's statistics come from: memory or a folder."""

    def of(self, spec: LayerSpec) -> Mapping[Statistic, Tensor]:
        """Return the statistics of a layer, those of its input and its own: what there are."""
        ...


def factor_model(
    model: PreTrainedModel,
    layers: ModelMap,
    method: FactorizationMethod,
    statistics: LayerStatistics,
    *,
    open_block: OpenBlock | None = None,
    device: torch.device | None = None,
    on_layer: Callable[[str], None] | None = None,
) -> Iterator[dict[str, LowRankFactors]]:
    """Factor every compressible layer, for every rank at which pivoted storage is below dense.

    Those include the ranks of factored storage, so one set of factors serves both forms.

    Args:
        model: The dense model; its weights are read at the precision that they have.
        layers: Its map.
        method: How.
        statistics: Of the layers; with output gradients, losses are predicted too.
        open_block: Brings the weights of a block into the model for the length of a ``with``;
            by default they are there.
        device: Where to decompose, by default where the weights are; on the CPU in place of a
            device without float64.
        on_layer: Told the name of each finished layer.

    Yields:
        Factors by layer name, a block at a time, float32 on the CPU: factored in float64, then
        rounded at 2^-24, far below the precision of the weights they stand for.

    Raises:
        StatisticsError: Naming the layer.
    """
    cost = partial(method.parameters, storage="pivoted")
    for block, members in groupby(layers.compressible, key=lambda spec: spec.block):
        assert block is not None
        made = {}
        with open_block(block) if open_block else nullcontext():
            for spec in members:
                useful = largest_rank(spec, cost)
                if useful:  # else dense is smaller at every rank
                    with _naming(spec.name):
                        module = model.get_submodule(spec.name)
                        full = _factor_layer(module, spec, method, statistics.of(spec), device)
                    made[spec.name] = full.to(
                        dtype=torch.float32, device=torch.device("cpu"), max_rank=useful
                    )
                if on_layer is not None:
                    on_layer(spec.name)
        yield made


def _factor_layer(
    module: nn.Module,
    spec: LayerSpec,
    method: FactorizationMethod,
    statistics: Mapping[Statistic, Tensor],
    device: torch.device | None,
) -> LowRankFactors:
    """Factor one layer at full rank, and predict its loss if gradients are known."""
    weight, bias = linear_weight(module), linear_bias(module)
    place = float64_device(weight.device if device is None else device)
    bias = None if bias is None else bias.to(place)
    statistics = {statistic: tensor.to(place) for statistic, tensor in statistics.items()}
    full = factor_layer(method.for_kind(spec.kind), weight.to(place), bias, statistics)
    if Statistic.OUTPUT_GRADIENT not in statistics:
        return full
    return replace(full, loss=predicted_loss(full, statistics))


def largest_rank(spec: LayerSpec, cost: Cost) -> int:
    """Return the largest rank at which a layer is below dense; 0 if there is none."""
    return max((rank for rank, _ in rungs(spec, cost, 1) if rank is not None), default=0)


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Put the name of a layer before each warning and statistics error; a method knows none."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except StatisticsError as error:
        raise StatisticsError(f"{layer}: {error}") from error
    for warning in caught:
        warnings.warn(f"{layer}: {warning.message}", warning.category, stacklevel=3)


def factors_fingerprint(
    model_fingerprint: str, calibration_fingerprint: str | None, method: FactorizationMethod
) -> str:
    """Return the digest of everything that the factors depend on.

    Args:
        model_fingerprint: Of the model.
        calibration_fingerprint: Of the statistics; ``None`` without any.
        method: With its options.
    """
    options = {  # sets have another order in every process
        name: sorted(value) if isinstance(value, frozenset) else repr(value)
        for name, value in vars(method).items()
    }
    settings = {
        "format": 4,
        "model": model_fingerprint,
        "calibration": calibration_fingerprint,
        "method": {"type": type(method).__name__, **options},
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def save_factors(
    folder: Path, parts: Iterator[Mapping[str, LowRankFactors]], fingerprint: str
) -> None:
    """Write factors as they come, a file each; the folder appears when it is complete.

    ``left`` is stored by direction, so that a prefix is contiguous.

    Args:
        folder: Must not exist.
        parts: What :func:`factor_model` yields.
        fingerprint: Of everything that they depend on.
    """
    with new_folder(folder) as beside:
        layers: dict[str, list[str]] = {}  # by file
        for index, factors in enumerate(parts):
            tensors: dict[str, Tensor] = {}
            for name, found in factors.items():
                for part in PARTS:
                    tensor = getattr(found, part)
                    if tensor is not None:
                        stored = tensor.T if part == "left" else tensor
                        tensors[f"{name}|{part}"] = stored.contiguous()
            file = beside / f"part_{index:05d}.safetensors"
            save_file(tensors, file)
            layers[file.name] = list(factors)
        seal(beside, fingerprint, layers)


def load_factors(folder: Path, fingerprint: str) -> dict[str, LowRankFactors]:
    """Open factors; the tensors are memory-mapped and read where they are used.

    Raises:
        CacheError: If they are not whole, or were made for another model, calibration or method.
    """
    found: dict[str, LowRankFactors] = {}
    for file, layers in opened(folder, fingerprint).items():
        path = folder / file
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
        with reading(CacheError, f"{path} is damaged"):
            with safe_open(str(path), framework="pt") as opened_file:
                reader: Any = opened_file
                for key in reader.keys():  # noqa: SIM118 (not a mapping)
                    name, _, part = key.rpartition("|")
                    tensor = reader.get_tensor(key)
                    parts[name][part] = tensor.T if part == "left" else tensor
            found |= {name: _checked(LowRankFactors(**given)) for name, given in parts.items()}
    return found


def _checked(factors: LowRankFactors) -> LowRankFactors:
    """Return factors whose parts fit each other.

    Raises:
        ValueError: If they do not.
    """
    (rows, rank), (_, columns) = factors.left.shape, factors.right.shape
    for part, shape in (
        ("right", (rank, columns)),
        ("tail", (rank + 1,)),
        ("offset", (rows,)),
        ("center", (columns,)),
        ("loss", (rank + 1,)),
    ):
        tensor = getattr(factors, part)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{part} has shape {tuple(tensor.shape)}, expected {shape}")
    return factors
