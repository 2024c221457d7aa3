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

from lrbo.calibration.corpus import Role, TokenWindows, run_hashes
from lrbo.errors import CheckpointError, reading

FILE = "lrbo_text.safetensors"
RUN = 32  # tokens: no phrase of that length recurs by chance, wherever windows begin
PART = 64  # windows at a time: a token takes 256 bytes while it is hashed
ROLES: tuple[Role, ...] = ("calibration", "validation")


def save_seen(folder: Path, windows: Mapping[Role, TokenWindows]) -> None:
    """Write the hashes of what was calibrated on and searched on; the text itself stays out.

    Args:
        folder: Of the checkpoint.
        windows: Of the study; roles that are only reported on are left out.
    """
    hashes = {role: np.unique(_hashes(windows[role].ids)) for role in ROLES}
    save_file(hashes, folder / FILE, metadata={role: windows[role].text for role in ROLES})


def seen_shares(folder: Path, ids: Int[Tensor, "windows tokens"]) -> dict[str, float] | None:
    """Return which part of the windows occurs in the text of each role.

    Args:
        folder: Of the checkpoint.
        ids: ``(windows, tokens)`` of the model's tokenizer.

    Returns:
        Share of all runs of 32 tokens inside a window, by role and its text; ``None`` for a
        checkpoint that does not say. In windows of fewer tokens nothing is found.

    Raises:
        CheckpointError: If the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    runs = _hashes(ids)
    shares = {}
    with (
        reading(CheckpointError, f"{path} is damaged"),
        safe_open(str(path), framework="numpy") as file,
    ):
        texts = file.metadata() or {}
        if set(texts) != set(ROLES):
            raise ValueError(f"it has hashes of {sorted(texts)}, expected of {sorted(ROLES)}")
        for role in ROLES:
            known: NDArray[np.uint64] = file.get_tensor(role)
            if known.dtype != np.uint64 or known.ndim != 1:
                raise ValueError(f"{role} is {known.dtype} of shape {known.shape}")
            shares[f"{role} ({texts[role]})"] = float(np.isin(runs, known).mean())
    return shares


def _hashes(ids: Int[Tensor, "windows tokens"]) -> NDArray[np.uint64]:
    """Hash each run of tokens inside each window, some windows at a time."""
    return np.concatenate([run_hashes(part, RUN) for part in torch.split(ids, PART)])
