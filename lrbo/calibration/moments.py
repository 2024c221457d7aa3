"""Running moments: of vectors, of inputs and output gradients of layers, of tokens and labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.linalg import add_gram, float64_device, mirror_upper
from lrbo.models.specs import LayerSpec

RUN = 64  # rows


def _zeros(*shape: int, device: torch.device | str) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=float64_device(torch.device(device)))


def _centred(batch: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows around a shift, the shift, and the mean of the shifted rows in float64."""
    # Products of half-precision activations are exact in float32, so rows are multiplied in it
    # (float64 rows in float64) and batches are summed in float64. Rows are shifted by their rounded
    # mean, so that a large mean cancels nothing.
    rows = batch if batch.dtype == torch.float64 else batch.to(torch.float32)
    shift = rows.mean(0)
    rows = rows - shift
    device = float64_device(batch.device)
    # Runs of rows are summed in their dtype, and only these sums in float64: to convert every
    # element takes longer than all else but the product. Small sums have a small rounding.
    whole = len(rows) // RUN * RUN
    runs = rows[:whole].reshape(-1, RUN, rows.shape[1]).sum(1)
    runs = torch.cat([runs, rows[whole:].sum(0, keepdim=True)])
    rest = runs.to(device).sum(0, dtype=torch.float64) / len(rows)
    return rows, shift.to(device, torch.float64), rest


class Moments:
    """Exact running mean and scatter of vectors, float64."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.mean = _zeros(features, device=device)
        # Its upper triangle is sum (x - mean)(x - mean)^T, the rest is undefined.
        self.upper = _zeros(features, features, device=device)

    def update(self, batch: Float[Tensor, "n d"]) -> None:
        """Add the rows of ``batch``, any floating dtype; an empty batch changes nothing."""
        count = len(batch)
        if not count:
            return
        rows, shift, rest = _centred(batch)
        total = self.tokens + count
        delta = shift + rest - self.mean
        # `shift` misses the mean of the rows by `rest`; and the mean of all moves (Chan, Golub and
        # LeVeque, 1983).
        weights = rest.new_tensor([-count, self.tokens * count / total])
        add_gram(self.upper, rows, vectors=torch.stack([rest, delta]), weights=weights)
        self.mean += delta * (count / total)
        self.tokens = total

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Return the maximum-likelihood covariance: the scatter over the number of tokens."""
        return mirror_upper(self.upper).div_(max(self.tokens, 1))


class PooledMoments:
    """Mean of per-group covariances, each group counted once (Bolaco, section 3.2), float64."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.groups, self.tokens = 0, 0  # that are closed, and their vectors
        self.mean = _zeros(features, device=device)  # of these vectors
        self.upper = _zeros(features, features, device=device)  # of the sum of their covariances
        self.open = Moments(features, device)  # of the group that is still open

    def update(self, parts: Sequence[Float[Tensor, "_ d"]], *, closes_last: bool) -> None:
        """Add rows of consecutive groups, each ``(n, d)`` with ``n > 0``, any floating dtype.

        The first part belongs to the open group, if any; the last one may leave its group open.
        """
        whole: list[Tensor] = []
        for index, part in enumerate(parts):
            closes = closes_last or index + 1 < len(parts)
            if closes and not self.open.tokens:
                whole.append(part)
                continue
            self.open.update(part)
            if closes:
                self.upper.add_(self.open.upper, alpha=1.0 / self.open.tokens)
                self._count(self.open.tokens, self.open.mean)
                self.open = Moments(len(self.mean), self.mean.device)
        if not whole:
            return
        centred, rests = [], []  # of whole groups, which are added with one product
        first = len(whole[0])
        for group in whole:
            rows, shift, rest = _centred(group)
            if len(group) != first:  # each group counts once
                rows = rows * (first / len(group)) ** 0.5
            centred.append(rows)
            rests.append(rest)
            self._count(len(group), shift + rest)
        together = torch.stack(rests)
        weights = -torch.ones(len(rests), dtype=together.dtype, device=together.device)
        rows = centred[0] if len(centred) == 1 else torch.cat(centred)
        add_gram(self.upper, rows, scale=1.0 / first, vectors=together, weights=weights)

    def _count(self, tokens: int, mean: Tensor) -> None:
        """Include a group of ``tokens`` vectors with this mean."""
        self.groups += 1
        self.tokens += tokens
        self.mean += (mean - self.mean) * (tokens / self.tokens)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Return the mean over groups of the groups' maximum-likelihood covariances."""
        return mirror_upper(self.upper).div_(max(self.groups, 1))


