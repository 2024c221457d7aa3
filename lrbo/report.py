"""What came of a study: one dict, tables for the terminal, data frames, figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml  # type: ignore[import-untyped]  # comes with omegaconf, without types
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lrbo import plots
from lrbo.accounting import Storage, dense_parameters, low_rank_parameters
from lrbo.errors import StudyError
from lrbo.model import LayerSpec
from lrbo.search.front import pareto_front
from lrbo.search.study import Study
from lrbo.storage import replacing
from lrbo.trial import TrialRecord

STAGES = ("suggestion", "allocation", "scoring", "logging")
WIDTH = 80
MAX_DEPTHS = 6  # columns of depth groups that fit
SHOWN = 10  # rows of the front, failures and groups; what is left out is counted

METRICS = {  # column of the frame: metric
    "nll": "nll",
    "perplexity": "perplexity",
    "objective": "objective",
    "kl": "kl_dense_to_compressed",
    "keep_ratio": "keep_ratio",
    "parameters": "parameters",
    "model_parameters": "model_parameters",
    "model_bytes": "model_bytes",
    "macs_per_token": "macs_per_token",
    "tokens": "tokens",
    "peak_memory_gib": "peak_memory_gib",
}
COLUMNS = (
    "trial",
    "origin",
    "outcome",
    "error",
    *METRICS,
    "seconds",
    *(f"{stage}_s" for stage in STAGES),
    "best_perplexity",
    "is_best",
    "on_front",
)


def summary(study: Study) -> dict[str, Any]:
    """Return the results of a study as plain values that go to JSON.

    Every key is always there. What is not known yet is ``None``, or an empty list or dict
    where there may be several.

    Returns:
        - ``study``: its name;
        - ``trials_completed``, and ``trials_failed``: those that ended without a value;
        - ``tokens_scored``: over all completed trials;
        - ``dense``: ``nll`` (nats per token) and ``perplexity`` on the validation text;
        - ``uniform``: the same, and ``keep_ratio``;
        - ``best``: ``trial``, ``nll``, ``perplexity``, ``keep_ratio``, ``parameters`` (of the
          compressible layers) of the trial with the lowest objective;
        - ``front``: ``trial``, ``nll``, ``keep_ratio`` of each trial on it, from small to large;
        - ``seconds``: sums over all trials, by stage;
        - ``test``: by label, ``trial``, ``text``, ``nll`` and ``perplexity`` on the test text.
    """
    state = study.state
    best = state.best()
    return {
        "study": study.name,
        "trials_completed": len(state.completed),
        "trials_failed": len(state.ended) - len(state.completed),
        "tokens_scored": int(sum(record.metrics.get("tokens", 0) for record in state.completed)),
        "dense": _pick(state.dense, "nll", "perplexity") if state.dense else None,
        "uniform": _pick(state.uniform.metrics, "nll", "perplexity", "keep_ratio")
        if state.uniform
        else None,
        "best": {
            "trial": best.request.trial_index,
            **_pick(best.metrics, "nll", "perplexity", "keep_ratio", "parameters"),
        }
        if best
        else None,
        "front": [
            {"trial": record.request.trial_index, **_pick(record.metrics, "nll", "keep_ratio")}
            for record in pareto_front(state.completed)
        ],
        "seconds": {
            stage: math.fsum(record.seconds.get(stage, 0.0) for record in state.records)
            for stage in STAGES
        },
        "test": {
            label: {
                "trial": test["trial"],
                "text": test["text"],
                **_pick(test["metrics"], "nll", "perplexity"),
            }
            for label, test in state.tests.items()
        },
    }


def frame(study: Study) -> pd.DataFrame:
    """Return a table with one row per trial that ended, in the order of their numbers.

    Returns:
        The columns in ``COLUMNS``. ``seconds`` is the sum of the four stages after it;
        ``best_perplexity`` is the perplexity of the best trial up to this one, the best being
        the one with the lowest objective; ``is_best`` marks the best of all and ``on_front``
        the Pareto front. Metrics of trials without a value are missing.
    """
    best = study.state.best()
    front = {record.request.trial_index for record in pareto_front(study.state.completed)}
    rows = []
    lowest, best_perplexity = math.inf, math.nan
    for record in study.state.ended:
        result, index = record.result, record.request.trial_index
        assert result is not None
        if record.is_completed and record.metrics["objective"] < lowest:
            lowest, best_perplexity = record.metrics["objective"], record.metrics["perplexity"]
        rows.append(
            {
                "trial": index,
                "origin": record.request.origin,
                "outcome": result.outcome,
                "error": result.error,
                **{column: record.metrics.get(name) for column, name in METRICS.items()},
                "seconds": math.fsum(record.seconds.get(stage, 0.0) for stage in STAGES),
                **{f"{stage}_s": record.seconds.get(stage) for stage in STAGES},
                "best_perplexity": best_perplexity,
                "is_best": best is not None and index == best.request.trial_index,
                "on_front": index in front,
            }
        )
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    numbers = [*METRICS, "seconds", *(f"{stage}_s" for stage in STAGES), "best_perplexity"]
    types = {"trial": int, "is_best": bool, "on_front": bool, **dict.fromkeys(numbers, float)}
    return table.astype(types)


def ranks_frame(study: Study, record: TrialRecord) -> pd.DataFrame:
    """Return a table with one row per layer of a trial's allocation.

    Returns:
        ``name``, ``kind``, ``block``, ``rank`` (missing where the layer is dense), ``stored``
        and ``dense`` (parameters), and ``kept``, their ratio.

    Raises:
        StudyError: If ``study.json`` does not describe the layers of the allocation.
    """
    about = study.about()
    specs = _specs(about)
    missing = [name for name in record.request.allocation.ranks if name not in specs]
    if missing:
        raise StudyError(
            f"{study.folder / 'study.json'} does not describe {len(missing)} of the layers of "
            f"trial {record.request.trial_index}, the first is {missing[0]}; it was not written "
            "by this version of lrbo."
        )
    rows = []
    for name, rank in record.request.allocation.ranks.items():
        spec = specs[name]
        stored = _stored(spec, rank, about)
        rows.append((name, spec.kind, spec.block, rank, stored, spec.parameters))
    table = pd.DataFrame(rows, columns=["name", "kind", "block", "rank", "stored", "dense"])
    table = table.astype({"rank": "Int64", "block": "Int64"})
    table["kept"] = table["stored"] / table["dense"]
    return table


def draw_figures(study: Study) -> list[Path]:
    """Draw what there is to draw into the study's ``figures/``, in place of older pictures.

    Returns:
        Paths of ``convergence.png``, ``front.png`` and ``ranks.png``; those whose data do not
        exist yet are left out.
    """
    state, about = study.state, study.about()
    best, uniform = state.best(), state.uniform
    if best is None:
        return []
    table = frame(study)
    dense = state.dense.get("perplexity")
    title = _subtitle(study)
    figures = {
        "convergence": plots.convergence(
            table,
            dense,
            None if uniform is None else uniform.metrics["perplexity"],
            about=title,
        ),
        "front": plots.front(table, dense, about=title),
    }
    if all(name in _specs(about) for name in best.request.allocation.ranks):
        figures["ranks"] = plots.ranks_over_depth(
            ranks_frame(study, best),
            None if uniform is None else ranks_frame(study, uniform),
            about=f"{title}, best trial {best.request.trial_index}",
        )
    paths = []
    for name, figure in figures.items():
        path = study.folder / "figures" / f"{name}.png"
        with replacing(path) as beside:
            figure.savefig(beside, format="png")
        paths.append(path)
    return paths


def print_report(study: Study, console: Console) -> None:
    """Print what came of a study, at most 80 columns wide.

    Raises:
        StudyError: If there is no study.
    """
    report = _Report(console, min(console.width, WIDTH))
    _print_header(study, report)
    _print_results(study, report)
    _print_front(study, report)
    _print_allocation(study, report)
    _print_failures(study, report)
    _print_seconds(study, report)


@dataclass(frozen=True)
class _Report:
    """Prints parts of a report, with a title and an empty line before each."""

    console: Console
    width: int

    def part(self, title: str, body: Table, note: str = "") -> None:
        """Print one part."""
        self.console.print()
        self.console.print(Text(title, style="bold"), width=self.width)
        indented = Padding(body, (0, 0, 0, 2), expand=False)
        self.console.print(indented, width=self.width, highlight=False)
        if note:
            self.note(note)

    def note(self, text: str) -> None:
        """Print a remark."""
        indented = Padding(Text(text, style="dim"), (0, 0, 0, 2), expand=False)
        self.console.print(indented, width=self.width)


def _print_header(study: Study, report: _Report) -> None:
    """Print what was searched."""
    state = study.state
    failed = len(state.ended) - len(state.completed)
    parts = [f"{len(state.completed)} completed"]
    parts += [f"{failed} without a value"] if failed else []
    parts += [f"{len(state.open)} not ended"] if state.open else []
    tokens = summary(study)["tokens_scored"]
    parts += [f"{_count(tokens)} tokens scored"] if tokens else []
    lines = {**_described(study), "Trials": ", ".join(parts)}
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines.items():
        table.add_row(name, Text(text))
    report.console.print(table, width=report.width, highlight=False)


def _print_results(study: Study, report: _Report) -> None:
    """Print dense model, baseline, start values and best trial."""
    state = study.state
    start = next((r for r in state.completed if r.request.origin == "start"), None)
    best = state.best()
    rows = [("uniform", state.uniform), ("start", start), ("best", best)]
    tested = {
        test["trial"]: test["metrics"].get("perplexity")
        for label, test in state.tests.items()
        if label != "dense"
    }
    tested_dense = state.tests.get("dense", {}).get("metrics", {}).get("perplexity")
    if not state.dense and best is None:
        report.console.print("\nNo trial has a value yet.", width=report.width)
        return
    table = _table(
        "", "trial", "nll", "ppl", "KL", "kept", "params", "size", "MACs", "test ppl", gap=0
    )
    size = _dense_size(study)
    if state.dense:
        metrics = {**size, **state.dense, "keep_ratio": 1.0, "kl_dense_to_compressed": 0.0}
        table.add_row("dense", "", *_cells(metrics), _perplexity(tested_dense))
    for name, record in rows:
        if record is not None:
            index = record.request.trial_index
            test = _perplexity(tested.get(index))
            style = "bold" if name == "best" else ""
            table.add_row(name, str(index), *_cells(record.metrics), test, style=style)
    report.part("Results", table)
    notes = [
        "nll and KL(dense || compressed): nats per token on the validation text",
        "kept: share of the parameters of the compressible layers",
        "params, size, MACs (per token): of the whole model",
    ]
    if start is not None:
        notes.append("start: the ratios that the search space starts from")
    if state.tests:
        texts = dict.fromkeys(str(test["text"]) for test in state.tests.values())
        notes.append(f"test: {', '.join(texts)}")
    for note in notes:
        report.note(note)


def _print_front(study: Study, report: _Report) -> None:
    """Print the Pareto front."""
    front = pareto_front(study.state.completed)
    if not front:
        return
    table = _table("trial", "perplexity", "nll", "kept", "parameters")
    for record in front[:SHOWN]:
        metrics = record.metrics
        table.add_row(
            str(record.request.trial_index),
            _perplexity(metrics.get("perplexity")),
            _number(metrics.get("nll"), ".4f"),
            _number(metrics.get("keep_ratio"), ".3%"),
            _number(metrics.get("parameters"), ",d"),
        )
    note = f"and {len(front) - SHOWN} larger" if len(front) > SHOWN else ""
    report.part("Front: no other trial is both smaller and better", table, note)


def _print_allocation(study: Study, report: _Report) -> None:
    """Print the mean keep ratio of each group of layers, over depth where it is split."""
    best = study.state.best()
    if best is None:
        return
    ratios = _group_ratios(study, best)
    if not ratios:
        return
    depths = max(len(row) for row in ratios.values())
    heads = ["kept"] if depths == 1 else [f"depth {depth}" for depth in range(depths)]
    table = _table("group", *heads)
    for group, row in list(ratios.items())[:SHOWN]:
        table.add_row(group, *(_number(value, ".1%") for value in row))
    note = f"and {len(ratios) - SHOWN} more groups" if len(ratios) > SHOWN else ""
    report.part(f"Mean keep ratios of the best trial, {best.request.trial_index}", table, note)
    dense = _dense_kinds(study, best)
    if dense:
        report.note(f"dense in every block: {', '.join(dense)}")


def _print_failures(study: Study, report: _Report) -> None:
    """Print which trials have no value, and why."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for record in study.state.ended:
        if record.result is not None and not record.is_completed:
            first_line = (record.result.error or "no reason given").strip().splitlines()[0]
            key = (record.result.outcome, first_line)
            reasons.setdefault(key, []).append(record.request.trial_index)
    if not reasons:
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", max_width=16)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for (outcome, reason), indices in list(reasons.items())[:SHOWN]:
        table.add_row(", ".join(map(str, indices)), outcome, Text(reason))
    note = f"and {len(reasons) - SHOWN} more reasons" if len(reasons) > SHOWN else ""
    report.part("Trials without a value", table, note)


