"""What training gives back after compression, and what it costs.

A model is compressed to several sizes, with and without the refit of ``lrbo compress``, and then
trained by ``lrbo recover`` in several ways, each for the same minutes. Results are appended to a
file, one JSON object per line; what is there already is not measured again, so that the command
can be stopped and typed again.

    python experiments/06_recovery/run.py --data FOLDER_WITH_TEXT_AND_ITEMS
    python experiments/06_recovery/run.py --table-only
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lrbo

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
HERE = Path(__file__).parent
TEXTS = ("C4", "packaged", "WikiText-2")
OTHER = "text/wikitext2.valid.raw"
HELD_OUT = 4096  # tokens that lrbo itself scores before and after
STUDY = [  # trial 1 is the least predicted loss; nothing is searched
    "search.trials=2", "search.initial=2", "sensitivity.layers_per_kind=0",
    f"data.validation.tokens={HELD_OUT}", f"data.test.tokens={HELD_OUT}", "tracking.enabled=false",
]  # fmt: skip
SIZES: Mapping[str, list[str]] = {
    "keep 0.8": ["budget.keep_ratio=0.8"],
    "keep 0.6": ["budget.keep_ratio=0.6"],
    "keep 0.5": ["budget.keep_ratio=0.5"],
    "3.25 bits": ["experiment=bytes", "budget.bits_per_parameter=3.25"],
    "2.25 bits": ["experiment=bytes", "budget.bits_per_parameter=2.25"],
}
DENSE, STAGES = "dense", "stages.json"
ITEMS = 50  # of each task
TASKS = ("arc_easy", "piqa", "hellaswag", "openbookqa")
TASK = """task: own_{task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{contexts[0]}}}}"
doc_to_choice: endings
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
"""


@dataclass(frozen=True)
class Way:
    """Whether there is a refit, the settings of ``lrbo recover``, and of its text."""

    refit: bool = False
    recover: tuple[str, ...] | None = None
    tokens: int | None = None  # of the mixed text; None: the study's
    text: str | None = None  # a file instead of the mixed text


def _stages(*names: str, **settings: object) -> tuple[str, ...]:
    """Return overrides: ``distill__lr=1`` stands for ``recover.distill.lr=1``."""
    values = (f"recover.{key.replace('__', '.')}={value}" for key, value in settings.items())
    return f"recover.stages=[{','.join(names)}]", *values


DISTILL = _stages("distill")
WAYS: Mapping[str, Way] = {
    "closed form": Way(),
    "blocks": Way(recover=_stages("blocks")),
    "distill": Way(recover=DISTILL),
    "blocks, distill": Way(recover=_stages("blocks", "distill")),
    "blocks, weighed": Way(recover=_stages("blocks", blocks__weighting="gradient")),
    "refit": Way(refit=True),
    "refit, blocks": Way(refit=True, recover=_stages("blocks")),
    "refit, distill": Way(refit=True, recover=DISTILL),
    "refit, blocks, distill": Way(refit=True, recover=_stages("blocks", "distill")),
    "distill, 16k tokens of text": Way(recover=DISTILL, tokens=16384),
    "distill, 256k tokens of text": Way(recover=DISTILL, tokens=262144),
    "refit, distill, 256k tokens of text": Way(refit=True, recover=DISTILL, tokens=262144),
    "distill, WikiText-2 alone": Way(recover=DISTILL, text="text/wikitext2.train.first1MB.raw"),
    "factors alone": Way(recover=_stages("distill", distill__train="factors")),
    "adapter, lora": Way(recover=_stages("adapter", adapter__form="lora")),
    "adapter, diagonal": Way(recover=_stages("adapter", adapter__form="diagonal")),
    "adapter, lora_sparse": Way(recover=_stages("adapter", adapter__form="lora_sparse")),
    "adapter, tensor_train": Way(recover=_stages("adapter", adapter__form="tensor_train")),
    "mixed_rank": Way(recover=_stages("mixed_rank")),
}
# Of the first two sizes all ways, of the others those that tell the sizes apart.
EVERYWHERE = ("closed form", "blocks", "distill", "blocks, distill", "refit", "refit, distill")
IN_BITS = ("closed form", "blocks", "distill", "blocks, distill")


@dataclass(frozen=True)
class Row:
    """One model to measure."""

    size: str
    way: str
    minutes: float | None  # of training
    seed: int = 0

    @property
    def folder(self) -> str:
        """A name for a folder."""
        words = [self.size, self.way, "-" if self.minutes is None else f"{self.minutes:g}"]
        return "-".join(words).replace(", ", "_").replace(" ", "_") + f"-{self.seed}"


def wanted(options: argparse.Namespace) -> Iterator[Row]:
    """Yield what the experiment is made of."""
    yield Row(DENSE, "-", None)
    for size in options.sizes:
        all_ways = WAYS if size in ("keep 0.8", "keep 0.6") else EVERYWHERE
        for way in IN_BITS if size.endswith("bits") else all_ways:
            if options.only is None or way in options.only:
                yield Row(size, way, None if WAYS[way].recover is None else options.minutes)


class Bench:
    """The folders of studies and checkpoints, and the texts that models are scored on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def measure(self, row: Row) -> dict[str, Any] | None:
        """Make a model, if there is none yet, and score it; ``None`` if its text is not at hand."""
        if row.size == DENSE:
            return {"stages": [], "nll": self.losses(row)}
        way, stages = WAYS[row.way], list[Any]()
        if way.text is not None and self.options.data is None:
            return None
        checkpoint = self.compressed(row.size, refit=way.refit)
        if way.recover is not None:
            out = self.folder / row.folder
            if not out.is_dir():
                result = lrbo.recover(
                    f"checkpoint='{checkpoint}'", f"out='{out}'", f"studies='{self.folder}'",
                    f"recover.minutes={row.minutes:g}", f"seed={row.seed}",
                    *way.recover, *self.text(way), *self.options.recover,
                )  # fmt: skip
                stages = [{k: v for k, v in s.items() if k != "rows"} for s in result["stages"]]
                (out / STAGES).write_text(json.dumps(stages), "utf-8")
            stages = json.loads((out / STAGES).read_text("utf-8"))
        return {"stages": stages, "nll": self.losses(row)}

    def model(self, row: Row) -> str:
        """Return what ``lrbo evaluate`` takes for a row that was measured."""
        if row.size == DENSE:
            return "model=tiny" if SMOKE else "model=smollm2_135m"
        way = WAYS[row.way]
        if way.recover is not None:
            return f"checkpoint='{self.folder / row.folder}'"
        return f"checkpoint='{self.compressed(row.size, refit=way.refit)}'"

    def compressed(self, size: str, *, refit: bool) -> Path:
        """Return the folder of the least predicted loss at a size, which is made once."""
        name = size.replace(" ", "_")
        out = self.folder / f"{name}-{'refit' if refit else 'closed_form'}"
        if not out.is_dir():
            where = f"study={name}", f"studies='{self.folder}'"
            lrbo.search(*STUDY, *SIZES[size], *self.options.overrides, *where)
            lrbo.compress(*where, "point=1", f"out='{out}'", f"refit.enabled={str(refit).lower()}")
        return out

    def text(self, way: Way) -> list[str]:
        """Return the settings of other text than the study's."""
        held_out = [f"data.{role}.tokens={HELD_OUT}" for role in ("validation", "test")]
        if way.text is not None:
            path = f"'{self.options.data / way.text}'"
            paths = [f"data.{role}.path={path}" for role in ("calibration", "validation", "test")]
            return ["data=files", *paths, "data.calibration.tokens=65536", *held_out]
        if way.tokens is None:
            return []
        return ["data=packaged", f"data.calibration.tokens={way.tokens}", *held_out]

    def losses(self, row: Row) -> dict[str, float]:
        """Return nats per token of every text, on none of which anything was trained or decided."""
        model, fixed = self.model(row), ["record=null", "model.dtype=float32"]
        return {
            name: lrbo.evaluate(model, *settings, *fixed)["nll"]
            for name, settings in self.tests().items()
        }

    def tests(self) -> dict[str, list[str]]:
        """Return the texts, as they are typed."""
        tokens = f"data.test.tokens={self.options.test_tokens}"
        if SMOKE:
            words = ["data=generated", "data.window=32", tokens]
            return dict.fromkeys(TEXTS, words)
        texts = {
            "C4": ["data=packaged", "data.test.path=c4", tokens],
            "packaged": ["data=packaged", "data.test.path=wiki", tokens],
        }
        if self.options.data is not None:
            path = f"data.test.path='{self.options.data / OTHER}'"
            texts["WikiText-2"] = ["data=files", path, tokens]
        return texts

    def items(self, row: Row) -> float:
        """Return the share of zero-shot items that are answered right, the mean over the tasks."""
        folder = (self.folder / "tasks").absolute()
        folder.mkdir(exist_ok=True)
        for task in TASKS:
            file = (self.options.data / "zeroshot" / f"{task}.jsonl").absolute()
            (folder / f"{task}.yaml").write_text(TASK.format(task=task, file=file), "utf-8")
        names = ",".join(f"own_{task}" for task in TASKS)
        settings = f"tasks=[{names}]", f"task_folder='{folder}'", f"limit={ITEMS}", "record=null"
        scores = lrbo.evaluate(self.model(row), *settings)
        shares = [metric["value"] for s in scores["tasks"].values() for metric in s["metrics"]]
        return statistics.mean(shares)


