"""Weights -> sums of Kronecker products, of which every first few are the sum of fewer terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lrbo.factorization.factors import Buffers, LowRankFactors, bias_of
from lrbo.factorization.methods import balanced
from lrbo.layers.form import Level
from lrbo.layers.kronecker import KroneckerLinear, sum_of
from lrbo.layers.kronecker_form import Kronecker
from lrbo.layers.low_rank import Bias, linear_of

SWEEPS = 3  # of alternating least squares, at most
SLOW = 0.002  # share of what a term removes, by which a sweep that goes on must raise it
STEPS = 4  # of conjugate gradients, for one side
SOLVED = 1e-6  # of the first remainder, squared
DAMPING = 1e-6  # of the mean diagonal entry
CHUNK = 2**22  # elements of each of two arrays while terms are multiplied with each other


@dataclass(frozen=True)
class KroneckerSum:
    """Kronecker products of a weight in an order in which every first few stand for it.

    Attributes:
        shape: Of the weight, ``(out, in)``.
        left: Rows and columns of every ``A``.
        rest: The terms: columns are the ``A``, and rows the ``B``, both row by row. Errors and
            losses are those of 0, 1, ... terms.
        offset: As of :class:`LowRankFactors`.
        center: As of :class:`LowRankFactors`.
    """

    shape: tuple[int, int]
    left: Level
    rest: LowRankFactors
    offset: Bias = None
    center: Float[Tensor, " in"] | None = None

    @property
    def device(self) -> torch.device:
        """Where the terms are."""
        return self.rest.left.device

    def module(self, count: int) -> KroneckerLinear:
        """Return the layer of the first terms; its tensors are views."""
        left, right = self._terms(count)

        def linear(x: Tensor) -> Tensor:
            result: Tensor = KroneckerLinear(left.to(x.dtype), right.to(x.dtype), None)(x)
            return result

        return KroneckerLinear(left, right, bias_of(self.offset, self.center, linear, left.dtype))

    def trial_module(self, name: str, count: int, tokens: int, buffers: Buffers) -> nn.Module:
        """Return a layer of the first terms as :meth:`LowRankFactors.trial_module` does."""
        left, right = self._terms(count)
        dense = self.shape[0] * self.shape[1]
        macs = Kronecker.macs(*self.shape, (*self.left, count))
        if tokens * macs <= (tokens + count) * dense:
            return self.module(count)
        if name not in buffers:
            buffers[name] = left.new_empty(self.shape)
        product = buffers[name].copy_(sum_of(left, right))
        bias = bias_of(self.offset, self.center, lambda x: product.to(x.dtype) @ x, product.dtype)
        return linear_of(product, bias)

    def weights(self) -> Iterator[Float[Tensor, "out in"]]:
        """Return the weights that the first 1, 2, ... terms stand for."""
        for count in range(1, self.rest.max_rank + 1):
            yield sum_of(*self._terms(count))

    def _terms(self, count: int) -> tuple[Tensor, Tensor]:
        """Return views of the first terms: ``(terms, rows, columns)`` each."""
        if not 1 <= count <= self.rest.max_rank:
            raise ValueError(f"{count} terms are outside 1..{self.rest.max_rank}.")
        block = Kronecker.block(*self.shape, self.left)
        left, right = self.rest.left.T[:count], self.rest.right[:count]
        return left.reshape(count, *self.left), right.reshape(count, *block)

    def to(
        self, *, dtype: torch.dtype, device: torch.device, max_rank: int | None = None
    ) -> KroneckerSum:
        """Return a copy of other dtype or device, with at most ``max_rank`` terms."""
        wide = torch.promote_types(dtype, torch.float32)
        offset, center = (
            None if each is None else each.to(device, wide) for each in (self.offset, self.center)
        )
        terms = self.rest.to(dtype=dtype, device=device, max_rank=max_rank)
        return replace(self, rest=terms, offset=offset, center=center)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for the cache."""
        ends = {"offset": self.offset, "center": self.center}
        return self.rest.tensors() | {n: each for n, each in ends.items() if each is not None}

    @classmethod
    def of_tensors(
        cls, shape: tuple[int, int], left: Level, tensors: Mapping[str, Tensor]
    ) -> KroneckerSum:
        """Read what :meth:`tensors` gave; ValueError if shapes do not fit each other."""
        given = dict(tensors)
        ends = given.pop("offset", None), given.pop("center", None)
        terms = LowRankFactors.of_tensors(given)
        block = Kronecker.block(*shape, left)
        expected = [left[0] * left[1], block[0] * block[1], *shape]
        actual = [terms.left.shape[0], terms.right.shape[1]]
        actual += [size if end is None else len(end) for end, size in zip(ends, shape, strict=True)]
        if actual != expected:
            raise ValueError(f"Kronecker terms of sizes {actual}, expected {expected}")
        return cls(shape, left, terms, *ends)


