"""A linear layer with a base, unpacked at each call, and a low rank of what the base leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lrbo.errors import ModelError
from lrbo.layers.delta_form import Bands
from lrbo.layers.form import Level
from lrbo.layers.forms import (
    Based,
    Codebook,
    Delta,
    DeltaBands,
    KeptRows,
    Quantized,
    QuantizedFactors,
    SemiStructured,
    Sparse,
)
from lrbo.layers.low_rank import Bias, FormModule, Left, Right, is_dearer
from lrbo.layers.packing import packed_width, unpack

# Of a base's tensors by name; None is the floating dtype of the model.
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype | None]]
BYTE = torch.uint8
INT8 = 127  # the largest integer of a factor of 8 bits
MIDDLE = 8  # what stands for 0 among the integers of a factor of 4 bits
PIECE = 2**24  # entries of a base that are unpacked at a time where it is multiplied with
ALL = slice(None)


def shapes_of(form: Based, out_features: int, in_features: int, base: Level) -> Shapes:
    """Return the shapes and dtypes of the tensors of a base."""

    def packed(count: int, bits: int) -> tuple[tuple[int, int], torch.dtype]:
        return (out_features, packed_width(count, bits)), BYTE

    match form:
        case QuantizedFactors() | Delta():
            return {}
        case Quantized():
            groups = (out_features, in_features // base[0])
            shapes: Shapes = {"packed": packed(in_features, form.bits), "scale": (groups, None)}
            return shapes if form.symmetric else {**shapes, "zero": (groups, BYTE)}
        case Codebook():
            table = (out_features, 2**form.bits)
            return {"packed": packed(in_features, form.bits), "table": (table, None)}
        case SemiStructured():
            values = (out_features, in_features // 2)
            return {"values": (values, None), "positions": packed(in_features // 2, 2)}
        case Sparse():
            values = (out_features, form.kept(in_features, base[0]))
            return {"values": (values, None), "mask": packed(in_features, 1)}
        case KeptRows():
            rows = form.kept(out_features, base[0])
            return {"values": ((rows, in_features), None), "rows": ((rows,), torch.int32)}
    raise TypeError(f"{form.name} has no tensors")


def dense_of(
    form: Based, shape: tuple[int, int], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Float[Tensor, "out in"]:
    """Return the weight of a shape that the tensors of a base stand for."""
    match form:
        case Quantized():
            scale, codes = tensors["scale"], unpack(tensors["packed"], form.bits).to(dtype)
            weight, zero = codes.view(*scale.shape, -1), tensors.get("zero")
            middle = 2 ** (form.bits - 1) if zero is None else zero.to(dtype)[:, :, None]
            weight.sub_(middle).mul_(scale.to(dtype)[:, :, None])
            return codes
        case Codebook():
            index = unpack(tensors["packed"], form.bits).long()
            return tensors["table"].to(dtype).gather(1, index)
        case SemiStructured():
            values = tensors["values"]
            pairs = unpack(tensors["positions"], 2).long().view(len(values), -1, 2)
            four = values.new_zeros(*pairs.shape[:2], 4, dtype=dtype)
            return four.scatter_(2, pairs, values.to(dtype).view_as(pairs)).flatten(1)
        case Sparse():
            kept = unpack(tensors["mask"], 1).bool()
            weight = tensors["values"].new_zeros(kept.shape, dtype=dtype)
            return weight.masked_scatter_(kept, tensors["values"].to(dtype))
        case KeptRows():
            values, rows = tensors["values"], tensors["rows"].long()
            return values.new_zeros(shape, dtype=dtype).index_copy_(0, rows, values.to(dtype))
    raise TypeError(f"{form.name} has no tensors")


def bands_of(form: Based, base: Level) -> Bands | None:
    """Return the bands of the factors over a base of some level; ``None`` where all are alike."""
    return Bands(*base) if isinstance(form, DeltaBands) else None


def parameters_in(form: Based, tensors: Mapping[str, Tensor], bands: Bands | None = None) -> int:
    """Count the parameters among the tensors of a module: weights, and what is no base.

    An integer or an index is a weight; scales, zero points, tables and positions say what it means.
    """
    scale = tensors.get("factor_scale")
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    packed, values = sizes.pop("packed", 0), sizes.pop("values", 0)
    for described in ("scale", "zero", "table", "positions", "mask", "rows", "factor_scale"):
        sizes.pop(described, None)
    bits = form.bits if isinstance(form, Quantized | Codebook) else 8
    factors = sum(sizes.pop(side, 0) for side in ("left", "right"))
    if bands is not None and scale is not None:
        factors = len(scale) * factors * 8 // bands.bits(len(scale))
    elif not form.has_floats:
        factors = factors * 8 // form.factor_bits
    return packed * 8 // bits + values + factors + sum(sizes.values())


class Factors(NamedTuple):
    """A low rank in integers, ``left diag(scale) right``, or in floats, ``left right``.

    Of 8 bits and of floats ``left`` is ``(out, r)`` and ``right`` ``(r, in)``; of 4 bits both lie
    by rank and are packed, ``(r, out / 2)`` and ``(r, in / 2)``, uint8. In ``bands`` of directions
    of other bits they lie so too, one direction behind the other, ``(bytes,)``.
    """

    left: Tensor
    scale: Float[Tensor, " r"] | None  # None of floats
    right: Tensor
    bands: Bands | None = None

    @classmethod
    def of(cls, left: Left, right: Right, dtype: torch.dtype, *, floats: bool = False) -> Factors:
        """Round two factors to 8 bits, each direction by its own scale, or to floats.

        Scales, or else the floats, are stored in ``dtype``.
        """
        if floats:
            return cls(left.to(dtype), None, right.to(dtype))
        steps = []
        for lengths in (left.abs().amax(0), right.abs().amax(1)):
            step = lengths.double() / INT8
            steps.append(torch.where(step > 0, step, torch.ones_like(step)))
        codes = [(left.double() / steps[0]).round(), (right.double() / steps[1][:, None]).round()]
        left, right = (each.to(torch.int8) for each in codes)
        return cls(left, (steps[0] * steps[1]).to(dtype), right)

    @classmethod
    def on_meta(
        cls, form: Based, base: Level, out_features: int, in_features: int, rank: int
    ) -> Factors:
        """Return factors of a rank over a base without numbers."""
        with torch.device("meta"):
            scale, bands = torch.empty(rank), bands_of(form, base)
            if bands is not None:
                sizes = (n * bands.bits(rank) // 8 for n in (out_features, in_features))
                left, right = (torch.empty(size, dtype=BYTE) for size in sizes)
                return cls(left, scale, right, bands)
            if form.has_floats:
                return cls(torch.empty(out_features, rank), None, torch.empty(rank, in_features))
            if form.factor_bits == 8:
                left = torch.empty(out_features, rank, dtype=torch.int8)
                return cls(left, scale, torch.empty(rank, in_features, dtype=torch.int8))
            widths = (packed_width(n, form.factor_bits) for n in (out_features, in_features))
            left, right = (torch.empty(rank, width, dtype=BYTE) for width in widths)
            return cls(left, scale, right)

    @property
    def rank(self) -> int:
        """The number of directions."""
        return len(self.right) if self.scale is None else len(self.scale)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.right.device

    def leading(self, rank: int) -> Factors:
        """Return views of the leading directions."""
        scale = None if self.scale is None else self.scale[:rank]
        if self.bands is not None:
            share = self.bands.bits(rank), self.bands.bits(self.rank)
            left, right = (
                side[: len(side) * share[0] // share[1]] if rank else side[:0]
                for side in (self.left, self.right)
            )
            return Factors(left, scale, right, self.bands)
        left = self.left[:rank] if self.left.dtype == BYTE else self.left[:, :rank]
        return Factors(left, scale, self.right[:rank])

    def to(self, device: torch.device, dtype: torch.dtype) -> Factors:
        """Return a copy elsewhere, with scales or floats of a dtype."""

        def moved(each: Tensor) -> Tensor:
            return each.to(device, dtype if each.is_floating_point() else None, copy=True)

        scale = None if self.scale is None else moved(self.scale)
        return Factors(moved(self.left), scale, moved(self.right), self.bands)

    def wide(self, dtype: torch.dtype, rows: slice | Int[Tensor, " n"] = ALL) -> tuple[Left, Right]:
        """Return ``left diag(scale)``, or rows of it, and ``right`` in a dtype."""
        if self.bands is not None:
            left, right = (
                _unpacked_bands(side, self.bands, self.rank, dtype)
                for side in (self.left, self.right)
            )
            left = left.T[rows]
        elif self.left.dtype != BYTE:
            left, right = self.left[rows].to(dtype), self.right.to(dtype)
        else:
            codes, right = self.left, unpack(self.right, 4).to(dtype) - MIDDLE
            if isinstance(rows, Tensor):  # of :func:`pack`: the second half lies above the first
                half = codes.shape[1]
                codes = (codes[:, rows % half] >> (4 * (rows // half)).to(BYTE)) & 15
            else:
                codes = unpack(codes, 4)[:, rows]
            left = codes.T.to(dtype) - MIDDLE
        return (left if self.scale is None else left * self.scale.to(dtype)), right


def middle_of(bits: int) -> float:
    """Return the code of 0 in a band, halfway between integers of few bits: all four are of use."""
    return 2.0 ** (bits - 1) if bits == 8 else (2**bits - 1) / 2


def _unpacked_bands(
    packed: Tensor, bands: Bands, rank: int, dtype: torch.dtype
) -> Float[Tensor, "r n"]:
    """Return the directions in the bytes of one side."""
    count, start, parts = len(packed) * 8 // max(bands.bits(rank), 1), 0, []
    for directions, bits in bands.runs(rank):
        stop = start + directions * packed_width(count, bits)
        codes = unpack(packed[start:stop].view(directions, -1), bits)
        parts.append(codes.to(dtype) - middle_of(bits))
        start = stop
    return torch.cat(parts)


class BasedLinear(FormModule):
    """x -> base(x) + left(scale * right(x)); a base of a few outputs multiplies no others.

    Attributes:
        form: What the base is; its tensors are buffers, as of :func:`shapes_of`.
        shared: The weight of a base model under a change, ``(out, in)``, in no checkpoint.
        left, right: As of :class:`Factors`, or ``None`` at rank 0.
        factor_scale: ``(rank,)``, or ``None`` at rank 0 and of floats.
    """

    shared: Tensor | None
    left: Tensor | None
    right: Tensor | None
    factor_scale: Tensor | None

    def __init__(
        self,
        form: Based,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        factors: Factors | None,
        bias: Bias,
        like: Tensor,
    ) -> None:
        """Wrap tensors without copying them, of the dtype and on the device of ``like``."""
        super().__init__(*shape, 0 if factors is None else factors.rank, like)
        self.form, self.names = form, tuple(tensors)
        self.bands = None if factors is None else factors.bands
        self.register_buffer("shared", None, persistent=False)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("left", None if factors is None else factors.left)
        self.register_buffer("right", None if factors is None else factors.right)
        self.register_buffer("factor_scale", None if factors is None else factors.scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def on_meta(
        cls, form: Based, out_features: int, in_features: int, level: Level, *, bias: bool
    ) -> BasedLinear:
        """Return a layer for weights to be loaded into."""
        *base, rank = level
        with torch.device("meta"):
            tensors = {
                name: torch.empty(shape, dtype=dtype)
                for name, (shape, dtype) in shapes_of(
                    form, out_features, in_features, tuple(base)
                ).items()
            }
            shape = out_features, in_features
            factors = Factors.on_meta(form, tuple(base), *shape, rank) if rank else None
            offset = torch.empty(out_features) if bias else None
            like = torch.empty(0)
        return cls(form, shape, tensors, factors, offset, like)

    @property
    def factors(self) -> Factors | None:
        """The low rank, ``None`` at rank 0."""
        if self.left is None or self.right is None:
            return None
        return Factors(self.left, self.factor_scale, self.right, self.bands)

    def share_(self, weight: Float[Tensor, "out in"]) -> None:
        """Put the weight of a base model under the change; it stays shared, and is not copied."""
        if weight.shape != (self.out_features, self.in_features):
            raise ModelError(
                f"a base of shape {tuple(weight.shape)}, expected "
                f"({self.out_features}, {self.in_features})"
            )
        self.shared = weight

    def base(
        self, dtype: torch.dtype, rows: slice | Int[Tensor, " n"] = ALL
    ) -> Float[Tensor, "n in"]:
        """Return rows of the weight that the base stands for."""
        if isinstance(self.form, Delta):
            if self.shared is None:
                raise ModelError(
                    "a layer that adds to a base model has none; open it with lrbo.load, or with "
                    "from_pretrained after `import lrbo`, which read the base too"
                )
            return self.shared[rows].to(dtype)
        tensors = {name: self.get_buffer(name) for name in self.names}
        shape = self.out_features, self.in_features
        if not self.form.by_rows:
            return dense_of(self.form, shape, tensors, dtype)[rows]
        own = {name: tensor[rows] for name, tensor in tensors.items()}
        return dense_of(self.form, shape, own, dtype)

    @override
    def dense_weight(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "out in"]:
        return self._weight(dtype, ALL, self.out_features)

    @override
    def look_up(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        return self._weight(self.weight.dtype, ids, len(ids))

    def _weight(
        self, dtype: torch.dtype, rows: slice | Int[Tensor, " n"], count: int
    ) -> Float[Tensor, "n in"]:
        if self.names or isinstance(self.form, Delta):
            weight = self.base(dtype, rows)
        else:
            weight = self.weight.new_zeros(count, self.in_features, dtype=dtype)
        if self.factors is not None:
            return torch.addmm(weight, *self.factors.wide(dtype, rows))  # rounded once
        return weight.clone() if isinstance(self.form, Delta) else weight  # that of others too

    @override
    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        linear, shape = nn.functional.linear, (self.out_features, self.in_features)
        is_whole = bool(self.names) and not isinstance(self.form, KeptRows)
        is_whole |= isinstance(self.form, Delta)
        tokens = x.numel() // max(self.in_features, 1)
        # Where that is fewer operations, the low rank is added to what is unpacked.
        if is_whole and (not self.rank or tokens * sum(shape) > shape[0] * shape[1]):
            return self._of_unpacked(x, with_rank=bool(self.rank))
        bias = None if is_whole else self.bias
        result = None
        if self.factors is not None:
            left, right = self.factors.wide(x.dtype)
            # As trials do with factors of floats.
            if not (self.names or is_whole) and is_dearer(self.rank, *shape, tokens):
                return linear(x, left @ right, bias)
            result = linear(linear(x, right), left, bias)
            if is_whole:
                return result.add_(self._of_unpacked(x, with_rank=False))
        if result is None:  # of rank 0
            result = x.new_zeros(*x.shape[:-1], self.out_features)
            result = result if bias is None else result + bias
        if self.names:
            rows, values = self.get_buffer("rows"), self.get_buffer("values").to(x.dtype)
            result.index_add_(-1, rows, linear(x, values))
        return result

    def _of_unpacked(
        self, x: Float[Tensor, "*batch in"], *, with_rank: bool
    ) -> Float[Tensor, "*batch out"]:
        """Multiply with what is unpacked and add the bias; a large base is unpacked in pieces."""

        def weight(rows: slice, count: int) -> Tensor:
            return self._weight(x.dtype, rows, count) if with_rank else self.base(x.dtype, rows)

        step = max(PIECE // self.in_features, 1)
        if not self.form.by_rows or step >= self.out_features:
            return nn.functional.linear(x, weight(ALL, self.out_features), self.bias)
        starts = range(0, self.out_features, step)
        pieces = [
            nn.functional.linear(x, weight(slice(start, start + step), step)) for start in starts
        ]
        result = torch.cat(pieces, -1)
        return result if self.bias is None else result.add_(self.bias)
