"""Methods, allocations, forms, refit and calibration texts at equal parameters.

Results are appended to a file, one JSON object per line; what is there already is not measured
again, so that the command can be stopped and typed again.

    python experiments/01_factorizations/run.py --data FOLDER_WITH_TEXT_AND_ITEMS
    python experiments/01_factorizations/run.py --table-only
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrbo.allocation.allocate import Allocation, dense_cost
from lrbo.allocation.apply import compressed, on_device
from lrbo.calibration.collect import CalibrationSettings
from lrbo.config import compose
from lrbo.config.schema import DataConfig, RefitConfig, RoleConfig
from lrbo.data.windows import ROLES, make_windows
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.registry import METHODS, method_named
from lrbo.layers.options import Budget
from lrbo.models.devices import resolve_device, resolve_dtype
from lrbo.models.loading import load_model, load_tokenizer
from lrbo.models.model_map import map_model
from lrbo.models.parameters import fingerprint
from lrbo.optimization.space import Problem
from lrbo.pipeline import planning
from lrbo.pipeline.prepare import Preparation, curve_needs
from lrbo.pipeline.search_space import menus_of
from lrbo.progress import Reporter
from lrbo.refit.sequential import RefitSettings, output_metric, refit
from lrbo.tasks.causal_lm import CausalLM
from lrbo.tasks.perplexity import DenseReference, Perplexity, measure_dense, predictions

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
HERE = Path(__file__).parent
BEST = "loss_aware"
TASKS = ("arc_easy", "piqa", "hellaswag", "winogrande")
ITEMS = 50


@dataclass(frozen=True)
class Row:
    """One model to measure; ``storage`` is the form, as recorded results call it."""

    method: str
    allocation: str
    storage: str
    keep: float
    refit: bool
    calibration: str
    tokens: int
    seed: int = 0


def wanted(options: argparse.Namespace) -> Iterator[Row]:
    """Yield what the experiment is made of, what matters most first."""
    main = ("mixed", options.tokens)
    keeps, kinds = options.keeps, ("analytic", "uniform")
    best = [name for name in options.methods if name == BEST]
    others = [name for name in options.methods if name != BEST]
    two = keeps[:2]
    for keep, method, refitted in itertools.product(two, best, (False, True)):
        yield Row(method, "analytic", "pivoted", keep, refitted, *main)
    with_data = options.data is not None
    for method, refitted, keep in itertools.product(best, (False, True), two if with_data else ()):
        yield Row(method, "analytic", "pivoted", keep, refitted, "both", options.tokens)
    for keep, storage in itertools.product(two, ("pivoted", "factored")):
        for method, allocation in itertools.product(best + others, kinds):
            yield Row(method, allocation, storage, keep, False, *main)
    for method, keep in itertools.product(best, two if with_data else ()):
        yield Row(method, "analytic", "pivoted", keep, False, "wikitext2", options.tokens)
    for tokens, method, keep, refitted in itertools.product(
        options.sizes, best, two, (False, True)
    ):
        yield Row(method, "analytic", "pivoted", keep, refitted, "mixed", tokens)
    for seed, method, keep in itertools.product(options.seeds, best, two):
        yield Row(method, "analytic", "pivoted", keep, False, *main, seed)
    for storage, keep in itertools.product(("pivoted", "factored"), keeps):
        for method, allocation in itertools.product(best + others, kinds):
            yield Row(method, allocation, storage, keep, False, *main)
        for method in best:
            yield Row(method, "analytic", storage, keep, True, *main)


class Bench:
    """Model, texts and everything that rows share."""

    def __init__(self, options: argparse.Namespace) -> None:
        model = ["model=tiny"] if SMOKE else ["model=smollm2_135m"]
        config: Any = compose.composed("search", [*model, "data=packaged", "study=none"])
        self.source = planning.model_source(config.model)
        self.device = resolve_device("auto")
        self.dtype = resolve_dtype(options.dtype, self.device)
        self.model: PreTrainedModel = load_model(self.source, dtype=self.dtype, device=self.device)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.source)
        self.layers = map_model(self.model)
        self.digest = fingerprint(self.model)
        self.options = options
        self._prepared: dict[tuple[Any, ...], dict[str, LowRankFactors]] = {}

    @cached_property
    def tests(self) -> dict[str, Tensor]:
        """Return the evaluation windows by name; none of them is calibrated on."""
        if SMOKE:
            generated = self._packaged(("words",), "generated", "test", 256, 32)
            return dict.fromkeys(("wikitext2", "c4", "packaged"), generated)  # the same columns
        texts = {
            "c4": self._packaged(("c4",), "packaged", "test", 8 * 1024, 1024),
            "packaged": self._packaged(("c4", "wiki"), "packaged", "test", 8 * 1024, 1024),
        }
        if self.options.data is not None:
            path = self.options.data / "text" / "wikitext2.valid.raw"
            windows = self._packaged((str(path),), "files", "test", None, 1024, alone=True)
            texts = {"wikitext2": windows[:: len(windows) // 8][:8], **texts}
        return texts

    def _packaged(
        self,
        texts: tuple[str, ...],
        source: str,
        role: str,
        tokens: int | None,
        window: int,
        *,
        alone: bool = False,
        seed: int = 0,
    ) -> Tensor:
        """Return the windows of a role; texts are divided among roles as in a search.

        The seed draws windows from the part of the role; those of tests are the first ones.
        """
        text = RoleConfig(list(texts), tokens)
        roles = dict.fromkeys((role,) if alone else ROLES, text)
        data = DataConfig(source=source, window=window, **roles)  # type: ignore[arg-type]
        windows: Any = make_windows(data, self.tokenizer, seed=seed, only=[role])  # type: ignore[list-item]
        return windows[role].ids

    def calibration(self, text: str, tokens: int, seed: int) -> Tensor:
        """Return calibration windows of 512 tokens."""
        packaged = partial(self._packaged, role="calibration", seed=seed)
        if SMOKE:
            return packaged(("words",), "generated", tokens=tokens, window=32)
        mixed = partial(packaged, ("c4", "wiki"), "packaged", window=512)
        if text == "mixed":
            return mixed(tokens=tokens)
        path = str(self.options.data / "text" / "wikitext2.train.first1MB.raw")
        own = partial(packaged, (path,), "files", window=512, alone=True)
        if text == "wikitext2":
            return own(tokens=tokens)
        return torch.cat([mixed(tokens=tokens // 2), own(tokens=tokens // 2)])

    def preparation(self, row: Row) -> Preparation:
        """Return what the factors of a row depend on; one calibration serves all methods."""
        needs = curve_needs(METHODS[row.method])
        if (row.calibration, row.tokens, row.seed) == ("mixed", self.options.tokens, 0):
            needs = frozenset().union(*(curve_needs(method) for method in METHODS.values()))
        return Preparation(
            self.source,
            self.layers,
            method_named(row.method),
            needs,
            self.calibration(row.calibration, row.tokens, row.seed),
            CalibrationSettings(seed=row.seed),
            CausalLM(),
        )

    def factors(self, row: Row) -> dict[str, LowRankFactors]:
        """Return the factors of a row's method, kept until another one is asked for."""
        key = (row.method, row.calibration, row.tokens, row.seed)
        if key not in self._prepared:
            made = self.preparation(row).factors(
                self.digest, self.dtype, self.device, Reporter(), self.model
            )
            self._prepared = {key: made}
        return self._prepared[key]

    def allocate(self, row: Row, factors: Mapping[str, LowRankFactors]) -> Allocation:
        """Return the options of a row."""
        menus = menus_of(
            self.layers.compressible,
            [row.storage],
            METHODS[row.method],
            self.dtype,
            multiple=1 if SMOKE else 8,
        )
        problem = Problem(menus, Budget.keeping(row.keep, dense_cost(menus)))
        return (
            problem.uniform()
            if row.allocation == "uniform"
            else (problem.with_losses(factors).by_loss())
        )

    def dense(self) -> dict[str, DenseReference]:
        """Return what the dense model says about every test text."""
        return {name: measure_dense(self.model, ids) for name, ids in self.tests.items()}

    def measure(self, row: Row, dense: Mapping[str, DenseReference]) -> dict[str, Any]:
        """Return everything that is measured of a row."""
        factors = self.factors(row)
        allocation = self.allocate(row, factors)
        start = time.perf_counter()
        result: dict[str, Any] = {}
        if row.refit:
            factors = self._refit(row, allocation, factors)
            result |= {"feedback": RefitSettings().feedback, "power": RefitConfig().output_power}
        result["seconds_refit"] = time.perf_counter() - start
        prefixes = on_device(self.model, factors, allocation.ranks)
        tokens = sum(ids.numel() for ids in self.tests.values())
        with compressed(self.model, allocation, prefixes, tokens=tokens):
            for name, ids in self.tests.items():
                total, divergence = Perplexity(0.0, 0), 0.0
                for chunk in predictions(self.model, ids):
                    total += Perplexity(float(chunk.nll.double().sum()), len(chunk.nll))
                    divergence += float(dense[name].kl_dense_to_compressed(chunk).double().sum())
                result[name] = {"nll": total.mean, "kl": divergence / total.tokens}
            if self.options.zeroshot and row.keep in self.options.keeps[:2] and self._worth(row):
                result["zeroshot"] = self.zero_shot()
        result["parameters"] = allocation.cost.parameters
        result["dense_layers"] = len(allocation.options) - len(allocation.compressed)
        return result

    def _refit(
        self, row: Row, allocation: Allocation, factors: Mapping[str, LowRankFactors]
    ) -> dict[str, LowRankFactors]:
        """Solve the options again on the calibration text of the row."""
        preparation = self.preparation(row)
        statistics = preparation.statistics(self.digest, self.dtype, Reporter(), self.model)
        metric = output_metric(self.layers, statistics, RefitConfig().output_power)
        if SMOKE:
            judging = self._packaged(("words",), "generated", "validation", 256, 32)
        else:
            judging = self._packaged(("c4", "wiki"), "packaged", "validation", 8 * 1024, 512)
        return refit(
            self.model,
            self.layers,
            allocation,
            factors,
            preparation.windows,
            judging=judging,
            metric=metric,
        ).factors

    def zero_shot(self) -> dict[str, float]:
        """Return the share of items answered right, by likelihood per byte of the ending."""
        shares = {}
        for task in TASKS:
            path = self.options.data / "zeroshot" / f"{task}.jsonl"
            items = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:ITEMS]]
            right = sum(self._answer(item) == item["gold"] for item in items)
            shares[task] = right / len(items)
        return shares

    def _worth(self, row: Row) -> bool:
        """Return whether zero-shot items are answered: they cost more than the texts."""
        return (row.allocation, row.storage) == ("analytic", "pivoted")

    @torch.inference_mode()
    def _answer(self, item: Mapping[str, Any]) -> int:
        """Return the index of the likeliest choice of context and ending."""
        choices = [
            tuple(self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in pair)
            for pair in itertools.product(item["contexts"], item["endings"])
        ]
        longest = max(len(before) + len(after) for before, after in choices)
        ids = torch.zeros(len(choices), longest, dtype=torch.long)  # padded behind: unseen
        for row, (before, after) in enumerate(choices):
            ids[row, : len(before) + len(after)] = torch.tensor(before + after)
        ids = ids.to(self.device)
        logits = self.model(ids, use_cache=False).logits
        scores = []
        for row, (before, after) in enumerate(choices):
            span = slice(len(before), len(before) + len(after))
            log_probabilities = logits[row, span.start - 1 : span.stop - 1].float().log_softmax(-1)
            known = log_probabilities.gather(1, ids[row, span, None])
            ending = item["endings"][row % len(item["endings"])]
            scores.append(float(known.sum()) / len(ending.encode()))
        return max(range(len(scores)), key=scores.__getitem__)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the results so far."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def show(results: list[dict[str, Any]]) -> None:
    """Print the table: a line per model, best first within a keep ratio."""
    dense = next(r for r in results if "method" not in r)
    texts = [name for name, value in dense.items() if isinstance(value, dict) and "nll" in value]
    first = texts[0]
    rows = sorted(results, key=lambda r: (-r.get("keep", 1.0), r[first]["nll"]))
    print(
        f"| keep | method | allocation | storage | refit | calibration | {' | '.join(texts)}",
        end="",
    )
    print(" | KL | zero-shot |\n" + "|---:" + "|---" * 5 + "|---:" * (len(texts) + 2) + "|")
    for row in rows:
        right = row.get("zeroshot")
        divergence = sum(row[text].get("kl", 0.0) for text in texts) / len(texts)
        cells = [
            f"{row.get('keep', 1.0):g}",
            row.get("method", "dense"),
            row.get("allocation", "-"),
            row.get("storage", "-"),
            "yes" if row.get("refit") else "no",
            _calibration_of(row),
            *(_perplexity(row[text]["nll"], dense[text]["nll"]) for text in texts),
            f"{divergence:.3f}",
            f"{sum(right.values()) / len(right):.3f}" if right else "-",
        ]
        print("| " + " | ".join(cells) + " |")