def _print_seconds(study: Study, report: _Report) -> None:
    """Print where the time went."""
    if not study.state.ended:
        return
    seconds = summary(study)["seconds"]
    total = math.fsum(seconds.values())
    table = _table("stage", "seconds", "per trial", "share")
    for stage, spent in seconds.items():
        trials = sum(stage in record.seconds for record in study.state.records)
        table.add_row(
            stage,
            _number(spent, ",.1f"),
            _number(spent / trials if trials else None, ",.2f"),
            _number(spent / total if total else None, ".0%"),
        )
    report.part("Time", table)


def _table(*columns: str, gap: int = 1) -> Table:
    """Return an empty table: names to the left, numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False)
    for place, column in enumerate(columns):
        left = place == 0 and column != "trial"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


def _cells(metrics: Mapping[str, float]) -> list[str]:
    """Return the cells that every row of the results has, from nll to MACs."""
    return [
        _number(metrics.get("nll"), ".4f"),
        _perplexity(metrics.get("perplexity")),
        _number(metrics.get("kl_dense_to_compressed"), ".4f"),
        _number(metrics.get("keep_ratio"), ".1%"),
        _count(metrics.get("model_parameters")),
        _bytes(metrics.get("model_bytes")),
        _count(metrics.get("macs_per_token")),
    ]


def _number(value: float | None, spec: str) -> str:
    """Return a formatted number, or a dash for none."""
    if value is None:
        return "-"
    return format(int(value) if spec.endswith("d") else value, spec)


def _perplexity(value: float | None) -> str:
    """Return a perplexity, or a dash for none."""
    return "-" if value is None else plots.perplexity_text(value)


def _count(value: float | None) -> str:
    """Return a large number in thousands, millions or billions, or a dash for none."""
    if value is None:
        return "-"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.0f}"


def _bytes(value: float | None) -> str:
    """Return a number of bytes in binary units, or a dash for none."""
    if value is None:
        return "-"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.{0 if value >= 100 * unit else 1}f} {name}"
    return f"{value:.0f} B"


def _pick(metrics: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return some of the metrics; ``None`` for one that is not there."""
    return {name: metrics.get(name) for name in names}


