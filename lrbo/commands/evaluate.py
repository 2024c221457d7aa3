"""Score a checkpoint, or a dense model, on texts and tasks."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrbo import builders, checks, config, export
from lrbo.calibration.corpus import Role, TokenWindows, make_windows
from lrbo.calibration.seen import FILE, seen_shares
from lrbo.commands.tables import console, print_table, record, table
from lrbo.errors import CheckpointError, ConfigError, DataError, ModelError
from lrbo.evaluation.limits import Limits
from lrbo.evaluation.perplexity import score
from lrbo.evaluation.protocols import Protocol, protocol_windows
from lrbo.evaluation.zero_shot import TaskScore, load_tasks, missing_harness, score_tasks
from lrbo.loading import (
    ModelSource,
    load_config,
    load_model,
    load_tokenizer,
    missing_package,
    resolve_device,
    resolve_dtype,
)
from lrbo.model import dtype_name
from lrbo.progress import Reporter
from lrbo.schema import EvaluateConfig
from lrbo.texts import corpus_spec

TEST: Role = "test"
# Share of a text that may occur in what was calibrated on: licences and page frames recur.
SEEN_LIMIT = 0.01


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, before it is loaded.

    Attributes:
        name: For reports.
        source: Of its configuration and tokenizer.
        load: Loads it in a dtype onto a device.
        folder: Of the checkpoint; ``None`` for a model that was not compressed here.
        dtype: Of its weights, in which it was scored when it was written; ``None`` for a model
            that was not compressed here.
    """

    name: str
    source: ModelSource
    load: Callable[[torch.dtype, torch.device], PreTrainedModel]
    folder: Path | None = None
    dtype: str | None = None


def run(chosen: EvaluateConfig, reporter: Reporter) -> dict[str, Any]:
    """Score a checkpoint, or a dense model, on texts and tasks.

    Raises:
        ConfigError: If a value cannot work, a name is not known, the model has no configuration
            or tokenizer, a text is missing, too short, or was calibrated on; all of it before a
            model is loaded.
        CheckpointError: If the checkpoint cannot be opened.
        ModelError: If the model cannot be loaded.
    """
    problems = checks.check(chosen)
    if chosen.checkpoint is None:
        problems += _known(missing_package(builders.model_source(chosen.model)))
    if chosen.tasks:
        problems += _known(missing_harness())
    is_readable, device = not problems, None
    try:
        device = resolve_device(chosen.model.device)
    except ConfigError as error:
        problems += error.problems
    if not is_readable:
        raise ConfigError(problems)
    try:
        subject = _subject(chosen)
        tokenizer = load_tokenizer(subject.source)
        with reporter.waiting("Reading texts"):
            windows, tasks = _texts_and_tasks(chosen, subject, tokenizer, problems)
    except (ModelError, CheckpointError) as error:
        raise ConfigError([*problems, str(error)]) from error
    seen = {} if subject.folder is None else _seen(chosen, subject.folder, windows, problems)
    if device is None or problems:
        raise ConfigError(problems)
    dtype = _dtype(chosen, subject, device, reporter)
    if subject.folder is not None and windows and None in seen.values():
        reporter.say(
            f"{subject.name} does not say which text it has seen, so that is not checked; "
            "lrbo compress writes it since this version"
        )
    with reporter.waiting("Loading the model"):
        model = subject.load(dtype, device)
    found: dict[str, Any] = {
        "model": subject.name,
        "dtype": dtype_name(model.dtype),
        "device": str(device),
    }
    texts = {name: _score_text(model, w, name, chosen, reporter) for name, w in windows.items()}
    for name, shares in seen.items():
        texts[name]["seen"] = None if shares is None else max(shares.values(), default=0.0)
    if TEST in texts:
        found |= texts[TEST]
        _print_test(found)
    for name, rules in _rules(chosen).items():
        texts[name] |= rules
    if chosen.protocols:
        found["protocols"] = texts
        _print_protocols(found)
    if tasks is not None:
        scores = score_tasks(
            model, tokenizer, tasks, batch_items=chosen.batch_items, limit=chosen.limit
        )
        found["tasks"] = {one.task: asdict(one) for one in scores}
        found |= {"limit": chosen.limit, "lm_eval": importlib.metadata.version("lm_eval")}
        _print_tasks(found, scores)
    if chosen.record is not None:
        record(Path(chosen.record), found)
    return found


