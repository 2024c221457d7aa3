"""Tables: weights of which rows are looked up, with which a tied head multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lrbo.errors import ModelError
from lrbo.layers.low_rank import Bias, FormModule, linear_of


class TiedHead(nn.Module):
    """A head that multiplies with the table of an embedding, and holds no tensor of its own."""

    def __init__(self, table: FormModule) -> None:
        super().__init__()
        self.tied = (table,)  # in a tuple it is no submodule, whose tensors would count twice

    @property
    def weight(self) -> Tensor:
        """The tensor that stands under the name of the weight of the table."""
        return self.tied[0].weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # transformers ties what is tied again.
        if value is not self.weight:
            raise ModelError(
                "the head is tied to the table of the embedding, expected no weight of its own; "
                "merge the model (lrbo compress format=merged) to give it one"
            )

    @property
    def bias(self) -> Tensor | None:
        """The bias of the table."""
        return self.tied[0].bias

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the logits of final hidden states."""
        return self.tied[0].multiply(x)


def is_table(model: nn.Module, name: str) -> bool:
    """Whether a unit is the embedding or the head of a model, which may have neither."""
    module, head = model.get_submodule(name), _head_of(model)
    return head is not None and (module is head or _is_embedding(model, name))


def stored_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Map names in a model to the modules of units, and to the heads that are tied to them."""
    result: dict[str, nn.Module] = {}
    for name, module in modules.items():
        result[name] = module
        for head in heads_of(model, name):
            assert isinstance(module, FormModule)
            result[head] = TiedHead(module)
    return result


def dense_modules(
    model: nn.Module, name: str, weight: Float[Tensor, "out in"], bias: Bias
) -> dict[str, nn.Module]:
    """Map names in a model to dense layers of a unit, whose weight is not copied."""
    if not _is_embedding(model, name):
        return {name: linear_of(weight, bias)}
    head: nn.Linear = linear_of(weight, bias)
    rows, width = weight.shape
    embedding = nn.Embedding(rows, width, _weight=head.weight)
    embedding.weight = head.weight  # itself, not a parameter of the same numbers
    return {name: embedding, **dict.fromkeys(heads_of(model, name), head)}


def heads_of(model: nn.Module, name: str) -> list[str]:
    """Name the heads that are tied to a unit: none, but for an embedding."""
    if not _is_embedding(model, name):
        return []
    weight, modules = model.get_submodule(name).weight, model.named_modules()
    return [each for each, m in modules if each != name and getattr(m, "weight", None) is weight]


def _is_embedding(model: nn.Module, name: str) -> bool:
    if _head_of(model) is None:  # transformers raises for an embedding that there is not
        return False
    own: Any = model
    return model.get_submodule(name) is own.get_input_embeddings()


def _head_of(model: nn.Module) -> nn.Module | None:
    # Of any model of transformers, whose import may be what imports this module.
    head_of: Any = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = None if head_of is None else head_of()
    return head


def fix_size_(model: nn.Module) -> None:
    """Let a model refuse another number of tokens: its table has a row for each."""
    vars(model)["resize_token_embeddings"] = partial(_refuse_other_size, model)


def _refuse_other_size(
    model: Any, new_num_tokens: int | None = None, *_args: Any, **_options: Any
) -> nn.Module:
    size = model.config.get_text_config().vocab_size
    if new_num_tokens not in (None, size):
        raise ModelError(
            f"resize_token_embeddings({new_num_tokens}): the embedding or the head is compressed "
            f"for its {size} tokens, expected no other number; add tokens to the dense model, and "
            "compress it again"
        )
    embedding: nn.Module = model.get_input_embeddings()
    return embedding
