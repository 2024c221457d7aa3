"""Small updates of a matrix, which is left as it is: few numbers are trained in its place."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lrbo.config.distillation import DIAGONAL, FORMS, LORA, LORA_SPARSE, AdapterConfig

CPU = torch.device("cpu")  # where numbers are drawn, so that they are the same everywhere
MODE = 8  # prime factors of a size are multiplied to modes of a tensor train up to this
D_INITIAL = 0.1  # of the diagonal over directions, as in Bolaco's code and in VeRA


class Update(nn.Module, ABC):
    """Gives a matrix with an update, which is 0 at first; a parametrization of torch."""

    def forward(self, matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """Return the matrix with the update, in its own dtype whatever products are taken in."""
        with torch.autocast(matrix.device.type, enabled=False):
            return self.applied(matrix)

    @abstractmethod
    def applied(self, matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """Return the matrix with the update."""


class LowRank(Update):
    """``M + alpha/r B A`` with ``B = 0`` at first.

    References:
        Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022, section 4.1;
        of factors, Wang et al., *SVD-LLM*, ICLR 2025, section 3.2.
    """

    def __init__(
        self, matrix: Float[Tensor, "m n"], rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        rows, columns = matrix.shape
        self.scale = alpha / rank
        bound = 1 / math.sqrt(columns)  # of a linear layer of torch
        self.up = nn.Parameter(matrix.new_zeros(rows, rank))
        down = torch.empty(rank, columns, device=CPU).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(matrix))

    @override
    def applied(self, matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return torch.addmm(matrix, self.up, self.down, alpha=self.scale)


class LowRankSparse(LowRank):
    """A low rank, and entries of their own at the largest entries of the matrix.

    References:
        Chen et al., *DSEE: Dually Sparsity-Embedded Efficient Tuning of Pre-trained Language
        Models*, ACL 2023, with the positions of the option ``omp`` of its code: a
        residual of a low rank, its other option, is nothing in a matrix as thin as that.
    """

    positions: Int[Tensor, " k"]

    def __init__(
        self,
        matrix: Float[Tensor, "m n"],
        rank: int,
        alpha: float,
        share: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__(matrix, rank, alpha, generator)
        count = math.ceil(share * matrix.numel())
        positions = matrix.detach().abs().flatten().topk(count).indices
        self.register_buffer("positions", positions, persistent=False)
        self.entries = nn.Parameter(matrix.new_zeros(count))

    @override
    def applied(self, matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        whole = super().applied(matrix)
        return whole.flatten().index_add(0, self.positions, self.entries).view_as(whole)


class Diagonal(Update):
    """``M' + b M' d`` for some directions ``M'`` of a factor, with diagonals, ``b = 0`` at first.

    Directions are the columns of a left factor and the rows of a right one; they are drawn once.

    References:
        Ji et al., *Adaptive Feature-based Low-Rank Compression of Large Language Models via
        Bayesian Optimization*, Findings of EMNLP 2024, and its code, which scale the outputs of
        ``B' d A'``: for the left factor the same. A right one is scaled likewise here.
    """

    directions: Int[Tensor, " r"]

    def __init__(
        self, matrix: Float[Tensor, "m n"], rank: int, generator: torch.Generator, *, rows: bool
    ) -> None:
        """Draw directions; ``rows`` is whether they are those of a right factor."""
        super().__init__()
        self.rows, self.dim = rows, 0 if rows else 1
        features, count = matrix.T.shape if rows else matrix.shape
        drawn = torch.randperm(count, generator=generator, device=CPU)[:rank].sort().values
        self.register_buffer("directions", drawn.to(matrix.device), persistent=False)
        self.b = nn.Parameter(matrix.new_zeros(features))
        self.d = nn.Parameter(matrix.new_full((len(drawn),), D_INITIAL))

    @override
    def applied(self, matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        scales = torch.outer(self.d, self.b) if self.rows else torch.outer(self.b, self.d)
        update = matrix.index_select(self.dim, self.directions) * scales
        return matrix.index_add(self.dim, self.directions, update)


class TensorTrain(Update):
    """``M + alpha T`` with a tensor train ``T`` over the factors of both sizes, the last core 0.

    References:
        Anjum et al., *Tensor Train Low-rank Approximation (TT-LoRA)*, 2024.
    """

    def __init__(
        self, matrix: Float[Tensor, "m n"], rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.alpha = alpha
        modes = modes_of(matrix.shape)
        bonds = [1, *(min(rank, most) for most in largest_bonds(matrix.shape)), 1]
        cores = []
        for before, mode, after in zip(bonds, modes, bonds[1:], strict=False):
            core = torch.empty(before, mode, after, device=CPU)
            core.normal_(std=1 / math.sqrt(before), generator=generator)
            cores.append(nn.Parameter(core.to(matrix)))
        nn.init.zeros_(cores[-1])
        self.cores = nn.ParameterList(cores)

    @override
    def applied(self, matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        train = matrix.new_ones(1, 1)
        for core in self.cores:
            train = (train @ core.flatten(1)).view(-1, core.shape[2])
        return matrix + self.alpha * train.view_as(matrix)


def modes_of(shape: tuple[int, ...]) -> list[int]:
    """Return the sizes of the modes of a tensor train: factors of the rows, then of the columns."""
    return [mode for size in shape for mode in _factors(size)]


def largest_bonds(shape: tuple[int, ...]) -> list[int]:
    """Return the largest rank between any two cores: more would be of no effect."""
    modes = modes_of(shape)
    return [
        min(math.prod(modes[:index]), math.prod(modes[index:])) for index in range(1, len(modes))
    ]


def _factors(size: int) -> list[int]:
    """Split a size into factors: its prime factors, smallest first, multiplied up to ``MODE``."""
    parts, divisor = [1], 2
    while size > 1:
        if divisor * divisor > size:
            divisor = size
        if size % divisor:
            divisor += 1
            continue
        size //= divisor
        if parts[-1] * divisor <= MODE or parts[-1] == 1:
            parts[-1] *= divisor
        else:
            parts.append(divisor)
    return parts


def largest_rank(form: str, shape: tuple[int, int]) -> int:
    """Return the largest rank that an update of a matrix can make use of."""
    if form in (LORA, LORA_SPARSE):
        return min(shape)
    return max(largest_bonds(shape), default=1)


def make_update(
    settings: AdapterConfig, name: str, matrix: Float[Tensor, "m n"], generator: torch.Generator
) -> Update:
    """Return the update of a matrix, which may be on the meta device, by the name of its side."""
    form = FORMS[settings.form]
    rank = settings.rank or form.rank
    alpha, entries = settings.alpha or form.alpha, settings.entries or form.entries
    if settings.form == DIAGONAL:
        return Diagonal(matrix, rank, generator, rows=name.endswith(".right"))
    assert alpha is not None
    if settings.form == LORA:
        return LowRank(matrix, min(rank, *matrix.shape), alpha, generator)
    if settings.form == LORA_SPARSE:
        assert entries is not None
        return LowRankSparse(matrix, min(rank, *matrix.shape), alpha, entries, generator)
    return TensorTrain(matrix, rank, alpha, generator)
