"""The modules of forms that several layers take together."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lrbo.layers.joint_form import Neurons, SharedFactored
from lrbo.layers.low_rank import Bias, FormModule, linear_of
from lrbo.layers.options import Option
from lrbo.layers.shared import SharedLinear
from lrbo.models.specs import LayerSpec


class ThinLinear(nn.Linear):
    """A layer of an MLP with some of its neurons: fewer outputs, or fewer inputs, than it had."""


class SkippedLinear(FormModule):
    """A layer of an attention or MLP that is not run.

    The last one gives the bias for every token. The others give vectors of no elements, which an
    MLP may pass through its activation function.

    Attributes:
        whole: Whether the module that it is a part of, an attention, is not run either.
    """

    def __init__(self, shape: tuple[int, int], bias: Bias, like: Tensor, *, whole: bool) -> None:
        """Wrap a bias without copying it; ``None`` for layers that end nothing."""
        super().__init__(*shape, 0, like)
        self.whole = whole
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @override
    def dense_weight(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "out in"]:
        return self.weight.new_zeros(self.out_features, self.in_features, dtype=dtype)

    @override
    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.bias is None:
            return x.new_empty(*x.shape[:-1], 0)
        return self.bias.to(x.dtype).expand(*x.shape[:-1], -1)


class SkippedAttention(nn.Module):
    """An attention that is not run, of which the last layer gives what it added on average."""

    def __init__(self, attention: nn.Module, last: str) -> None:
        """Keep the modules of the attention, whose tensors stay where they were."""
        super().__init__()
        for name, module in attention.named_children():
            self.add_module(name, module)
        self.layer_idx, self.last = attention.layer_idx, last

    def forward(
        self, hidden_states: Float[Tensor, "batch tokens d"], *_: Any, **given: Any
    ) -> tuple[Float[Tensor, "batch tokens d"], None]:
        """Return the mean contribution for every token, and no attention weights."""
        cache = given.get("past_key_values", given.get("layer_past"))  # GPT-NeoX has another name
        if cache is not None:
            # One number per token instead of keys and values: transformers reads the number of
            # tokens before, and so positions and masks, off the first attention's.
            mark = hidden_states.new_ones(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(mark, mark, self.layer_idx)
        return self.get_submodule(self.last)(hidden_states), None


def empty_joint(
    spec: LayerSpec, option: Option, *, bias: bool
) -> ThinLinear | SkippedLinear | SharedLinear:
    """Return the layer of a joint option on the meta device, for weights to be loaded into.

    ``bias`` is whether it has one where its form does not say so itself.
    """
    if option.form == SharedFactored.name:
        return SharedLinear.on_meta(spec, option.rank, bias=bias)
    with torch.device("meta"):
        if option.form != Neurons.name:
            mean = torch.empty(spec.out_features) if spec.is_closing else None
            shape, whole = (spec.out_features, spec.in_features), not spec.neurons
            return SkippedLinear(shape, mean, torch.empty(0), whole=whole)
        outputs, inputs = Neurons.shape(spec, *option.level)
        offset = torch.empty(outputs) if spec.has_bias else None
        return linear_of(torch.empty(outputs, inputs), offset, ThinLinear)
