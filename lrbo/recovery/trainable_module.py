"""A trainable layer of the same function as a stored one: products, and what is all floats."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lrbo.factorization.methods import balanced
from lrbo.layers.low_rank import FormModule, Left, LowRankLinear, Right, is_dearer
from lrbo.layers.pivoted import PivotedLinear
from lrbo.layers.shared import SharedLinear
from lrbo.linalg import float64_device, require_finite

Stored: TypeAlias = FormModule | nn.Linear  # a linear layer that has lost neurons is plain
MATRIX = "matrix"  # the weight of a thin layer
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class TrainableModule(nn.Module, ABC):
    """A layer of the function of a stored one, with float32 parameters where that has its numbers.

    It computes in the dtype of its input, a table in that of the model.

    Attributes:
        name: Of the layer, for messages.
        matrices: Names of the parameters that multiply features.
    """

    matrices: tuple[str, ...] = ()

    def __init__(self, name: str, stored: Stored) -> None:
        super().__init__()
        self.name = name
        self._stored = (stored,)  # in a tuple it is no submodule, whose tensors would count twice
        self._before = ""

    @property
    def stored(self) -> Stored:
        """The layer that it stands for, as it was."""
        return self._stored[0]

    @property
    def weight(self) -> Tensor:
        """The empty tensor under the name of the dense weight, as in a stored layer."""
        return self.stored.weight

    @abstractmethod
    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Apply the layer to features."""

    @abstractmethod
    def look_up(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        """Return rows of the dense weight, in the dtype of the model."""

    @abstractmethod
    def write_(self) -> None:
        """Give the stored layer, which is not in the model, the numbers that were trained."""

    def forward(self, x: Float[Tensor, "*batch in"] | Int[Tensor, "*ids"]) -> Float[Tensor, ...]:
        """Apply the layer to features; for integers, token ids, look up the rows of the table."""
        if x.is_floating_point():
            return self.multiply(x)
        rows = self.look_up(x.flatten())
        return rows.view(*x.shape, rows.shape[-1])

    def remember(self) -> None:
        """Take the present parameters for those of the stored layer."""
        self._before = self._digest()

    def stored_again(self) -> Stored:
        """Return the stored layer with what was trained: itself, if nothing was.

        Raises:
            StatisticsError: If a parameter is not finite.
        """
        for own, parameter in self.named_parameters():
            require_finite(f"{self.name}.{own}", parameter.detach())
        if self._digest() != self._before:
            layout = layout_of(self.stored)
            with torch.no_grad():
                self.write_()
            assert layout_of(self.stored) == layout, f"{self.name} was not stored as it was"
        return self.stored

    def _digest(self) -> str:
        hashed = hashlib.blake2b()
        for _, parameter in sorted(self.named_parameters()):  # an adapter changes their order
            hashed.update(parameter.detach().cpu().numpy().tobytes())
        return hashed.hexdigest()


class Direct(TrainableModule):
    """Runs the stored layer itself, on the trained numbers: of forms that are all floats."""

    def __init__(self, name: str, stored: Stored) -> None:
        super().__init__(name, stored)
        self._paths = {_own_name(path): path for path, _ in stored.named_parameters()}
        for own, path in self._paths.items():
            self.register_parameter(own, trained(stored.get_parameter(path)))
        self.matrices = (MATRIX,) if MATRIX in self._paths else ()

    @override
    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self._run(x, x.dtype)

    @override
    def look_up(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        return self._run(ids, self.weight.dtype)

    def _run(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        numbers = {path: getattr(self, own).to(dtype) for own, path in self._paths.items()}
        result: Tensor = functional_call(self.stored, numbers, (x,))
        return result

    @override
    def write_(self) -> None:
        for own, path in self._paths.items():
            put(self.stored, path, self.get_parameter(own))


class Product(TrainableModule):
    """Two thin matrices: of a stored product, of one that shares a factor, or of a pivoted one.

    Adam on rows and coefficients, which are of very unlike sizes, would be badly conditioned: a
    pivoted layer is trained as a product along the singular vectors, and pivoted again.

    Attributes:
        right: ``None`` where another layer that reads the same input has it.
        peers: As of :class:`SharedLinear`.
    """

    bias: nn.Parameter | None
    right: nn.Parameter | None

    def __init__(self, name: str, stored: LowRankLinear | SharedLinear | PivotedLinear) -> None:
        super().__init__(name, stored)
        if isinstance(stored, PivotedLinear):
            like = wide(stored.rows.weight)
            left, right = along_singular_vectors(*factors_of(stored))
            self.left, self.right = trained(left.to(like)), trained(right.to(like))
        else:
            self.left = trained(stored.left.weight)
            self.right = None if stored.right is None else trained(stored.right.weight)
        self.bias = None if stored.bias is None else trained(stored.bias)
        self.matrices = ("left",) if self.right is None else ("left", "right")
        self.peers: tuple[Product, ...] = ()
        self._handed: tuple[Tensor, Tensor] | None = None

    @override
    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        left, bias = self.left.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        tokens, rank = x.numel() // max(x.shape[-1], 1), left.shape[1]
        right: Tensor | None = None if self.peers else self.right
        if right is not None:
            right = right.to(x.dtype)
            if is_dearer(rank, len(left), x.shape[-1], tokens):
                return nn.functional.linear(x, left @ right, bias)
            return nn.functional.linear(nn.functional.linear(x, right), left, bias)
        return nn.functional.linear(self._reduced(x), left, bias)

    def _reduced(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch r"]:
        """Apply the shared factor once for all layers of an input, as SharedLinear does."""
        handed, self._handed = self._handed, None
        if handed is not None and handed[0] is x:
            return handed[1]
        own = self.right
        right = self.peers[0].right if own is None else own
        assert right is not None
        reduced = nn.functional.linear(x, right.to(x.dtype))
        if own is not None:
            for other in self.peers:
                other._handed = x, reduced
        return reduced

    @override
    def look_up(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        assert self.right is not None  # no table shares a factor
        dtype = self.weight.dtype
        return self.left[ids].to(dtype) @ self.right.to(dtype)

    @override
    def write_(self) -> None:
        stored = self.stored
        if isinstance(stored, PivotedLinear):
            assert self.right is not None
            sides = self.left.detach().double(), self.right.detach().double()
            made = PivotedLinear.of_product(
                self.name, *sides, lambda *_: None, stored.rows.weight.dtype
            )
            put(stored.rows, "weight", made.rows.weight)
            put(stored.coefficients, "weight", made.coefficients.weight)
            stored.index = made.index
        else:
            assert isinstance(stored, LowRankLinear | SharedLinear)
            put(stored.left, "weight", self.left)
            if self.right is not None:
                assert stored.right is not None
                put(stored.right, "weight", self.right)
        if self.bias is not None:
            put(stored if isinstance(stored, PivotedLinear) else stored.left, "bias", self.bias)


def _own_name(path: str) -> str:
    """Name a parameter; ``weight`` is the empty tensor of a layer of a form."""
    return MATRIX if path == "weight" else path.replace(".", "_")


def wide(tensor: Tensor) -> Tensor:
    """Return a copy in float32, or float64 if it is."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def trained(tensor: Tensor) -> nn.Parameter:
    """Return a trainable copy: updates of a few ten-thousandths would be lost in half precision."""
    return nn.Parameter(wide(tensor).contiguous())


def put(module: nn.Module, path: str, values: Tensor) -> None:
    """Replace a parameter by others of its dtype; what shares its memory stays as it was."""
    owner, _, own = path.rpartition(".")
    part, before = module.get_submodule(owner), module.get_parameter(path)
    fresh = values.detach().to(before.device, before.dtype, copy=True)
    setattr(part, own, nn.Parameter(fresh, requires_grad=False))


def layout_of(module: nn.Module) -> Layout:
    """Return the shape and dtype of every tensor that a module stores, by name."""
    return {n: (tuple(t.shape), t.dtype) for n, t in module.state_dict().items()}


def factors_of(stored: PivotedLinear) -> tuple[Left, Right]:
    """Return a pivoted layer as a product, in float64 where the device has it."""
    device = float64_device(stored.index.device)
    rows, coefficients = (
        part.weight.detach().to(device, torch.float64)
        for part in (stored.rows, stored.coefficients)
    )
    unit = torch.eye(len(rows), dtype=rows.dtype, device=device)
    return torch.cat([unit, coefficients])[stored.index.to(device)], rows


def along_singular_vectors(left: Left, right: Right) -> tuple[Left, Right]:
    """Return the same product with orthogonal directions, both sides of each of one length."""
    first, inner = torch.linalg.qr(left)
    second, outer = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(inner @ outer.T)
    return balanced(first @ (u * s), vh @ second.T)
