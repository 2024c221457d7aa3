"""What each model family calls its blocks and layers, and which layers share an input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lrbo.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Where the linear layers of a family are.

    To add a family, add one entry to ``FAMILIES``; ``tests/test_model.py`` checks on a tiny
    random model that the layers of a site really read the same tensor.

    Attributes:
        model_types: Values of ``config.model_type`` in Hugging Face's terms.
        blocks: Path of the module list of blocks.
        sites: Paths inside a block; one tuple per distinct input, in forward order.
        writers: Paths of the layers, each alone at its site, whose answers are added to the
            residual stream as they are: first attention's, then the MLP's.
        pointwise: Paths of the layers whose answers the MLP takes number by number, through an
            activation function or a product, so that they may lie in memory in any order.
    """

    model_types: tuple[str, ...]
    blocks: str
    sites: tuple[tuple[str, ...], ...]
    writers: tuple[str, str]
    pointwise: tuple[str, ...]

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Map path to kind: the last name, with its parent where that alone is ambiguous."""
        paths = [path for site in self.sites for path in site]
        last = [path.rpartition(".")[2] for path in paths]
        return {
            path: name if last.count(name) == 1 else path.replace(".", "_")
            for path, name in zip(paths, last, strict=True)
        }


FAMILIES = (
    Family(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3"),
        "model.layers",
        (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ),
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
        (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
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
        (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
            ("self_attn.dense",),
            ("mlp.fc2",),
        ),
        ("self_attn.dense", "mlp.fc2"),
        ("mlp.fc1",),
    ),
    Family(
        ("phi3",),
        "model.layers",
        (
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            ("mlp.gate_up_proj",),
            ("mlp.down_proj",),
        ),
        ("self_attn.o_proj", "mlp.down_proj"),
        ("mlp.gate_up_proj",),
    ),
)


MODEL_TYPES = tuple(sorted(name for family in FAMILIES for name in family.model_types))
POINTWISE = frozenset(path for family in FAMILIES for path in family.pointwise)


def family_of(model_type: str) -> Family:
    """Return the family of a model type.

    Raises:
        ModelError: If no family lists it; the message names those that exist.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise ModelError(
        f"model type {model_type!r} is not mapped; known types: {', '.join(MODEL_TYPES)}. "
        "Describe it in lrbo/families.py."
    )


def is_pointwise(name: str) -> bool:
    """Return whether the answers of a layer are only taken number by number, in any family.

    Args:
        name: Module path, in a model or in a block.
    """
    return any(f".{name}".endswith(f".{path}") for path in POINTWISE)


def writers_of(config: Any) -> tuple[str, ...]:
    """Return the layers of a block that add to its residual stream as they are.

    Args:
        config: Of a model, as transformers has it.

    Raises:
        ModelError: If the family is unknown.
    """
    family = family_of(config.model_type)
    # OPT-350m normalizes behind the addition, so that its stream is not what layers add to.
    return family.writers if getattr(config, "do_layer_norm_before", True) else ()
