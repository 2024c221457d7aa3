"""Linear layers that read the same input and have one right factor: SharedLinear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lrbo.layers.low_rank import Bias, FormModule, Left, Right, linear_of
from lrbo.models.specs import LayerSpec


class SharedLinear(FormModule):
    """x -> left(right(x)), where layers that read the same input have one ``right``.

    The first of them holds it, and hands what it gives to the others, each of which takes it once.
    One that then reads another tensor, or runs before the first, applies ``right`` itself.

    Attributes:
        site: Name of the first layer.
        peers: Of the first layer all others, of these the first; in a tuple they are no
            submodules, whose tensors would count twice.
    """

    def __init__(
        self, left: Left, right: Right | None, bias: Bias, in_features: int, site: str
    ) -> None:
        """Wrap tensors without copying them; ``right`` is ``None`` but of the first layer."""
        super().__init__(left.shape[0], in_features, left.shape[1], left.detach())
        self.right: nn.Linear | None = None if right is None else linear_of(right, None)
        self.left: nn.Linear = linear_of(left, bias)
        self.site = site
        self.peers: tuple[SharedLinear, ...] = ()
        self._handed: tuple[Tensor, Tensor] | None = None  # an input, and right(input)

    @classmethod
    def on_meta(cls, spec: LayerSpec, rank: int, *, bias: bool) -> SharedLinear:
        """Return a layer for weights to be loaded into."""
        with torch.device("meta"):
            left = torch.empty(spec.out_features, rank)
            right = torch.empty(rank, spec.in_features) if spec.name == spec.site else None
            offset = torch.empty(spec.out_features) if bias else None
            return cls(left, right, offset, spec.in_features, spec.site)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias of the layer, ``(out,)``, if it has one."""
        return self.left.bias

    @override
    def dense_weight(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "out in"]:
        right: Tensor = self._right().weight
        return self.left.weight.to(dtype) @ right.to(dtype)

    @override
    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        result: Tensor = self.left(self._reduced(x))
        return result

    def _reduced(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch r"]:
        """Apply ``right``, or take what the first layer has handed over for this very input."""
        handed, self._handed = self._handed, None
        if handed is not None and handed[0] is x:
            return handed[1]
        reduced: Tensor = self._right()(x)
        if self.right is not None:
            for other in self.peers:
                other._handed = x, reduced
        return reduced

    def _right(self) -> Any:
        # Of the first layer as it is now: an adapter may have taken the place of its matrix.
        return self.peers[0].right if self.right is None else self.right


def link_(layers: Mapping[str, nn.Module]) -> None:
    """Let shared layers, by name, know the first of their site, and that one them."""
    for layer in layers.values():
        if isinstance(layer, SharedLinear) and layer.right is None and not layer.peers:
            first = layers[layer.site]
            assert isinstance(first, SharedLinear)
            layer.peers, first.peers = (first,), (*first.peers, layer)
