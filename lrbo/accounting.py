"""Parameters, bytes and MACs of dense, factored and pivoted storage; the one accountant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lrbo.specs import LayerSpec, ModelMap

Storage = Literal["factored", "pivoted"]
STORAGES: tuple[Storage, ...] = ("factored", "pivoted")


def low_rank_parameters(spec: LayerSpec, rank: int, *, bias: bool, storage: Storage) -> int:
    """Count the parameters of a layer stored at a rank.

    ``factored`` keeps ``left`` and ``right``: ``rank * (out + in)``. ``pivoted`` is the
    lossless PIFA form (Zhao et al., ICML 2025), ``rank * (out + in) - rank**2``, which never
    exceeds the dense weight.

    Args:
        spec: The layer.
        rank: Inner dimension, at least 0.
        bias: Whether the low-rank layer carries a bias vector of ``out`` numbers.
        storage: The form that is counted.

    Raises:
        ValueError: If the rank is negative or above ``min(out, in)``.
    """
    if not 0 <= rank <= min(spec.out_features, spec.in_features):
        raise ValueError(
            f"{spec.name}: rank {rank} is outside 0..{min(spec.out_features, spec.in_features)}."
        )
    parameters = rank * (spec.out_features + spec.in_features)
    if storage == "pivoted":
        parameters -= rank * rank
    return parameters + (spec.out_features if bias else 0)


def low_rank_macs(spec: LayerSpec, rank: int, storage: Storage) -> int:
    """Return the multiply-accumulates of a layer for one token: as many as its matrices hold."""
    return low_rank_parameters(spec, rank, bias=False, storage=storage)


def index_bytes(spec: LayerSpec, storage: Storage) -> int:
    """Return the bytes of a low-rank layer that are no parameters.

    A pivoted layer keeps the order of its outputs, an int32 each.
    """
    return 4 * spec.out_features if storage == "pivoted" else 0


@dataclass(frozen=True)
class ModelAccount:
    """What a model holds and costs, before and after compression.

    Parameters are floating-point numbers; the integers that pivoted layers keep are in the bytes
    only.

    Attributes:
        compressible_dense: Parameters of the layers that may be compressed, dense.
        compressible: The same layers as allocated.
        model_dense: Parameters of the whole dense model, tied tensors counted once.
        model: The whole model as allocated.
        bytes_dense: ``model_dense`` at the dtype that was asked for.
        bytes: ``model`` at the dtype that was asked for, and the integers of pivoted layers.
        macs_per_token_dense: Multiply-accumulates of all linear layers, the head included,
            for one token; attention scores, norms and embeddings are not in it.
        macs_per_token: The same as allocated, in the storage form that was asked for.
    """

    compressible_dense: int
    compressible: int
    model_dense: int
    model: int
    bytes_dense: int
    bytes: int
    macs_per_token_dense: int
    macs_per_token: int

    @property
    def keep_ratio(self) -> float:
        """Parameters kept divided by dense parameters, of the compressible layers."""
        return self.compressible / self.compressible_dense


def account(
    model: ModelMap,
    ranks: Mapping[str, int | None],
    layer_parameters: Mapping[str, int],
    *,
    storage: Storage,
    bytes_per_parameter: int,
) -> ModelAccount:
    """Count a whole model under an allocation.

    Args:
        model: The map of the dense model.
        ranks: Rank of each compressible layer; ``None`` is dense.
        layer_parameters: Stored parameters of each compressible layer, from the allocation's
            own cost function.
        storage: The form of the layers with a rank.
        bytes_per_parameter: Of the dtype to count in.
    """
    compressible = [spec for spec in model.layers if spec.name in ranks]
    dense = sum(spec.parameters for spec in compressible)
    kept = sum(layer_parameters[spec.name] for spec in compressible)
    macs_dense = sum(spec.out_features * spec.in_features for spec in model.layers)
    macs, integers = macs_dense, 0
    for spec in compressible:
        rank = ranks[spec.name]
        if rank is not None:
            macs += low_rank_macs(spec, rank, storage) - spec.out_features * spec.in_features
            integers += index_bytes(spec, storage)
    total = model.parameters - dense + kept
    return ModelAccount(
        compressible_dense=dense,
        compressible=kept,
        model_dense=model.parameters,
        model=total,
        bytes_dense=model.parameters * bytes_per_parameter,
        bytes=total * bytes_per_parameter + integers,
        macs_per_token_dense=macs_dense,
        macs_per_token=macs,
    )


def dense_parameters(layers: Iterable[LayerSpec]) -> int:
    """Return the parameters of ``layers`` while they are dense, biases included."""
    return sum(spec.parameters for spec in layers)
