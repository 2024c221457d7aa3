"""Recover the best trials of a search, one after the other, and rank them again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lrbo.checkpoints import export
from lrbo.checkpoints.calibration_text import SEEN_LIMIT, shared_runs
from lrbo.commands import compress, recover
from lrbo.config.recovery import STUDY_TEXT, DenseConfig
from lrbo.config.schema import (
    CompressConfig,
    DataConfig,
    RecoverConfig,
    SearchConfig,
)
from lrbo.data.windows import TokenWindows
from lrbo.errors import CheckpointError, Collecting, DataError, NonFiniteError
from lrbo.files.atomic import remove_whole
from lrbo.files.parsing import to_json
from lrbo.models.devices import dtype_name, release_memory, resolve_device
from lrbo.pipeline import planning
from lrbo.pipeline.recovering import plan_recovery
from lrbo.pipeline.recovery_text import split
from lrbo.progress import Reporter
from lrbo.recovery import states
from lrbo.reports.mlflow_view import (
    make_tracker,
    params,
    presentation,
    show_checkpoint,
    show_if_possible,
    show_recoveries,
)
from lrbo.reports.recoveries import is_there, recoveries
from lrbo.study.journal import Study
from lrbo.tasks.causal_lm import CausalLM
from lrbo.tracking.tracker import Tracker
from lrbo.trials.records import TrialRecord

FOLDER = "recovered"  # in that of a study


def problems_of(plan: planning.Plan) -> list[str]:
    """List what keeps the best trials of a search from being recovered, before a model is loaded.

    What values alone show is not among it.
    """
    windows = plan.windows
    if not plan.config.recover.enabled:
        return []
    if plan.task.auto_class != CausalLM.auto_class:
        return [
            f"recover.enabled=True: language models can be recovered, and task={plan.config.task} "
            "has none; leave it out"
        ]
    problems = []
    if (dtype := dtype_name(plan.dtype)) not in ("float32", "bfloat16"):
        problems.append(
            f"recover.enabled=True: the study runs in {dtype}, and training needs float32 or "
            "bfloat16; leave it out, or begin another study=NAME with that model.dtype"
        )
    training = windows["calibration"]
    assert isinstance(training, TokenWindows)
    with Collecting(problems, DataError):
        split(training, plan.config.recover.held_back)
    for role in ("validation", "test"):
        share = shared_runs(windows[role].examples, training.ids)
        if share > SEEN_LIMIT:
            problems.append(
                f"recover.enabled=True: {share:.1%} of {windows[role].text} (data.{role}) is in "
                "data.calibration, which is trained on, so its score would mean nothing; choose "
                "other text, or leave it out"
            )
    return problems


def recover_best(config: SearchConfig, study: Study, reporter: Reporter) -> None:
    """Recover the best trials of a locked study that are not yet, and test the best of them all.

    A trial is recovered once with the same settings. One that was interrupted goes on after its
    last finished block or stage, or the last checkpoint of one. Nothing of a search may be in
    memory.

    Raises:
        ConfigError: If memory or a disk cannot hold what is needed, with the sizes.
        CheckpointError: If what an interruption left is damaged, or the best is to be tested and
            its checkpoint was removed.
        ModelError: If a layer cannot be trained, or the dense model changed.
        NonFiniteError: If a loss is not finite, after the other trials were recovered; what was
            finished before it is kept.
    """
    settings, failed = _settings(config), dict[int, str]()
    folder = study.folder / FOLDER / _name_of(settings)
    records = _candidates(study, config.recover.candidates, reporter)
    new = [r for r in records if study.state.recovery(r.request.trial_index, settings) is None]
    if new or not _is_tested(study, settings):
        with _shown(config, study) as tracker:
            with reporter.waiting("Reading texts"):
                plan = planning.plan_search(config, study, [])  # with windows that were selected
            failed = _recover_all(plan, study, new, settings, folder, tracker, reporter)
            if len(failed) < len(records):
                _test_best(plan, study, settings, tracker, reporter)
            show_recoveries(study, tracker)
            show_if_possible(study, tracker)
    for start in sorted(folder.glob("*.start")):  # which the best no longer needs
        remove_whole(start)
    for each in recoveries(study):
        if each.settings == settings:
            best = study.folder / each.events[0]["folder"]
            where = "It is in" if is_there(best) else "It is no longer in"
            reporter.say(f"Recovered: {each.sentence}. {where} {best}")
    if failed:
        why = "; ".join(f"trial {trial}: {error}" for trial, error in failed.items())
        raise NonFiniteError(f"{len(failed)} of {len(new)} trials could not be recovered: {why}")


def _settings(config: SearchConfig) -> dict[str, Any]:
    """Return the settings of a set: recovered trials with the same ones compare."""
    return {**config.recover.section.effective, "seed": config.seed}


def _name_of(settings: Mapping[str, Any]) -> str:
    return hashlib.blake2b(to_json(settings, sort_keys=True).encode(), digest_size=4).hexdigest()


def _candidates(study: Study, count: int, reporter: Reporter) -> list[TrialRecord]:
    """Return the completed trials of the lowest objective, of different options each."""
    records: list[TrialRecord] = []
    for record in sorted(study.state.completed, key=lambda r: r.metrics["objective"]):
        options = record.request.allocation.options
        if all(options != other.request.allocation.options for other in records):
            records.append(record)
    if len(records) < count:
        reporter.say(
            f"recover.candidates={count}: {len(records)} completed trials differ, and those are "
            "recovered"
        )
    return records[:count]


def _is_tested(study: Study, settings: Mapping[str, Any]) -> bool:
    """Whether the best of a set was scored on the test text, or there is no set."""
    return all(
        each.after[0] in each.tests for each in recoveries(study) if each.settings == settings
    )


@contextmanager
def _shown(config: SearchConfig, study: Study) -> Iterator[Tracker]:
    """Yield the tracker of a study whose run goes on."""
    tracker, completed = make_tracker(config, study), False
    try:
        tracker.start(params(config, study))
        tracker.present(presentation(study))
        yield tracker
        completed = True
    finally:
        tracker.finish(completed=completed)


def _recover_all(
    plan: planning.Plan,
    study: Study,
    records: Sequence[TrialRecord],
    settings: Mapping[str, Any],
    folder: Path,
    tracker: Tracker,
    reporter: Reporter,
) -> dict[int, str]:
    """Recover trials one at a time, and note each in the journal when its checkpoint is there.

    Returns:
        Why trials have none, by number: a loss was not finite.
    """
    failed: dict[int, str] = {}
    for number, record in enumerate(records, start=1):
        trial = record.request.trial_index
        out = folder / f"trial-{trial:03d}"
        reporter.say(
            f"Recovery {number} of {len(records)}: trial {trial}, for up to "
            f"{plan.config.recover.minutes:g} min"
        )
        try:
            if not out.exists():  # else it was interrupted just before it was noted
                config = _recover_config(plan, study, out)
                _write_start(plan, study, record, Path(config.checkpoint), reporter)
                release_memory()
                recovery = plan_recovery(config, study, ("validation",))
                recover.recover(recovery, reporter, tracker)
        except KeyboardInterrupt:
            text = f"Stopping: {number - 1} of {len(records)} recoveries are in {study.journal}"
            if (begun := states.folder_of(out)).exists():
                text += f", and what is finished of trial {trial} lies in {begun}"
            reporter.say(text)
            raise
        except NonFiniteError as error:
            failed[trial] = str(error)
            reporter.say(f"Trial {trial} could not be recovered: {error}")
            release_memory()
            continue
        about = _provenance(out)["recovery"]
        study.record(
            "recovered",
            id=about["id"],
            trial=trial,
            folder=str(out.relative_to(study.folder)),
            settings=settings,
            validation={model: about["scores"][model]["validation"] for model in recover.MODELS},
            stages=about["stages"],
        )
        if (left := states.folder_of(out)).exists():
            remove_whole(left)
        release_memory()
    return failed


def _recover_config(plan: planning.Plan, study: Study, out: Path) -> RecoverConfig:
    """Return the values with which `lrbo recover` would do the same."""
    return RecoverConfig(
        checkpoint=str(out.with_name(f"{out.name}.start")),
        out=str(out),
        model=DenseConfig(dtype=study.about.dtype, device=plan.config.model.device),
        data=DataConfig(name=STUDY_TEXT, source="files"),
        recover=plan.config.recover.section,
        studies=plan.config.studies,
        seed=plan.config.seed,
    )


def _write_start(
    plan: planning.Plan, study: Study, record: TrialRecord, folder: Path, reporter: Reporter
) -> None:
    """Write a trial as `lrbo compress` does, but score it on no test text."""
    if folder.exists():
        return
    config = CompressConfig(
        study=plan.config.study,
        studies=plan.config.studies,
        point=str(record.request.trial_index),
        out=str(folder),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    compress.write(config, plan, study, [record], reporter, tests=False)


def _test_best(
    plan: planning.Plan,
    study: Study,
    settings: Mapping[str, Any],
    tracker: Tracker,
    reporter: Reporter,
) -> None:
    """Score the best of a set on the test text, after and before, and enter its checkpoint."""
    (own,) = (each for each in recoveries(study) if each.settings == settings)
    best = own.events[0]
    trial, folder = best["trial"], study.folder / best["folder"]
    if trial in own.tests:
        return
    if not is_there(folder):
        raise CheckpointError(
            f"trial {trial} is the best after recovery and is to be scored on the test text, and "
            f"its checkpoint is no longer in {folder}: put it back there, give another value of "
            "recover, such as recover.minutes, to recover the best trials into a set of their own, "
            "or give recover.enabled=false"
        )
    start = folder.with_name(f"{folder.name}.start")
    _write_start(plan, study, study.state.trials[trial], start, reporter)
    device, record = resolve_device(plan.config.model.device), plan.task.record
    test = {}
    for name, each in (("before", start), ("after", folder)):
        with reporter.waiting("Loading the model"):
            model = export.load(each, dtype=plan.dtype, device=device)
        losses = plan.losses(model, "test", f"Test text, {name} recovery", reporter)
        test[name] = record.measured(float(losses.mean()))
        del model, losses
        release_memory()
    headline = record.headline.name
    scores = {"validation": best["validation"]["after"], "test": test["after"]}
    tags = {text: f"{values[headline]:.4f}" for text, values in scores.items()}
    tags |= {"format": "lrbo", "dtype": study.about.dtype}
    tags |= {"keep_ratio": f"{_provenance(folder)['keep_ratio']:.4f}"}
    event = {"id": best["id"], "trial": trial, "folder": str(folder.absolute())}
    event |= {"register": "link", "tags": tags}
    if all(other["id"] != event["id"] for other in study.state.checkpoints):
        study.record("compressed", **event)
    show_checkpoint(study, tracker, event)
    text = plan.windows["test"].text
    study.record("reranked", trial=trial, settings=settings, text=text, test=test)


def _provenance(folder: Path) -> Any:
    """Return the record in a checkpoint of how it was made."""
    return export.load_config(folder).quantization_config["provenance"]
