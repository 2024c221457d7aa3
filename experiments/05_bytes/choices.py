"""Does more choice ever hurt: the menu without one of its forms, and with one form more.

    python experiments/05_bytes/choices.py --data FOLDER_WITH_TEXT

Each menu's options of least predicted loss are scored on texts on which nothing was decided, and
compared with those of the whole preset `bytes`, window by window.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from run import IN_BYTES, Bench, Row
from torch import Tensor

from lrbo.allocation.apply import compressed
from lrbo.optimization.space import Problem

MORE = ("lut3", "sparse_2_4", "kronecker", "int8_sym")  # no part of the preset


def without(problem: Problem) -> Iterator[tuple[str, Problem]]:
    """Yield the problem, and the problem without each of its forms."""
    yield "whole", problem
    menus = problem.menus
    names = dict.fromkeys(s.form for menu in menus.values() for s in menu.sections[:-1])
    for name in names:
        less = {}
        for unit, menu in menus.items():
            assert menu.losses is not None
            sections = tuple(s for s in menu.sections if s.form != name)
            own = [s.form == name for s in menu.sections for _ in s.levels]
            losses = menu.losses[[index for index, is_own in enumerate(own) if not is_own]]
            less[unit] = replace(menu, sections=sections, losses=losses)
        yield f"without {name}", replace(problem, menus=less)


def main() -> None:
    """Score every menu, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with text/wikitext2.valid.raw")
    parser.add_argument("--folder", type=Path, default=Path("studies/bytes_choices"))
    parser.add_argument("--bits", type=float, nargs="*", default=[3.25, 2.25])
    parser.add_argument("--more", nargs="*", default=list(MORE), help="forms beside the preset")
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--test-tokens", type=int, default=4096, help="of each text")
    parser.add_argument("overrides", nargs="*", help="further settings of the search")
    options = parser.parse_args()
    bench = Bench(options)
    print("| bits | menu | predicted | measured | measured - whole |\n|---:|---|---:|---:|---:|")

    def losses(plan: Any, worker: Any, problem: Problem) -> tuple[float, Tensor]:
        allocation = problem.by_loss()
        with compressed(worker.model, allocation, worker.prepared):
            every = [bench.task.losses(worker.model, ids) for ids in bench.texts(plan).values()]
        predicted = problem.predicted(allocation)
        assert predicted is not None
        return predicted, torch.cat(every)

    for bits in options.bits:
        whole: Tensor | None = None
        for more in (None, *options.more):
            forms = ["bytes"] if more is None else ["bytes", more]
            row = Row("menu" if more is None else f"with {more}", bits=bits)
            plan, worker, space = bench.opened(row, (forms, *IN_BYTES["menu"][1:]))
            each = without(space.problem) if more is None else [(row.what, space.problem)]
            for name, problem in each:
                predicted, measured = losses(plan, worker, problem)
                whole = measured if whole is None else whole
                change = measured - whole
                error = float(change.std()) / math.sqrt(len(change))
                print(
                    f"| {bits} | {name} | {predicted:.3f} | {float(measured.mean()):.4f} | "
                    f"{float(change.mean()):+.4f} +- {error:.4f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