def _require_sound(
    owner: str, of: str, statistics: Mapping[Statistic, Tensor], *, seen: int, tokens: int
) -> None:
    """Refuse statistics of the wrong number of tokens, or that are not finite."""
    if seen != tokens:
        raise StatisticsError(
            f"{owner}: {of} came for {seen} of {tokens} tokens; every mapped layer must run once "
            "per token. Correct the family's sites in lrbo/models/families.py."
        )
    for statistic, tensor in statistics.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise StatisticsError(
                f"{owner}: its {statistic} holds {bad} non-finite values out of {tensor.numel()} "
                f"after {tokens} tokens. The {of} overflowed; use model.dtype=float32 or bfloat16."
            )


class SiteMoments:
    """Running statistics of the inputs of a site; mean and covariance come together."""

    def __init__(self, needs: Collection[Statistic], width: int, device: torch.device) -> None:
        pooled = Statistic.POOLED_INPUT_COVARIANCE in needs
        plain = Statistic.INPUT_COVARIANCE in needs or (
            Statistic.INPUT_MEAN in needs and not pooled
        )
        magnitude = Statistic.INPUT_MAGNITUDE in needs
        self.tokens = 0
        self.plain = Moments(width, device) if plain else None
        self.pooled = PooledMoments(width, device) if pooled else None
        self.magnitude = _zeros(width, device=device) if magnitude else None  # sum |x|

    def update(
        self, inputs: Float[Tensor, "windows tokens d"], groups: Sequence[int], *, closes_last: bool
    ) -> None:
        """Add inputs, of so many windows of each group; the last one may go on after them."""
        rows = inputs.flatten(0, 1)
        self.tokens += len(rows)
        if self.plain is not None:
            self.plain.update(rows)
        if self.pooled is not None:
            parts = [part.flatten(0, 1) for part in torch.split(inputs, list(groups))]
            self.pooled.update(parts, closes_last=closes_last)
        if self.magnitude is not None:
            self.magnitude += rows.abs().to(self.magnitude.device).sum(0, dtype=torch.float64)

    def statistics(self, site: str, tokens: int) -> dict[Statistic, Tensor]:
        """Return means over all tokens, float64, on the CPU; StatisticsError if unsound."""
        statistics: dict[Statistic, Tensor] = {}
        if self.pooled is not None:
            statistics[Statistic.INPUT_MEAN] = self.pooled.mean
            statistics[Statistic.POOLED_INPUT_COVARIANCE] = self.pooled.covariance
        if self.plain is not None:
            statistics[Statistic.INPUT_MEAN] = self.plain.mean
            statistics[Statistic.INPUT_COVARIANCE] = self.plain.covariance
        if self.magnitude is not None:
            statistics[Statistic.INPUT_MAGNITUDE] = self.magnitude / tokens
        _require_sound(site, "inputs", statistics, seen=self.tokens, tokens=tokens)
        return {statistic: tensor.cpu() for statistic, tensor in statistics.items()}


