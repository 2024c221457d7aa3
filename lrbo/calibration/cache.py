"""Statistics on disk: a folder with a file per block, written block by block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrbo.cache import opened, seal
from lrbo.calibration.collect import CalibrationSettings, Found, merged_statistics
from lrbo.errors import CacheError, reading
from lrbo.factorization.base import GRADIENT_STATISTICS, MATRICES, Statistic
from lrbo.specs import LayerSpec
from lrbo.storage import new_folder

FORMAT = 3


def calibration_fingerprint(
    model_fingerprint: str,
    windows: Int[Tensor, "windows tokens"],
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
    content = {
        "format": FORMAT,
        "model": model_fingerprint,
        "tokens": hashlib.sha256(windows.to(torch.int32).numpy().tobytes()).hexdigest(),
        "window": windows.shape[1],
        "needs": sorted(need.value for need in needs),
        "settings": used,
        "dtype": str(dtype),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def save_calibration(folder: Path, parts: Iterator[Found], fingerprint: str) -> None:
    """Write statistics as they come; covariances as packed upper triangles, float64.

    The folder appears when it is complete.

    Args:
        folder: Must not exist.
        parts: What :func:`~lrbo.calibration.collect.calibrate` yields; one file each.
        fingerprint: Of everything that they depend on.
    """
    with new_folder(folder) as beside:
        owners: dict[str, list[str]] = {}  # by file
        for index, part in enumerate(parts):
            tensors = {
                f"{owner}|{statistic.value}": _pack(tensor)
                if statistic in MATRICES
                else tensor.contiguous()
                for owner, statistics in part.items()
                for statistic, tensor in statistics.items()
            }
            name = f"part_{index:05d}.safetensors"
            save_file(tensors, beside / name)
            owners[name] = list(part)
        seal(beside, fingerprint, owners)


class CalibrationFolder:
    """Statistics on disk, read layer by layer, so that they need not be in memory together."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Open a folder that :func:`save_calibration` wrote.

        Raises:
            CacheError: If it is not whole, or was made with other data, model or settings.
        """
        self._folder = folder
        self._files: dict[str, list[str]] = {}  # by owner
        for name, owners in opened(folder, fingerprint).items():
            for owner in owners:
                self._files.setdefault(owner, []).append(name)

    def of(self, spec: LayerSpec) -> dict[Statistic, Tensor]:
        """Return the statistics of a layer, those of its input and its own: what there are.

        Raises:
            CacheError: If they were deleted meanwhile, or are damaged.
        """
        return merged_statistics(self._read(spec.site), self._read(spec.name))

    def _read(self, owner: str) -> dict[Statistic, Tensor]:
        """Return what is stored under a name."""
        found: dict[Statistic, Tensor] = {}
        for name in self._files.get(owner, []):
            path = self._folder / name
            with (
                reading(CacheError, f"{path} is damaged"),
                safe_open(str(path), framework="pt") as reader,
            ):
                file: Any = reader
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    of, _, kind = key.rpartition("|")
                    if of == owner:
                        statistic, tensor = Statistic(kind), file.get_tensor(key)
                        found[statistic] = _unpack(tensor) if statistic in MATRICES else tensor
        return found


def _pack(matrix: Float[Tensor, "d d"]) -> Float[Tensor, " packed"]:
    """Return the upper triangle row by row: half the disk, and symmetric by construction."""
    return torch.cat([row[place:] for place, row in enumerate(matrix)])


def _unpack(packed: Float[Tensor, " packed"]) -> Float[Tensor, "d d"]:
    """Return the symmetric matrix of a packed upper triangle."""
    features = int((8 * packed.numel() + 1) ** 0.5 - 1) // 2
    matrix = packed.new_empty(features, features)
    start = 0
    for place in range(features):
        row = packed[start : start + features - place]
        matrix[place, place:] = row
        matrix[place:, place] = row
        start += len(row)
    return matrix
