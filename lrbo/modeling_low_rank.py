"""A model with low-rank layers, for transformers alone; written beside its weights by lrbo."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D


class LowRankLinear(nn.Module):
    """Two thin layers for one: ``left(right(x))``."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.right = nn.Linear(inputs, rank, bias=False)
        self.left = nn.Linear(rank, outputs, bias=bias)
        self.register_buffer("weight", torch.empty(0))  # there is no dense weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        result: Tensor = self.left(self.right(x))
        return result


class PivotedLinear(nn.Module):
    """Some outputs are rows times the input, the others combinations of these outputs."""

    places: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.rows = nn.Linear(inputs, rank, bias=False)
        self.coefficients = nn.Linear(rank, outputs - rank, bias=False)
        self.register_buffer("places", torch.arange(outputs, dtype=torch.int32))
        self.register_buffer("weight", torch.empty(0))  # there is no dense weight
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        pivots = self.rows(x)
        both = torch.cat([pivots, self.coefficients(pivots)], -1)
        result = both.gather(-1, self.places.long().expand_as(both))
        return result if self.bias is None else result + self.bias


class LowRankForCausalLM(LlamaForCausalLM):
    """The dense architecture, with low-rank layers where ``config.json`` gives a rank."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        about = config.lrbo
        kind = PivotedLinear if about["storage"] == "pivoted" else LowRankLinear
        for name, rank in about["ranks"].items():
            dense = self.get_submodule(name)
            shape = dense.weight.shape
            outputs, inputs = reversed(shape) if isinstance(dense, Conv1D) else shape
            bias = dense.bias is not None or name in about["added_biases"]
            self.set_submodule(name, kind(inputs, outputs, rank, bias))
