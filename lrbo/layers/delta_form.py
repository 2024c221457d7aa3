"""Forms of a change: what a fine-tuned layer adds to that of a base model, which is shared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from typing_extensions import override

from lrbo.layers.based_form import Based
from lrbo.layers.form import Costs, Grid, Level, Levels


class Bands(NamedTuple):
    """How many bits each direction has, in order: 8, then 3, then 2."""

    eight: int  # directions of 8 bits
    three: int  # directions of 3 bits behind them

    def runs(self, rank: int) -> list[tuple[int, int]]:
        """Return the directions of each width, up to a rank: counts and bits, no count 0."""
        eight = min(rank, self.eight)
        three = min(rank - eight, self.three)
        counts = ((eight, 8), (three, 3), (rank - eight - three, 2))
        return [(count, bits) for count, bits in counts if count]

    def bits(self, rank: Any) -> Any:
        """Return the bits of all directions up to a rank, of one number each; arrays are taken."""
        return 2 * rank + _least(rank, self.eight + self.three) + 5 * _least(rank, self.eight)


def _least(ranks: Any, most: Any) -> Any:
    return ranks - (ranks > most) * (ranks - most)


@dataclass(frozen=True)
class Delta(Based):
    """The weight of a base model, which is shared and costs nothing, and a low rank of the change.

    At rank 0 the layer is that of the base. The factors are numbers of the model's dtype, as those
    of a LoRA adapter.
    """

    base_name = "delta"
    by_rows = False
    has_floats: bool = field(default=True, kw_only=True)

    @property
    @override
    def name(self) -> str:  # type: ignore[override]
        return self.base_name

    @override
    def largest_rank(self, out_features: int, in_features: int) -> int:
        return out_features * in_features // (out_features + in_features)  # from there on dense

    @override
    def base_cost(self, out_features: int, in_features: int, base: Levels, itemsize: int) -> Costs:
        return 0, 0, out_features * in_features

    @override
    def base_problem(self, out_features: int, in_features: int, base: Level) -> str | None:
        return None

    @override
    def base_label(self, base: Level) -> str:
        return "the base"

    @override
    def label(self, level: Level) -> str:
        return f"the base + rank {level[-1]}" if level[-1] else "the base"


@dataclass(frozen=True)
class DeltaInt8(Delta):
    """The same with factors in integers of 8 bits, with one scale per rank."""

    base_name = "delta_int8"
    has_floats: bool = field(default=False, kw_only=True)

    @override
    def largest_rank(self, out_features: int, in_features: int) -> int:
        return min(out_features, in_features)

    @override
    def label(self, level: Level) -> str:
        return f"{super().label(level)} in 8 bit" if level[-1] else "the base"


@dataclass(frozen=True)
class DeltaBands(Delta):
    """The same with factors in bands of bits: the leading directions 8, some more 3, the rest 2.

    The base has two numbers, how many directions have 8 and 3 bits.

    References:
        Ping et al., *Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large
        Language Models*, NeurIPS 2024, section 4; theirs are 2 and 32.
    """

    base_name = "delta_bands"
    has_floats: bool = field(default=False, kw_only=True)

    @override
    def largest_rank(self, out_features: int, in_features: int) -> int:
        return min(out_features, in_features)

    @override
    def bases(self, grid: Grid) -> list[Level]:
        return [(eight, three) for eight, three in grid.bands]

    @override
    def factor_bytes(
        self, out_features: int, in_features: int, base: Levels, rank: Any, itemsize: int
    ) -> Any:
        bits = Bands(*base).bits(rank)
        return (out_features + in_features) * bits // 8 + itemsize * rank

    @override
    def base_problem(self, out_features: int, in_features: int, base: Level) -> str | None:
        if out_features % 8 or in_features % 8:
            return f"multiples of 8 outputs and inputs, not {out_features} and {in_features}"
        return None if min(base) >= 0 else "bands of at least 0 directions"

    @override
    def label(self, level: Level) -> str:
        eight, three, rank = level
        bands = f"8 bit for {eight}, 3 for {three}, then 2"
        return f"the base + rank {rank}, {bands}" if rank else "the base"
