"""Weights -> a few of their entries, corrected for those that are gone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lrbo.factorization.bases import PANEL, Base, upper_root
from lrbo.layers.forms import KeptRows, SemiStructured, Sparse
from lrbo.layers.packing import pack

GROUP = 4  # consecutive inputs, of which two are kept
# Row by row what a column of a weight becomes: its position in order, its values so far, and those
# of the columns from it to the end of the panel, ``(columns, rows)``.
Snap = Callable[[int, Tensor, Tensor], Tensor]


def sparsify(
    weight: Float[Tensor, "out in"],
    form: SemiStructured | Sparse,
    percent: int | None,
    *,
    dtype: torch.dtype,
    moment: Float[Tensor, "in in"] | None = None,
    gradient: Float[Tensor, "out out"] | None = None,
    damping: float = 0.01,
) -> Base:
    """Keep two of four consecutive entries, or a percentage of all.

    With ``moment``, entries of least ``w^2 / [H^-1]_jj`` go, one input after the other, and the
    entries to come are corrected for them (SparseGPT: Frantar and Alistarh, ICML 2023); else the
    smallest go. 2:4 decides on corrected entries, a percentage on the weight as it is given: in
    every row, or with the second moment ``gradient`` of output gradients over all of them, where an
    output's entries weigh as much as its gradients. How much an output weighs is nothing to 2:4,
    which leaves every row as many.

    Raises:
        StatisticsError: If the damped moment is not positive definite.
    """
    rows, width = weight.shape
    columns = weight.float().T.contiguous()
    if moment is None:
        root, share = None, torch.ones(width).to(columns)
    else:
        upper = upper_root(moment, damping, "input second moment")
        identity = torch.eye(width).to(upper)
        root = torch.linalg.solve_triangular(upper, identity, upper=True).float()
        share = root.diagonal().square().reciprocal()
    if isinstance(form, Sparse):
        assert percent is not None
        spread = share if root is None else root.square().sum(0).reciprocal()  # 1 / [H^-1]_jj
        saliency = columns.square() * spread[:, None]
        count = form.kept(width, percent)
        if gradient is None:
            kept = _largest(saliency.T, count).T.contiguous()
        else:
            weighed = (saliency * gradient.diagonal().to(saliency)).T.reshape(1, -1)
            kept = _largest(weighed, count * rows).view(rows, width).T.contiguous()
    else:
        kept = torch.empty_like(columns, dtype=torch.bool)

    def snap(at: int, column: Tensor, rest: Tensor) -> Tensor:
        if isinstance(form, SemiStructured) and at % GROUP == 0:
            four = rest[:GROUP].square() * share[at : at + GROUP, None]
            kept[at : at + GROUP] = _largest(four.T, GROUP // 2).T
        return column * kept[at]

    if root is not None:
        compensate(columns, root, snap)
    elif isinstance(form, SemiStructured):
        for at in range(0, width, GROUP):
            snap(at, columns[at], columns[at:])
    values, mask = columns.T.contiguous(), kept.T.contiguous()
    tensors = {"values": values[mask].view(rows, -1).to(dtype)}  # row after row
    if isinstance(form, SemiStructured):
        positions = mask.view(rows, -1, GROUP).nonzero()[:, 2].view(rows, -1)
        tensors["positions"] = pack(positions.to(torch.uint8), 2)
        return Base(form, (), (rows, width), tensors, dtype)
    tensors["mask"] = pack(mask.to(torch.uint8), 1)
    return Base(form, (percent or 0,), (rows, width), tensors, dtype)


def compensate(weight: Float[Tensor, "in rows"], root: Float[Tensor, "in in"], snap: Snap) -> None:
    """Replace column after column, and move what each leaves to the columns to come, in place.

    Greedily, for the least of ``tr(E H E^T)``, with ``root^T root = H^-1``; ``weight`` lies by
    columns. What ``snap`` returns is what the column becomes.

    References:
        Frantar and Alistarh, *SparseGPT: Massive Language Models Can Be Accurately Pruned in
        One-Shot*, ICML 2023, algorithm 1.
    """
    width = len(weight)
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        panel, errors = weight[start:stop], torch.empty_like(weight[start:stop])
        for index in range(stop - start):
            at = start + index
            error = panel[index] - snap(at, panel[index], panel[index:])
            error /= root[at, at]
            errors[index] = error
            if index + 1 < stop - start:
                panel[index + 1 :].addr_(root[at, at + 1 : stop], error, alpha=-1.0)
        weight[stop:].addmm_(root[start:stop, stop:].T, errors, alpha=-1.0)


def keep_rows(
    weight: Float[Tensor, "out in"],
    form: KeptRows,
    percent: int,
    *,
    dtype: torch.dtype,
    change: Float[Tensor, "out in"] | None = None,
    moment: Float[Tensor, "in in"] | None = None,
    gradient: Float[Tensor, "out out"] | None = None,
) -> Base:
    """Keep a percentage of the outputs, those whose absence costs most.

    That is how much less ``tr(G D C D^T)`` is without a row of ``D`` than with it, for the
    ``change`` ``D`` that the others are to suffer, by default the whole weight; where a moment is
    not known it is an identity.
    """
    rows, width = weight.shape
    rest = weight if change is None else change
    inputs = rest @ rest.T if moment is None else rest @ moment @ rest.T
    outputs = torch.eye(rows).to(weight) if gradient is None else gradient
    own = inputs.diagonal() * outputs.diagonal()
    gains = 2 * (outputs * inputs).sum(1) - own
    kept = gains.topk(form.kept(rows, percent)).indices.sort().values
    tensors = {"values": weight[kept].to(dtype), "rows": kept.int()}
    return Base(form, (percent,), (rows, width), tensors, dtype)


def _largest(values: Float[Tensor, "rows n"], count: int) -> Bool[Tensor, "rows n"]:
    """Mark the largest of every row."""
    index = values.topk(count, dim=1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, index, True)
