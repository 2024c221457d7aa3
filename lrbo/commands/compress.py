"""Write the model of a trial as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lrbo.allocation.apply import store_
from lrbo.checkpoints import export
from lrbo.checkpoints import nemotron_nas as nas
from lrbo.checkpoints.card import Card
from lrbo.checkpoints.lora import DeltaAdapter
from lrbo.checkpoints.merged import save_merged
from lrbo.checkpoints.stock import Stock, missing_packages, schemes_of, vllm_problems
from lrbo.commands.compress_checks import require_room
from lrbo.config import saved, schema
from lrbo.config.choices import KEEP_RATIO, ceiling_of
from lrbo.config.saved import command_line, repeating
from lrbo.config.schema import CompressConfig, SearchConfig
from lrbo.config.shell import assigned
from lrbo.data.windows import TokenWindows
from lrbo.errors import ConfigError, ModelError
from lrbo.files.tables import Table, columns
from lrbo.layers.options import Option, as_stored
from lrbo.layers.pivoted import PivotedLinear
from lrbo.models.devices import dtype_name, resolve_device, resolve_dtype
from lrbo.models.parameters import cast_, not_finite
from lrbo.pipeline import build_worker, checks, planning
from lrbo.pipeline.delta import Difference
from lrbo.pipeline.feasibility import points, study_of
from lrbo.pipeline.finalists import Finalist, finalist
from lrbo.pipeline.trial_loop import evaluate_between
from lrbo.progress import Reporter
from lrbo.reports.gains import gains
from lrbo.reports.mlflow_view import enter_checkpoint
from lrbo.reports.results import covered_text, score_rows
from lrbo.study.study_record import StudyRecord
from lrbo.study.versions import versions
from lrbo.tasks.metrics import MISSING
from lrbo.trials.records import TrialRecord


def run(config: CompressConfig, reporter: Reporter) -> dict[str, Any]:
    """Write the model of a trial as a checkpoint.

    Raises:
        ConfigError: If a value cannot work, or the folder exists.
        StudyError: If there is no such study or trial.
        ModelError: If a number of the model is beyond the dtype that it is to be written in.
        CheckpointError: If a format of dense layers has no parameter for biases that the method
            adds.
    """
    checks.require_valid(config)
    if config.format == "adapter" and (problem := missing_packages()) is not None:
        raise ConfigError([problem])
    study = study_of(config)
    if config.vllm and study.config.model.base is not None:
        raise ConfigError(
            [
                "vllm=True: a change of a base has no integers to pack; expected false, with which "
                "format=adapter is the same for all readers"
            ]
        )
    point = str(config.point)
    records = points(study, point, config.refit.candidates)
    stored = saved.continued(study.config, [assigned("studies", config.studies)])
    with reporter.waiting("Reading texts"):
        problems = checks.check(replace(stored, study=config.study))
        plan = planning.plan_search(stored, study, problems)
    if config.format != "lrbo" and plan.task.auto_class != "AutoModelForCausalLM":
        raise ConfigError(
            [f"format={config.format!r} is for language models; task={stored.task} has format=lrbo"]
        )
    require_room(config, plan, records)
    if config.dtype == "float16":  # of which not every model's numbers are
        _stored_model(plan, study, config.dtype)
    if (ceiling := ceiling_of(point)) is not None:
        metric, limit = ceiling
        if metric == KEEP_RATIO:
            evaluate_between(plan, study, limit, reporter)
            records = points(study, point, config.refit.candidates)
            require_room(config, plan, records)  # its layers may be others
        lowest = records[0]
        reporter.say(
            f"point={point}: trial {lowest.request.trial_index} has the lowest loss up to there, "
            f"with {metric} {lowest.metrics[metric]:.4f} of {limit:g}"
        )
    result, trial, tags = write(config, plan, study, records, reporter)
    out = Path(config.out)
    enter_checkpoint(stored, study, out, trial, config.register, tags)
    reporter.say(f"How to open it, what it scored and how it was made: {out / export.CARD}")
    return result


def write(
    config: CompressConfig,
    plan: planning.Plan,
    study: StudyRecord,
    records: Sequence[TrialRecord],
    reporter: Reporter,
    *,
    tests: bool = True,
) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Solve completed trials again as is asked for, and write the best as a checkpoint.

    Returns:
        What the command returns, the trial that was written, and tags of the checkpoint for the
        journal. Without ``tests`` what was solved again is not scored on the test text.

    Raises:
        ModelError: If a number of the model is beyond the dtype that it is to be written in.
        CheckpointError: If a format of dense layers has no parameter for biases that the method
            adds.
    """
    about = study.about
    best = finalist(plan, study, records, config.refit, reporter, bases=config.bases, tests=tests)
    record, allocation = best.record, best.record.request.allocation
    model = _stored_model(plan, study, config.dtype)
    difference = Difference.of(plan, model)
    layers = plan.layers
    if difference is not None:
        layers = difference.layers
        reporter.say(f"Beside its layers, {difference.text()}")
        if config.format == "adapter":
            difference.require_adapter([allocation.compressed], plan.added_biases)
    _put_in(model, best, reporter)
    _require_finite(model)
    as_written = _score_as_written(model, best.loss, plan, about.dtype, reporter)
    trial, measure = record.request.trial_index, allocation.budget.measure
    costs, counted = as_stored(
        layers, allocation.options, plan.method.adds_bias, model.dtype.itemsize
    )
    keep_ratio = counted.keep_ratio(measure)
    forms = sorted({option.form for option in allocation.compressed.values()})
    written = {
        "study": study.name,
        "trial": trial,
        "base_model": asdict(plan.source),
        "base_fingerprint": about.model_fingerprint,
        "method": plan.method.name,
        "keep_ratio": keep_ratio,
        "validation": {
            **plan.task.record.measured(best.loss),
            "tokens": record.metrics["tokens"],
            "dtype": about.dtype,
        },
        "validation_as_written": as_written,
        "refit": best.refit,
        "bases": _totals(best),
        "data": study.data,
        "versions": versions(),
    }
    tokens = {role: w for role, w in plan.windows.items() if isinstance(w, TokenWindows)} or None
    out, tokenizer = Path(config.out), plan.task.tokenizer(plan.source)
    *commands, measuring = _commands(config, plan.config, about.dtype, trial)
    stock = None
    adapter = None
    if config.format == "adapter" and difference is None:
        stock = Stock.of(model, allocation.compressed, vllm=config.vllm)
    elif config.format == "adapter" and difference is not None:
        adapter = DeltaAdapter.of(
            model,
            allocation.options,
            difference.changed,
            difference.base,
            by_columns=difference.by_columns,
        )
    layout = nas.NemotronNas.of(model) if config.format == "nemotron_nas" else None
    card = Card(
        out.name,
        config.format,
        written,
        source=plan.source,
        parameters=(counted.model.parameters, counted.model_dense.parameters),
        forms=forms,
        keep_ratio=record.metrics["keep_ratio"],
        scores=_scores(study, best, as_written),
        notes=[f"{sentence}." for gain in gains(study.state) for sentence in gain.sentences],
        commands=commands,
        measuring=None if tokens is None else measuring,
        auto_class=plan.task.auto_class,
        hub_tag=plan.task.record.hub_tag,
        measure=measure,
        stock=stock,
        layout=layout,
        base=None if difference is None else difference.base,
        adapter=adapter,
        others="" if difference is None else difference.text(),
        counted_bytes=counted.model.bytes,
        covered=covered_text(study),
    ).text()
    parameters = counted.model.parameters
    sizes = {}
    if stock is not None:
        stock.save(out, model, tokenizer, card, tokens)
        in_file = stock.parameters
        sizes = {"base_bytes": stock.base_bytes, "adapter_bytes": stock.adapter_bytes}
        reporter.say(
            f"format=adapter: {stock.base_bytes:,} bytes of the base, {stock.adapter_bytes:,} of "
            f"the adapter; format=lrbo holds both in {counted.model.bytes:,}"
        )
        reporter.say(_serving(stock, allocation.compressed))
    elif layout is not None:
        forms = []
        layout.save(out, model, tokenizer, card, tokens)
        in_file = parameters = layout.parameters
        reporter.say(f"format=nemotron_nas: {in_file:,} dense parameters; {layout.summary}")
    elif adapter is not None:
        adapter.save(out, model, tokenizer, card, tokens)
        in_file, sizes = adapter.parameters, {"adapter_bytes": adapter.bytes}
        reporter.say(
            f"format=adapter: {adapter.bytes:,} bytes beside the base {adapter.base_name}, ranks "
            f"up to {adapter.rank}; format=lrbo holds the same in {counted.model.bytes:,}"
        )
    elif config.format == "merged":
        forms = []
        in_file = parameters = save_merged(out, model, tokenizer, card, tokens)
        dense = counted.model_dense.parameters
        effect = f"has {dense - in_file:,} fewer" if in_file < dense else "saves nothing"
        reporter.say(
            f"format=merged: {in_file:,} dense parameters; it opens everywhere and {effect}"
        )
    else:
        in_file = export.save(
            out,
            model,
            tokenizer,
            allocation,
            written,
            costs={name: costs[name] for name in allocation.compressed},
            parameters=parameters,
            card=card,
            with_code=config.format == "remote_code",
            windows=tokens,
            auto_class=plan.task.auto_class,
            base=None if difference is None else difference.base,
            shared=() if difference is None else difference.shared,
        )
    headline = plan.task.record.headline.name
    tags = {
        "keep_ratio": f"{keep_ratio:.4f}",
        "validation": f"{as_written[headline]:.4f}",
        "format": config.format,
        "dtype": as_written["dtype"],
    }
    if best.test_loss is not None:
        tags["test"] = f"{plan.task.record.measured(best.test_loss)[headline]:.4f}"
    result = {
        "folder": str(out),
        "parameters": parameters,
        "parameters_in_file": in_file,
        "keep_ratio": keep_ratio,
        "forms": forms,
        "refit": best.refit,
        "bases": best.bases,
        **sizes,
    }
    return result, trial, tags


