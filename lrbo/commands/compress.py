"""Write the model of a trial as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lrbo import builders, checks, config, export
from lrbo.accounting import account
from lrbo.allocation import Allocation
from lrbo.command_lines import command_line, repeating
from lrbo.commands.asked import points, study_of
from lrbo.commands.finalists import Finalist, finalist
from lrbo.commands.trials import evaluate_between
from lrbo.commands.view import enter_checkpoint
from lrbo.compression import store_
from lrbo.errors import ModelError
from lrbo.evaluation.perplexity import perplexity_of, score
from lrbo.gains import gains
from lrbo.layers import PivotedLinear
from lrbo.loading import load_config, load_model, load_tokenizer, resolve_device, resolve_dtype
from lrbo.merging import save_merged, with_biases
from lrbo.model import cast_, dtype_name, not_finite
from lrbo.model_card import Score, model_card
from lrbo.nested import LowRankFactors
from lrbo.optimization.front import KEEP_RATIO, ceiling_of
from lrbo.optimization.study import Study
from lrbo.progress import Reporter
from lrbo.results import score_rows
from lrbo.schema import CompressConfig, SearchConfig
from lrbo.shell import assigned
from lrbo.trial import TrialRecord
from lrbo.versions import versions
from lrbo.worker import allocation_parameters


def run(chosen: CompressConfig, reporter: Reporter) -> dict[str, Any]:
    """Write the model of a trial as a checkpoint.

    Raises:
        ConfigError: If a value cannot work, or the folder exists.
        StudyError: If there is no such study or trial.
        ModelError: If a number of the model is beyond the dtype that it is to be written in.
        CheckpointError: If format=merged has no place for biases that the method adds, or file
            and accountant disagree on the number of parameters.
    """
    checks.require_valid(chosen)
    study = study_of(chosen)
    about = study.about()
    point = str(chosen.point)
    records = points(study, point, chosen.refit.candidates)
    stored = config.continued(study.config(), [assigned("studies", chosen.studies)])
    with reporter.waiting("Reading texts"):
        problems = checks.check(replace(stored, study=chosen.study))
        plan = builders.plan_search(stored, study, problems)
    if chosen.format == "merged":
        _require_place_for_biases(plan, records)
    if chosen.dtype == "float16":  # of which not every model's numbers are
        _stored_model(plan, study, chosen.dtype)
    ceiling = ceiling_of(point)
    if ceiling is not None and ceiling[0] == KEEP_RATIO:
        evaluate_between(plan, study, ceiling[1], reporter)
        records = points(study, point, chosen.refit.candidates)
        if chosen.format == "merged":  # its ranks may be of other layers
            _require_place_for_biases(plan, records)
    if ceiling is not None:
        metric, limit = ceiling
        taken = records[0]
        reporter.say(
            f"point={point}: trial {taken.request.trial_index} has the lowest loss up to there, "
            f"with {metric} {taken.metrics[metric]:.4f} of {limit:g}"
        )
    found = finalist(plan, study, records, chosen.refit, reporter)
    record, allocation = found.record, found.record.request.allocation
    model = _stored_model(plan, study, chosen.dtype)
    _put_in(model, allocation, found.factors, plan, reporter)
    _require_finite(model)
    as_written = _score_as_written(model, found.nll, plan, about["dtype"], reporter)
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
            "perplexity": perplexity_of(found.nll),
            "tokens": record.metrics["tokens"],
            "dtype": about["dtype"],
        },
        "validation_as_written": as_written,
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
        scores=_scores(study, found, as_written),
        notes=[f"{sentence}." for gain in gains(study.state) for sentence in gain.sentences],
        commands=_commands(chosen, stored, about["dtype"], record.request.trial_index),
        measuring=_measuring(out.name, stored),
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
            "validation_perplexity": f"{as_written['perplexity']:.4f}",
            "format": chosen.format,
            "dtype": dtype_name(model.dtype),
            **(
                {}
                if found.test_nll is None
                else {"test_perplexity": f"{perplexity_of(found.test_nll):.4f}"}
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


def _require_place_for_biases(plan: builders.Plan, records: Sequence[TrialRecord]) -> None:
    """Refuse to merge what has biases that the dense model has no place for.

    Raises:
        CheckpointError: Naming the first layer.
    """
    ranked = {
        name
        for record in records
        for name, rank in record.request.allocation.ranks.items()
        if rank is not None
    }
    biased = [name for name in plan.added_biases if name in ranked]
    with_biases(load_config(plan.source), biased)


def _stored_model(plan: builders.Plan, study: Study, dtype: str) -> PreTrainedModel:
    """Load the dense model of a study on the CPU, and round what was compared as it is stored.

    Args:
        plan: Of the study.
        study: Whose model it must be.
        dtype: Of the configuration; ``auto`` is that of the model's files.

    Raises:
        StudyError: If the model is another one by now.
        ModelError: If a number is beyond the dtype.
    """
    model = load_model(plan.source, dtype=None, device=torch.device("cpu"))
    builders.require_same_model(study, model)
    if dtype != "auto":
        cast_(model, resolve_dtype(dtype, model.device))
        _require_finite(model)
    return model


def _require_finite(model: PreTrainedModel) -> None:
    """Refuse a model with a number that its dtype does not have.

    Raises:
        ModelError: Naming the tensor and the dtypes that reach further.
    """
    if problem := not_finite(model):
        raise ModelError(
            f"dtype={dtype_name(model.dtype)}: {problem} What was rounded is beyond "
            f"{torch.finfo(model.dtype).max:,.0f}; take dtype=bfloat16 or float32."
        )


def _score_as_written(
    model: PreTrainedModel, nll: float, plan: builders.Plan, dtype: str, reporter: Reporter
) -> dict[str, Any]:
    """Return the score on the validation text in the dtype in which the model is written.

    Args:
        model: Compressed, on the CPU; there again afterwards.
        nll: In the dtype of the study, nats per token.
        plan: Of the study.
        dtype: Of the study.
        reporter: Shows progress.

    Raises:
        NonFiniteError: If the model overflows in its dtype.
    """
    own = dtype_name(model.dtype)
    if own != dtype:
        windows = plan.windows["validation"]
        model.to(device=resolve_device(plan.config.model.device))
        with reporter.step(f"Validation text in {own}", windows.scored_tokens, "tokens") as on:
            measured = score(
                model,
                windows.ids,
                batch_windows=plan.config.evaluation.batch_windows,
                chunk_tokens=plan.config.evaluation.chunk_tokens,
                on_tokens=on,
            ).mean
        model.to(device="cpu")
        reporter.say(f"Validation nll in {own}: {measured:.4f}; in {dtype}: {nll:.4f}")
        nll = measured
    return {"nll": nll, "perplexity": perplexity_of(nll), "dtype": own}


def _scores(study: Study, found: Finalist, as_written: Mapping[str, Any]) -> list[Score]:
    """Return what is known of the dense model, baselines, best trial and the model itself."""
    names = {
        "dense": "dense",
        "uniform": "uniform ranks",
        "analytic": "analytic ranks",
        "best": "best trial, before any refit",
    }
    rows = [
        Score(
            names[row.label],
            row.keep_ratio,
            row.validation.get("perplexity"),
            row.test.get("perplexity"),
        )
        for row in score_rows(study)
    ]
    record = found.record
    ratio = record.metrics["keep_ratio"]
    test = None if found.test_nll is None else perplexity_of(found.test_nll)
    rows.append(Score("this model", ratio, perplexity_of(found.nll), test))
    if as_written["dtype"] != study.about()["dtype"]:
        name = f"this model in {as_written['dtype']}, as written"
        rows.append(Score(name, ratio, as_written["perplexity"], None))
    return rows


def _commands(chosen: CompressConfig, searched: SearchConfig, dtype: str, trial: int) -> list[str]:
    """Return the command lines that make the checkpoint again.

    Args:
        chosen: What was typed now.
        searched: Of the study.
        dtype: That the study's model ran in, which ``auto`` may not choose elsewhere.
        trial: That was written.
    """
    own = {"point": str(trial), "out": Path(chosen.out).name, "study": searched.study}
    skipped = ("studies", "output", "refit.candidates")
    options = {k: v for k, v in config.flat(chosen).items() if k not in skipped} | own
    return [
        command_line(command, values, searched.study)
        for command, values in (
            ("search", repeating(searched) | {"model.dtype": dtype}),
            ("compress", options),
        )
    ]


def _measuring(name: str, searched: SearchConfig) -> str:
    """Return the command line that scores a checkpoint on the test text of its study.

    Args:
        name: Of the checkpoint.
        searched: Of the study, all of whose texts decide which part is the test text.
    """
    data = {key: value for key, value in config.flat(searched).items() if key.startswith("data.")}
    return command_line("evaluate", data | {"checkpoint": name}, searched.study)


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