def _dtype(
    chosen: EvaluateConfig, subject: Subject, device: torch.device, reporter: Reporter
) -> torch.dtype:
    """Return the dtype to score in, where nothing was typed that in which a checkpoint is stored.

    Rounding moves a perplexity by as much as methods differ: the same number must come out.
    """
    wanted = chosen.model.dtype
    if subject.dtype is None:
        return resolve_dtype(wanted, device)
    if wanted == "auto":
        return resolve_dtype(subject.dtype, device)
    if wanted != subject.dtype:
        reporter.say(
            f"{subject.name} is scored in {wanted} and stored in {subject.dtype}; "
            f"model.dtype=auto takes {subject.dtype}"
        )
    return resolve_dtype(wanted, device)


def _known(problem: str | None) -> list[str]:
    """Return a problem as a list."""
    return [] if problem is None else [problem]


def _subject(chosen: EvaluateConfig) -> Subject:
    """Return the model that is evaluated."""
    folder = chosen.checkpoint
    source = builders.model_source(chosen.model) if folder is None else ModelSource("hf", folder)
    if folder is not None and export.is_checkpoint(folder):
        return Subject(
            folder,
            source,
            lambda dtype, device: export.load(folder, dtype=dtype, device=device),
            Path(folder),
            export.stored_dtype(folder),
        )
    merged = Path(folder) if folder is not None and (Path(folder) / FILE).is_file() else None
    return Subject(
        source.path,
        source,
        lambda dtype, device: load_model(source, dtype=dtype, device=device),
        merged,
        None if merged is None else export.stored_dtype(merged),
    )


def _texts_and_tasks(
    chosen: EvaluateConfig,
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[str],
) -> tuple[dict[str, TokenWindows], Any]:
    """Cut the windows of each text and find the tasks; what cannot be is added to the problems."""
    windows: dict[str, TokenWindows] = {}
    tasks = None
    try:
        windows = _windows(chosen, tokenizer)
    except DataError as error:
        problems += error.problems
    if chosen.tasks:
        folder = None if chosen.task_folder is None else Path(chosen.task_folder)
        try:
            tasks = load_tasks(chosen.tasks, folder)
        except DataError as error:
            problems += error.problems
    limits = Limits.of(load_config(subject.source), subject.name)
    problems += limits.of_windows({name: found.ids for name, found in windows.items()})
    if chosen.tasks:
        problems += limits.of_tokenizer(tokenizer.vocab_size)
    return windows, tasks


def _windows(chosen: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, TokenWindows]:
    """Cut the windows of each protocol, or, without protocols and tasks, of the test text.

    Returns:
        Windows by protocol, or of the test text under ``"test"``.

    Raises:
        DataError: Listing every text that is missing or too short.
    """
    if not chosen.protocols and not chosen.tasks:
        spec = corpus_spec(chosen.data, chosen.seed)
        return {TEST: make_windows(spec, tokenizer, only=[TEST])[TEST]}
    problems: list[str] = []
    windows = {}
    for name, found in chosen.protocols.items():
        values = {**vars(found), "path": checks.protocol_file(found, chosen.text_folder)}
        try:
            windows[name] = protocol_windows(Protocol(name=name, **values), tokenizer)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    return windows


def _seen(
    chosen: EvaluateConfig, folder: Path, windows: Mapping[str, TokenWindows], problems: list[str]
) -> dict[str, dict[str, float] | None]:
    """Return which part of each text the checkpoint has seen; too much is added to the problems."""
    seen = {name: seen_shares(folder, found.ids) for name, found in windows.items()}
    for name, shares in seen.items():
        for role, share in (shares or {}).items():
            if share > SEEN_LIMIT and not chosen.allow_seen:
                problems.append(
                    f"{name}: {share:.1%} of {windows[name].text} is in what {folder} used for "
                    f"{role}, so its score would mean nothing; choose another text, or "
                    "allow_seen=true to score it nevertheless, which the result states"
                )
    return seen