def _calibration_of(row: Mapping[str, Any]) -> str:
    """Return text, tokens and, beside the first, the seed."""
    if "tokens" not in row:
        return "-"
    seed = f", seed {row['seed']}" if row.get("seed") else ""
    return f"{row['calibration']} {row['tokens'] // 1024}k{seed}"


def _perplexity(nll: float, dense: float) -> str:
    """Return the perplexity, and as how many times the dense one."""
    value = math.exp(nll)
    shown = f"{value:.2f}" if value < 10_000 else f"{value:.0e}"
    times = math.exp(nll - dense)
    return f"{shown} ({times:.3f})" if times < 10 else shown


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with text/ and zeroshot/")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6, 0.9, 0.7, 0.5])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--sizes", type=int, nargs="*", default=[16384, 65536, 262144])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2], help="beside seed 0")
    parser.add_argument("--refit", choices=("yes", "no"), help="only rows with, or without, refit")
    parser.add_argument("--limit", type=int, help="measure at most so many rows")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--zeroshot", action="store_true")
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    file = HERE / "results.jsonl"
    if SMOKE:
        file = Path(tempfile.mkdtemp()) / "results.jsonl"
        options.keeps, options.tokens, options.sizes = [0.7], 512, [256]
    if not options.table_only:
        run(options, file)
    show(read(file))


def run(options: argparse.Namespace, file: Path) -> None:
    """Measure what is missing."""
    bench = Bench(options)
    results = read(file)
    known = {
        Row(**{name: r[name] for name in Row.__annotations__ if name in r})
        for r in results
        if "method" in r
    }
    dense = bench.dense()
    if not results:
        result: dict[str, Any] = {name: {"nll": d.perplexity.mean} for name, d in dense.items()}
        if options.zeroshot:
            result["zeroshot"] = bench.zero_shot()
        result["dtype"] = str(bench.dtype)
        append(file, result)
    refits = {"yes": (True,), "no": (False,), None: (True, False)}[options.refit]
    rows = [
        row for row in dict.fromkeys(wanted(options)) if row.refit in refits and row not in known
    ]
    for row in rows[: options.limit]:
        start = time.perf_counter()
        result = bench.measure(row, dense)
        seconds = time.perf_counter() - start
        result |= {"dtype": str(bench.dtype), "seconds": round(seconds, 1)}
        append(file, {**asdict(row), **result})
        print(asdict(row), {name: round(result[name]["nll"], 4) for name in dense}, flush=True)


def append(file: Path, result: Mapping[str, Any]) -> None:
    """Add a line."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
