"""What a model consists of, without its weights: layers, kinds, shared inputs, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LayerSpec:
    """A linear map of the model, without its weights.

    Attributes:
        name: Module path, ``"model.layers.3.self_attn.q_proj"``.
        kind: Projection type, ``"q_proj"``.
        block: Depth index; ``None`` for the head.
        out_features: Rows of the weight (torch's orientation, also for GPT-2's ``Conv1D``).
        in_features: Columns of the weight.
        has_bias: Whether the dense layer carries a bias vector.
        site: Name of the layer that stands for the shared input: layers of one site read the
            same tensor, so they share calibration statistics.
        tied_to: Name of the parameter that this weight is tied to.
    """

    name: str
    kind: str
    block: int | None
    out_features: int
    in_features: int
    has_bias: bool
    site: str
    tied_to: str | None = None

    @property
    def parameters(self) -> int:
        """Return the parameters of the dense layer, its bias included."""
        return self.out_features * self.in_features + (self.out_features if self.has_bias else 0)


@dataclass(frozen=True)
class ModelMap:
    """Every linear layer of a model, in the order of the forward pass.

    Attributes:
        layers: Layers of the blocks, then the head.
        parameters: Of the whole model; tied tensors are counted once.
        blocks: Number of blocks.
    """

    layers: tuple[LayerSpec, ...]
    parameters: int
    blocks: int

    @property
    def compressible(self) -> tuple[LayerSpec, ...]:
        """Return the layers of the blocks: those that a budget covers."""
        return tuple(spec for spec in self.layers if spec.block is not None)

    @cached_property
    def by_name(self) -> dict[str, LayerSpec]:
        """Return the layers by name."""
        return {spec.name: spec for spec in self.layers}

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the distinct inputs of the compressible layers, in order."""
        return tuple(dict.fromkeys(spec.site for spec in self.compressible))