def _totals(best: Finalist) -> dict[str, Any] | None:
    """Return the totals of bases that were made again, without their rows by layer."""
    if best.bases is None:
        return None
    trials = best.bases["trials"]
    totals = [{key: row[key] for key in row if key != "rows"} for row in trials]
    return {**best.bases, "trials": totals}


def _serving(stock: Stock, options: Mapping[str, Option]) -> str:
    """Say whether vLLM reads a model, and would if it were packed for it."""
    if not stock.vllm_problems:
        return "vLLM reads it too"
    packed = schemes_of(options, stock.frame, vllm=True)
    mended = not vllm_problems(packed, stock.rank, stock.frame)
    hint = "; vllm=true packs it so that it does" if mended else ""
    return f"vLLM does not read it: {'; '.join(stock.vllm_problems)}{hint}"


def _stored_model(plan: planning.Plan, study: StudyRecord, dtype: str) -> PreTrainedModel:
    """Load the dense model of a study on the CPU, in the dtype that it is written in."""
    model = plan.task.load(plan.source, dtype=None, device=torch.device("cpu"))
    build_worker.require_same_model(study, model)
    if dtype != "auto":
        cast_(model, resolve_dtype(dtype, model.device))
        _require_finite(model)
    return model


def _require_finite(model: PreTrainedModel) -> None:
    """Refuse a model with a number that its dtype does not have."""
    if problem := not_finite(model):
        raise ModelError(
            f"dtype={dtype_name(model.dtype)}: {problem} What was rounded is beyond "
            f"{torch.finfo(model.dtype).max:,.0f}; take dtype=bfloat16 or float32."
        )


