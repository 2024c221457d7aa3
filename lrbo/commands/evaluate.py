"""Score a checkpoint, or a dense model, on texts and tasks."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrbo.checkpoints import export, lora, stock
from lrbo.checkpoints.calibration_text import FILE, SEEN_LIMIT, seen_shares
from lrbo.config import saved
from lrbo.config.schema import EvaluateConfig
from lrbo.data.windows import Role, TokenWindows, make_windows, protocol_windows
from lrbo.errors import CheckpointError, Collecting, ConfigError, DataError, ModelError
from lrbo.evaluation.zero_shot import TaskScore, load_tasks, missing_harness, score_tasks
from lrbo.files.paths import model_folder
from lrbo.files.tables import Table, columns
from lrbo.models.devices import dtype_name, resolve_device, resolve_dtype
from lrbo.models.limits import Limits
from lrbo.models.loading import load_config, load_model, load_tokenizer
from lrbo.models.sources import ModelSource
from lrbo.pipeline import checks, planning
from lrbo.progress import PlainConsole, Reporter
from lrbo.reports.record import record
from lrbo.reports.terminal import print_table
from lrbo.tasks.perplexity import score

TEST: Role = "test"
RULES = ("documents", "join", "bos", "max_windows")  # by which a protocol cuts its text
# How the numbers of a protocol are printed.
NUMBERS = {"perplexity": ".4f", "nll": ".5f"} | dict.fromkeys(
    ("tokens", "windows", "window", "stride"), ","
)


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, before it is loaded."""

    name: str
    source: ModelSource  # of its configuration and tokenizer
    load: Callable[..., PreTrainedModel]  # in a dtype onto a device
    # Of what `lrbo compress` wrote: the folder, and the dtype in which it was written and scored.
    written: Path | None = None
    dtype: str | None = None


def run(config: EvaluateConfig, reporter: Reporter) -> dict[str, Any]:
    """Score a checkpoint, or a dense model, on texts and tasks.

    Raises:
        ConfigError: Listing every problem of values, names, tokenizer and texts, before a model
            is loaded.
        CheckpointError, ModelError: If checkpoint or model cannot be loaded.
    """
    problems = checks.check(config)
    if config.checkpoint is None:
        problems += filter(None, [planning.model_source(config.model).missing_package()])
    if config.tasks:
        problems += filter(None, [missing_harness()])
    is_readable, device = not problems, None
    with Collecting(problems, ConfigError):
        device = resolve_device(config.model.device)
    if not is_readable:
        raise ConfigError(problems)
    try:
        subject = _subject(config)
        tokenizer = load_tokenizer(subject.source)
        with reporter.waiting("Reading texts"):
            windows, tasks = _texts_and_tasks(config, subject, tokenizer, problems)
    except (ModelError, CheckpointError) as error:
        raise ConfigError([*problems, str(error)]) from error
    seen = {} if subject.written is None else _seen(config, subject.written, windows, problems)
    if device is None or problems:
        raise ConfigError(problems)
    # By default that of the checkpoint: rounding moves a perplexity as much as methods differ.
    dtype, stored = config.model.dtype, subject.dtype
    if dtype == "auto":
        dtype = stored or dtype
    elif stored not in (None, dtype):
        reporter.say(
            f"{subject.name} is scored in {dtype} and stored in {stored}; "
            f"model.dtype=auto takes {stored}"
        )
    if None in seen.values():
        reporter.say(
            f"{subject.name} does not say which text it has seen, so that is not checked; "
            "lrbo compress writes it since this version"
        )
    with reporter.waiting("Loading the model"):
        model = subject.load(dtype=resolve_dtype(dtype, device), device=device)
    result: dict[str, Any] = {
        "model": subject.name,
        "dtype": dtype_name(model.dtype),
        "device": str(device),
    }
    texts = {name: _score_text(model, w, name, config, reporter) for name, w in windows.items()}
    for name, shares in seen.items():
        texts[name]["seen"] = None if shares is None else max(shares.values(), default=0.0)
    if TEST in texts:
        result |= texts[TEST]
        _print_test(result)
    if config.protocols:
        for name, changed in saved.protocol_changes(config).items():
            texts[name] |= {rule: getattr(config.protocols[name], rule) for rule in RULES}
            texts[name]["changed"] = changed
        result["protocols"] = texts
        _print_protocols(result)
    if tasks is not None:
        scores = score_tasks(
            model, tokenizer, tasks, batch_items=config.batch_items, limit=config.limit
        )
        result["tasks"] = {one.task: asdict(one) for one in scores}
        result |= {"limit": config.limit, "lm_eval": importlib.metadata.version("lm_eval")}
        _print_tasks(result, scores)
    if config.record is not None:
        record(Path(config.record), result)
    return result


