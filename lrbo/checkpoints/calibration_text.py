"""Which text a checkpoint has seen: hashes of short runs of tokens, kept beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from lrbo.data.windows import RUN, Role, TokenWindows, run_hashes
from lrbo.errors import CheckpointError, reading

FILE = "lrbo_text.safetensors"
# Share of a text that may occur in what was calibrated on: licences and page frames recur.
SEEN_LIMIT = 0.01
PART = 64  # windows at a time: a token takes 256 bytes while it is hashed
ROLES: tuple[Role, ...] = ("calibration", "validation")


def save_seen(
    folder: Path, windows: Mapping[Role, TokenWindows], before: Path | None = None
) -> None:
    """Write the hashes of what a study calibrated and searched on; the text itself stays out.

    What a checkpoint ``before`` had seen, if it says so, is added to them.
    """
    hashes = {role: _hashes(windows[role].ids).ravel() for role in ROLES}
    texts = {role: windows[role].text for role in ROLES}
    if before is not None and (before / FILE).is_file():
        earlier, seen = _read(before / FILE)
        for role in ROLES:
            hashes[role] = np.concatenate([hashes[role], seen[role]])
            if earlier[role] != texts[role]:
                texts[role] = f"{earlier[role]} and {texts[role]}"
    unique = {role: np.unique(each) for role, each in hashes.items()}
    save_file(unique, folder / FILE, metadata=texts)


def _read(path: Path) -> tuple[dict[str, str], dict[str, NDArray[np.uint64]]]:
    with reading(CheckpointError, f"{path} is damaged"), safe_open(path, framework="np") as file:
        texts = file.metadata() or {}
        if set(texts) != set(ROLES):
            raise ValueError(f"it has hashes of {sorted(texts)}, expected of {sorted(ROLES)}")
        hashes: dict[str, NDArray[np.uint64]] = {role: file.get_tensor(role) for role in ROLES}
        for role, each in hashes.items():
            if each.dtype != np.uint64 or each.ndim != 1:
                raise ValueError(f"{role} is {each.dtype} of shape {each.shape}")
    return texts, hashes


def seen_shares(folder: Path, ids: Int[Tensor, "windows tokens"]) -> dict[str, float] | None:
    """Return the share of the runs of 32 tokens in windows that each role's text has too.

    By role and its text; ``None`` without a file, and CheckpointError if that is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    runs = _hashes(ids)
    texts, hashes = _read(path)
    return {f"{role} ({texts[role]})": float(np.isin(runs, hashes[role]).mean()) for role in ROLES}


def shared_runs(ids: Int[Tensor, "windows tokens"], others: Int[Tensor, "others length"]) -> float:
    """Return the share of the runs of 32 tokens in windows that other windows have too."""
    return float(np.isin(_hashes(ids), _hashes(others)).mean())


def _hashes(ids: Int[Tensor, "windows tokens"]) -> NDArray[np.uint64]:
    return np.concatenate([run_hashes(part, RUN) for part in torch.split(ids, PART)])
