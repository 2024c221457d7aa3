"""The model card beside the weights: what it is, what it scored, how to load and repeat it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # has no types
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from lrbo.checkpoints.lora import DeltaAdapter
from lrbo.checkpoints.nemotron_nas import NemotronNas
from lrbo.checkpoints.stock import Stock
from lrbo.config.choices import FLOATS
from lrbo.files.paths import ADAPTER, BASE
from lrbo.files.rendering import render
from lrbo.files.tables import Table
from lrbo.layers.options import UNITS, Measure
from lrbo.models.pairs import BaseModel
from lrbo.models.sources import PACKAGED, ModelSource


@dataclass(frozen=True)
class Card:
    """What the card of a checkpoint states."""

    name: str
    written_as: str  # one of FORMATS
    about: Mapping[str, Any]  # of the checkpoint: method, refit, validation, data and versions
    source: ModelSource  # of the base model
    parameters: tuple[int, int]  # of the whole model, low-rank and dense
    forms: Sequence[str]
    keep_ratio: float
    scores: Table
    commands: Sequence[str]  # which make the checkpoint again
    measuring: str | None  # the command that scores it on the test text, if it reads text
    auto_class: str = "AutoModelForCausalLM"
    hub_tag: str = "text-generation"
    notes: Sequence[str] = ()  # a sentence each, on what the search adds to where it began
    measure: Measure = "parameters"
    stock: Stock | None = None  # what is written as an adapter
    layout: NemotronNas | None = None  # what is written as blocks that differ
    base: BaseModel | None = None  # that the model adds to
    adapter: DeltaAdapter | None = None  # what it adds, written as one
    others: str = ""  # what changed beside the layers
    counted_bytes: int = 0  # of what is written as an adapter, as the forms count
    covered: str = ""  # which share of the model the budget covers

    def text(self) -> str:
        """Return the Markdown of the card, with the head that the Hub reads."""
        origin, license_ = origin_of(self.source)
        base = None if self.base is None else origin_of(self.base.source)[0]
        head = ModelCardData(
            base_model=base or origin,
            license=license_,
            library_name="transformers",
            pipeline_tag=self.hub_tag,
            tags=["lrbo", "low-rank", "compression"],
        )
        refit = self.about["refit"] or {"trials": []}
        return render(
            "model_card.md",
            **vars(self),
            head=head.to_yaml(),
            # As Python has it too: JSON writes a character beyond U+FFFF as two escapes.
            folder=json.dumps(self.name, ensure_ascii=False),
            origin=origin,
            kept=f"{self.keep_ratio:.1%}",
            counted=UNITS[self.measure],
            parts={
                part: json.dumps(f"{self.name}/{part}", ensure_ascii=False)
                for part in (BASE, ADAPTER)
            },
            serving=self._serving(),
            in_floats=any(form.endswith(FLOATS) for form in self.forms),
            refined=self._refined(),
            base_path="" if self.adapter is None else json.dumps(self.adapter.base_name),
            is_refit=any(trial["taken"] for trial in refit["trials"]),
            table=self.scores,
        )

    def _refined(self) -> Mapping[str, Any] | None:
        """Return how bases were made again, and the row of the trial, if it was taken."""
        bases = self.about.get("bases") or {"trials": []}
        own = [r for r in bases["trials"] if r["trial"] == self.about["trial"] and r["taken"]]
        return {**bases, **own[0]} if own else None

    def _serving(self) -> str:
        """Return the command line that serves an adapter with its base."""
        words = ["vllm", "serve", f"{self.name}/{BASE}"]
        if self.stock is not None and self.stock.adapter:
            words += ["--enable-lora", "--max-lora-rank", str(self.stock.vllm_rank)]
            words += ["--lora-modules", f"{self.name}={self.name}/{ADAPTER}"]
        return shlex.join(words)


def origin_of(source: ModelSource) -> tuple[str | None, str | None]:
    """Return the hub id of a base model and its license, as far as they are known here.

    The hub is not asked: the license is that of a card in the folder, or in the hub's cache.
    """
    if source.source != "hf":
        packaged = PACKAGED.get(source.path)
        return (packaged.hub_id, packaged.license) if packaged else (None, None)
    folder = Path(source.path)
    if folder.is_dir():
        return None, _license(folder / "README.md")
    try:
        cached = try_to_load_from_cache(source.path, "README.md", revision=source.revision)
    except HFValidationError:
        return None, None
    return source.path, _license(Path(cached)) if isinstance(cached, str) else None


def _license(card: Path) -> str | None:
    """Return the license that a card states, if it can be read."""
    try:
        stated = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return stated if isinstance(stated, str) else None
