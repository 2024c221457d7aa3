"""Write the model of a trial as a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lrbo import builders, checks, config, export
from lrbo.accounting import account
from lrbo.compression import compress_
from lrbo.errors import StudyError
from lrbo.loading import load_model, load_tokenizer, resolve_dtype
from lrbo.progress import Reporter
from lrbo.schema import CompressConfig
from lrbo.search.study import Study
from lrbo.trial import TrialRecord
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
    record = _point(study, str(chosen.point))
    stored = config.stored_config(study.config_yaml(), [])
    plan = builders.plan_search(stored, study, checks.check(stored))
    run_dtype = getattr(torch, about["dtype"])
    factors = builders.load_or_make_factors(plan, about["model_fingerprint"], run_dtype, reporter)
    dtype = None if chosen.dtype == "auto" else resolve_dtype(chosen.dtype, torch.device("cpu"))
    model = load_model(plan.source, dtype=dtype, device=torch.device("cpu"))
    builders.require_same_model(study, model)
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
            "validation": {
                **{key: record.metrics[key] for key in ("nll", "perplexity", "tokens")},
                "dtype": about["dtype"],
            },
            "data": about["data"],
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
