"""What each model family calls its blocks and layers, and which layers share an input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lrbo.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Where the linear layers of a family are, by their paths inside a block."""

    model_types: tuple[str, ...]  # values of config.model_type
    blocks: str  # path of the module list of blocks
    sites: tuple[tuple[str, ...], ...]  # a tuple per distinct input, in forward order
    # Whose outputs are added to the residual stream as they are: attention's, then the MLP's.
    writers: tuple[str, str]
    # Whose outputs the MLP uses elementwise, so that these may lie in memory in any order.
    pointwise: tuple[str, ...]

    def end_of(self, path: str) -> str:
        """Return the path of the layer with which the attention or MLP of another one ends."""
        attention, mlp = self.writers
        return mlp if path in (*self.pointwise, mlp) else attention

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Map path to kind: the last name, with its parent where that alone is ambiguous."""
        paths = [path for site in self.sites for path in site]
        last = [path.rpartition(".")[2] for path in paths]
        return {
            path: name if last.count(name) == 1 else path.replace(".", "_")
            for path, name in zip(paths, last, strict=True)
        }


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FAMILIES = (
    Family(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3"),
        "model.layers",
        (_QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
        ("self_attn.o_proj", "mlp.down_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ),
    Family(
        ("gpt2",),
        "transformer.h",
        (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        ("attn.c_proj", "mlp.c_proj"),
        ("mlp.c_fc",),
    ),
    Family(
        ("opt",),
        "model.decoder.layers",
        (_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        ("self_attn.out_proj", "fc2"),
        ("fc1",),
    ),
    Family(
        ("gpt_neox",),
        "gpt_neox.layers",
        (
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        ("attention.dense", "mlp.dense_4h_to_h"),
        ("mlp.dense_h_to_4h",),
    ),
    Family(  # attention and MLP run in parallel behind one norm: fc1 reads what q, k, v read
        ("phi",),
        "model.layers",
        ((*_QKV, "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",)),
        ("self_attn.dense", "mlp.fc2"),
        ("mlp.fc1",),
    ),
    Family(
        ("phi3",),
        "model.layers",
        (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
        ("self_attn.o_proj", "mlp.down_proj"),
        ("mlp.gate_up_proj",),
    ),
)
MODEL_TYPES = tuple(sorted(name for family in FAMILIES for name in family.model_types))


def family_of(model_type: str) -> Family:
    """Return the family of a model type; ModelError if none lists it."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise ModelError(
        f"model type {model_type!r} is not mapped; known types: {', '.join(MODEL_TYPES)}. "
        "Describe it in lrbo/models/families.py."
    )


def is_pointwise(name: str) -> bool:
    """Whether the outputs of the layer with this path are only used elementwise."""
    paths = {path for family in FAMILIES for path in family.pointwise}
    return any(f".{name}".endswith(f".{path}") for path in paths)


def writers_of(config: Any) -> tuple[str, ...]:
    """Return the layers of a block whose outputs are added to its residual stream as they are."""
    # OPT-350m normalizes behind the addition, so that its stream is not what layers add to.
    normalizes_before = getattr(config, "do_layer_norm_before", True)
    return family_of(config.model_type).writers if normalizes_before else ()
