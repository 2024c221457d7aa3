"""The linear layers of a model without their weights: kinds, shared inputs, sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lrbo.config.choices import BLOCKS, EMBEDDING, HEAD
from lrbo.errors import ModelError


@dataclass(frozen=True)
class LayerSpec:
    """A linear map of the model, without its weights; that of an embedding is a table of rows."""

    name: str  # module path, "model.layers.3.self_attn.q_proj"
    kind: str  # projection type, "q_proj"
    block: int | None  # depth index; None for the embedding and the head
    out_features: int  # rows of the weight in torch's orientation, also for GPT-2's Conv1D
    in_features: int
    has_bias: bool
    site: str  # name of the first layer that reads the same tensor, and so shares statistics
    tied_to: str | None = None  # of an embedding: the head, if that has the same weight
    is_lookup: bool = False  # an embedding: rows of its weight are looked up
    closing: str | None = None  # name of the layer that closes its attention or MLP, if in one
    neurons: int = 0  # of its MLP: inputs of the layer that closes it; 0 in attention

    @property
    def parameters(self) -> int:
        """Parameters of the dense layer, its bias included."""
        return self.out_features * self.in_features + (self.out_features if self.has_bias else 0)

    @property
    def is_closing(self) -> bool:
        """Whether its attention or MLP ends with this layer, whose outputs the block adds."""
        return self.name == self.closing

    @property
    def part(self) -> str:
        """The part of the model that it belongs to, as in ``budget.include``."""
        if self.block is not None:
            return BLOCKS
        return EMBEDDING if self.is_lookup else HEAD

    @property
    def multiplies(self) -> bool:
        """Whether its weight is multiplied with features: not where rows are only looked up."""
        return not self.is_lookup or self.tied_to is not None

    def is_biased(self, adds_bias: bool) -> bool:
        """Whether it has a bias where it is not dense, by a method that adds one to layers."""
        return self.has_bias or (adds_bias and self.part == BLOCKS)


def sharing(layers: Iterable[LayerSpec]) -> list[tuple[LayerSpec, ...]]:
    """List the layers of one attention or MLP that read the same input, two at least, in order.

    Layers of one input or one output, of which no rank is below the full one, share nothing.
    """
    groups: dict[tuple[str, str | None], list[LayerSpec]] = {}
    for spec in layers:
        groups.setdefault((spec.site, spec.closing), []).append(spec)
    return [
        tuple(group)
        for (site, _), group in groups.items()
        if len(group) > 1
        and group[0].name == site
        and min(min(spec.out_features, spec.in_features) for spec in group) > 1
    ]


@dataclass(frozen=True)
class ModelMap:
    """Every linear layer of a model: those of the blocks, as they run, then embedding and head.

    A head that is tied to the embedding is one with it.
    """

    layers: tuple[LayerSpec, ...]
    parameters: int  # of the whole model; tied tensors are counted once
    blocks: int  # their number
    include: tuple[str, ...] = (BLOCKS,)  # the parts that a budget covers

    @property
    def compressible(self) -> tuple[LayerSpec, ...]:
        """The layers of the parts that a budget covers."""
        return tuple(spec for spec in self.layers if spec.part in self.include)

    def covering(self, include: Sequence[str]) -> ModelMap:
        """Return the map with a budget that covers some parts; ModelError if it lacks one."""
        parts = {spec.part: spec for spec in self.layers}
        for part in include:
            given = f"budget.include=[{', '.join(include)}]"
            if part == HEAD and part not in parts:
                raise ModelError(
                    f"{given}: the head of this model, {self.layers[-1].tied_to}, is tied to its "
                    f"embedding, {self.layers[-1].name}; write embedding, which is both"
                )
            width = self.layers[0].in_features
            if part not in parts or (part == EMBEDDING and parts[part].in_features != width):
                raise ModelError(
                    f"{given}: the embedding of this model is no table of rows of the {width} "
                    "features that its blocks read; leave embedding out"
                )
        return replace(self, include=tuple(include))

    @cached_property
    def by_name(self) -> dict[str, LayerSpec]:
        """The layers by name."""
        return {spec.name: spec for spec in self.layers}

    @property
    def sites(self) -> tuple[str, ...]:
        """The distinct inputs of the compressible layers, in order."""
        return tuple(dict.fromkeys(spec.site for spec in self.compressible))
