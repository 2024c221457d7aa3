"""Exact running mean and covariance; pooled over groups; merge, save, load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.linalg import add_gram, float64_device, mirror_upper

RUN = 64  # rows


def _centred(batch: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows around a shift, the shift, and the mean of the shifted rows.

    Products of half-precision activations are exact in float32 and a batch sums a few thousand
    of them, so the rows of a batch are multiplied in float32 (float64 rows in float64) and
    batches are summed in float64. Rows are shifted by their rounded mean first, so that a large
    mean cancels nothing; the rest of the mean is returned in float64 and taken out exactly.
    """
    rows = batch if batch.dtype == torch.float64 else batch.to(torch.float32)
    shift = rows.mean(0)
    rows = rows - shift
    device = float64_device(batch.device)
    return rows, shift.to(device, torch.float64), _column_sums(rows, device) / len(rows)


def _column_sums(rows: Float[Tensor, "n d"], device: torch.device) -> Float[Tensor, " d"]:
    """Return the sums of columns in float64.

    Runs of rows are summed in the dtype of the rows, and only these in float64: to convert every
    entry takes longer than the rest of what is done with a batch but for the product. After the
    shift sums are small, so that their rounding is nothing beside the entries.
    """
    whole = len(rows) // RUN * RUN
    runs = rows[:whole].reshape(-1, RUN, rows.shape[1]).sum(1)
    runs = torch.cat([runs, rows[whole:].sum(0, keepdim=True)])
    return runs.to(device).sum(0, dtype=torch.float64)


@dataclass
class Moments:
    """Exact running mean and scatter of vectors; merging is associative.

    Attributes:
        tokens: Vectors seen.
        mean: ``(d,)``, float64.
        upper: ``(d, d)``, float64; its upper triangle is the scatter
            ``sum (x - mean)(x - mean)^T``, below it is nothing of meaning.
    """

    tokens: int
    mean: Float[Tensor, " d"]
    upper: Float[Tensor, "d d"]

    @classmethod
    def empty(cls, features: int, device: torch.device | str = "cpu") -> Moments:
        """Return the moments of no vectors, the neutral element of :meth:`merge`."""
        place = float64_device(torch.device(device))
        mean = torch.zeros(features, dtype=torch.float64, device=place)
        return cls(0, mean, torch.zeros(features, features, dtype=torch.float64, device=place))

    def update(self, batch: Float[Tensor, "n d"]) -> None:
        """Add the rows of ``batch``, any floating dtype; an empty batch changes nothing."""
        count = len(batch)
        if not count:
            return
        rows, shift, rest = _centred(batch)
        total = self.tokens + count
        delta = shift + rest - self.mean
        # The rows were centred on `shift`, which misses their mean by `rest`; and the mean of all
        # moves, as in `merge`.
        weights = rest.new_tensor([-count, self.tokens * count / total])
        add_gram(self.upper, rows, vectors=torch.stack([rest, delta]), weights=weights)
        self.mean += delta * (count / total)
        self.tokens = total

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of vectors (Chan, Golub and LeVeque, 1983).

        The correction uses the difference of the two means. (The published code of Bolaco
        uses the deviation from the combined mean, which is inexact.)
        """
        if not other.tokens:
            return Moments(self.tokens, self.mean.clone(), self.upper.clone())
        total = self.tokens + other.tokens
        delta = other.mean - self.mean
        upper = self.upper + other.upper
        upper.addr_(delta, delta, alpha=self.tokens * other.tokens / total)
        return Moments(total, self.mean + delta * (other.tokens / total), upper)

    @property
    def scatter(self) -> Float[Tensor, "d d"]:
        """Return ``sum (x - mean)(x - mean)^T``, symmetric."""
        return mirror_upper(self.upper)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Return the maximum-likelihood covariance: the scatter over the number of tokens."""
        return self.scatter.div_(max(self.tokens, 1))


@dataclass
class PooledMoments:
    """Mean of per-group covariances, each group counted once (Bolaco, section 3.2).

    Attributes:
        groups: Closed groups.
        tokens: Vectors in closed groups.
        mean: ``(d,)``, mean over all vectors of closed groups, float64.
        upper: ``(d, d)``, upper triangle of the sum of the groups' covariances, float64.
        open: Moments of the group that is still open.
    """

    groups: int
    tokens: int
    mean: Float[Tensor, " d"]
    upper: Float[Tensor, "d d"]
    open: Moments

    @classmethod
    def empty(cls, features: int, device: torch.device | str = "cpu") -> PooledMoments:
        """Return the moments of no groups."""
        start = Moments.empty(features, device)
        other = Moments.empty(features, device)
        return cls(0, 0, start.mean, start.upper, other)

    def update(self, batch: Float[Tensor, "n d"], *, closes_group: bool) -> None:
        """Add the rows of ``batch`` to the open group, and close it if told to.

        Args:
            batch: ``(n, d)``, any floating dtype.
            closes_group: Whether the group ends with this batch.
        """
        if self.open.tokens == 0 and closes_group and len(batch):
            self.update_whole([batch])
            return
        self.open.update(batch)
        if closes_group and self.open.tokens:
            self.upper.add_(self.open.upper, alpha=1.0 / self.open.tokens)
            self._count(self.open.tokens, self.open.mean)
            self.open = Moments.empty(len(self.mean), self.mean.device)

    def update_whole(self, groups: Sequence[Float[Tensor, "_ d"]]) -> None:
        """Add whole groups with one product, beside the one that may be open.

        Args:
            groups: Each ``(n, d)`` with ``n > 0``, any floating dtype; ``n`` may differ.
        """
        found, rests = [], []
        first = len(groups[0])
        for group in groups:
            rows, shift, rest = _centred(group)
            if len(group) != first:  # each group counts once, however many rows it has
                rows = rows * (first / len(group)) ** 0.5
            found.append(rows)
            rests.append(rest)
            self._count(len(group), shift + rest)
        together = torch.stack(rests)
        weights = -torch.ones(len(rests), dtype=together.dtype, device=together.device)
        rows = found[0] if len(found) == 1 else torch.cat(found)
        add_gram(self.upper, rows, scale=1.0 / first, vectors=together, weights=weights)

    def merge(self, other: PooledMoments) -> PooledMoments:
        """Return the moments of both sets of groups; both must have no group open.

        Raises:
            ValueError: If a group is open on either side.
        """
        if self.open.tokens or other.open.tokens:
            raise ValueError(
                f"cannot merge while a group is open ({self.open.tokens} and "
                f"{other.open.tokens} tokens): close the groups first."
            )
        none_open = Moments.empty(len(self.mean), self.mean.device)
        merged = PooledMoments(
            self.groups, self.tokens, self.mean.clone(), self.upper + other.upper, none_open
        )
        if other.tokens:
            merged._count(other.tokens, other.mean, groups=other.groups)
        return merged

    def _count(self, tokens: int, mean: Tensor, groups: int = 1) -> None:
        """Include ``tokens`` vectors with this mean in count and mean."""
        self.groups += groups
        self.tokens += tokens
        self.mean += (mean - self.mean) * (tokens / self.tokens)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Return the mean over groups of the groups' maximum-likelihood covariances."""
        return mirror_upper(self.upper).div_(max(self.groups, 1))
