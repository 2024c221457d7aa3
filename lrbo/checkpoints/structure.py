"""A plain configuration for a model with thinner MLPs and skipped parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from lrbo.layers.joint import SkippedLinear, ThinLinear
from lrbo.models.families import family_of, writers_of
from lrbo.models.model_map import linear_bias
from lrbo.models.specs import LayerSpec

WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")  # keys of the neurons of all MLPs
PER_BLOCK = ("layer_types", "no_rope_layers")  # keys of lists with an entry per block


@dataclass(frozen=True)
class Structure:
    """The blocks of a compressed model that a dense one needs, and the neurons of its MLPs."""

    blocks: str  # path of their list
    kept: tuple[int, ...]
    constants: Mapping[str, Tensor]  # what other blocks add, by the layer whose bias it joins
    width: int | None  # None where some MLP has all neurons, or none has any

    @classmethod
    def of(cls, model: PreTrainedModel) -> Structure:
        """Find the structure of a model.

        A block of which both parts are skipped adds two biases to the residual stream, and so may
        the layer do that wrote to it last. The first block stays, for there is none before it.
        """
        family = family_of(model.config.model_type)
        blocks = model.get_submodule(family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        # Where a norm follows the addition, or numbers of blocks enter, no block is the same.
        is_plain = bool(writers_of(model.config))
        is_plain &= not getattr(model.config, "scale_attn_by_inverse_layer_idx", False)
        kept, constants, widths, last = list[int](), dict[str, Tensor](), list[int | None](), ""
        for index, block in enumerate(blocks):
            ends = [block.get_submodule(path) for path in family.writers]
            biases = [end.bias for end in ends if isinstance(end, SkippedLinear)]
            if kept and is_plain and len(biases) == 2:
                for bias in biases:
                    assert bias is not None
                    constants[last] = constants.get(last, 0.0) + bias.detach().double()
                continue
            kept.append(index)
            last = f"{family.blocks}.{index}.{family.writers[1]}"
            if not isinstance(ends[1], SkippedLinear):
                widths.append(ends[1].in_features if isinstance(ends[1], ThinLinear) else None)
        known = [width for width in widths if width is not None]
        width = max(known) if known and len(known) == len(widths) else None
        return cls(family.blocks, tuple(kept), constants, width)

    def config(self, config: PretrainedConfig) -> PretrainedConfig:
        """Return the configuration of the dense model, made of that of the original."""
        values = config.to_dict()
        for key in PER_BLOCK:
            if values.get(key):
                values[key] = [values[key][index] for index in self.kept]
        if self.width is not None:
            values[next(key for key in WIDTHS if key in values)] = self.width
        count = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
        return type(config).from_dict(values | {count: len(self.kept)})

    def renamed(self, name: str) -> str | None:
        """Return the name of a layer or tensor in the dense model; ``None`` where it has none."""
        inside = name.removeprefix(f"{self.blocks}.")
        if inside == name:
            return name
        index, _, path = inside.partition(".")
        if int(index) not in self.kept:
            return None
        return f"{self.blocks}.{self.kept.index(int(index))}.{path}"


def padded(layer: ThinLinear, spec: LayerSpec) -> tuple[Float[Tensor, "out in"], Tensor | None]:
    """Return weight and bias with zeros for the neurons that others have, in float64."""
    groups = 1 if spec.is_closing else spec.out_features // spec.neurons
    each = spec.out_features // groups
    weight = layer.weight.detach().double().view(groups, -1, layer.in_features)
    missing = (0, spec.in_features - weight.shape[2], 0, each - weight.shape[1])
    whole = functional.pad(weight, missing).flatten(0, 1)
    if linear_bias(layer) is None:
        return whole, None
    bias = layer.bias.detach().double().view(groups, -1)
    return whole, functional.pad(bias, (0, each - bias.shape[1])).flatten()
