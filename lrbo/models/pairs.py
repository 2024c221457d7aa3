"""A fine-tuned model beside the base model that it was made from: what of them differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lrbo.errors import ModelError, some
from lrbo.models.loading import load_model
from lrbo.models.parameters import weights_fingerprint
from lrbo.models.sources import PACKAGED, ModelSource
from lrbo.models.specs import ModelMap

TINY = "tiny"
SAME = (
    "its weights are those of the model, and there is no change to compress; give the model before "
    "it was fine-tuned"
)
# Keys of a configuration that no output depends on.
IDLE = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "max_position_embeddings", "pad_token_id", "quantization_config", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
SHOWN = 3  # layers that a message names


def base_source(name: str) -> ModelSource:
    """Return where a base comes from: a packaged model by its name, a folder, or the hub."""
    if name in PACKAGED:
        return ModelSource("packaged", name)
    if name == TINY and not Path(name).is_dir():
        return ModelSource("tiny", name)
    return ModelSource("hf", name)


@dataclass(frozen=True)
class BaseModel:
    """A base model and the fingerprint of its weights, as its files have them."""

    source: ModelSource
    fingerprint: str

    @classmethod
    def of(cls, source: ModelSource, model: PreTrainedModel) -> BaseModel:
        """Describe a base that is in memory, in the dtype of its files."""
        return cls(source, weights_fingerprint(model))

    def load(self) -> PreTrainedModel:
        """Load the base on the CPU in the dtype of its files; ModelError if it is another one."""
        model = load_model(self.source, dtype=None, device=torch.device("cpu"))
        self.require(model)
        return model

    def require(self, model: PreTrainedModel) -> None:
        """Raise ModelError, with both fingerprints, unless a model has the weights of the base."""
        if (current := weights_fingerprint(model)) != self.fingerprint:
            raise ModelError(
                f"the base model {self.source.label} has weights of fingerprint {current}, and the "
                f"delta is of one with {self.fingerprint}: they changed, or it is another model. "
                "Restore that base; added to another, a delta means nothing."
            )


def unlike(model: PreTrainedModel, base: PreTrainedModel, key: str) -> list[str]:
    """List why one model is no base of another, after the key that names it; both may be empty."""
    kinds = [each.config.model_type for each in (model, base)]
    if kinds[0] != kinds[1]:
        return [f"{key}: it is of type {kinds[1]!r}, the model of type {kinds[0]!r}; expected one"]
    own, other = ({n: tuple(p.shape) for n, p in each.named_parameters()} for each in (model, base))
    problems = []
    rows = [each.get_input_embeddings().weight.shape[0] for each in (model, base)]
    if rows[0] != rows[1]:
        problems.append(
            f"{key}: its vocabulary has {rows[1]:,} tokens, that of the model {rows[0]:,}; "
            "expected the same tokens"
        )
    table = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    differing = [
        f"{name} is {list(other[name])}, that of the model {list(shape)}"
        for name, shape in own.items()
        if name in other and other[name] != shape and (name != table or rows[0] == rows[1])
    ]
    if differing:
        problems.append(f"{key}: {len(differing)} tensors have other shapes: {_first(differing)}")
    lacking, more = (sorted(one.keys() - two) for one, two in ((own, other), (other, own)))
    if lacking or more:
        problems.append(
            f"{key}: it lacks {some(lacking, SHOWN)} of the model, and has {some(more, SHOWN)} "
            "beside; expected layers of the same names"
        )
    return problems


def _first(texts: list[str]) -> str:
    more = len(texts) - SHOWN
    return "; ".join(texts[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def other_settings(model: PreTrainedModel, base: PreTrainedModel) -> list[str]:
    """List the settings of a configuration that outputs depend on and that differ, with both."""
    own, other = (each.config.to_dict() for each in (model, base))
    return [
        f"{key}={own.get(key)!r}, that of the base {other.get(key)!r}"
        for key in sorted((own.keys() | other.keys()) - IDLE)
        if own.get(key) != other.get(key)
    ]


def changed_beside(
    model: PreTrainedModel, base: PreTrainedModel, layers: ModelMap
) -> dict[str, int]:
    """Return the parameters that differ but are of no compressible layer, with their sizes."""
    inside = tuple(f"{spec.name}." for spec in layers.compressible)
    return {
        name: own.numel()
        for name, own, other in _pairs(model, base)
        if not name.startswith(inside) and not torch.equal(own, other)
    }


def is_same(model: PreTrainedModel, base: PreTrainedModel) -> bool:
    """Whether no parameter differs, in the dtype of the first model."""
    return all(torch.equal(own, other) for _, own, other in _pairs(model, base))


def _pairs(model: PreTrainedModel, base: PreTrainedModel) -> Iterator[tuple[str, Any, Any]]:
    others = dict(base.named_parameters())
    for name, own in model.named_parameters():
        yield name, own.detach(), others[name].detach().to(own)


def with_changes(layers: ModelMap, changed: dict[str, int]) -> ModelMap:
    """Return the map of a delta, whose parameters are those of its layers and what else changed."""
    units = sum(spec.parameters for spec in layers.compressible)
    return replace(layers, parameters=units + sum(changed.values()))


def changed_biases(model: PreTrainedModel, base: PreTrainedModel, layers: ModelMap) -> list[str]:
    """Name the compressible layers whose bias is another than in the base."""
    biased = {f"{spec.name}.bias": spec.name for spec in layers.compressible if spec.has_bias}
    return [
        biased[name]
        for name, own, other in _pairs(model, base)
        if name in biased and not torch.equal(own, other)
    ]
