"""A surrogate of the real model from recorded trials, on which ten seeds of a search are cheap.

A Gaussian process on the trials of recorded_BITS.jsonl: SmolLM2-135M, rotated, at so many bits per
parameter of its blocks, described by what each allocation is predicted to lose per form, and per
kind and depth.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
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
from lrbo.layers.options import Budget, Menu, Section
from lrbo.models.specs import LayerSpec
from lrbo.optimization.space import Problem
from lrbo.optimization.variables import SpaceSettings, WeightSpace, build_weight_space

HERE = Path(__file__).parent
CRUSHED = 5  # times the least loss beyond the dense model
PARTS = 3  # of the depth


def load_menus(path: Path) -> tuple[dict[str, Menu], Budget, float]:
    """Read the menus with their predicted losses, the budget and the loss of the dense model."""
    arrays = np.load(path)
    menus = {}
    for index, (name, kind, block, shape) in enumerate(
        zip(arrays["names"], arrays["kinds"], arrays["blocks"], arrays["shapes"], strict=True)
    ):
        spec = LayerSpec(str(name), str(kind), int(block), *map(int, shape), False, "x")
        rows = np.flatnonzero(arrays["unit"] == index)
        forms, numbers = arrays["form"][rows], arrays["numbers"][rows].astype(np.int64)
        sizes = arrays["bytes"][rows].astype(np.int64)
        keys = [
            (form, number if second >= 0 else -2)
            for form, (number, second) in zip(forms, numbers, strict=True)
        ]
        sections = []
        for key in dict.fromkeys(keys):
            own = np.array([other == key for other in keys])
            width = int((numbers[own][0] >= 0).sum())
            costs = np.column_stack([sizes[own]] * 3)
            sections.append(Section(str(key[0]), numbers[own][:, :width], costs))
        menus[spec.name] = Menu(spec, tuple(sections), arrays["loss"][rows].astype(np.float64))
    return menus, Budget("bytes", int(arrays["budget"])), float(arrays["dense"])


@dataclass
class Recorded:
    """The trials of the real model, and the space that they are of."""

    space: WeightSpace
    dense: float
    rows: list[dict[str, Any]]

    @classmethod
    def load(cls, bits: float, folder: Path = HERE) -> Recorded:
        """Read recorded_BITS.jsonl and menus_BITS.npz."""
        menus, budget, dense = load_menus(folder / f"menus_{bits}.npz")
        space = build_weight_space(Problem(menus, budget), SpaceSettings(bounds=(-0.5, 0.5)))
        lines = (folder / f"recorded_{bits}.jsonl").read_text("utf-8").splitlines()
        every = [json.loads(line) for line in lines]
        # Where a few layers are crushed the loss jumps; no search goes there twice.
        limit = CRUSHED * min(row["nll"] - dense for row in every)
        return cls(space, dense, [row for row in every if row["nll"] - dense < limit])

    @cached_property
    def inputs(self) -> np.ndarray:
        """Return what describes each trial."""
        return np.stack([self.features(row["options"]) for row in self.rows])

    @cached_property
    def targets(self) -> np.ndarray:
        """Return the logarithm of the loss of each trial beyond that of the dense model."""
        return np.log(np.array([row["nll"] for row in self.rows]) - self.dense)

    @cached_property
    def cells(self) -> list[tuple[str, ...]]:
        """What losses are summed over: forms, and kinds in parts of the depth."""
        menus = self.space.problem.menus.values()
        forms = dict.fromkeys((s.form,) for menu in menus for s in menu.sections[:-1])
        kinds = dict.fromkeys(menu.unit.kind for menu in menus)
        return [*forms, ("repair",), *((kind, str(p)) for kind in kinds for p in range(PARTS))]

    def features(self, options: Sequence[int]) -> np.ndarray:
        """Return logarithms of predicted losses by form, by kind and depth, and of all."""
        menus = list(self.space.problem.menus.values())
        blocks = 1 + max(menu.unit.block or 0 for menu in menus)
        sums = dict.fromkeys(self.cells, 0.0)
        for menu, index in zip(menus, options, strict=True):
            assert menu.losses is not None
            lost, option = float(menu.losses[index]), menu.option(index)
            if (option.form,) in sums:
                sums[option.form,] += lost
                if not option.is_low_rank and option.level[-1]:
                    sums["repair",] += lost
            sums[menu.unit.kind, str(PARTS * (menu.unit.block or 0) // blocks)] += lost
        each = np.array(list(sums.values()))
        return np.log(np.append(each, each[self._kinds :].sum()) + 1e-3)

    @property
    def _kinds(self) -> int:
        return sum(len(cell) == 1 for cell in self.cells)

    def indices(self, allocation: Allocation) -> list[int]:
        """Return the options of an allocation by their indices."""
        menus = self.space.problem.menus
        return [menus[name].index(option) for name, option in allocation.options.items()]


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
        self.parabola = np.polyfit(inputs[:, -1], targets, 1)
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
        inputs = self.recorded.features(self.recorded.indices(allocation))[None]
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
