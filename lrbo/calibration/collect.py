"""One pass of text through the model, hooks in, moments out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.calibration.moments import Moments, PooledMoments
from lrbo.errors import StatisticsError
from lrbo.factorization.base import Statistic
from lrbo.linalg import mirror_upper
from lrbo.model import ModelMap, body_and_head
from lrbo.storage import replacing

OnTokens = Callable[[int], None]

MATRICES = (Statistic.INPUT_COVARIANCE, Statistic.POOLED_INPUT_COVARIANCE)


@dataclass
class SiteMoments:
    """Running statistics of one site: only what was asked for."""

    plain: Moments | None = None
    pooled: PooledMoments | None = None

    @property
    def tokens(self) -> int:
        """Return how many vectors entered."""
        seen = self.pooled if self.plain is None else self.plain
        return 0 if seen is None else seen.tokens

    def statistics(self) -> dict[Statistic, Tensor]:
        """Return the finished statistics, float64."""
        found: dict[Statistic, Tensor] = {}
        if self.pooled is not None:
            found[Statistic.INPUT_MEAN] = self.pooled.mean
            found[Statistic.POOLED_INPUT_COVARIANCE] = self.pooled.covariance
        if self.plain is not None:
            found[Statistic.INPUT_MEAN] = self.plain.mean
            found[Statistic.INPUT_COVARIANCE] = self.plain.covariance
        return found


@dataclass
class Calibration:
    """What calibration found, one set of statistics per site.

    Attributes:
        sites: Statistics by site name.
        tokens: Token positions that entered.
        groups: Groups of the pooled covariance.
    """

    sites: dict[str, dict[Statistic, Tensor]] = field(default_factory=dict)
    tokens: int = 0
    groups: int = 1

    def at(self, site: str) -> Mapping[Statistic, Tensor]:
        """Return the statistics of a site.

        Raises:
            StatisticsError: If calibration did not see it.
        """
        if site not in self.sites:
            raise StatisticsError(f"calibration has no statistics of site {site}.")
        return self.sites[site]


def group_of_window(windows: int, groups: int) -> list[int]:
    """Deal windows out to groups; sizes differ by at most one window.

    Windows come text by text. Dealt out, every group has its part of each text, so that what
    tells texts apart counts as variation inside a group, not as a difference between groups.
    """
    groups = min(groups, windows)
    return [index % groups for index in range(windows)]


def calibrate(
    model: PreTrainedModel,
    layers: ModelMap,
    windows: Int[Tensor, "windows tokens"],
    needs: Collection[Statistic],
    *,
    groups: int = 32,
    batch_windows: int = 4,
    on_tokens: OnTokens | None = None,
) -> Calibration:
    """Gather the input statistics of every site in one pass.

    The head is not run: no statistic needs it.

    Args:
        model: In evaluation mode; not changed.
        layers: Its map.
        windows: ``(windows, tokens)`` token ids; every position enters.
        needs: What to gather. Nothing needed means no pass.
        groups: Groups of the pooled covariance, at most one per window.
        batch_windows: Windows per forward pass.
        on_tokens: Told the number of tokens after each batch.

    Returns:
        Float64 statistics on the CPU.

    Raises:
        StatisticsError: If a site saw a non-finite value, naming the site, or none at all.
    """
    wanted = set(needs)
    if not wanted:
        return Calibration()
    dealt = group_of_window(len(windows), groups)
    order = sorted(range(len(windows)), key=dealt.__getitem__)  # group by group
    windows, membership = windows[order], sorted(dealt)
    widths = {spec.site: spec.in_features for spec in layers.compressible}
    device = next(model.parameters()).device
    collected = {
        site: SiteMoments(
            plain=Moments.empty(width, device) if Statistic.INPUT_COVARIANCE in wanted else None,
            pooled=None
            if wanted == {Statistic.INPUT_COVARIANCE}
            else PooledMoments.empty(width, device),
        )
        for site, width in widths.items()
    }
    body, _ = body_and_head(model)
    spans: list[tuple[int, int, bool]] = []

    def hook(moments: SiteMoments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del module
            x = inputs[0].reshape(-1, windows.shape[1], inputs[0].shape[-1])
            for start, stop, closes in spans:
                rows = x[start:stop].flatten(0, 1)
                if moments.plain is not None:
                    moments.plain.update(rows)
                if moments.pooled is not None:
                    moments.pooled.update(rows, closes_group=closes)

        return observe

    handles = [
        model.get_submodule(site).register_forward_pre_hook(hook(moments))
        for site, moments in collected.items()
    ]
    try:
        with torch.inference_mode():
            for first in range(0, len(windows), batch_windows):
                batch = windows[first : first + batch_windows]
                spans[:] = _spans(membership, first, len(batch))
                body(batch.to(device), use_cache=False)
                if on_tokens is not None:
                    on_tokens(batch.numel())
    finally:
        for handle in handles:
            handle.remove()
    result = Calibration(tokens=windows.numel(), groups=membership[-1] + 1)
    for site in list(collected):
        moments = collected.pop(site)
        if moments.tokens != windows.numel():
            raise StatisticsError(
                f"{site}: its input was seen for {moments.tokens} of {windows.numel()} tokens; "
                "every mapped layer must run once per token. Correct the family's sites in "
                "lrbo/families.py."
            )
        found = moments.statistics()
        result.sites[site] = {key: value.cpu() for key, value in found.items()}
        _require_healthy(site, result.sites[site], windows.numel())
    return result


def _spans(membership: list[int], first: int, count: int) -> list[tuple[int, int, bool]]:
    """Cut a batch of windows at the borders of groups: (start, stop, closes the group)."""
    spans: list[tuple[int, int, bool]] = []
    start = 0
    for index in range(count):
        here = first + index
        ends = here + 1 == len(membership) or membership[here + 1] != membership[here]
        if ends or index + 1 == count:
            spans.append((start, index + 1, ends))
            start = index + 1
    return spans


def _require_healthy(site: str, statistics: Mapping[Statistic, Tensor], tokens: int) -> None:
    """Refuse statistics with non-finite entries."""
    for statistic, tensor in statistics.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise StatisticsError(
                f"{site}: the {statistic} of its input holds {bad} non-finite values out of "
                f"{tensor.numel()} after {tokens} tokens. The activations overflowed; rerun "
                "with model.dtype=float32 or bfloat16."
            )


def calibration_fingerprint(
    model_fingerprint: str,
    windows: Int[Tensor, "windows tokens"],
    needs: Collection[Statistic],
    *,
    groups: int,
    dtype: torch.dtype,
) -> str:
    """Return the digest of everything that the statistics depend on."""
    settings = {
        "format": 2,
        "model": model_fingerprint,
        "tokens": hashlib.sha256(windows.to(torch.int32).numpy().tobytes()).hexdigest(),
        "window": windows.shape[1],
        "needs": sorted(need.value for need in needs),
        "groups": groups,
        "dtype": str(dtype),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def save_calibration(path: Path, calibration: Calibration, fingerprint: str) -> None:
    """Write statistics as float64 safetensors; covariances as packed upper triangles."""
    tensors: dict[str, Tensor] = {}
    for site, statistics in calibration.sites.items():
        for statistic, tensor in statistics.items():
            packed = _pack(tensor) if statistic in MATRICES else tensor
            tensors[f"{site}|{statistic.value}"] = packed.contiguous()
    about = {"tokens": calibration.tokens, "groups": calibration.groups}
    with replacing(path) as beside:
        metadata = {"fingerprint": fingerprint, "about": json.dumps(about)}
        save_file(tensors, beside, metadata=metadata)


class CalibrationFile:
    """Statistics on disk, read site by site, so that they need not be in memory together."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open a file that :func:`save_calibration` wrote.

        Raises:
            StatisticsError: If it was made with other data, model or settings.
        """
        self._file = _open(path)
        metadata = dict(self._file.metadata() or {})
        if metadata.get("fingerprint") != fingerprint:
            raise StatisticsError(
                f"{path} has fingerprint {metadata.get('fingerprint')}, expected {fingerprint}. "
                "Delete it; it will be made again."
            )
        about = json.loads(metadata["about"])
        self.tokens: int = about["tokens"]
        self.groups: int = about["groups"]

    def at(self, site: str) -> Mapping[Statistic, Tensor]:
        """Return the statistics of a site.

        Raises:
            StatisticsError: If calibration did not see it.
        """
        found: dict[Statistic, Tensor] = {}
        for key in self._keys(site):
            statistic = Statistic(key.rpartition("|")[2])
            tensor = self._file.get_tensor(key)
            found[statistic] = _unpack(tensor) if statistic in MATRICES else tensor
        if not found:
            raise StatisticsError(f"calibration has no statistics of site {site}.")
        return found

    def _keys(self, site: str) -> Iterator[str]:
        """List what is stored of a site."""
        names = self._file.keys()
        return (name for name in names if name.rpartition("|")[0] == site)


def _open(path: Path) -> Any:
    """Open a safetensors file; its reader carries no types."""
    return safe_open(str(path), framework="pt")


def _pack(matrix: Float[Tensor, "d d"]) -> Float[Tensor, " packed"]:
    """Return the upper triangle row by row: half the disk, and symmetric by construction."""
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def _unpack(packed: Float[Tensor, " packed"]) -> Float[Tensor, "d d"]:
    """Return the symmetric matrix of a packed upper triangle."""
    features = int((8 * packed.numel() + 1) ** 0.5 - 1) // 2
    matrix = packed.new_zeros(features, features)
    rows, columns = torch.triu_indices(features, features)
    matrix[rows, columns] = packed
    return mirror_upper(matrix)
