"""The map of a model: its linear layers, their kinds, shared inputs, ties and sizes."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lrbo.errors import ModelError
from lrbo.models.families import family_of
from lrbo.models.specs import LayerSpec, ModelMap

LINEAR_HEAD = "expected a linear one; load it with AutoModelForCausalLM, without adapters."


def map_model(model: PreTrainedModel) -> ModelMap:
    """Map a causal language model, also on the meta device; ModelError if its family is unlike."""
    family = family_of(model.config.model_type)
    blocks = dict(model.named_modules()).get(family.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise ModelError(
            f"{type(model).__name__} has no ModuleList of blocks at {family.blocks!r}, where "
            f"models of type {model.config.model_type!r} keep them; load it anew."
        )
    layers: list[LayerSpec] = []
    for index, block in enumerate(blocks):
        prefix = f"{family.blocks}.{index}"
        linear = {path: module for path, module in block.named_modules() if is_linear(module)}
        missing = sorted(set(family.kinds) - set(linear))
        unmapped = sorted(
            path
            for path, module in block.named_modules()
            if path not in family.kinds and any(p.dim() >= 2 for p in module.parameters(False))
        )
        if missing or unmapped:
            raise ModelError(
                f"{prefix} of {type(model).__name__} does not look like a "
                f"{model.config.model_type!r} block: missing {missing or 'nothing'}, "
                f"not mapped {[f'{prefix}.{path}' for path in unmapped] or 'nothing'}. Describe "
                "it in lrbo/models/families.py, or load it without quantization and adapters."
            )
        for site in family.sites:
            name = f"{prefix}.{site[0]}"
            for path in site:
                own = f"{prefix}.{path}"
                spec = _spec(linear[path], own, family.kinds[path], index, name)
                end = family.end_of(path)
                is_mlp = end == family.writers[1]
                neurons = linear_weight(linear[end]).shape[1] if is_mlp else 0
                layers.append(replace(spec, closing=f"{prefix}.{end}", neurons=neurons))
    head = require_head(model)
    if not is_linear(head):
        raise ModelError(
            f"{type(model).__name__} has a head of type {type(head).__name__}, {LINEAR_HEAD}"
        )
    names = {module: name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    tied_to = names[head] if is_tied(model) else None
    if is_table(embedding):
        table = _spec(embedding, names[embedding], _last(names[embedding]), None, names[embedding])
        bias = tied_to is not None and linear_bias(head) is not None
        layers.append(replace(table, has_bias=bias, tied_to=tied_to, is_lookup=True))
    if tied_to is None or not is_table(embedding):
        layers.append(_spec(head, names[head], _last(names[head]), None, names[head]))
    return ModelMap(tuple(layers), sum(p.numel() for p in model.parameters()), len(blocks))


def require_head(model: PreTrainedModel) -> nn.Module:
    """Return the head; ModelError for a body without one and a classifier."""
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no head, {LINEAR_HEAD}")
    return head


def is_linear(module: nn.Module) -> bool:
    """Whether this is ``nn.Linear`` or GPT-2's ``Conv1D``, but no subclass: these may adapt it."""
    return type(module) in (nn.Linear, Conv1D) and isinstance(module.weight, nn.Parameter)


def is_table(module: nn.Module) -> bool:
    """Whether this is ``nn.Embedding``, but no subclass: these may adapt it."""
    return type(module) is nn.Embedding and isinstance(module.weight, nn.Parameter)


def linear_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """Return the weight of a dense layer or table as ``(out, in)``; a view, detached."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer stores its weight as ``(in, out)``, as GPT-2 does."""
    return type(module) is Conv1D


def linear_bias(module: nn.Module) -> Float[Tensor, " out"] | None:
    """Return the bias of a dense layer, detached, or ``None``."""
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _spec(module: nn.Module, name: str, kind: str, block: int | None, site: str) -> LayerSpec:
    out_features, in_features = linear_weight(module).shape
    has_bias = linear_bias(module) is not None
    return LayerSpec(name, kind, block, out_features, in_features, has_bias, site)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding by its tensors, whatever the configuration says."""
    head = model.get_output_embeddings()  # a model without it may have no embedding either
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight


def body_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """Split a causal language model: ``head(body(x).last_hidden_state)`` are the logits."""
    return model.base_model, require_head(model)
