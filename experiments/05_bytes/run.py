"""Ways to make a model smaller at equal bytes, and some at equal parameters.

Results are appended to a file, one JSON object per line; what is there already is not measured
again, so that the command can be stopped and typed again.

    python experiments/05_bytes/run.py --data FOLDER_WITH_TEXT
    python experiments/05_bytes/run.py --table-only
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import public
from torch import Tensor

from lrbo.allocation.allocate import Allocation, widest
from lrbo.allocation.apply import compressed, on_device, replaced
from lrbo.commands import search
from lrbo.config import compose
from lrbo.config.schema import DataConfig, RefinementConfig, RoleConfig
from lrbo.data.windows import ROLES, make_windows
from lrbo.errors import BudgetError, ConfigError
from lrbo.layers.low_rank import linear_of
from lrbo.layers.options import Cost, Option, account
from lrbo.models.model_map import linear_bias, linear_weight
from lrbo.models.parameters import fingerprint
from lrbo.optimization.space import Problem
from lrbo.pipeline import build_worker, finalists, planning
from lrbo.progress import Reporter
from lrbo.study.journal import Study
from lrbo.tasks.causal_lm import CausalLM

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
HERE = Path(__file__).parent
BYTES = (8.25, 4.25, 3.25, 2.25, 3.75, 2.75)  # bits per parameter of the blocks
KEEPS = (0.8, 0.6)  # of their parameters


@dataclass(frozen=True)
class Row:
    """One model to measure."""

    what: str
    bits: float | None = None  # per parameter of the blocks
    keep: float | None = None  # share of their parameters
    seed: int = 0

    @property
    def name(self) -> str:
        """A name for a folder."""
        size = f"{self.bits}_bits" if self.bits is not None else f"keep_{self.keep}"
        return f"{self.what.replace(', ', '_').replace(' ', '_')}-{size}-{self.seed}"


# Forms of a menu, the method, and how options are taken: one everywhere, as far as bytes allow, the
# least predicted loss, or the best of a search.
Way = tuple[list[str], str, str]
UNIFORM = ["int2_sym", "int2", "int3_sym", "int3", "int4_sym", "int4", "int8_sym", "int8"]
IN_BYTES: Mapping[str, Way] = {
    "nearest": (UNIFORM, "svd", "alike"),
    "GPTQ": (UNIFORM, "svd", "alike"),
    "GPTQ, swept": (UNIFORM, "svd", "alike"),
    "QERA": (UNIFORM, "drone", "repaired"),
    "LoSparse": (["sparse_rows"], "loss_aware", "analytic"),
    "Kronecker": (["kronecker"], "loss_aware", "analytic"),
    "low rank": (["pivoted"], "loss_aware", "analytic"),
    "bits": (UNIFORM, "loss_aware", "analytic"),
    "menu": (["bytes"], "loss_aware", "analytic"),
    "menu, refined": (["bytes"], "loss_aware", "analytic"),
    "menu, searched": (["bytes"], "loss_aware", "searched"),
    "menu, searched and refined": (["bytes"], "loss_aware", "searched"),
}
# Whose bases are made again, as lrbo compress does, once the options are decided on.
REFINED: Mapping[str, RefinementConfig] = {
    "GPTQ, swept": RefinementConfig(sweeps=2),
    "menu, refined": RefinementConfig(alternations=2, sweeps=2),
    "menu, searched and refined": RefinementConfig(alternations=2, sweeps=2),
}
IN_PARAMETERS: Mapping[str, Way] = {
    "low rank": (["pivoted"], "loss_aware", "analytic"),
    "sparse": (["sparse"], "loss_aware", "analytic"),
    "LoSparse": (["sparse_rows"], "loss_aware", "analytic"),
    "Kronecker": (["kronecker"], "loss_aware", "analytic"),
    "neurons": (["neurons", "pivoted"], "loss_aware", "analytic"),
    "structured": (["structured"], "loss_aware", "analytic"),
}


def wanted(options: argparse.Namespace) -> Iterator[Row]:
    """Yield what the experiment is made of, what matters most first."""
    for bits in options.bits:
        for what in [*public.LIBRARIES, *IN_BYTES]:
            if options.only is None or what in options.only:
                yield Row(what, bits=bits)
    for keep in options.keeps:
        for what in IN_PARAMETERS:
            if options.only is None or what in options.only:
                yield Row(what, keep=keep)
    for seed in options.seeds:
        for what in ("GPTQ", "menu"):
            if options.only is None or what in options.only:
                yield Row(what, bits=3.25, seed=seed)


class Bench:
    """The model, its texts, and a worker for each menu."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.task = CausalLM()
        self.reporter = Reporter()
        self._open: tuple[tuple[Any, ...], Any] | None = None
        self._texts: dict[str, Tensor] | None = None

    def opened(self, row: Row, way: Way) -> tuple[planning.Plan, Any, Any]:
        """Return plan, worker and space of a row; that of the last menu is kept."""
        forms, method, _ = way
        key = (tuple(forms), method, row.what == "nearest", row.bits, row.keep, row.seed)
        if self._open is None or self._open[0] != key:
            self._open = None
            study = Study(self.options.folder / row.name)
            config: Any = compose.composed("search", self.overrides(row, way, study))
            plan = planning.plan_search(config, study, [])
            with study.locked():
                worker = build_worker.build_worker(plan, study, self.reporter)
                space = build_worker.informed_space(
                    plan, study, worker.model, worker.prepared, self.reporter
                )
            self._open = key, (plan, worker, space)
        return self._open[1]

    def overrides(self, row: Row, way: Way, study: Study) -> list[str]:
        """Return the settings of a row, as they would be typed."""
        forms, method, _ = way
        budget = (
            [f"budget.bits_per_parameter={row.bits}"]
            if row.bits is not None
            else ["budget.bits_per_parameter=null", "budget.measure=parameters",
                  f"budget.keep_ratio={row.keep}"]
        )  # fmt: skip
        tokens = self.options.tokens
        return [
            "experiment=bytes", f"study={study.folder}", f"method={method}", f"seed={row.seed}",
            f"space.forms=[{','.join(forms)}]", "sensitivity.layers_per_kind=0",
            f"bases.method={'nearest' if row.what == 'nearest' else 'gptq'}",
            f"data.calibration.tokens={tokens}", "tracking.enabled=false",
            *budget, *self.options.overrides,
        ]  # fmt: skip

    def texts(self, plan: planning.Plan) -> dict[str, Tensor]:
        """Return the windows of every text; no option was decided on them."""
        if self._texts is None:
            data, tokens = self.options.data, self.options.test_tokens
            tokenizer = self.task.tokenizer(plan.source)

            def windows(names: list[str], source: str, alone: bool = False) -> Tensor:
                role = RoleConfig(names, None if alone else tokens)
                roles = {"test": role} if alone else dict.fromkeys(ROLES, role)
                config = DataConfig(source=source, window=plan.config.data.window, **roles)
                ids = make_windows(config, tokenizer, seed=0, only=["test"])["test"].ids
                count = max(tokens // plan.config.data.window, 1)
                return ids[:: max(len(ids) // count, 1)][:count]

            if plan.config.data.source == "generated":
                words = windows(["words"], "generated")
                self._texts = dict.fromkeys(("C4", "packaged", "WikiText-2"), words)
            else:
                self._texts = {
                    "C4": windows(["c4"], "packaged"),
                    "packaged": windows(["wiki"], "packaged"),
                }
            if data is not None:
                path = str(data / "text" / "wikitext2.valid.raw")
                self._texts["WikiText-2"] = windows([path], "files", alone=True)
        return self._texts

    def scored(self, model: Any, plan: planning.Plan) -> dict[str, float]:
        """Return the loss on every text, nats per token."""
        return {
            name: float(self.task.losses(model, ids).mean())
            for name, ids in self.texts(plan).items()
        }

    def measure(self, row: Row) -> dict[str, Any] | None:
        """Return what is measured of a row; ``None`` if it cannot be that small."""
        if row.what in public.LIBRARIES:
            return self._public(row)
        way = (IN_BYTES if row.bits is not None else IN_PARAMETERS)[row.what]
        try:
            plan, worker, space = self.opened(row, way)
        except (ConfigError, BudgetError) as error:
            print(f"{row}: {error}")
            return None
        allocation = self.allocation(row, way, space)
        if allocation is None:
            return None
        counted = account(plan.layers, allocation.cost, itemsize=worker.itemsize)
        result = {
            "bits": 8 * counted.units.bytes / counted.units_dense.parameters,
            "keep": counted.keep_ratio("parameters"),
            "forms": forms_of(allocation),
        }
        prepared = worker.prepared
        if row.what in REFINED:
            result["refined"], prepared = self.refined(row, plan, worker.model, allocation)
        with compressed(worker.model, allocation, prepared):
            return result | self.scored(worker.model, plan)

    def refined(
        self, row: Row, plan: planning.Plan, model: Any, allocation: Allocation
    ) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Make the bases of an allocation again, as ``lrbo compress`` does; say what it gained."""
        digest, reporter, parts = fingerprint(model), self.reporter, plan.preparation
        factors = parts.factors(digest, plan.dtype, model.device, reporter, model)
        statistics = parts.statistics(digest, plan.dtype, reporter, model)
        before = finalists.loss_of(
            plan, model, allocation, factors, reporter, "validation", "preparation"
        )
        gained, _, made = finalists.refined(
            plan, model, statistics, allocation, factors, before, REFINED[row.what], reporter
        )
        totals = {key: value for key, value in gained.items() if key != "rows"}
        return totals, on_device(model, made, allocation.ranks)

    def dense(self) -> dict[str, Any]:
        """Return the losses of the dense model."""
        row = Row("GPTQ", bits=max(self.options.bits))
        plan, worker, _ = self.opened(row, IN_BYTES["GPTQ"])
        return self.scored(worker.model, plan)

    def allocation(self, row: Row, way: Way, space: Any) -> Allocation | None:
        """Return the options of a row, or ``None`` where it cannot be that small."""
        problem = space.problem
        if way[2] == "analytic":
            return problem.by_loss()
        if way[2] == "alike":
            return widest(problem.menus, problem.budget)
        if way[2] == "repaired":
            return repaired(problem)
        row = replace(row, what="menu, searched")  # of which there is one search
        study = Study(self.options.folder / row.name)
        config: Any = compose.composed("search", self.overrides(row, way, study))
        config.search.trials = self.options.trials
        typed = [f"search.trials={self.options.trials}"]
        best = search.search(config, typed, self.reporter).state.best()
        return None if best is None else best.request.allocation

    def _public(self, row: Row) -> dict[str, Any] | None:
        assert row.bits is not None
        plan, worker, _ = self.opened(Row("GPTQ", bits=row.bits), IN_BYTES["GPTQ"])
        if public.version(row.what) is None:
            print(f"{row.what} is not installed")
            return None
        modules, bits = {}, 0.0
        for unit in plan.layers.compressible:
            grid = public.best_grid(row.what, row.bits, unit.in_features)
            if grid is None:
                return None
            module = worker.model.get_submodule(unit.name)
            weight, own = public.LIBRARIES[row.what](linear_weight(module), *grid)
            modules[unit.name] = linear_of(weight.to(worker.model.dtype), linear_bias(module))
            bits += own * unit.parameters
        bits /= sum(unit.parameters for unit in plan.layers.compressible)
        with replaced(worker.model, modules):
            scores = self.scored(worker.model, plan)
        return {"bits": bits, "keep": 1.0, "forms": {public.version(row.what): 1.0}} | scores


def repaired(problem: Problem) -> Allocation | None:
    """Give every unit integers a step narrower than fit, and the rank that the rest pays for."""
    share = problem.budget.limit / problem.dense_cost.bytes
    options, costs = {}, {}
    for name, menu in problem.menus.items():
        ceiling, best = share * menu.dense.bytes, None
        for section in menu.sections[:-1]:
            sizes = section.costs[:, 1]
            fitting = np.flatnonzero(sizes <= ceiling)
            if len(fitting) and section.levels[fitting[-1], -1]:  # with a rank
                best = best or (section, int(fitting[-1]))
        if best is None:
            return None
        section, index = best
        options[name] = Option(section.form, tuple(map(int, section.levels[index])))
        costs[name] = Cost(*map(int, section.costs[index]))
    return Allocation(options, costs, problem.budget)


def forms_of(allocation: Allocation) -> dict[str, int]:
    """Count the units of every form."""
    return dict(Counter(option.form for option in allocation.options.values()))


def table(rows: list[dict[str, Any]], dense: Mapping[str, float], key: str) -> str:
    """Return nats above dense, by what is done and by size."""
    texts = list(dense)
    lines = [
        f"| {key} | what | taken | {' | '.join(texts)} |",
        "|---:|---|---:|" + "---:|" * len(texts),
    ]
    for row in rows:
        size = row["result"]["bits" if key == "bits" else "keep"]
        losses = (f"{row['result'][name] - dense[name]:.3f}" for name in texts)
        lines.append(f"| {row[key]} | {row['what']} | {size:.3f} | {' | '.join(losses)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not measured yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with text/wikitext2.valid.raw")
    parser.add_argument("--folder", type=Path, default=Path("studies/bytes_table"))
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--bits", type=float, nargs="*", default=list(BYTES))
    parser.add_argument("--keeps", type=float, nargs="*", default=list(KEEPS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--only", nargs="*", help="what is measured, by name")
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--test-tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("overrides", nargs="*", help="further settings of the search")
    options = parser.parse_args()
    if SMOKE:
        options.results, options.folder = Path("results.jsonl"), Path("studies")
        options.bits, options.seeds, options.trials = [16.0], [], 3
        options.keeps, options.only = [], ["GPTQ", *REFINED, "menu", "menu, searched", "low rank"]
        options.tokens, options.test_tokens = 256, 128
        options.overrides = [
            "model=tiny",
            "data=generated",
            "data.window=32",
            "search.initial=2",
            "bases.group_sizes=[16]",
        ]
    file = options.results
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines]
    # Losses of other windows do not compare.
    rows = [row for row in rows if row["test_tokens"] == options.test_tokens]
    bench = Bench(options)

    def write(row: dict[str, Any]) -> None:
        row["test_tokens"] = options.test_tokens
        rows.append(row)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")

    if not options.table_only:
        if not any(row["what"] == "dense" for row in rows):
            write({"what": "dense", "result": bench.dense()})
        for row in wanted(options):
            if any(asdict(row).items() <= other.items() for other in rows):
                continue
            start = time.perf_counter()
            result = bench.measure(row)
            if result is not None:
                write({**asdict(row), "result": result, "seconds": time.perf_counter() - start})
                print(row, result)
    dense = next(row["result"] for row in rows if row["what"] == "dense")
    for key in ("bits", "keep"):
        own = [row for row in rows if row.get(key) is not None]
        if own:
            print(table(sorted(own, key=lambda row: -row[key]), dense, key), end="\n\n")


if __name__ == "__main__":
    main()
