"""What came of a study: one dict, data frames, figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from lrbo.accounting import (
    dense_parameters,
    index_bytes,
    low_rank_macs,
)
from lrbo.errors import StudyError
from lrbo.gains import gains
from lrbo.loss_calibration import LossCalibration, sensitivity_file
from lrbo.optimization.front import (
    KEEP_RATIO,
    LATENCIES,
    LOSS,
    hypervolume,
    pareto_front,
    reference_point,
)
from lrbo.optimization.study import Study, layers_of, stored_parameters
from lrbo.pictures import digest_of, is_of, write_picture
from lrbo.presentation import count_text
from lrbo.progress import imported
from lrbo.trial import Origin, TrialRecord

DEPTHS = 3  # parts of the depth that are told apart
STAGES = ("suggestion", "allocation", "scoring", "logging")
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
    **{name: name for latency in LATENCIES for name in (latency, f"{latency}_sem")},
}
NUMBERS_WRITTEN = ("keep_ratio", "validation_perplexity", "test_perplexity")  # of a checkpoint
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
        - ``trials_completed``, ``trials_stopped``: given up early, and ``trials_failed``: those
          that ended without a value;
        - ``tokens_scored``: over all trials with a value;
        - ``validation_windows``: where they were chosen, ``chosen`` of how many in the ``pool``;
        - ``dense``: ``nll`` (nats per token) and ``perplexity`` on the validation text;
        - ``uniform``: ``trial``, the same, and ``keep_ratio``;
        - ``analytic``: the same, of the allocation of least predicted loss;
        - ``best``: ``trial``, ``nll``, ``perplexity``, ``keep_ratio``, ``parameters`` (of the
          compressible layers) of the trial with the lowest objective;
        - ``gains``: what the search adds: the best trial minus the ``analytic`` one, nats per
          token on ``validation`` and ``test`` text, with the ``standard_error`` over windows; one
          at one budget, of a front one at each budget of an analytic trial;
        - ``front``: ``trial``, ``nll``, ``keep_ratio`` of each trial on it, and what it was
          minimised in, from small to large; at one budget there is none;
        - ``hypervolume``: where a front was searched, the area that it dominates below its
          ``reference``, loss times size, and ``size``, the name of the metric;
        - ``seconds``: sums over all trials, by stage;
        - ``checkpoints``: what was written: ``trial``, ``folder``, whether it ``exists`` still,
          ``format``, ``dtype``, ``keep_ratio``, ``validation_perplexity`` and
          ``test_perplexity``; of a folder that was written again the last;
        - ``test``: by label, ``trial``, ``text``, ``nll`` and ``perplexity`` on the test text.
    """
    state, size = study.state, size_metric(study)
    best = state.best()
    return {
        "study": study.name,
        "trials_completed": len(state.completed),
        "trials_stopped": len(state.stopped),
        "trials_failed": len(state.ended) - len(state.completed) - len(state.stopped),
        "tokens_scored": int(sum(record.metrics.get("tokens", 0) for record in state.ended)),
        "validation_windows": {
            "chosen": len(state.chosen["windows"]),
            "pool": state.chosen["pool"],
        }
        if state.chosen
        else None,
        "dense": _pick(state.dense, "nll", "perplexity") if state.dense else None,
        "uniform": _baseline(state.uniform),
        "analytic": _baseline(state.analytic),
        "best": {
            "trial": best.request.trial_index,
            **_pick(best.metrics, "nll", "perplexity", "keep_ratio", "parameters"),
        }
        if best
        else None,
        "gains": [gain.to_dict() for gain in gains(state)],
        "front": [
            {
                "trial": record.request.trial_index,
                **_pick(record.metrics, "nll", "keep_ratio", *([size] if size else [])),
            }
            for record in front(study)
        ],
        "hypervolume": _hypervolume(study),
        "checkpoints": checkpoints(study),
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


@dataclass(frozen=True)
class ScoreRow:
    """A row of every table of results: the dense model or a trial beside the others.

    Attributes:
        label: ``dense``, ``uniform``, ``analytic``, ``best``, or what proposed it.
        trial: Its number; ``None`` for the dense model.
        keep_ratio: Share of the parameters of the compressible layers.
        validation: Metrics on the validation text, ``{}`` if not known.
        test: Metrics on the test text, likewise.
    """

    label: str
    trial: int | None
    keep_ratio: float
    validation: Mapping[str, float]
    test: Mapping[str, float]

    @property
    def name(self) -> str:
        """Return what a table calls it."""
        return f"best, trial {self.trial}" if self.label == "best" else self.label


def score_rows(study: Study, *origins: Origin) -> list[ScoreRow]:
    """Return what is known of the dense model, the baselines and the best trial.

    Args:
        study: Perhaps without a trial.
        *origins: Of which the first trial with a value is a row too, before the best.
    """
    state = study.state
    first = {record.request.origin: record for record in reversed(state.completed)}
    records = {"uniform": state.uniform, "analytic": state.analytic}
    records |= {origin: first.get(origin) for origin in origins} | {"best": state.best()}
    tests = {test["trial"]: test["metrics"] for test in state.tests.values()}
    rows = [ScoreRow("dense", None, 1.0, state.dense, tests.get(None, {}))] if state.dense else []
    for label, record in records.items():
        if record is not None:
            trial, metrics = record.request.trial_index, record.metrics
            rows.append(
                ScoreRow(label, trial, metrics["keep_ratio"], metrics, tests.get(trial, {}))
            )
    return rows


def counted_trials(study: Study) -> str:
    """Say how many trials ended in which way, and how many tokens they scored."""
    state = study.state
    failed = len(state.ended) - len(state.completed) - len(state.stopped)
    tokens = sum(record.metrics.get("tokens", 0) for record in state.ended)
    parts = [f"{len(state.completed)} completed"]
    parts += [f"{len(state.stopped)} stopped early"] if state.stopped else []
    parts += [f"{failed} without a value"] if failed else []
    parts += [f"{len(state.open)} not ended"] if state.open else []
    parts += [f"{count_text(tokens)} tokens scored"] if tokens else []
    return ", ".join(parts)


def _baseline(record: TrialRecord | None) -> dict[str, Any] | None:
    """Return what stands in tables of a trial that others are compared with."""
    if record is None:
        return None
    numbers = _pick(record.metrics, "nll", "perplexity", "keep_ratio")
    return {"trial": record.request.trial_index, **numbers}


def front(study: Study) -> list[TrialRecord]:
    """Return the Pareto front from small to large.

    There is none at one budget, where sizes differ by the rounding of ranks alone.
    """
    size = size_metric(study)
    return [] if size is None else pareto_front(study.state.completed, size)


def size_metric(study: Study) -> str | None:
    """Return what a study minimises beside the loss; ``None`` at one budget."""
    config = study.config()
    return None if config.budget.lowest is None else config.search.size


def checkpoints(study: Study) -> list[dict[str, Any]]:
    """Return the compressed models that were written, and whether they are still there."""
    found = {}
    for event in study.state.checkpoints:
        folder, tags = event["folder"], event["tags"]
        numbers = {key: tags.get(key) for key in NUMBERS_WRITTEN}
        found[folder] = {
            "trial": event["trial"],
            "folder": folder,
            "exists": (Path(folder) / "config.json").is_file(),
            "format": tags["format"],
            "dtype": tags["dtype"],
            **{key: None if text is None else float(text) for key, text in numbers.items()},
        }
    return list(found.values())


def _hypervolume(study: Study) -> dict[str, Any] | None:
    """Return the area that the front dominates, where one was searched."""
    size, completed = size_metric(study), study.state.completed
    if size is None:
        return None
    thresholds = study.config().search.thresholds
    reference = reference_point(completed, size, thresholds)
    if reference is None:
        return None
    points = [(record.metrics["objective"], record.metrics[size]) for record in completed]
    return {
        "value": hypervolume(points, reference),
        "reference": {LOSS: reference[0], size: reference[1]},
        "size": size,
    }


def frame(study: Study) -> pd.DataFrame:
    """Return a table with one row per trial that ended, in the order of their numbers.

    Returns:
        The columns in ``COLUMNS``. ``seconds`` is the sum of the four stages after it;
        ``best_perplexity`` is the perplexity of the best trial up to this one, the best being
        the one with the lowest objective; ``is_best`` marks the best of all and ``on_front``
        the Pareto front, of which there is none at one budget. Metrics of trials without a
        value are missing.
    """
    best = study.state.best()
    on_front = {record.request.trial_index for record in front(study)}
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
                "on_front": index in on_front,
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
    """
    about = study.about()
    specs = layers_of(about)
    rows = []
    for name, rank in record.request.allocation.ranks.items():
        spec = specs[name]
        stored = stored_parameters(spec, rank, about)
        rows.append((name, spec.kind, spec.block, rank, stored, spec.parameters))
    table = pd.DataFrame(rows, columns=["name", "kind", "block", "rank", "stored", "dense"])
    table = table.astype({"rank": "Int64", "block": "Int64"})
    table["kept"] = table["stored"] / table["dense"]
    return table


def draw_figures(study: Study) -> list[Path]:
    """Draw what there is to draw into the study's ``figures/``, unless it is there already.

    Returns:
        Paths of the pictures, such as ``convergence.png``.
    """
    paths = [study.folder / "figures" / f"{name}.png" for name in drawable(study)]
    state, measured = study.state, sensitivity(study)
    fixed = (study.about(), study.config_yaml())
    digest = digest_of(*fixed, state.dense, state.trials, state.tests, measured)
    if not all(is_of(path, digest) for path in paths):
        drawn = imported("lrbo.figures").figures(study)  # matplotlib, which nothing else asks for
        for path in paths:
            write_picture(path, drawn[path.stem], digest)
    return paths


def drawable(study: Study) -> list[str]:
    """Return the names of the figures that there is something to draw in.

    There is no front at one budget, at which all trials are of one size.
    """
    if study.state.best() is None:
        return []
    front = ["front"] if size_metric(study) is not None else []
    measured = ["sensitivity"] if sensitivity(study) is not None else []
    return ["convergence", *front, "ranks", *measured]


def _pick(metrics: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return some of the metrics; ``None`` for one that is not there."""
    return {name: metrics.get(name) for name in names}


def dense_size(study: Study) -> dict[str, float]:
    """Return size and cost of the dense model: those of a trial plus what it left out.

    Empty while there is no completed trial.
    """
    if not study.state.completed:
        return {}
    about = study.about()
    record, specs, storage = study.state.completed[0], layers_of(about), about["storage"]
    metrics, ranks = record.metrics, record.request.allocation.ranks
    layers = [specs[name] for name in ranks]
    parameters = metrics["model_parameters"] - metrics["parameters"] + dense_parameters(layers)
    macs, integers = metrics["macs_per_token"], 0
    for spec in layers:
        rank = ranks[spec.name]
        if rank is not None:
            macs += spec.out_features * spec.in_features
            macs -= low_rank_macs(spec, rank, storage)
            integers += index_bytes(spec, storage)
    bytes_per_parameter = (metrics["model_bytes"] - integers) / metrics["model_parameters"]
    return {
        "model_parameters": parameters,
        "model_bytes": parameters * bytes_per_parameter,
        "macs_per_token": macs,
    }


def kept_by_depth(study: Study, record: TrialRecord) -> pd.DataFrame:
    """Return the share of their parameters that layers keep in a trial, by kind and depth.

    Returns:
        A row per kind, and a last one ``all``. A column per third of the blocks, named after
        the blocks in it; missing where the kind has no layer. A last column ``all``.
    """
    table = ranks_frame(study, record)
    blocks = int(table["block"].max()) + 1
    parts = min(DEPTHS, blocks)
    edges = [-(-part * blocks // parts) for part in range(parts + 1)]
    columns = {
        f"blocks {first}-{end - 1}" if end - first > 1 else f"block {first}": table[
            table["block"].between(first, end - 1)
        ]
        for first, end in pairwise(edges)
    }
    if parts == 1:
        columns = {}
    shares = {}
    for name, some in {**columns, "all": table}.items():
        sums = some.groupby("kind")[["stored", "dense"]].sum()
        sums.loc["all"] = sums.sum()
        shares[name] = sums["stored"] / sums["dense"]
    kinds = list(dict.fromkeys(table["kind"]))
    return pd.DataFrame(shares).reindex([*kinds, "all"])


def weights(study: Study, record: TrialRecord) -> dict[str, float]:
    """Return the weights of a trial in natural logarithms; empty where ratios are searched."""
    is_weights = study.config().space.type == "weights"
    found = record.request.variables if is_weights else {}
    return {name: value for name, value in found.items() if name != KEEP_RATIO}


def sensitivity(study: Study) -> LossCalibration | None:
    """Return what single layers were measured to cost, if that was measured.

    Raises:
        StudyError: If the file says something else, with what to do.
    """
    file = sensitivity_file(study.folder)
    try:
        return LossCalibration.load(file) if file.is_file() else None
    except StudyError as error:
        raise StudyError(
            f"{error}. Delete the file: the next search of the study measures it again"
        ) from error


def dense_kinds(study: Study, record: TrialRecord) -> list[str]:
    """Return the kinds of which every layer of a trial is dense."""
    is_dense = ranks_frame(study, record).set_index("kind")["rank"].isna()
    return [
        str(kind) for kind, every in is_dense.groupby("kind", sort=False).all().items() if every
    ]


def described(study: Study) -> dict[str, str]:
    """Return what was searched, under which budget, as lines by name."""
    about, config = study.about(), study.config()
    keep, lowest = config.budget.keep_ratio, config.budget.lowest
    budget = f"{about['budget_parameters']:,} parameters, {keep:.4g} of the compressible ones"
    if lowest is not None:
        budget = f"from {lowest:.4g} to {keep:.4g} of the parameters of compressible layers"
    lines = {
        "Study": study.name,
        "Model": f"{config.model.name} ({about['dtype']} on {about['device']})",
        "Method": f"{config.method.name}, space {config.space.name}",
        "Budget": budget,
    }
    if weight := config.search.kl_weight:
        lines["Loss"] = f"nll + {weight:g} KL(dense || compressed), which the best has lowest"
    return lines
