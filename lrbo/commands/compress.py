"""Write the model of a trial as a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lrbo import builders, checks, config, export
from lrbo.accounting import account
from lrbo.allocation import Allocation
from lrbo.command_lines import command_line, repeating
from lrbo.commands.finalists import Finalist, finalist
from lrbo.commands.trials import evaluate_between
from lrbo.commands.view import enter_checkpoint
from lrbo.compression import store_
from lrbo.errors import StudyError
from lrbo.gains import gains
from lrbo.layers import PivotedLinear
from lrbo.loading import load_model, load_tokenizer, resolve_dtype
from lrbo.merging import save_merged
from lrbo.model_card import Score, model_card
from lrbo.nested import LowRankFactors
from lrbo.optimization.base import KEEP_RATIO
from lrbo.optimization.front import ceiling_of
from lrbo.optimization.study import Study
from lrbo.progress import Reporter
from lrbo.schema import CompressConfig, SearchConfig
from lrbo.trial import TrialRecord
from lrbo.versions import versions
from lrbo.worker import allocation_parameters


def run(chosen: CompressConfig, reporter: Reporter) -> dict[str, Any]:
    """Write the model of a trial as a checkpoint.

    Raises:
        ConfigError: If a value cannot work, or the folder exists.
        StudyError: If there is no such study or trial.
        CheckpointError: If file and accountant disagree on the number of parameters.
    """
    checks.require_valid(chosen)
    study = Study(checks.study_folder(chosen.studies, chosen.study))
    about = study.about()
    point = str(chosen.point)
    records = _points(study, point, chosen.refit.candidates)
    stored = config.stored_config(study.config_yaml(), [f"studies={chosen.studies}"])
    with reporter.waiting("Reading texts"):
        plan = builders.plan_search(stored, study, checks.check(stored))
    ceiling = ceiling_of(point)
    if ceiling is not None and ceiling[0] == KEEP_RATIO:
        evaluate_between(plan, study, ceiling[1], reporter)
        records = _points(study, point, chosen.refit.candidates)
    if ceiling is not None:
        metric, limit = ceiling
        taken = records[0]
        reporter.say(
            f"point={point}: trial {taken.request.trial_index} has the lowest loss up to there, "
            f"with {metric} {taken.metrics[metric]:.4f} of {limit:g}"
        )
    found = finalist(plan, study, records, chosen.refit, reporter)
    record, allocation = found.record, found.record.request.allocation
    dtype = None if chosen.dtype == "auto" else resolve_dtype(chosen.dtype, torch.device("cpu"))
    model = load_model(plan.source, dtype=dtype, device=torch.device("cpu"))
    builders.require_same_model(study, model)
    _put_in(model, allocation, found.factors, plan, reporter)
    counted = account(
        plan.layers,
        allocation.ranks,
        allocation_parameters(plan.layers, allocation, plan.space.cost),
        storage=plan.storage,
        bytes_per_parameter=model.dtype.itemsize,
    )
    written = {
        "study": study.name,
        "trial": record.request.trial_index,
        "base_model": asdict(plan.source),
        "base_fingerprint": about["model_fingerprint"],
        "method": plan.method.name,
        "keep_ratio": counted.keep_ratio,
        "validation": {
            "nll": found.nll,
            "perplexity": math.exp(found.nll) if found.nll < 700 else math.inf,
            "tokens": record.metrics["tokens"],
            "dtype": about["dtype"],
        },
        "refit": found.refit,
        "data": study.data(),
        "versions": versions(),
    }
    out, tokenizer = Path(chosen.out), load_tokenizer(plan.source)
    card = model_card(
        out.name,
        chosen.format,
        written,
        source=plan.source,
        parameters=(counted.model, counted.model_dense),
        storage=plan.storage,
        scores=_scores(study, found, written["validation"]["perplexity"]),
        notes=[f"{sentence}." for gain in gains(study.state) for sentence in gain.sentences],
        commands=_commands(chosen, stored, about["dtype"], record.request.trial_index),
    )
    if chosen.format == "merged":
        in_file = save_merged(out, model, tokenizer, card, plan.windows)
        reporter.say(
            f"format=merged: {in_file:,} dense parameters; it opens everywhere and saves nothing"
        )
    else:
        in_file = export.save(
            out,
            model,
            tokenizer,
            allocation,
            written,
            storage=plan.storage,
            parameters=counted.model,
            card=card,
            with_code=chosen.format == "remote_code",
            windows=plan.windows,
        )
    enter_checkpoint(
        stored,
        study,
        out,
        record.request.trial_index,
        chosen.register,
        {
            "keep_ratio": f"{counted.keep_ratio:.4f}",
            "validation_perplexity": f"{math.exp(min(found.nll, 700)):.4f}",
            "format": chosen.format,
            "dtype": str(model.dtype).removeprefix("torch."),
            **(
                {}
                if found.test_nll is None
                else {"test_perplexity": f"{math.exp(min(found.test_nll, 700)):.4f}"}
            ),
        },
    )
    reporter.say(f"How to open it, what it scored and how it was made: {out / export.CARD}")
    return {
        "folder": str(out),
        "parameters": in_file if chosen.format == "merged" else counted.model,
        "parameters_in_file": in_file,
        "keep_ratio": counted.keep_ratio,
        "storage": "dense" if chosen.format == "merged" else plan.storage,
        "refit": found.refit,
    }


def _scores(study: Study, found: Finalist, perplexity: float) -> list[Score]:
    """Return what is known of the dense model, baselines, best trial and the model itself."""
    state, record = study.state, found.record
    tests = {test["trial"]: test["metrics"]["perplexity"] for test in state.tests.values()}
    rows = [Score("dense", 1.0, state.dense.get("perplexity"), tests.get(None))]
    trials = {
        "uniform ranks": state.uniform,
        "analytic ranks": state.analytic,
        "best trial, before any refit": state.best(),
    }
    rows += [
        Score(
            name,
            one.metrics["keep_ratio"],
            one.metrics["perplexity"],
            tests.get(one.request.trial_index),
        )
        for name, one in trials.items()
        if one is not None
    ]
    test = None if found.test_nll is None else math.exp(min(found.test_nll, 700))
    return [*rows, Score("this model", record.metrics["keep_ratio"], perplexity, test)]


def _commands(chosen: CompressConfig, searched: SearchConfig, dtype: str, trial: int) -> list[str]:
    """Return the command lines that make the checkpoint again.

    Args:
        chosen: What was typed now.
        searched: Of the study.
        dtype: That the study's model ran in, which ``auto`` may not choose elsewhere.
        trial: That was written.
    """
    own = {"point": trial, "out": Path(chosen.out).name, "study": searched.study}
    skipped = ("studies", "output", "refit.candidates")
    options = {k: v for k, v in config.flat(chosen).items() if k not in skipped} | own
    return [
        command_line(command, values, searched.study)
        for command, values in (
            ("search", repeating(searched) | {"model.dtype": dtype}),
            ("compress", options),
        )
    ]


def _put_in(
    model: PreTrainedModel,
    allocation: Allocation,
    factors: Mapping[str, LowRankFactors],
    plan: builders.Plan,
    reporter: Reporter,
) -> None:
    """Replace the layers of a model by their form in the storage of the budget.

    Args:
        model: Changed.
        allocation: Ranks by layer name.
        factors: As they are in the cache: pivots are chosen from these, and rounded after.
        plan: Of the study.
        reporter: Shows progress and the largest coefficient.
    """
    if plan.storage == "factored":
        store_(model, allocation, factors, plan.storage)
        return
    count = sum(rank is not None for rank in allocation.ranks.values())
    with reporter.step("Pivoting", count, "layers") as advance:
        store_(model, allocation, factors, plan.storage, on_layer=lambda _: advance(1))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PivotedLinear)}
    if layers:
        name, largest = max(layers.items(), key=lambda item: item[1].growth)
        reporter.say(f"Largest coefficient of the pivoted layers: {largest.growth:.3f} in {name}")


def _points(study: Study, point: str, candidates: int) -> list[TrialRecord]:
    """Return the trials that ``point`` names, best first: best, a number, or METRIC=CEILING.

    Raises:
        StudyError: If there is no such trial with a value; says which there are.
    """
    completed = study.state.completed
    metric, ceiling = ceiling_of(point) or (KEEP_RATIO, math.inf)
    if point.isdecimal():
        found = [r for r in completed if r.request.trial_index == int(point)]
    else:
        found = [r for r in completed if r.metrics.get(metric, math.inf) <= ceiling]
        found.sort(key=lambda r: r.metrics["objective"])  # stable: the first of equals is first
    if not found:
        ratios = sorted(r.metrics[metric] for r in completed if metric in r.metrics)
        indices = [r.request.trial_index for r in completed]
        stopped = [r.request.trial_index for r in study.state.stopped]
        raise StudyError(
            f"study {study.name} has no completed trial for point={point}; it has the trials "
            f"{indices}"
            + (f", and stopped early: {stopped}" if stopped else "")
            + (f" with {metric} from {ratios[0]:.4f} to {ratios[-1]:.4f}" if ratios else "")
            + ("" if ratios or not completed else f", of which {metric} was not measured")
        )
    return found[:candidates]
