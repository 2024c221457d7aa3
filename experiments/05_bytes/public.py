"""Public libraries that quantize: what they make of a weight, and how many bits it takes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Rounded = tuple[Tensor, float]  # the weight that is multiplied with, and bits per parameter


def hqq(weight: Tensor, bits: int, group: int) -> Rounded:
    """Round as HQQ does, with its iterations; a group has scale and zero point in 16 bits."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        weight.float(), bits, group_size=group, axis=1, bitpack=False, device="cpu",
        compute_dtype=torch.float32,
    )  # fmt: skip
    scale, zero = (meta[name].to(torch.bfloat16).float() for name in ("scale", "zero"))
    return ((codes.float() - zero) * scale).view_as(weight), bits + 32 / group


def torchao(weight: Tensor, bits: int, group: int) -> Rounded:
    """Round to the nearest by torchao; a group has a scale of 16 bits and a zero point of 8."""
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    most = 2**bits - 1
    block = (1, group)
    scale, zero = choose_qparams_affine(
        weight.float(), MappingType.ASYMMETRIC, block, torch.uint8, 0, most,
        scale_dtype=torch.float32, zero_point_dtype=torch.uint8,
    )  # fmt: skip
    scale = scale.to(torch.bfloat16).float()
    codes = quantize_affine(weight.float(), block, scale, zero, torch.uint8, 0, most)
    rounded: Tensor = dequantize_affine(
        codes, block, scale, zero, torch.uint8, 0, most, output_dtype=torch.float32
    )
    return rounded, bits + 24 / group


LIBRARIES: Mapping[str, Callable[[Tensor, int, int], Rounded]] = {"HQQ": hqq, "torchao": torchao}


def version(library: str) -> str | None:
    """Return the version that is installed; ``None`` if none is."""
    try:
        return importlib.metadata.version(library.lower())
    except importlib.metadata.PackageNotFoundError:
        return None


def best_grid(library: str, bits: float, width: int) -> tuple[int, int] | None:
    """Return most bits, then the smallest group that divides a width, within bits per parameter."""
    described: Mapping[str, Any] = {"HQQ": 32, "torchao": 24}
    for whole in (8, 4, 3, 2):
        for group in (16, 32, 64, 128, 192, 576):
            if width % group == 0 and whole + described[library] / group <= bits + 1e-9:
                return whole, group
    return None
