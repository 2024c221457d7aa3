"""Integers of 8, 4, 3, 2 bits or one in bytes, as checkpoints and memory hold them."""

from __future__ import annotations

import torch
from jaxtyping import UInt8

# Each width is split into parts that divide a byte: their bits, lowest first.
PARTS = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}

Codes = UInt8[torch.Tensor, "rows n"]
Packed = UInt8[torch.Tensor, "rows bytes"]


def packed_width(count: int, bits: int) -> int:
    """Return the bytes of a row of ``count`` integers."""
    return count * bits // 8


def pack(codes: Codes, bits: int) -> Packed:
    """Pack integers below ``2**bits``, eight at least in a row, and a multiple of eight.

    A part of ``b`` bits takes ``n * b / 8`` bytes of a row; byte ``i`` holds entries ``i``,
    ``i + n * b / 8`` and so on, so that whole runs of a row are unpacked by one shift.
    """
    parts, shift = [], 0
    for width in PARTS[bits]:
        part = (codes >> shift) & (2**width - 1)
        lanes = part.view(len(part), 8 // width, -1)
        total = lanes[:, 0].clone()
        for lane in range(1, 8 // width):
            total |= lanes[:, lane] << (lane * width)
        parts.append(total)
        shift += width
    return torch.cat(parts, 1)


def unpack(packed: Packed, bits: int) -> Codes:
    """Undo :func:`pack`."""
    rows, count = len(packed), packed.shape[1] * 8 // bits
    codes = packed.new_empty(rows, count)
    shift = start = 0
    for width in PARTS[bits]:
        size = packed_width(count, width)
        part = packed[:, start : start + size]
        for lane in range(8 // width):
            own = codes[:, lane * size : (lane + 1) * size]
            values = (part >> (lane * width)) & (2**width - 1)
            if shift:
                own |= values << shift
            else:
                own.copy_(values)
        start, shift = start + size, shift + width
    return codes
