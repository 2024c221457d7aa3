"""Processor seconds and gap of the allocation by loss, on random but realistic curves.

Small cases are compared with every selection that fits; large ones state their own gap.
"""

from __future__ import annotations

import itertools
import math
import os
import time

import numpy as np

from lrbo.allocation import knapsack
from lrbo.allocation.allocate import allocate_by_loss, dense_cost
from lrbo.layers.options import Budget, Menu
from lrbo.models.specs import LayerSpec

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
SHRINK = 64 if SMOKE else 1  # of the sides of Llama-2-7B's layers
BLOCKS = (2, 4) if SMOKE else (32, 320)
CASES = 50 if SMOKE else 1000
SEEDS = 1 if SMOKE else 3
RANK_MULTIPLE = 8
KEEP_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.2)
FORMS = ("factored", "pivoted")
SHAPES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (11008, 4096)),
    "down_proj": (4096, 11008),
}


def layers_of(blocks: int) -> list[LayerSpec]:
    """Return the layers of a Llama-2-7B with so many blocks."""
    layers = []
    for block, (kind, (out, into)) in itertools.product(range(blocks), SHAPES.items()):
        name = f"model.layers.{block}.{kind}"
        sides = (out // SHRINK, into // SHRINK)
        layers.append(LayerSpec(name, kind, block, *sides, False, site=name))
    return layers


def curves_of(layers: list[LayerSpec], seed: int) -> dict[str, np.ndarray]:
    """Return tail sums of noisy power-law spectra, of random exponents and scales."""
    random = np.random.default_rng(seed)
    curves = {}
    for layer in layers:
        side = min(layer.out_features, layer.in_features)
        spectrum = np.arange(1, side + 1) ** -random.uniform(0.3, 2.5)
        spectrum = np.sort(spectrum * np.exp(random.normal(0.0, 0.05, side)))
        tail = np.append(0.0, np.cumsum(spectrum))[::-1]
        curves[layer.name] = tail / tail[0] * np.exp(random.normal(-3.0, 1.5))
    return curves


def measure(blocks: int, form: str) -> None:
    """Print one row per keep ratio: the worst of all seeds."""
    layers = layers_of(blocks)
    for keep_ratio in KEEP_RATIOS:
        taken, solving, gaps, unused = [], [], [], []
        for seed in range(SEEDS):
            menus = menus_of(layers, form, seed)
            budget = Budget.keeping(keep_ratio, dense_cost(menus))
            start = time.process_time()
            allocation = allocate_by_loss(menus, budget)
            taken.append(time.process_time() - start)
            unused.append(budget.limit - allocation.cost.parameters)
            ladders = [menu.ladder(budget.measure, menu.losses) for menu in menus.values()]
            losses = [ladder.losses for ladder in ladders if ladder.losses is not None]
            start = time.process_time()
            best = knapsack.solve([ladder.prices for ladder in ladders], losses, budget.limit)
            solving.append(time.process_time() - start)
            gaps.append(best.gap / best.loss)
        print(
            f"| {len(layers):,} {form} {keep_ratio} "
            f"| {sum(map(len, ladders)):,} "
            f"| {max(taken):.2f} | {max(solving):.2f} | {max(gaps):.1e} | {max(unused):,} |"
        )


def menus_of(layers: list[LayerSpec], form: str, seed: int) -> dict[str, Menu]:
    """Return the menus of layers with their losses."""
    menus = {}
    for layer, curve in zip(layers, curves_of(layers, seed).values(), strict=True):
        menu = Menu.of(layer, [form], bias=False, itemsize=2, multiple=RANK_MULTIPLE)
        menus[layer.name] = menu.with_losses([curve[menu.sections[0].levels[:, 0]]])
    return menus


def compare() -> None:
    """Print how many small random cases miss the best of all selections."""
    random = np.random.default_rng(0)
    missed, unproven, worst = 0, 0, 0.0
    for case in range(CASES):
        sizes, losses = [], []
        for _ in range(int(random.integers(2, 6))):
            count = int(random.integers(2, 8))
            sizes.append(np.sort(random.choice(5000, count, replace=False)) + 1)
            # Falling curves of every shape, in whole numbers: their sums do not round.
            drops = random.integers(0, 2 if case % 4 == 0 else 10_000, count)
            losses.append(np.cumsum(drops[::-1])[::-1].astype(np.float64))
        least, most = (sum(int(own[end]) for own in sizes) for end in (0, -1))
        ceiling = int(random.integers(least, most + 1))
        best = min(
            math.fsum(float(loss) for loss, _ in options)
            for options in itertools.product(
                *(list(zip(*pair, strict=True)) for pair in zip(losses, sizes, strict=True))
            )
            if sum(int(size) for _, size in options) <= ceiling
        )
        solution = knapsack.solve(sizes, losses, ceiling)
        missed += solution.loss != best
        unproven += solution.gap > 0.0
        worst = max(worst, solution.loss - best)
    print("| small random cases | not optimal | without proof | largest gap to brute force |")
    print("|---|---:|---:|---:|")
    print(f"| {CASES:,} | {missed} | {unproven} | {worst:g} |")
    if missed or unproven:
        raise SystemExit("promise broken: a small case was not solved to optimality")


def main() -> None:
    """Print both tables."""
    print("| layers, form, keep ratio | choices | allocation s | solver s | gap / loss | unused |")
    print("|---|---:|---:|---:|---:|---:|")
    for blocks, form in itertools.product(BLOCKS, FORMS):
        measure(blocks, form)
    print()
    compare()


if __name__ == "__main__":
    main()