def _score_text(
    model: PreTrainedModel,
    windows: TokenWindows,
    name: str,
    chosen: EvaluateConfig,
    reporter: Reporter,
) -> dict[str, Any]:
    """Return the perplexity on a text, with what it was measured on."""
    step = "Evaluation" if name == TEST else name
    with reporter.step(step, windows.scored_tokens, "tokens") as advance:
        found = score(
            model,
            windows.ids,
            batch_windows=chosen.batch_windows,
            chunk_tokens=chosen.chunk_tokens,
            on_tokens=advance,
        )
    count, window = windows.ids.shape
    return {
        "text": windows.text,
        "digest": windows.digest,
        "windows": count,
        "window": window,
        "stride": window,
        "tokens": found.tokens,
        "nll": found.mean,
        "perplexity": found.value,
    }


def _rules(chosen: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Return by which rules each protocol cut its text, and what of them is not the protocol's."""
    changes = config.protocol_changes(chosen)
    return {
        name: {
            "documents": found.documents,
            "join": found.join,
            "bos": found.bos,
            "max_windows": found.max_windows,
            "changed": changes[name],
        }
        for name, found in chosen.protocols.items()
    }


def _print_test(found: Mapping[str, Any]) -> None:
    """Print the perplexity on the test text."""
    console().print(
        f"{found['model']}: perplexity {found['perplexity']:.4f} "
        f"(nll {found['nll']:.5f} nats/token)\n"
        f"on {found['text']}: {found['tokens']:,} tokens in {found['windows']} windows of "
        f"{found['window']}, stride {found['stride']}, {found['dtype']} on {found['device']}",
        markup=False,
        emoji=False,
        soft_wrap=True,
    )
    for note in _seen_notes("the text", found):
        console().print(note, markup=False, emoji=False, soft_wrap=True)


def _seen_notes(name: str, text: Mapping[str, Any]) -> list[str]:
    """Return what must be known about a text that the model has seen a part of."""
    share = text.get("seen")
    return [f"{name}: {share:.2%} of it is in what the model has seen"] if share else []


def _print_protocols(found: Mapping[str, Any]) -> None:
    """Print a line per protocol, and below what is not as its name promises."""
    rows = table("protocol", "perplexity", "nll", "tokens", "windows", "window", "stride")
    notes = []
    for name, text in found["protocols"].items():
        rows.add_row(
            f"{name} *" if text["changed"] else name,
            f"{text['perplexity']:.4f}",
            f"{text['nll']:.5f}",
            f"{text['tokens']:,}",
            f"{text['windows']:,}",
            f"{text['window']:,}",
            f"{text['stride']:,}",
        )
        notes.append(f"{name}: {text['text']}")
        if text["changed"]:
            notes.append(f"* {name} is not the literature's: {'; '.join(text['changed'])}")
        notes += _seen_notes(name, text)
    print_table(_title(found), rows, notes)


def _print_tasks(found: Mapping[str, Any], scores: list[TaskScore]) -> None:
    """Print a line per task and metric."""
    rows = table("task", "metric", "value", "standard error", "items", "shots", "version")
    for one in scores:
        for metric in one.metrics:
            rows.add_row(
                one.task,
                metric.name,
                *("-" if x is None else f"{x:.4f}" for x in (metric.value, metric.error)),
                *("-" if x is None else str(x) for x in (one.items, one.shots, one.version)),
            )
    limited = [f"limit={found['limit']}: not the whole tasks"] if found["limit"] else []
    print_table(_title(found), rows, limited)


def _title(found: Mapping[str, Any]) -> str:
    """Return which model a table is of."""
    return f"{found['model']}, {found['dtype']} on {found['device']}"
