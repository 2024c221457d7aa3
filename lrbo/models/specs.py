"""The linear layers of a model without their weights: kinds, shared inputs, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LayerSpec:
    """A linear map of the model, without its weights."""

    name: str  # module path, "model.layers.3.self_attn.q_proj"
    kind: str  # projection type, "q_proj"
    block: int | None  # depth index; None for the head
    out_features: int  # rows of the weight in torch's orientation, also for GPT-2's Conv1D
    in_features: int
    has_bias: bool
    site: str  # name of the first layer that reads the same tensor, and so shares statistics
    tied_to: str | None = None  # name of the parameter that the weight is tied to
    part: str | None = None  # name of the layer with which its attention or MLP ends, if in one
    neurons: int = 0  # of its MLP: inputs of the layer that ends it; 0 in attention

    @property
    def parameters(self) -> int:
        """Parameters of the dense layer, its bias included."""
        return self.out_features * self.in_features + (self.out_features if self.has_bias else 0)

    @property
    def ends_part(self) -> bool:
        """Whether its attention or MLP ends with this layer, whose outputs the block adds."""
        return self.name == self.part


@dataclass(frozen=True)
class ModelMap:
    """Every linear layer of a model, in the order of the forward pass."""

    layers: tuple[LayerSpec, ...]  # of the blocks, then the head
    parameters: int  # of the whole model; tied tensors are counted once
    blocks: int  # their number

    @property
    def compressible(self) -> tuple[LayerSpec, ...]:
        """The layers of the blocks: those that a budget covers."""
        return tuple(spec for spec in self.layers if spec.block is not None)

    @cached_property
    def by_name(self) -> dict[str, LayerSpec]:
        """The layers by name."""
        return {spec.name: spec for spec in self.layers}

    @property
    def sites(self) -> tuple[str, ...]:
        """The distinct inputs of the compressible layers, in order."""
        return tuple(dict.fromkeys(spec.site for spec in self.compressible))
