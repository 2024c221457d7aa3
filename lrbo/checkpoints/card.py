"""The model card beside the weights: what it is, what it scored, how to load and repeat it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # has no types
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from lrbo.loading import ORIGINS, ModelSource
from lrbo.rendering import render

LOADING = {
    "lrbo": """\
import lrbo  # which tells transformers what a low-rank layer is
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})""",
    "remote_code": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({folder})""",
    "merged": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})""",
}


@dataclass(frozen=True)
class Score:
    """A row of the card's table.

    Attributes:
        model: What it is, for readers.
        keep_ratio: Share of the compressible parameters that it keeps.
        validation: Perplexity on the validation text, if known.
        test: Perplexity on the test text, if known.
    """

    model: str
    keep_ratio: float
    validation: float | None
    test: float | None


def model_card(
    name: str,
    written_as: str,
    about: Mapping[str, Any],
    *,
    source: ModelSource,
    parameters: tuple[int, int],
    storage: str,
    scores: Sequence[Score],
    commands: Sequence[str],
    measuring: str,
    notes: Sequence[str] = (),
) -> str:
    """Return the text of a model card, with the head that the Hub reads.

    Args:
        name: Of the folder.
        written_as: ``"lrbo"``, ``"remote_code"`` or ``"merged"``.
        about: What the checkpoint says of its making: ``method``, ``refit``, ``validation``,
            ``data`` and ``versions``.
        source: Of the base model.
        parameters: Of the whole model, low-rank and dense.
        storage: Form of the low-rank layers, where they are written.
        scores: Rows of the table, the model itself last.
        commands: Command lines that make the checkpoint again.
        measuring: Command line that scores it on the test text of the table.
        notes: What the search adds to the allocation that it starts from, a sentence each.
    """
    origin, license_ = origin_of(source)
    data = ModelCardData(
        base_model=origin,
        license=license_,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lrbo", "low-rank", "compression"],
    )
    solved = [row["taken"] for row in (about["refit"] or {"trials": []})["trials"]]
    # As Python has it too: JSON writes a character beyond U+FFFF as two escapes.
    literal = json.dumps(name, ensure_ascii=False)
    return render(
        "model_card.md",
        head=data.to_yaml(),
        name=name,
        origin=origin,
        path=source.path,
        kept=f"{scores[-1].keep_ratio:.1%}",
        method=about["method"],
        is_refit=any(solved),
        form="merged" if written_as == "merged" else storage,
        parameters=f"{parameters[0]:,}",
        dense_parameters=f"{parameters[1]:,}",
        scores=[
            (row.model, f"{row.keep_ratio:.1%}", _number(row.validation), _number(row.test))
            for row in scores
        ],
        dtype=about["validation"]["dtype"],
        notes=notes,
        measuring=measuring,
        written_as=written_as,
        loading=LOADING[written_as].format(folder=literal),
        without_code=f"lrbo.load({literal})",
        texts=[(role, used["text"]) for role, used in about["data"].items()],
        commands="\n".join(commands),
        versions=", ".join(f"{package} {found}" for package, found in about["versions"].items()),
    )


def _number(perplexity: float | None) -> str:
    """Return a perplexity for the table."""
    return "-" if perplexity is None else f"{perplexity:.2f}"


def origin_of(source: ModelSource) -> tuple[str | None, str | None]:
    """Return the hub id of a base model and its license, as far as they are known here.

    The hub is not asked: the license is that of a card in the folder, or in the hub's cache.

    Args:
        source: Where the base model came from.
    """
    if source.source != "hf":
        return ORIGINS.get(source.path, (None, None))
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
        found = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None
