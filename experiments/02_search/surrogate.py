"""A surrogate of the real model from recorded trials, which ten seeds of every search can afford.

A Gaussian process on the trials of recorded.jsonl: SmolLM2-135M at keep ratio 0.8, described by
what each allocation is predicted to lose per kind and depth.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.mlls import ExactMarginalLogLikelihood

from lrbo.allocation.allocate import Allocation
from lrbo.layers.options import Budget
from lrbo.models.specs import LayerSpec

HERE = Path(__file__).parent
MULTIPLE = 8
CRUSHED = 1.2  # nats beyond the dense model


def ranks_of(allocation: Allocation) -> dict[str, int | None]:
    """Return the rank of each layer; ``None`` is dense."""
    return {
        name: option.level[0] if option.level else None
        for name, option in allocation.options.items()
    }


@dataclass
class Recorded:
    """The trials of the real model, and the layers that they are about."""

    layers: list[LayerSpec]
    curves: dict[str, np.ndarray]
    budget: Budget
    dense: float
    rows: list[dict[str, Any]]

    @classmethod
    def load(cls) -> Recorded:
        """Read recorded.jsonl and layers.npz."""
        arrays = np.load(HERE / "layers.npz")
        layers = [
            LayerSpec(str(name), str(kind), int(block), *map(int, shape), has_bias=False, site="x")
            for name, kind, block, shape in zip(
                arrays["names"], arrays["kinds"], arrays["blocks"], arrays["shapes"], strict=True
            )
        ]
        curves = {}
        for spec, row in zip(layers, arrays["curves"].astype(np.float64), strict=True):
            full = min(spec.out_features, spec.in_features)
            ranks = np.arange(full + 1)
            curves[spec.name] = np.interp(ranks, np.arange(len(row)) * MULTIPLE, row)
        lines = (HERE / "recorded.jsonl").read_text("utf-8").splitlines()
        dense = float(arrays["dense"])
        every = [json.loads(line) for line in lines]
        # Where a few layers are crushed the loss jumps; no search goes there twice.
        rows = [row for row in every if row["nll"] - dense < CRUSHED]
        return cls(layers, curves, Budget("parameters", int(arrays["budget"])), dense, rows)

    @cached_property
    def inputs(self) -> np.ndarray:
        """Return what describes each trial."""
        names = [spec.name for spec in self.layers]
        return np.stack(
            [
                self.features({n: r or None for n, r in zip(names, row["ranks"], strict=True)})
                for row in self.rows
            ]
        )

    @cached_property
    def targets(self) -> np.ndarray:
        """Return the logarithm of the loss of each trial beyond that of the dense model."""
        return np.log(np.array([row["nll"] for row in self.rows]) - self.dense)

    def features(self, ranks: Mapping[str, int | None]) -> np.ndarray:
        """Return logarithms of predicted losses: each kind in each third of the depth, and all."""
        blocks = 1 + max(spec.block or 0 for spec in self.layers)
        cells: dict[tuple[str, int], float] = {}
        for spec in self.layers:
            rank = ranks[spec.name]
            lost = 0.0 if rank is None else float(self.curves[spec.name][rank])
            cell = (spec.kind, 3 * (spec.block or 0) // blocks)
            cells[cell] = cells.get(cell, 0.0) + lost
        each = np.array(list(cells.values()))
        return np.log(np.append(each, each.sum()) + 1e-4)


class Surrogate:
    """What the real model would say of an allocation, to within a stated error.

    A parabola of the whole predicted loss, and a Gaussian process for what it misses, both of the
    logarithm of the loss beyond that of the dense model.
    """

    def __init__(self, recorded: Recorded, rows: Sequence[int]) -> None:
        """Fit some of the recorded trials."""
        self.recorded = recorded
        inputs, targets = recorded.inputs[rows], recorded.targets[rows]
        self.centre, self.scale = inputs.mean(0), inputs.std(0) + 1e-9
        self.parabola = np.polyfit(inputs[:, -1], targets, 2)
        rest = targets - np.polyval(self.parabola, inputs[:, -1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.process = SingleTaskGP(self._scaled(inputs), torch.tensor(rest)[:, None])
            fit_gpytorch_mll(ExactMarginalLogLikelihood(self.process.likelihood, self.process))
        self.process.eval()

    def _scaled(self, inputs: np.ndarray) -> torch.Tensor:
        return torch.tensor((inputs - self.centre) / self.scale)

    def log_excess(self, inputs: np.ndarray) -> np.ndarray:
        """Return the logarithm of the loss beyond that of the dense model."""
        with torch.no_grad():
            rest = self.process.posterior(self._scaled(inputs)).mean[:, 0].numpy()
        return np.asarray(np.polyval(self.parabola, inputs[:, -1]) + rest)

    def __call__(self, allocation: Allocation) -> float:
        """Return the loss, nats per token."""
        inputs = self.recorded.features(ranks_of(allocation))[None]
        return self.recorded.dense + math.exp(float(self.log_excess(inputs)[0]))


def held_back(recorded: Recorded) -> dict[str, float]:
    """Return how far trials that were not fitted are off, by sort: relative, of the excess."""
    count = len(recorded.rows)
    order = np.random.default_rng(0).permutation(count)
    errors = np.zeros(count)
    for fold in range(5):
        left_out = order[fold::5]
        model = Surrogate(recorded, np.setdiff1d(order, left_out).tolist())
        errors[left_out] = model.log_excess(recorded.inputs[left_out]) - recorded.targets[left_out]
    sorts = [row["sort"] for row in recorded.rows]
    deviations = {"R^2": 1 - float(errors.var() / recorded.targets.var())}
    for sort in dict.fromkeys(sorts):
        own = errors[[index for index, other in enumerate(sorts) if other == sort]]
        deviations[sort] = float(np.sqrt((own**2).mean()))
    return deviations