def _subject(config: EvaluateConfig) -> Subject:
    folder = config.checkpoint
    if folder is None:
        source = planning.model_source(config.model)
        return Subject(source.path, source, partial(load_model, source))
    if lora.is_delta_adapter(folder):
        load = partial(lora.load_adapted, folder)
        source, dtype = lora.base_of(folder), lora.stored_dtype(folder)
        return Subject(folder, source, load, Path(folder), dtype)
    own = model_folder(folder)
    source = ModelSource("hf", own)
    is_low_rank = export.is_checkpoint(own)
    load = partial(export.load, own) if is_low_rank else partial(stock.load, folder)
    if not is_low_rank and not (Path(folder) / FILE).is_file():
        return Subject(folder, source, load)
    return Subject(folder, source, load, Path(folder), export.stored_dtype(own))


def _texts_and_tasks(
    config: EvaluateConfig,
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[str],
) -> tuple[dict[str, TokenWindows], Any]:
    """Cut the windows of each text and load the tasks, adding what fails to the problems."""
    windows: dict[str, TokenWindows] = {}
    tasks = None
    if not config.protocols and not config.tasks:
        with Collecting(problems, DataError):
            test = make_windows(config.data, tokenizer, seed=config.seed, only=[TEST])
            windows[TEST] = test[TEST]
    for name, protocol in config.protocols.items():
        path = checks.protocol_file(protocol, config.text_folder)
        with Collecting(problems, DataError):
            windows[name] = protocol_windows(name, protocol, path, tokenizer)
    if config.tasks:
        folder = None if config.task_folder is None else Path(config.task_folder)
        with Collecting(problems, DataError):
            tasks = load_tasks(config.tasks, folder)
    limits = Limits.of(load_config(subject.source), subject.name)
    problems += limits.of_windows({name: text.ids for name, text in windows.items()})
    if config.tasks:
        problems += limits.of_tokenizer(tokenizer.vocab_size)
    return windows, tasks


def _seen(
    config: EvaluateConfig, folder: Path, windows: Mapping[str, TokenWindows], problems: list[str]
) -> dict[str, dict[str, float] | None]:
    """The shares of each text that the checkpoint was made with; large ones are problems."""
    seen = {name: seen_shares(folder, text.ids) for name, text in windows.items()}
    for name, shares in seen.items():
        for role, share in (shares or {}).items():
            if share > SEEN_LIMIT and not config.allow_seen:
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
    config: EvaluateConfig,
    reporter: Reporter,
) -> dict[str, Any]:
    step = "Evaluation" if name == TEST else name
    with reporter.step(step, windows.scored, "tokens") as advance:
        loss = score(
            model,
            windows.ids,
            batch_windows=config.batch_windows,
            chunk_tokens=config.chunk_tokens,
            on_tokens=advance,
        )
    count, window = windows.ids.shape
    return {
        "text": windows.text,
        "digest": windows.digest,
        "windows": count,
        "window": window,
        "stride": window,
        "tokens": loss.tokens,
        "nll": loss.mean,
        "perplexity": loss.value,
    }


def _print_test(result: Mapping[str, Any]) -> None:
    lines = [
        f"{result['model']}: perplexity {result['perplexity']:.4f} "
        f"(nll {result['nll']:.5f} nats/token)",
        f"on {result['text']}: {result['tokens']:,} tokens in {result['windows']} windows of "
        f"{result['window']}, stride {result['stride']}, {result['dtype']} on {result['device']}",
        *_seen_notes("the text", result),
    ]
    PlainConsole().print("\n".join(lines), soft_wrap=True)


def _seen_notes(name: str, text: Mapping[str, Any]) -> list[str]:
    share = text.get("seen")
    return [f"{name}: {share:.2%} of it is in what the model has seen"] if share else []


def _print_protocols(result: Mapping[str, Any]) -> None:
    """Print a line per protocol, and below what is not as its name promises."""
    rows, notes = [], []
    for name, text in result["protocols"].items():
        numbers = (format(text[number], spec) for number, spec in NUMBERS.items())
        rows.append([f"{name} *" if text["changed"] else name, *numbers])
        notes.append(f"{name}: {text['text']}")
        if text["changed"]:
            notes.append(f"* {name} is not the literature's: {'; '.join(text['changed'])}")
        notes += _seen_notes(name, text)
    print_table(Table(_title(result), columns("protocol", *NUMBERS), rows, notes))


def _print_tasks(result: Mapping[str, Any], scores: list[TaskScore]) -> None:
    heads = columns("task", "metric", "value", "standard error", "items", "shots", "version")
    rows = [
        [
            one.task,
            metric.name,
            *("-" if x is None else f"{x:.4f}" for x in (metric.value, metric.error)),
            *("-" if x is None else str(x) for x in (one.items, one.shots, one.version)),
        ]
        for one in scores
        for metric in one.metrics
    ]
    limited = [f"limit={result['limit']}: not the whole tasks"] if result["limit"] else []
    print_table(Table(_title(result), heads, rows, limited))


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['model']}, {result['dtype']} on {result['device']}"