class GradientMoments:
    """Running moments of the output gradients of a layer."""

    def __init__(self, needs: Collection[Statistic], spec: LayerSpec, device: torch.device) -> None:
        out, width, self.tokens = spec.out_features, spec.in_features, 0

        def sums(statistic: Statistic, *shape: int) -> Tensor | None:
            return _zeros(*shape, device=device) if statistic in needs else None

        # The upper triangle of sum g g^T, sum |g|^2 x_j^2, and sum over windows |sum g x^T|.
        self.upper = sums(Statistic.OUTPUT_GRADIENT, out, out)
        self.importance = sums(Statistic.INPUT_IMPORTANCE, width)
        self.weight = sums(Statistic.WEIGHT_GRADIENT, out, width)

    def update(
        self,
        inputs: Float[Tensor, "windows tokens in"],
        gradients: Float[Tensor, "windows tokens out"],
    ) -> None:
        """Add whole windows, any floating dtype; products run in float32, sums in float64."""
        wide = torch.promote_types(gradients.dtype, torch.float32)
        inputs, gradients = inputs.to(wide), gradients.to(wide)
        rows = gradients.flatten(0, 1)
        self.tokens += len(rows)
        if self.upper is not None:
            add_gram(self.upper, rows)
        if self.importance is not None:
            lengths = rows.square().sum(1, keepdim=True)
            weighted = inputs.flatten(0, 1).square() * lengths
            self.importance += weighted.to(self.importance.device).sum(0, dtype=torch.float64)
        if self.weight is not None:
            for x, g in zip(inputs, gradients, strict=True):
                self.weight += (g.T @ x).abs_().to(self.weight.device)

    def statistics(self, layer: str, tokens: int, scored: int) -> dict[Statistic, Tensor]:
        """Return means over the tokens with a loss, float64, on the CPU; refuse unsound ones."""
        # With the data's labels the last token of a window has no loss, and its gradients are 0.
        statistics: dict[Statistic, Tensor] = {}
        if self.upper is not None:
            statistics[Statistic.OUTPUT_GRADIENT] = mirror_upper(self.upper).div_(scored).cpu()
        if self.importance is not None:
            statistics[Statistic.INPUT_IMPORTANCE] = self.importance.cpu() / scored
        if self.weight is not None:
            statistics[Statistic.WEIGHT_GRADIENT] = (self.weight.cpu() / scored).float()
        _require_sound(layer, "gradients", statistics, seen=self.tokens, tokens=tokens)
        return statistics


class TokenCounts:
    """How often each row of an embedding is looked up."""

    def __init__(self, rows: int) -> None:
        self.counts = torch.zeros(rows, dtype=torch.int64)
        self.windows = torch.zeros(rows, dtype=torch.int64)  # that have the token
        self.total = 0  # windows

    def update(self, ids: Int[Tensor, "windows tokens"]) -> None:
        """Add the ids of some windows."""
        self.total += len(ids)
        for window in ids.cpu():
            own = torch.bincount(window, minlength=len(self.counts))
            self.counts += own
            self.windows += own > 0

    def statistics(self, name: str, tokens: int) -> dict[Statistic, Tensor]:
        """Return the share of each row, float64, on the CPU; refuse counts of other tokens.

        Rows that were seen in one window have as large a share as the rows that were not seen will
        have in another one (I. J. Good, *The population frequencies of species*, 1953, where a
        sample is a window: a text repeats its words); that is spread over all rows.
        """
        is_alone = self.windows == 1 if self.total > 1 else self.counts == 1
        once = max(int(self.counts[is_alone].sum()), 1) / tokens
        shares = self.counts.double() / tokens
        statistics = {Statistic.TOKEN_FREQUENCY: (1 - once) * shares + once / len(shares)}
        _require_sound(name, "tokens", statistics, seen=int(self.counts.sum()), tokens=tokens)
        return statistics


class HeadMoments:
    """Running moments of the inputs of the head, and of the labels that it predicts."""

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        self.name, self.inputs = spec.name, Moments(spec.in_features, device)
        self.variance = _zeros(spec.out_features, device=device)  # sum p_v (1 - p_v)

    def update(self, inputs: Float[Tensor, "n in"], logits: Float[Tensor, "n out"]) -> None:
        """Add some tokens; logits are in float32 at least."""
        self.inputs.update(inputs)
        shares = logits.softmax(-1)
        self.variance += shares.mul_(1 - shares).sum(0).to(self.variance)

    def statistics(self, tokens: int) -> dict[Statistic, Tensor]:
        """Return means over all tokens, float64, on the CPU; StatisticsError if unsound."""
        statistics = {
            Statistic.INPUT_MEAN: self.inputs.mean,
            Statistic.INPUT_COVARIANCE: self.inputs.covariance,
            Statistic.LABEL_VARIANCE: self.variance / max(tokens, 1),
        }
        seen = self.inputs.tokens
        _require_sound(self.name, "inputs", statistics, seen=seen, tokens=tokens)
        return {statistic: tensor.cpu() for statistic, tensor in statistics.items()}
