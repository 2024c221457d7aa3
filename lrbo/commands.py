"""What the commands do, from checked values to a result; `cli` only reads and prints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrbo import builders, checks, config, export
from lrbo.accounting import account
from lrbo.compression import compress_, compressed
from lrbo.errors import ConfigError, StudyError
from lrbo.evaluation.perplexity import score
from lrbo.executors.inline import InlineExecutor
from lrbo.loading import (
    ModelSource,
    load_model,
    load_tokenizer,
    missing_package,
    resolve_device,
    resolve_dtype,
)
from lrbo.progress import Reporter
from lrbo.report import print_report
from lrbo.results import draw_figures, summary
from lrbo.schema import (
    CompressConfig,
    DashboardConfig,
    EvaluateConfig,
    ReportConfig,
    SearchConfig,
)
from lrbo.search.client import SearchClient
from lrbo.search.loop import SearchLoop, SearchSettings
from lrbo.search.study import Study
from lrbo.storage import write_text
from lrbo.tracking import MlflowTracker, NullTracker, Tracker
from lrbo.trial import TrialRecord
from lrbo.worker import Worker, allocation_parameters


def search(chosen: SearchConfig, typed: Sequence[str], reporter: Reporter) -> dict[str, Any]:
    """Run a search to its end, continuing what exists of it.

    Args:
        chosen: The composed values.
        typed: Overrides as typed. If none of them changes what is measured, an existing study
            is continued with its own values, so that its name is all one needs to type.
        reporter: Shows progress.

    Returns:
        The summary of the study.

    Raises:
        ConfigError: Listing every problem, before any model is loaded.
        StudyError: If the study is locked, damaged or stuck.
    """
    study = Study(checks.study_folder(chosen.studies, chosen.study))
    problems: list[str] = []
    if study.exists:
        study.about()
        if all(config.is_free(override.lstrip("+~").partition("=")[0]) for override in typed):
            chosen = config.stored_config(study.config_yaml(), typed)
        else:
            problems += [
                f"study {study.name} was begun with another configuration; {difference}"
                for difference in config.differences(study.config_yaml(), chosen)
            ]
            if problems:
                problems.append(
                    f"to continue it: lrbo search study={chosen.study}; to begin another: "
                    "study=NEWNAME"
                )
    problems += checks.check(chosen)
    with study.locked():
        plan = builders.plan_search(chosen, study, problems)
        return _run(plan, study, reporter)


def _run(plan: builders.Plan, study: Study, reporter: Reporter) -> dict[str, Any]:
    """Search, test and report, with the study locked."""
    chosen = plan.config
    settings = SearchSettings(
        trials=chosen.search.trials,
        initial=chosen.search.initial,
        kl_weight=chosen.search.kl_weight,
        seed=chosen.seed,
    )
    if study.state.trials:
        reporter.say(
            f"Continuing study {study.name}: {len(study.state.ended)} of {settings.trials} "
            "trials are done"
        )
    worker = builders.build_worker(plan, study, reporter)
    tracker = _tracker(chosen, study)
    tracker.start(config.flat(chosen) | _digests(study))
    tracker.sync(study.state.records)
    loop = SearchLoop(
        study=study,
        client=SearchClient(plan.space, seed=chosen.seed),
        worker=worker,
        executor=InlineExecutor(),
        tracker=tracker,
        settings=settings,
        on_trial=lambda record: reporter.say(_trial_line(record, study, settings.trials)),
    )
    completed = False
    try:
        loop.run()
        _test(plan, study, worker, reporter)
        completed = True
    finally:
        if study.state.dense:
            _show(study, tracker)
        tracker.finish(completed=completed)
    print_report(study, Console(highlight=False))
    reporter.say(f"Figures: {study.folder / 'figures'}")
    reporter.say(f"Next: lrbo compress study={chosen.study} out=FOLDER, or: lrbo dashboard")
    return summary(study)


def _trial_line(record: TrialRecord, study: Study, trials: int) -> str:
    """Return one line about a trial that ended."""
    index, origin = record.request.trial_index, record.request.origin
    head = f"Trial {index + 1:>3}/{trials} {origin:<7}"
    if not record.is_completed:
        assert record.result is not None
        return f"{head} {record.result.outcome}: {record.result.error}"
    best = study.state.best()
    assert best is not None
    mark = " *" if best.request.trial_index == index else ""
    seconds = record.seconds
    return (
        f"{head} perplexity {record.metrics['perplexity']:9.3f}  "
        f"best {best.metrics['perplexity']:9.3f}  {seconds['scoring']:5.1f} s "
        f"(+ {seconds['suggestion'] + seconds['allocation']:.1f} s to suggest){mark}"
    )


def _test(plan: builders.Plan, study: Study, worker: Worker, reporter: Reporter) -> None:
    """Score dense, uniform and best on the test text, once each."""
    windows = plan.windows["test"]
    best, uniform = study.state.best(), study.state.uniform
    wanted: dict[str, TrialRecord | None] = {"dense": None}
    if uniform is not None:
        wanted["uniform"] = uniform
    if best is not None:
        wanted["best"] = best
    for label, record in wanted.items():
        trial = None if record is None else record.request.trial_index
        if label in study.state.tests and study.state.tests[label]["trial"] == trial:
            continue
        with reporter.step(f"Test text, {label}", windows.scored_tokens, "tokens") as advance:
            sizes = {
                "batch_windows": plan.config.evaluation.batch_windows,
                "chunk_tokens": plan.config.evaluation.chunk_tokens,
            }
            if record is None:
                found = score(worker.model, windows.ids, **sizes, on_tokens=advance)
            else:
                with compressed(worker.model, record.request.allocation, worker.factors):
                    found = score(worker.model, windows.ids, **sizes, on_tokens=advance)
        metrics = {"nll": found.mean, "perplexity": found.value, "tokens": found.tokens}
        study.record("tested", label=label, trial=trial, text=windows.text, metrics=metrics)


def _tracker(chosen: SearchConfig, study: Study, *, strict: bool = False) -> Tracker:
    """Return the tracker that the configuration asks for."""
    if not chosen.tracking.enabled:
        return NullTracker()
    return MlflowTracker(
        uri=_absolute(chosen.tracking.uri),
        experiment=chosen.tracking.experiment,
        study_id=study.about()["study_id"],
        study_name=study.name,
        artifact_root=Path(chosen.studies).absolute() / "mlflow-artifacts",
        strict=strict,
    )


def _absolute(uri: str) -> str:
    """Return a SQLite address that does not depend on the working folder, its folder made."""
    scheme = "sqlite:///"
    if not uri.startswith(scheme) or uri == scheme:
        return uri
    path = Path(uri.removeprefix(scheme)).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"{scheme}{path}"


def _digests(study: Study) -> dict[str, Any]:
    """Return the digests of model and data, for tracking."""
    about = study.about()
    digests = {f"data.{role}.digest": found["digest"] for role, found in about["data"].items()}
    versions = {f"version.{name}": found for name, found in about["versions"].items()}
    return digests | versions | {"model.fingerprint": about["model_fingerprint"]}


def _show(study: Study, tracker: Tracker) -> None:
    """Draw the figures and put them, the front and the configuration on the parent run."""
    figures = draw_figures(study)
    found = summary(study)
    front = study.folder / "front.json"
    write_text(front, json.dumps(found["front"], indent=2) + "\n")
    numbers = {"dense_nll": found["dense"]["nll"], "dense_perplexity": found["dense"]["perplexity"]}
    for label in ("uniform", "best"):
        if found[label] is not None:
            numbers |= {
                f"{label}_{k}": found[label][k] for k in ("nll", "perplexity", "keep_ratio")
            }
    for label, tested in found["test"].items():
        numbers |= {f"test_{label}_{key}": tested[key] for key in ("nll", "perplexity")}
    artifacts = [*figures, front, study.folder / "config.yaml", study.folder / "study.json"]
    tracker.summary(numbers, artifacts)


def report(chosen: ReportConfig, reporter: Reporter) -> dict[str, Any]:
    """Show what a study found, from its journal alone.

    Raises:
        StudyError: If there is no such study.
        TrackingError: If ``sync`` is asked for and MLflow cannot be reached.
    """
    _require_valid(chosen)
    study = _existing_study(chosen.studies, chosen.study)
    if chosen.sync:
        stored = config.stored_config(study.config_yaml(), [])
        stored.studies = chosen.studies
        tracker = _tracker(stored, study, strict=True)
        tracker.start(config.flat(stored) | _digests(study))
        written = tracker.sync(study.state.records)
        if study.state.dense:
            _show(study, tracker)
        tracker.finish(completed=len(study.state.ended) >= stored.search.trials)
        reporter.say(f"MLflow: {written} trials were missing and are there now")
    print_report(study, Console(highlight=False))
    if chosen.figures:
        for path in draw_figures(study):
            reporter.say(f"Figure: {path}")
    return summary(study)


def _existing_study(studies: str, name: str) -> Study:
    """Open a study that must exist."""
    study = Study(checks.study_folder(studies, name))
    study.about()
    return study


def _require_valid(chosen: ReportConfig | CompressConfig | EvaluateConfig) -> None:
    """Refuse values that cannot work, all at once."""
    problems = checks.check(chosen)
    if problems:
        raise ConfigError(problems)


def compress(chosen: CompressConfig, reporter: Reporter) -> dict[str, Any]:
    """Write the model of a trial as a checkpoint.

    Raises:
        ConfigError: If a value cannot work, or the folder exists.
        StudyError: If there is no such study or trial.
        CheckpointError: If file and accountant disagree on the number of parameters.
    """
    _require_valid(chosen)
    study = _existing_study(chosen.studies, chosen.study)
    record = _point(study, str(chosen.point))
    stored = config.stored_config(study.config_yaml(), [])
    plan = builders.plan_search(stored, study, checks.check(stored))
    about = study.about()
    run_dtype = getattr(torch, about["dtype"])
    factors = builders.load_or_make_factors(plan, about["model_fingerprint"], run_dtype, reporter)
    dtype = None if chosen.dtype == "auto" else resolve_dtype(chosen.dtype, torch.device("cpu"))
    model = load_model(plan.source, dtype=dtype, device=torch.device("cpu"))
    factors = {name: found.to(dtype=model.dtype) for name, found in factors.items()}
    allocation = record.request.allocation
    compress_(model, allocation, factors)
    counted = account(
        plan.layers,
        allocation.ranks,
        allocation_parameters(plan.layers, allocation, plan.method.parameters),
        bytes_per_parameter=model.dtype.itemsize,
    )
    tokenizer = load_tokenizer(plan.source)
    out = Path(chosen.out)
    if chosen.merged:
        in_file = export.save_merged(out, model, tokenizer)
        reporter.say(
            f"merged=true: {in_file:,} dense parameters; it opens everywhere and saves nothing"
        )
    else:
        written = {
            "study": study.name,
            "trial": record.request.trial_index,
            "base_model": asdict(plan.source),
            "base_fingerprint": about["model_fingerprint"],
            "method": plan.method.name,
            "storage": stored.budget.storage,
            "keep_ratio": counted.keep_ratio,
            "validation": {key: record.metrics[key] for key in ("nll", "perplexity", "tokens")},
            "versions": builders.versions(),
        }
        in_file = export.save(out, model, tokenizer, allocation, written, parameters=counted.model)
        reporter.say(f"Open it with: import lrbo; model = lrbo.load({str(out)!r})")
    return {
        "folder": str(out),
        "parameters": in_file if chosen.merged else counted.model,
        "parameters_in_file": in_file,
        "keep_ratio": counted.keep_ratio,
        "storage": "dense" if chosen.merged else stored.budget.storage,
    }


def _point(study: Study, point: str) -> TrialRecord:
    """Return the trial that ``point`` names: best, a number, or keep=RATIO.

    Raises:
        StudyError: If there is no such trial with a value; says which there are.
    """
    completed = study.state.completed
    if point == "best":
        found = study.state.best()
    elif point.startswith("keep="):
        ceiling = float(point.removeprefix("keep="))
        fitting = [r for r in completed if r.metrics["keep_ratio"] <= ceiling]
        found = min(fitting, key=lambda r: r.metrics["objective"], default=None)
    else:
        found = next((r for r in completed if r.request.trial_index == int(point)), None)
    if found is None:
        ratios = sorted(r.metrics["keep_ratio"] for r in completed)
        indices = [r.request.trial_index for r in completed]
        raise StudyError(
            f"study {study.name} has no completed trial for point={point}; it has the trials "
            f"{indices}"
            + (f" with keep ratios {ratios[0]:.4f} to {ratios[-1]:.4f}" if ratios else "")
        )
    return found


def evaluate(chosen: EvaluateConfig, reporter: Reporter) -> dict[str, Any]:
    """Score a checkpoint, or a dense model, on the test text.

    Raises:
        ConfigError: If a value cannot work or the text is too short.
        CheckpointError: If the checkpoint cannot be opened.
        ModelError: If the model cannot be loaded.
    """
    problems = checks.check(chosen)
    source = builders.model_source(chosen.model)
    if chosen.checkpoint is None:
        problems += [problem for problem in [missing_package(source)] if problem]
    if problems:
        raise ConfigError(problems)
    device = resolve_device(chosen.model.device)
    dtype = resolve_dtype(chosen.model.dtype, device)
    tokenizer, load = _to_evaluate(chosen, source)
    windows = builders.test_windows(chosen, tokenizer)
    model = load(dtype, device)
    with reporter.step("Evaluation", windows.scored_tokens, "tokens") as advance:
        found = score(
            model,
            windows.ids,
            batch_windows=chosen.batch_windows,
            chunk_tokens=chosen.chunk_tokens,
            on_tokens=advance,
        )
    window = windows.ids.shape[1]
    name = chosen.checkpoint or chosen.model.path
    Console(highlight=False).print(
        f"{name}: perplexity {found.value:.4f} (nll {found.mean:.5f} nats/token)\n"
        f"on {windows.text}: {found.tokens:,} tokens in {len(windows.ids)} windows of {window}, "
        f"stride {window}, {model.dtype} on {device}",
        markup=False,
        soft_wrap=True,
    )
    return {
        "text": windows.text,
        "window": window,
        "stride": window,
        "tokens": found.tokens,
        "nll": found.mean,
        "perplexity": found.value,
    }


def _to_evaluate(
    chosen: EvaluateConfig, source: ModelSource
) -> tuple[PreTrainedTokenizerBase, Callable[[torch.dtype, torch.device], PreTrainedModel]]:
    """Return the tokenizer, and what loads the model once the text is known to be long enough."""
    folder = chosen.checkpoint
    if folder is None:
        return load_tokenizer(source), lambda dtype, device: load_model(
            source, dtype=dtype, device=device
        )
    if export.is_checkpoint(folder):
        tokenizer = load_tokenizer(ModelSource("hf", folder))
        return tokenizer, lambda dtype, device: export.load(folder, dtype=dtype, device=device)
    plain = ModelSource("hf", folder)
    return load_tokenizer(plain), lambda dtype, device: load_model(
        plain, dtype=dtype, device=device
    )


def dashboard(chosen: DashboardConfig, reporter: Reporter) -> None:
    """Serve the MLflow UI until it is interrupted.

    Raises:
        StudyError: If no study was tracked there yet.
    """
    uri = _absolute(chosen.uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise StudyError(
            f"there is no MLflow store at {uri} yet; run lrbo search first, or rebuild it with: "
            "lrbo report study=NAME sync=true"
        )
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--host", chosen.host, "--port", str(chosen.port)]
    reporter.say(f"MLflow UI on http://{chosen.host}:{chosen.port} (Ctrl-C stops it)")
    try:
        raise SystemExit(subprocess.run(command, check=False).returncode)
    except KeyboardInterrupt:
        raise SystemExit(0) from None
