"""A model with low-rank layers, for transformers alone; written beside its weights by lrbo."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

# Layers whose outputs are only used elementwise, so that these may lie by columns.
POINTWISE = {"gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "dense_h_to_4h"}
# Of layers that read the same input, which of them holds the factor that all may share.
HOLDERS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class LowRankLinear(nn.Module):
    """Two thin layers for one: ``left(right(x))``; ``right`` may be that of the ``first`` layer."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool, first: Any = None) -> None:
        super().__init__()
        self.right = nn.Linear(inputs, rank, bias=False) if first is None else None
        self.left = nn.Linear(rank, outputs, bias=bias)
        self.register_buffer("weight", torch.empty(0))  # there is no dense weight
        # In a tuple they are no submodules, whose tensors would count twice.
        self.peers: tuple[Any, ...] = () if first is None else (first,)
        if first is not None:
            first.peers = (*first.peers, self)
        self.handed: tuple[Tensor, Tensor] | None = None  # an input, and right(input)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; a first one hands the others what its right factor gives."""
        handed, self.handed = self.handed, None
        if handed is None or handed[0] is not x:
            handed = x, (self.right or self.peers[0].right)(x)
            for other in self.peers if self.right is not None else ():
                other.handed = handed
        result: Tensor = self.left(handed[1])
        return result


def by_columns(x: Tensor, pointwise: bool) -> bool:
    """Whether a pivoted layer works by columns."""
    return pointwise or (x.device.type == "cpu" and x.element_size() == 2)


class Product(nn.Linear):
    """A linear map whose output may lie in memory by columns, which are fast to put in order."""

    pointwise = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, which has no bias."""
        # Quantized weights have a type of their own, and may only be a factor on the right.
        if by_columns(x, self.pointwise) and type(self.weight) in (nn.Parameter, Tensor):
            return nn.functional.linear(self.weight, x).T
        return super().forward(x)


class PivotedLinear(nn.Module):
    """Some outputs are rows times the input, the others combinations of these outputs."""

    index: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool, pointwise: bool) -> None:
        super().__init__()
        self.rows = Product(inputs, rank, bias=False)
        self.coefficients = Product(rank, outputs - rank, bias=False)
        self.pointwise = self.rows.pointwise = self.coefficients.pointwise = pointwise
        self.register_buffer("index", torch.arange(outputs, dtype=torch.int32))
        self.register_buffer("weight", torch.empty(0))  # there is no dense weight
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        pivots = self.rows(x.reshape(-1, x.shape[-1]))
        others = self.coefficients(pivots)
        if by_columns(x, self.pointwise):
            result = torch.cat([pivots.T, others.T]).index_select(0, self.index).T
            result = result if self.pointwise else result.contiguous()
        else:
            both = torch.cat([pivots, others], -1)
            if x.device.type == "cpu":  # there index_select takes up to ten times as long
                result = both.gather(-1, self.index.long().expand_as(both))
            else:
                result = both.index_select(-1, self.index)
        result = result if self.bias is None else result + self.bias
        return result.view(*x.shape[:-1], len(self.index))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


class LowRankForCausalLM(LlamaForCausalLM):
    """The dense architecture, with layers of other forms where ``config.json`` says so."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        about = config.lrbo
        # Those that hold a factor for others come before these.
        units = sorted(about["units"].items(), key=lambda unit: _last(unit[0]) in HOLDERS)
        for name, option in units:
            form, rank = option.split(" ")
            dense = self.get_submodule(name)
            shape = dense.weight.shape
            outputs, inputs = reversed(shape) if isinstance(dense, Conv1D) else shape
            bias = dense.bias is not None or name in about["added_biases"]
            if form == "pivoted":
                pointwise = _last(name) in POINTWISE
                layer: nn.Module = PivotedLinear(inputs, outputs, int(rank), bias, pointwise)
            elif form in ("factored", "shared_factored"):
                holder = HOLDERS.get(_last(name)) if form == "shared_factored" else None
                path = f"{name.rpartition('.')[0]}.{holder}"
                first = None if holder is None else self.get_submodule(path)
                layer = LowRankLinear(inputs, outputs, int(rank), bias, first)
            else:
                raise ValueError(f"{name} has the form {form!r}, which this file does not know")
            self.set_submodule(name, layer)