def kronecker_terms(
    weight: Float[Tensor, "out in"],
    left: Level,
    gradient: Float[Tensor, "out out"] | None,
    moment: Float[Tensor, "in in"] | None,
    *,
    is_weighed: bool = True,
) -> LowRankFactors:
    """Return the terms of a weight, with the exact error of every first few of them.

    The error of a change ``D`` is ``tr(G D C D^T)``. Terms are fitted one after the other to what
    those before them leave, from the leading singular vectors of the rearranged weight on, by
    alternating least squares. Then they are put in order: next is the one that removes most of
    what those before it leave, with the factor at which it does.

    Args:
        weight: In float64.
        left: Rows and columns of every ``A``; there are :meth:`Kronecker.largest` terms.
        gradient: ``G``; by default every output weighs the same.
        moment: ``C``; by default every input does.
        is_weighed: Whether terms are fitted in the moments, or are singular vectors of the weight.

    References:
        Van Loan and Pitsianis, *Approximation with Kronecker products*, 1993, for both.
    """
    shape = weight.shape[0], weight.shape[1]
    block = Kronecker.block(*shape, left)
    count = Kronecker.largest(*shape, left)
    metric = [
        torch.eye(size).to(weight) if each is None else each
        for each, size in zip((gradient, moment), shape, strict=True)
    ]
    if is_weighed and not (gradient is None and moment is None):
        a, b = _fitted(weight, left, count, *metric)
    else:
        u, values, vh = torch.linalg.svd(_rearranged(weight, left), full_matrices=False)
        a = (u[:, :count] * values[:count]).T.reshape(count, *left)
        b = vh[:count].reshape(count, *block)
    weighed = metric[0] @ weight @ metric[1]
    gains = torch.einsum("kij,iajb,kab->k", a, weighed.view(left[0], block[0], left[1], -1), b)
    products = inner_products(a, b, *metric)
    order, scale, errors = _in_turns(float((weighed * weight).sum()), gains, products)
    a, b = a[order] * scale[:, None, None], b[order]
    tail = errors if gradient is None else errors / 2
    loss = None if gradient is None else tail.clone()
    return LowRankFactors(*balanced(a.flatten(1).T, b.flatten(1)), tail, loss=loss)