def _specs(about: Mapping[str, Any]) -> dict[str, LayerSpec]:
    """Return the layers that ``study.json`` describes, by name."""
    return {
        layer["name"]: LayerSpec(
            layer["name"],
            layer["kind"],
            layer["block"],
            layer["out_features"],
            layer["in_features"],
            layer["has_bias"],
            site=layer["name"],  # which layers share an input plays no part here
        )
        for layer in about.get("layers", ())
    }


def _stored(spec: LayerSpec, rank: int | None, about: Mapping[str, Any]) -> int:
    """Return the parameters of a layer at a rank, counted as the study's budget counts them."""
    if rank is None:
        return spec.parameters
    bias = bool(about.get("adds_bias", False)) or spec.has_bias
    storage: Storage = about.get("storage", "factored")
    return low_rank_parameters(spec, rank, bias=bias, storage=storage)


def _dense_size(study: Study) -> dict[str, float]:
    """Return size and cost of the dense model: those of a trial plus what it left out.

    Empty while there is no completed trial, or where the layers are not described.
    """
    record = next(iter(study.state.completed), None)
    specs = _specs(study.about())
    if record is None or not all(name in specs for name in record.request.allocation.ranks):
        return {}
    metrics, ranks = record.metrics, record.request.allocation.ranks
    if not {"parameters", "model_parameters", "model_bytes", "macs_per_token"} <= set(metrics):
        return {}
    layers = [specs[name] for name in ranks]
    parameters = metrics["model_parameters"] - metrics["parameters"] + dense_parameters(layers)
    macs = metrics["macs_per_token"]
    for spec in layers:
        rank = ranks[spec.name]
        if rank is not None:
            macs += spec.out_features * spec.in_features
            macs -= rank * (spec.out_features + spec.in_features)
    return {
        "model_parameters": parameters,
        "model_bytes": parameters * metrics["model_bytes"] / metrics["model_parameters"],
        "macs_per_token": macs,
    }


