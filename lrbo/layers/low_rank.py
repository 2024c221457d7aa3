"""What the modules of all forms have in common, and LowRankLinear: a product of two thin layers."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lrbo.errors import ModelError
from lrbo.layers.form import Level

Left = Float[Tensor, "out r"]
Right = Float[Tensor, "r in"]
Bias = Float[Tensor, " out"] | None
# The bias that belongs to a linear map without one, which computes in the dtype it is given; the
# second argument is the dtype of the bias.
BiasFor = Callable[[Callable[[Tensor], Tensor], torch.dtype], Tensor | None]

L = TypeVar("L", bound=nn.Linear)


def linear_of(
    weight: Float[Tensor, "out in"],
    bias: Bias,
    kind: type[L] = nn.Linear,  # type: ignore[assignment]
) -> L:
    """Wrap tensors without copying them: views stay views."""
    with torch.device("meta"), warnings.catch_warnings():
        # Rank 0 is a layer too: its output is the bias.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        layer = kind(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def no_weight(like: Tensor) -> Tensor:
    """Return the empty tensor that stands under the name of the dense weight in a module of a form.

    A loader that does not know the form would find nothing under that name in a checkpoint and
    start the layer at random; over another shape it stops.
    """
    return like.new_empty(0)


def is_dearer(rank: int, out_features: int, in_features: int, tokens: int) -> bool:
    """Whether two thin products cost more than multiplying them out for these tokens.

    That takes ``rank * out * in`` operations once, and then ``out * in`` per token.
    """
    dense = out_features * in_features
    return tokens * rank * (out_features + in_features) > (tokens + rank) * dense


def require_plain(*layers: nn.Module) -> None:
    """Refuse adapters on the factors of a table: rows that are looked up do not pass them."""
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                f"a factor of an embedding is a {type(layer).__name__}, expected a linear layer: "
                "rows that are looked up would miss its adapter. Leave the embedding out of "
                "target_modules, or merge the adapter with merge_and_unload()"
            )


class FormModule(nn.Module, ABC):
    """A linear layer in a form other than dense, at a rank; ``weight`` is :func:`no_weight`.

    As an embedding, its weight is a table of rows, which are looked up.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, out_features: int, in_features: int, rank: int, like: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features, self.rank = out_features, in_features, rank
        self.register_buffer("weight", no_weight(like))

    @abstractmethod
    def dense_weight(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "out in"]:
        """Return the dense weight that the layer stands for."""

    @abstractmethod
    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Apply the layer to features."""

    def look_up(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        """Return rows of the dense weight; forms of tables work no others out."""
        return self.dense_weight(self.weight.dtype)[ids]

    def forward(self, x: Float[Tensor, "*batch in"] | Int[Tensor, "*ids"]) -> Float[Tensor, ...]:
        """Apply the layer to features; for integers, token ids, look up the rows of the table."""
        if x.is_floating_point():
            return self.multiply(x)
        return self.look_up(x.flatten()).view(*x.shape, self.in_features)


class ProductModule(FormModule):
    """A linear layer that is a product of two thin matrices, in one form or another."""

    @classmethod
    @abstractmethod
    def of_product(
        cls, name: str, left: Left, right: Right, bias_for: BiasFor, dtype: torch.dtype
    ) -> ProductModule:
        """Return the layer ``name`` as it is stored: a product, rounded to a dtype once."""

    @classmethod
    @abstractmethod
    def stand_in(cls, name: str, left: Left, right: Right, bias: Bias) -> ProductModule:
        """Return, at once, a layer that takes as long as the stored one; its outputs may differ."""

    @classmethod
    def empty(
        cls, name: str, out_features: int, in_features: int, level: Level, *, bias: bool
    ) -> ProductModule:
        """Return a layer on the meta device, for weights to be loaded into; its level is a rank."""
        (rank,) = level
        with torch.device("meta"):
            left, right = torch.empty(out_features, rank), torch.empty(rank, in_features)
            return cls.stand_in(name, left, right, torch.empty(out_features) if bias else None)


class LowRankLinear(ProductModule):
    """x -> left(right(x)): two nn.Linear, so that dtype and device moves and adapters just work."""

    def __init__(self, left: Left, right: Right, bias: Bias) -> None:
        """Wrap tensors without copying them: views stay views."""
        super().__init__(len(left), right.shape[1], len(right), left.detach())
        self.right: nn.Linear = linear_of(right, None)  # in -> rank, without bias
        self.left: nn.Linear = linear_of(left, bias)  # rank -> out, with the bias, if any

    @classmethod
    @override
    def of_product(
        cls, name: str, left: Left, right: Right, bias_for: BiasFor, dtype: torch.dtype
    ) -> LowRankLinear:
        left, right = left.to(dtype), right.to(dtype)
        bias = bias_for(lambda x: left.to(x.dtype) @ (right.to(x.dtype) @ x), dtype)
        return cls(left, right, bias)

    @classmethod
    @override
    def stand_in(cls, name: str, left: Left, right: Right, bias: Bias) -> LowRankLinear:
        return cls(left.contiguous(), right, bias)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias of the layer, ``(out,)``, if it has one."""
        return self.left.bias

    @override
    def dense_weight(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "out in"]:
        return self.left.weight.to(dtype) @ self.right.weight.to(dtype)

    @override
    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        result: Tensor = self.left(self.right(x))
        return result

    @override
    def look_up(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        require_plain(self.left, self.right)
        return self.left.weight[ids] @ self.right.weight