def _rearranged(weight: Float[Tensor, "out in"], left: Level) -> Float[Tensor, "a b"]:
    """Return a row for every entry of an ``A``: the block of the weight that it multiplies."""
    rows, columns = left
    parts = weight.reshape(rows, len(weight) // rows, columns, -1)
    return parts.transpose(1, 2).reshape(rows * columns, -1)


def _swapped(matrix: Float[Tensor, "d e"], left: Level) -> Float[Tensor, "d e"]:
    """Reorder outputs and inputs so that ``A (x) B`` becomes ``B (x) A``."""
    parts = matrix.view(left[0], len(matrix) // left[0], left[1], -1)
    return parts.permute(1, 0, 3, 2).reshape(matrix.shape)


def _fitted(
    weight: Float[Tensor, "out in"],
    left: Level,
    count: int,
    gradient: Float[Tensor, "out out"],
    moment: Float[Tensor, "in in"],
) -> tuple[Float[Tensor, "k rows columns"], Float[Tensor, "k block_rows block_columns"]]:
    """Fit terms one after the other.

    In float32, which is twice as fast: an error is taken for what the terms then are, in float64.
    """
    block = Kronecker.block(weight.shape[0], weight.shape[1], left)
    if left[0] * left[1] < block[0] * block[1]:  # the small side is solved as a whole
        swapped = _swapped(weight, left), block, count, _swapped(gradient, (left[0], left[0]))
        b, a = _fitted(*swapped, _swapped(moment, (left[1], left[1])))
        return a, b
    rest = weight.float()
    outputs, inputs = ((each / each.diagonal().mean()).float() for each in (gradient, moment))
    # By entries of the blocks: (block, block, rows, rows) of A.
    pairs = [
        each.view(size, part, size, part).permute(1, 3, 0, 2).contiguous()
        for each, size, part in zip((outputs, inputs), left, block, strict=True)
    ]
    weighed = outputs @ rest @ inputs
    sides = weight.new_empty(count, *left), weight.new_empty(count, *block)
    for term in range(count):
        parts = weighed.view(left[0], block[0], left[1], block[1])
        energy = _rearranged(rest, left).T @ _rearranged(weighed, left)
        b = torch.linalg.eigh(energy + energy.T)[1][:, -1].view(block)
        a = torch.zeros(left).to(rest)
        for _ in range(SWEEPS):
            target = torch.einsum("iajb,ab->ij", parts, b)
            a = _left(target, a, b, *pairs)
            gain = (target * a).sum()
            target = torch.einsum("iajb,ij->ab", parts, a)
            b = _right(target, a, *pairs)
            more = (target * b).sum()
            size = b.norm().clamp_min(torch.finfo(b.dtype).tiny)
            a, b = a * size, b / size
            if not float(more - gain) > SLOW * float(more):
                break
        product = sum_of(a[None], b[None])
        sides[0][term], sides[1][term] = a, b
        if term + 1 < count:
            rest = rest - product
            weighed = weighed - outputs @ product @ inputs
    return sides


def _left(
    target: Float[Tensor, "rows columns"],
    start: Float[Tensor, "rows columns"],
    right: Float[Tensor, "block_rows block_columns"],
    outputs: Float[Tensor, "block_rows block_rows rows rows"],
    inputs: Float[Tensor, "block_columns block_columns columns columns"],
) -> Float[Tensor, "rows columns"]:
    """Solve for ``A`` beside a ``B``, by preconditioned conjugate gradients.

    With ``B = sum_t s_t p_t q_t^T`` the normal equations are ``sum_tu G_tu A C_ut = target``; for a
    ``B`` of rank 1, such as a single row or column, the preconditioner is their solution.
    """
    u, values, vh = torch.linalg.svd(right, full_matrices=False)
    root = values.sqrt()
    sides = [
        torch.einsum("at,cu,acij->tuij", vectors * root, vectors * root, whole)
        for vectors, whole in ((u, outputs), (vh.T, inputs))
    ]

    def normal(x: Tensor) -> Tensor:
        result: Tensor = (sides[0] @ x @ sides[1].mT).sum((0, 1))
        return result

    inverses = []
    for side in sides:
        total = side.diagonal(dim1=0, dim2=1).sum(-1).double()
        total.diagonal().add_(DAMPING * total.diagonal().mean())
        inverses.append(torch.linalg.inv(total).to(start))
    x, rest = start, target - normal(start)
    step = ready = inverses[0] @ rest @ inverses[1]
    size = (rest * ready).sum()
    first = size
    for _ in range(STEPS):
        if not float(size) > SOLVED * float(first):
            break
        image = normal(step)
        along = size / (step * image).sum()
        x, rest = x + along * step, rest - along * image
        ready = inverses[0] @ rest @ inverses[1]
        before, size = size, (rest * ready).sum()
        step = ready + size / before * step
    return x


def _right(
    target: Float[Tensor, "block_rows block_columns"],
    left: Float[Tensor, "rows columns"],
    outputs: Float[Tensor, "block_rows block_rows rows rows"],
    inputs: Float[Tensor, "block_columns block_columns columns columns"],
) -> Float[Tensor, "block_rows block_columns"]:
    """Solve for ``B`` beside an ``A``, by its normal equations."""
    count = target.numel()
    ends = [each.flatten(2).flatten(0, 1) for each in (outputs @ left, left @ inputs)]
    normal = (ends[0] @ ends[1].T).view(*outputs.shape[:2], *inputs.shape[:2]).transpose(1, 2)
    normal = normal.reshape(count, count).double()
    mean = normal.diagonal().mean().clamp_min(torch.finfo(normal.dtype).tiny / DAMPING)
    normal.diagonal().add_(DAMPING * mean)  # also of an A of zeros
    solved: Tensor = torch.linalg.solve(normal, target.flatten().double())
    return solved.view_as(target).to(target)


def inner_products(
    left: Float[Tensor, "k rows columns"],
    right: Float[Tensor, "k block_rows block_columns"],
    gradient: Float[Tensor, "out out"],
    moment: Float[Tensor, "in in"],
) -> Float[Tensor, "k k"]:
    """Return ``tr(G T_k C T_l^T)`` for all pairs of terms, no more than a few rows at a time."""
    (count, rows, columns), block = left.shape, right.shape[1:]
    width = columns * block[1]
    inputs = moment.view(columns, block[1], width).transpose(0, 1).flatten(1)
    outputs = gradient.view(rows, block[0], rows, block[0]).permute(1, 0, 3, 2)
    total = left.new_zeros(count, count)
    step = max(CHUNK // (count * block[0] * width), 1)
    for start in range(0, rows, step):
        part = outputs[:, start : start + step]
        height = part.shape[0] * part.shape[1]
        flat = part.reshape(height * block[0], rows)
        ends = left.new_empty(count, height, width), left.new_empty(count, height, width)
        for index in range(count):
            a, b = left[index], right[index]
            inner = (flat @ a).view(height, block[0], columns).transpose(1, 2) @ b
            ends[0][index] = inner.flatten(1)
            outer = (b @ inputs).view(block[0], columns, width)
            ends[1][index] = (a[start : start + step] @ outer).flatten(0, 1)
        total += ends[0].flatten(1) @ ends[1].flatten(1).T
    return total


def _in_turns(
    whole: float, gains: Float[Tensor, " k"], products: Float[Tensor, "k k"]
) -> tuple[Tensor, Float[Tensor, " k"], Float[Tensor, " k_plus_1"]]:
    """Return the order of the terms, the factor of each, and the error of every first few.

    ``gains`` are the inner products of the weight with the terms, ``products`` those of the terms.
    """
    rest = gains.clone()
    sizes = products.diagonal().clamp_min(torch.finfo(products.dtype).tiny)
    order = torch.zeros(len(gains), dtype=torch.int64, device=gains.device)
    scale, errors = torch.zeros_like(gains), gains.new_full((len(gains) + 1,), whole)
    free = torch.ones_like(gains)
    for step in range(len(gains)):
        gain = rest.square() / sizes * free
        best = int((gain - (1 - free)).argmax())
        order[step], scale[step] = best, rest[best] / sizes[best]
        errors[step + 1] = errors[step] - gain[best]
        rest = rest - scale[step] * products[:, best]
        free[best] = 0.0
    return order, scale, errors.clamp_min(0.0)