def _group_ratios(study: Study, record: TrialRecord) -> dict[str, list[float | None]]:
    """Return the keep ratios of a trial by group, one per depth group.

    A variable ``"qk.2"`` is the third depth group of ``"qk"``. Variables that are single
    layers, more depth groups than fit beside each other, and allocations that no point stands
    for, are summed up by kind instead.
    """
    variables, ranks = record.request.variables, record.request.allocation.ranks
    if variables and not any(name in ranks for name in variables):
        found: dict[str, dict[int, float]] = {}
        for name, value in variables.items():
            group, _, depth = name.rpartition(".")
            if group and depth.isdecimal():
                found.setdefault(group, {})[int(depth)] = value
            else:
                found.setdefault(name, {})[0] = value
        depths = 1 + max(max(row) for row in found.values())
        if depths <= MAX_DEPTHS:
            return {group: [row.get(d) for d in range(depths)] for group, row in found.items()}
    if not all(name in _specs(study.about()) for name in ranks):
        return {}
    sums = ranks_frame(study, record).groupby("kind", sort=False)[["stored", "dense"]].sum()
    return {str(kind): [float(row["stored"] / row["dense"])] for kind, row in sums.iterrows()}


def _dense_kinds(study: Study, record: TrialRecord) -> list[str]:
    """Return the kinds of which every layer is dense, where the layers are described."""
    ranks = record.request.allocation.ranks
    if not all(name in _specs(study.about()) for name in ranks):
        return []
    is_dense = ranks_frame(study, record).set_index("kind")["rank"].isna()
    return [
        str(kind) for kind, every in is_dense.groupby("kind", sort=False).all().items() if every
    ]


