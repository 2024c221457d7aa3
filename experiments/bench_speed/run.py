"""How much faster than dense is a model in each form, and does fusing layers pay?

    python experiments/bench_speed/run.py [--shape 135m|1b|7b] [--dtype bfloat16] [--compile]

Models of a real shape with random weights, every layer at the same share of its parameters. What
`lrbo benchmark` measures of a checkpoint is measured of each.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lrbo.evaluation.timing import (
    KindSpeed,
    Speed,
    TimingSettings,
    dense_twin,
    measure_kinds,
    measure_speed,
)
from lrbo.layers.low_rank import linear_of
from lrbo.layers.modules import PRODUCTS, low_rank_layers, replace_module
from lrbo.layers.options import Menu
from lrbo.layers.pivoted import Product
from lrbo.models.model_map import map_model
from lrbo.models.specs import LayerSpec

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
# Of 1B and 7B fewer blocks than they have: their share of the time hardly changes.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4,
           "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
KEPT = (0.8, 0.5)
FUSED = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


class Shared(nn.Module):
    """The rows of a pivoted layer, multiplied with those of its neighbours by the first one."""

    def __init__(self, shared: dict[str, Any], index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index

    def forward(self, x: Tensor) -> Tensor:
        """Answer the pivots of the layer."""
        if self.index == 0:
            self.shared["pivots"] = self.shared["rows"](x).split(self.shared["ranks"], -1)
        pivots: Tensor = self.shared["pivots"][self.index]
        return pivots


def fuse_(model: PreTrainedModel) -> None:
    """Let layers that share an input share the product with their rows."""
    for block in model.model.layers:
        for parent, names in FUSED.items():
            layers = [getattr(block.get_submodule(parent), name) for name in names]
            rows = linear_of(torch.cat([one.rows.weight for one in layers]), None, Product)
            rows.pointwise = layers[0].pointwise
            shared = {"rows": rows, "ranks": [one.rank for one in layers]}
            for index, layer in enumerate(layers):
                layer.rows = Shared(shared, index)


def rank_for(unit: LayerSpec, keep_ratio: float, form: str) -> int:
    """Return the largest rank at a share of the parameters, a multiple of 32 where there is one."""
    menu = Menu.of(unit, [form], bias=False, itemsize=4)
    options = [(menu.option(i), menu.cost(i).parameters) for i in range(len(menu) - 1)]
    fits = [option.level[0] for option, cost in options if cost <= keep_ratio * unit.parameters]
    return max([rank for rank in fits if rank % 32 == 0] or fits)


def made(
    shape: str, keep_ratio: float, form: str, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """Return a model of random weights."""

    def some(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device) * 0.02

    with torch.device(device):
        config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
        model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    units = map_model(model).compressible
    for unit in units:
        rank = rank_for(unit, keep_ratio, form)
        left, right = some(unit.out_features, rank), some(rank, unit.in_features)
        replace_module(model, unit.name, PRODUCTS[form].stand_in(unit.name, left, right, None))
    assert len(low_rank_layers(model)) == len(units)
    return model


def print_speeds(model: str, keep_ratio: float, form: str, speeds: list[Speed]) -> None:
    """Print a row for each."""
    for one in speeds:
        step = f"{one.step}, compiled" if one.compiled else one.step
        print(
            f"| {model} | {keep_ratio} | {form} | {step} | {one.prompt:,} "
            f"| {one.dense_tokens_per_second:,.0f} | {one.tokens_per_second:,.0f} "
            f"| {one.speedup:.2f} +- {one.error:.2f} |",
            flush=True,
        )


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="tiny" if SMOKE else "135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, nargs="+", default=[8] if SMOKE else [512])
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    settings = TimingSettings(tuple(options.prompts), steps=8, repeats=3 if SMOKE else 7)
    kinds: list[tuple[float, str, KindSpeed]] = []
    label = f"{options.shape}, {options.dtype}, {options.device}"
    print(f"{torch.get_num_threads()} threads\n")
    print("| model | kept | form | step | prompt | dense tokens/s | tokens/s | times faster |")
    print("|---|---:|---|---|---:|---:|---:|---:|")
    for keep_ratio in KEPT:
        for form in PRODUCTS:
            dtype = getattr(torch, options.dtype)
            model = made(options.shape, keep_ratio, form, dtype, options.device)
            twin = dense_twin(model)
            print_speeds(label, keep_ratio, form, measure_speed(model, twin, settings))
            kinds += [(keep_ratio, form, one) for one in measure_kinds(model, twin, settings)]
            if options.compile:
                shorter = replace(settings, prompts=settings.prompts[:1])
                speeds = measure_speed(model, twin, shorter, compiled=True)
                print_speeds(label, keep_ratio, form, speeds)
            if form == "pivoted":
                fuse_(model)
                print_speeds(
                    label, keep_ratio, "pivoted, fused", measure_speed(model, twin, settings)
                )
    print("\n| model | kept | form | kind | dense ms | ms | times faster |")
    print("|---|---:|---|---|---:|---:|---:|")
    for keep_ratio, form, kind in kinds:
        print(
            f"| {label} | {keep_ratio} | {form} | {kind.kind} | {kind.dense_ms:.2f} "
            f"| {kind.ms:.2f} | {kind.speedup:.2f} +- {kind.error:.2f} |"
        )


if __name__ == "__main__":
    main()