def table(rows: list[dict[str, Any]]) -> str:
    """Return nats above dense, perplexity over that of the dense model, and items, by size."""
    last = {(row["size"], row["way"], row["minutes"], row["seed"]): row for row in rows}
    dense = next(row["result"] for row in last.values() if row["size"] == DENSE)
    names = [name for name in TEXTS if name in dense["nll"]]
    heads = ["size", "what", "minutes", "tokens", *names, "zero-shot", "CPU"]
    lines = [
        f"| {' | '.join(heads)} |",
        "|---|---|---:|---:" + "|---:" * (len(names) + 1) + "|---|",
    ]
    for row in sorted(last.values(), key=lambda each: [DENSE, *SIZES].index(each["size"])):
        result, stages = row["result"], row["result"]["stages"]
        above = {name: result["nll"][name] - dense["nll"][name] for name in names}
        cells = [
            row["size"],
            row["way"],
            f"{sum(stage['seconds'] for stage in stages) / 60:.1f}" if stages else "-",
            f"{sum(stage['tokens'] for stage in stages):,}" if stages else "-",
            *(f"{nats:.3f} ({math.exp(nats):.2f})" for nats in above.values()),
            f"{result['items']:.3f}" if "items" in result else "-",
            row["cpu"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help=f"folder with {OTHER} and zeroshot/*.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("studies/recovery_table"))
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--only", nargs="*", help="what is measured, by name")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, for each row")
    parser.add_argument("--test-tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--zeroshot", action="store_true", help="items of rows that are there")
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--recover", nargs="*", default=[], help="further settings of lrbo recover")
    parser.add_argument("overrides", nargs="*", help="further settings of the search")
    options = parser.parse_args()
    if SMOKE:
        options.results, options.folder = Path("results.jsonl"), Path("recovery")
        options.sizes, options.minutes, options.test_tokens = ["keep 0.8"], 0.2, 128
        options.only = ["closed form", "blocks, distill"]
        options.overrides = [
            "model=tiny", "data=generated", "data.window=32", "data.calibration.tokens=256",
            "data.validation.tokens=128", "data.test.tokens=128",
        ]  # fmt: skip
        options.recover = ["recover.tokens=128"]
    file, bench = options.results, Bench(options)
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines]

    def write(row: Row, result: dict[str, Any], old: dict[str, Any] | None = None) -> None:
        cpu = f"{torch.get_num_threads()} x {torch.backends.cpu.get_cpu_capability()}"
        rows.append({"cpu": cpu, **(old or {}), **asdict(row), "result": result})
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], flush=True)

    for row in () if options.table_only else wanted(options):
        # The last line of a row is the one that counts.
        old = next((r for r in reversed(rows) if asdict(row).items() <= r.items()), None)
        if old is None:
            result = bench.measure(row)
            if result is not None:
                write(row, result)
        elif options.zeroshot and options.data is not None and "items" not in old["result"]:
            write(row, {**old["result"], "items": bench.items(row)}, old)
    print(table(rows))


if __name__ == "__main__":
    main()
