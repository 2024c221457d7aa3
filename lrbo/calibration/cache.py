"""Statistics on disk: a folder with one file per block."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.calibration.collect import CalibrationSettings, StatisticsByOwner, merged_statistics
from lrbo.calibration.statistics import GRADIENT_STATISTICS, MATRICES, Statistic
from lrbo.files.caches import fingerprint_of, opened, read_part, save_parts
from lrbo.models.specs import LayerSpec

FORMAT = 3


def calibration_fingerprint(
    model_fingerprint: str,
    windows: Tensor,
    needs: Collection[Statistic],
    settings: CalibrationSettings,
    *,
    dtype: torch.dtype,
) -> str:
    """Return the digest of everything that the statistics depend on."""
    used = asdict(settings)
    del used["memory_gib"], used["batch_windows"]
    if Statistic.POOLED_INPUT_COVARIANCE not in needs:
        del used["groups"]
    if not GRADIENT_STATISTICS & set(needs):
        del used["labels"], used["gradient_share"], used["seed"]
    elif used["labels"] == "data":
        used["mean"] = "over tokens with a loss"  # earlier files count the last of a window too
    if Statistic.TOKEN_FREQUENCY in needs:
        used["unseen"] = "as those of one window"  # earlier files take those that occur once
    return fingerprint_of(
        {
            "format": FORMAT,
            "model": model_fingerprint,
            "examples": hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest(),
            "shape": [str(windows.dtype), *windows.shape],
            "needs": sorted(need.value for need in needs),
            "settings": used,
            "dtype": str(dtype),
        }
    )


def save_calibration(folder: Path, parts: Iterator[StatisticsByOwner], fingerprint: str) -> None:
    """Write the parts of calibration to a new folder, one file each: matrices as triangles."""

    def packed(statistics: Mapping[Statistic, Tensor]) -> dict[str, Tensor]:
        return {key.value: _pack(t) if key in MATRICES else t for key, t in statistics.items()}

    tensors = ({owner: packed(each) for owner, each in part.items()} for part in parts)
    save_parts(folder, tensors, fingerprint)


class CalibrationFolder:
    """Statistics on disk, read layer by layer, so that memory need not hold all of them."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Open a folder of :func:`save_calibration`; CacheError if it is damaged or another's."""
        self._files: dict[str, list[Path]] = {}  # by owner
        self._site: tuple[str, dict[Statistic, Tensor]] = ("", {})  # the last that was read
        for name, owners in opened(folder, fingerprint).items():
            for owner in owners:
                self._files.setdefault(owner, []).append(folder / name)

    def of(self, spec: LayerSpec) -> dict[Statistic, Tensor]:
        """Return the statistics of a layer: those of its input and its own."""
        if self._site[0] != spec.site:  # several layers of a block read the same input
            self._site = ("", {})  # before the next one is in memory
            self._site = (spec.site, self._read(spec.site))
        return merged_statistics(self._site[1], self._read(spec.name))

    def _read(self, owner: str) -> dict[Statistic, Tensor]:
        stored: dict[str, Tensor] = {}
        for path in self._files.get(owner, []):
            stored |= read_part(path, owner).get(owner, {})
        return {
            Statistic(name): _unpack(tensor) if Statistic(name) in MATRICES else tensor
            for name, tensor in stored.items()
        }


def _pack(matrix: Float[Tensor, "d d"]) -> Float[Tensor, " packed"]:
    """Return the upper triangle, row by row."""
    return torch.cat([row[index:] for index, row in enumerate(matrix)])


def _unpack(packed: Float[Tensor, " packed"]) -> Float[Tensor, "d d"]:
    features = int((8 * packed.numel() + 1) ** 0.5 - 1) // 2
    matrix = packed.new_zeros(features, features)
    for index, row in enumerate(torch.split(packed, [*range(features, 0, -1)])):
        matrix[index, index:] = row
    matrix += matrix.triu(1).T  # a third of the time of writing columns too
    return matrix
