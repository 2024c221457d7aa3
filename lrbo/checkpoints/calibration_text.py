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
PART = 64  # windows at a time: a token takes 256 bytes while it is hashed
ROLES: tuple[Role, ...] = ("calibration", "validation")


def save_seen(folder: Path, windows: Mapping[Role, TokenWindows]) -> None:
    """Write the hashes of what a study calibrated and searched on; the text itself stays out."""
    hashes = {role: np.unique(_hashes(windows[role].ids)) for role in ROLES}
    save_file(hashes, folder / FILE, metadata={role: windows[role].text for role in ROLES})


def seen_shares(folder: Path, ids: Int[Tensor, "windows tokens"]) -> dict[str, float] | None:
    """Return the share of the runs of 32 tokens in windows that each role's text has too.

    By role and its text; ``None`` without a file, and CheckpointError if that is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    runs = _hashes(ids)
    shares = {}
    with reading(CheckpointError, f"{path} is damaged"), safe_open(path, framework="np") as file:
        texts = file.metadata() or {}
        if set(texts) != set(ROLES):
            raise ValueError(f"it has hashes of {sorted(texts)}, expected of {sorted(ROLES)}")
        for role in ROLES:
            hashes: NDArray[np.uint64] = file.get_tensor(role)
            if hashes.dtype != np.uint64 or hashes.ndim != 1:
                raise ValueError(f"{role} is {hashes.dtype} of shape {hashes.shape}")
            shares[f"{role} ({texts[role]})"] = float(np.isin(runs, hashes).mean())
    return shares


def _hashes(ids: Int[Tensor, "windows tokens"]) -> NDArray[np.uint64]:
    return np.concatenate([run_hashes(part, RUN) for part in torch.split(ids, PART)])