def _config(study: Study) -> Mapping[str, Any]:
    """Return the configuration that the study was begun with; empty if there is none."""
    try:
        found = yaml.safe_load(study.config_yaml())
    except (FileNotFoundError, yaml.YAMLError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _first(sources: Iterable[Any], *keys: str) -> str | None:
    """Return the first plain value under one of the keys, or that is itself one."""
    for source in sources:
        if isinstance(source, Mapping):
            for key in keys:
                if isinstance(source.get(key), str | int | float):
                    return str(source[key])
        elif isinstance(source, str | int | float):
            return str(source)
    return None


def _described(study: Study) -> dict[str, str]:
    """Return the lines of the header that can be said, by name."""
    about, config = study.about(), _config(study)
    lines = {"Study": study.name}
    model = _first([config.get("model"), about.get("model")], "name", "id", "path")
    if model is not None:
        setup = [str(about[key]) for key in ("dtype", "device") if about.get(key)]
        lines["Model"] = f"{model} ({' on '.join(setup)})" if setup else model
    method = _first([config.get("method"), about.get("method")], "name")
    if method is not None:
        lines["Method"] = method
    budget = _budget(study, about)
    if budget is not None:
        lines["Budget"] = budget
    return lines


def _budget(study: Study, about: Mapping[str, Any]) -> str | None:
    """Return the budget in words, or ``None`` before the first trial."""
    keep = _keep_ratio(study, about)
    record = next(iter(study.state.records), None)
    if record is None:
        return None if keep is None else f"keep {keep:.4g}% of the compressible parameters"
    allocation = record.request.allocation
    ceiling, layers = f"{allocation.budget.parameters:,}", len(allocation.ranks)
    text = f"at most {ceiling} parameters in {layers} layers"
    return text if keep is None else f"{text} ({keep:.4g}%)"


def _keep_ratio(study: Study, about: Mapping[str, Any]) -> float | None:
    """Return the percentage that the budget keeps, as configured or as counted."""
    config = _config(study)
    budget = config.get("budget")
    given = budget.get("keep_ratio") if isinstance(budget, Mapping) else None
    if isinstance(given, int | float):
        return 100 * given
    record = next(iter(study.state.records), None)
    specs = _specs(about)
    if record is None or not all(name in specs for name in record.request.allocation.ranks):
        return None
    allocation = record.request.allocation
    dense = dense_parameters(specs[name] for name in allocation.ranks)
    return 100 * allocation.budget.parameters / dense


def _subtitle(study: Study) -> str:
    """Return study, model, method and budget in one line under a figure's title."""
    about, config = study.about(), _config(study)
    parts = [study.name]
    parts += [
        text
        for section in ("model", "method")
        if (text := _first([config.get(section), about.get(section)], "name", "id", "path"))
    ]
    keep = _keep_ratio(study, about)
    parts += [] if keep is None else [f"budget {keep:.4g}%"]
    return ", ".join(parts)
