"""The folder of a recovery in progress: its settings, and whatever is finished of it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrbo.errors import CheckpointError, ConfigError, LrboError, reading
from lrbo.files.atomic import remove_whole, replacing, write_text
from lrbo.files.parsing import parse_json, to_json
from lrbo.recovery.stage import StageReport

FORMAT = 1
SETTINGS, SCORES, LOCK = "settings.json", "scores.json", "lock"
PATH = "checkpoint"  # key of a path, which may change: the digest of the files is what counts
REPORT = "report"  # key of what a file of tensors says beside them


def folder_of(out: Path) -> Path:
    """Return where the recovery that is to write a folder keeps what is finished."""
    return out.with_name(f"{out.name}.recovery")


def begun(folder: Path) -> dict[str, Any]:
    """Return the settings of a recovery in progress; none where there is none.

    Raises:
        CheckpointError: If its file cannot be read.
    """
    settings: dict[str, Any] = (_read(folder / SETTINGS) or {}).get("settings", {})
    return settings


def differences(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """List how a recovery in progress differs from settings; nothing where there is none.

    Raises:
        CheckpointError: If its file cannot be read.
    """
    content = _read(folder / SETTINGS)
    if content is None:
        return []
    if content.get("format") != FORMAT:
        return [f"{folder} has format {content.get('format')!r}, expected {FORMAT}; move it away"]
    old, new = content["settings"], json.loads(to_json(settings))
    return [
        f"{key}: the recovery in {folder} has {old.get(key)!r}, the command has {new.get(key)!r}"
        for key in dict.fromkeys([*old, *new])
        if key != PATH and old.get(key) != new.get(key)
    ]


class State:
    """What is finished of a recovery; each file is written beside its path and renamed."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Begin in a new folder, or go on in one that was begun with the same settings.

        Raises:
            ConfigError: Listing the differences, if it was begun with other settings.
        """
        if problems := differences(folder, settings):
            advice = f"give what it was begun with, remove {folder} to begin anew, or take another "
            raise ConfigError([*problems, f"to go on or not: {advice}out="])
        self.folder = folder
        content = _read(folder / SETTINGS)
        self.is_new = content is None
        if content is None:
            folder.mkdir(parents=True, exist_ok=True)
            content = {"format": FORMAT, "id": uuid.uuid4().hex, "settings": dict(settings)}
            write_text(folder / SETTINGS, to_json(content, indent=2) + "\n")
        self.identity: str = content["id"]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, unless another process does; the system releases it from a dead one.

        Raises:
            CheckpointError: If another process works in it.
        """
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise CheckpointError(
                f"another process is working in {self.folder}; wait for it, stop it, or choose "
                "another out="
            ) from error
        try:
            yield
        finally:
            lock.release()

    def stage_folder(self, stage: str) -> Path:
        """Return the folder of a stage's own state, which exists then."""
        folder = self.folder / stage
        folder.mkdir(exist_ok=True)
        return folder

    def scores(self) -> dict[str, Any]:
        """Return the scores that were measured before anything was trained."""
        return _read(self.folder / SCORES) or {}

    def keep_scores(self, scores: Mapping[str, Any]) -> None:
        """Write scores for :meth:`scores`."""
        write_text(self.folder / SCORES, to_json(scores, indent=2) + "\n")

    def finished(self, stage: str) -> tuple[StageReport, dict[str, Tensor]] | None:
        """Return the report and the parameters of a stage, if it is finished."""
        read = read_tensors(self._file(stage))
        if read is None:
            return None
        report, tensors = read
        return StageReport(**report | {"rows": tuple(report["rows"])}), tensors

    def finish(self, report: StageReport, tensors: Mapping[str, Tensor]) -> None:
        """Write that a stage is finished, with all parameters after it."""
        write_tensors(self._file(report.name), tensors, asdict(report))

    def remove(self) -> None:
        """Remove the folder: what was to be written is."""
        remove_whole(self.folder)

    def _file(self, stage: str) -> Path:
        return self.folder / f"{stage}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
    """Write tensors with a report, for :func:`read_tensors`."""
    with replacing(path) as beside:
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(own, beside, metadata={REPORT: to_json(report)})


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Read the report and tensors of a file; ``None`` where there is none.

    Raises:
        CheckpointError: If it is damaged.
    """
    if not path.exists():
        return None
    what = f"{path} is damaged, remove it to do that part again"
    with reading(CheckpointError, what), safe_open(str(path), framework="pt") as file:
        report = parse_json((file.metadata() or {})[REPORT], str(path))
        return report, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    what = f"{path} cannot be read; move its folder away to begin anew"
    with reading(CheckpointError, what, own=LrboError):
        content = parse_json(path.read_bytes(), str(path))
        if not isinstance(content, dict):
            raise ValueError("it is no object of JSON")
        return content
