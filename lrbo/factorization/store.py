"""Factor every layer of a model once, and keep the factors on disk."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.allocation import Cost, rungs
from lrbo.errors import StatisticsError
from lrbo.factorization.base import FactorizationMethod, Statistic
from lrbo.model import LayerSpec, ModelMap, linear_bias, linear_weight
from lrbo.nested import LowRankFactors
from lrbo.storage import replacing

PARTS = ("left", "right", "tail", "offset", "center")


@runtime_checkable
class SiteStatistics(Protocol):
    """Where a layer's statistics come from: memory or a file."""

    def at(self, site: str) -> Mapping[Statistic, Tensor]:
        """Return the statistics of a site."""
        ...


def factor_model(
    model: PreTrainedModel,
    layers: ModelMap,
    method: FactorizationMethod,
    statistics: SiteStatistics,
    *,
    on_layer: Callable[[str], None] | None = None,
) -> dict[str, LowRankFactors]:
    """Factor every compressible layer, for every rank at which pivoted storage is below dense.

    Those include the ranks of factored storage, so one file of factors serves both forms.

    Args:
        model: The dense model; its weights are read at the precision that they have.
        layers: Its map.
        method: How.
        statistics: Of the inputs; not read by methods that need none.
        on_layer: Told the name of each finished layer.

    Returns:
        Factors by layer name, float32 on the CPU: factored in float64, then rounded at 2^-24,
        far below the precision of the weights they stand for.

    Raises:
        StatisticsError: Naming the layer.
    """
    factors = {}
    cost = partial(method.parameters, storage="pivoted")
    for spec in layers.compressible:
        module = model.get_submodule(spec.name)
        useful = largest_rank(spec, cost)
        if useful:  # else dense is smaller at every rank
            with _naming(spec.name):
                full = method.factor(
                    linear_weight(module),
                    linear_bias(module),
                    statistics.at(spec.site) if method.needs else {},
                )
            factors[spec.name] = full.to(
                dtype=torch.float32, device=torch.device("cpu"), max_rank=useful
            )
        if on_layer is not None:
            on_layer(spec.name)
    return factors


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
    model_fingerprint: str, calibration_fingerprint: str, method: FactorizationMethod
) -> str:
    """Return the digest of everything that the factors depend on."""
    options = {  # sets have another order in every process
        name: sorted(value) if isinstance(value, frozenset) else repr(value)
        for name, value in vars(method).items()
    }
    settings = {
        "format": 3,
        "model": model_fingerprint,
        "calibration": calibration_fingerprint if method.needs else None,
        "method": {"type": type(method).__name__, **options},
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def save_factors(path: Path, factors: Mapping[str, LowRankFactors], fingerprint: str) -> None:
    """Write factors as safetensors; ``left`` by direction, so that a prefix is contiguous."""
    tensors: dict[str, Tensor] = {}
    for name, found in factors.items():
        for part in PARTS:
            tensor = getattr(found, part)
            if tensor is not None:
                stored = tensor.T if part == "left" else tensor
                tensors[f"{name}|{part}"] = stored.contiguous()
    with replacing(path) as beside:
        save_file(tensors, beside, metadata={"fingerprint": fingerprint})


def load_factors(path: Path, fingerprint: str) -> dict[str, LowRankFactors]:
    """Open factors; the tensors are memory-mapped and read where they are used.

    Raises:
        StatisticsError: If the file was made for another model, calibration or method.
    """
    with safe_open(str(path), framework="pt") as opened:
        file: Any = opened
        found = (file.metadata() or {}).get("fingerprint")
        if found != fingerprint:
            raise StatisticsError(
                f"{path} has fingerprint {found}, expected {fingerprint}. Delete it; it will be "
                "made again."
            )
        parts: dict[str, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            name, _, part = key.rpartition("|")
            tensor = file.get_tensor(key)
            parts.setdefault(name, {})[part] = tensor.T if part == "left" else tensor
    return {name: LowRankFactors(**found) for name, found in parts.items()}