def _score_as_written(
    model: PreTrainedModel, nll: float, plan: planning.Plan, dtype: str, reporter: Reporter
) -> dict[str, Any]:
    """Score a model, which stays on the CPU, on the validation text in the dtype that it has.

    ``nll`` is its loss in ``dtype``, that of the study, in nats per token.
    """
    own, record = dtype_name(model.dtype), plan.task.record
    if own != dtype:
        model.to(device=resolve_device(plan.config.model.device))
        losses = plan.losses(model, "validation", f"Validation text in {own}", reporter)
        measured = float(losses.mean())
        model.to(device="cpu")
        reporter.say(
            f"Validation {record.minimized.label} in {own}: {measured:.4f}; in {dtype}: {nll:.4f}"
        )
        nll = measured
    return {**record.measured(nll), "dtype": own}


def _scores(study: StudyRecord, best: Finalist, as_written: Mapping[str, Any]) -> Table:
    task, metric, rows = study.task, study.task.headline, []
    for row in score_rows(study):
        name = "best trial, before any refit" if row.label == "best" else row.label
        rows.append((name, row.keep_ratio, metric.of(row.validation), metric.of(row.test)))
    ratio = best.record.metrics["keep_ratio"]
    test = {} if best.test_loss is None else task.measured(best.test_loss)
    rows.append(("this model", ratio, metric.of(task.measured(best.loss)), metric.of(test)))
    if as_written["dtype"] != study.about.dtype:
        name = f"this model in {as_written['dtype']}, as written"
        rows.append((name, ratio, metric.of(as_written), MISSING))
    measure = best.record.request.allocation.budget.measure
    return Table(
        "Scores",
        columns("model", f"{measure} kept", f"validation {metric.label}", f"test {metric.label}"),
        [[name, f"{share:.1%}", *cells] for name, share, *cells in rows],
    )


def _commands(config: CompressConfig, searched: SearchConfig, dtype: str, trial: int) -> list[str]:
    """The command lines that make the checkpoint again, and score it on the study's test text.

    They name the dtype that the study's model ran in, which ``auto`` may not choose elsewhere.
    """
    name, skipped = Path(config.out).name, ("studies", "output", "refit.candidates")
    options = {k: v for k, v in schema.flat(config).items() if k not in skipped}
    data = {k: v for k, v in schema.flat(searched).items() if k.startswith("data.")}
    values = {
        "search": repeating(searched) | {"model.dtype": dtype},
        "compress": options | {"point": str(trial), "out": name, "study": searched.study},
        "evaluate": data | {"checkpoint": name},
    }
    return [command_line(command, each, searched.study) for command, each in values.items()]


def _put_in(model: PreTrainedModel, best: Finalist, reporter: Reporter) -> None:
    """Replace the layers of a model by their options, as these are stored."""
    allocation = best.record.request.allocation
    with reporter.step("Layers as stored", len(allocation.compressed), "layers") as advance:
        store_(model, allocation, best.factors, on_unit=lambda _: advance(1))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PivotedLinear)}
    if layers:
        name, largest = max(layers.items(), key=lambda item: item[1].growth)
        reporter.say(f"Largest coefficient of the pivoted layers: {largest.growth:.3f} in {name}")
