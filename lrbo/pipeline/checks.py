"""Check values before anything is loaded, and report every problem at once."""

from __future__ import annotations

import math
import os
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lrbo import paths
from lrbo.accounting import STORAGES
from lrbo.config import flatten, group_keys
from lrbo.errors import ConfigError, cut
from lrbo.front_checks import check_front
from lrbo.optimization.front import LATENCIES, is_point
from lrbo.options import BOS, FILE_FORMATS, RANGES, ROLES, SOURCES, SQLITE, STUDY
from lrbo.ranges import check_numbers
from lrbo.schema import (
    BenchmarkConfig,
    CompressConfig,
    Config,
    DashboardConfig,
    DataConfig,
    EvaluateConfig,
    MethodConfig,
    ProtocolConfig,
    ReportConfig,
    RoleConfig,
    SearchConfig,
    SpaceConfig,
)
from lrbo.storage import CACHED, cache_folder

EXECUTORS = ("inline", "ray")
FORMATS = ("lrbo", "remote_code", "merged")
# Databases that MLflow keeps runs in, and what lets it write to a folder of files.
DATABASES = ("postgresql", "mysql", "mssql")
FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
DTYPES = ("auto", "float32", "bfloat16", "float16")
# What may lie in the folder of a study that was not begun yet.
OWN = re.compile(r"\..*|lock|journal\..*|(config|study)\..*|(tokens|dense)\.safetensors")
WARM_START = re.compile(r"uniform|analytic|start|paper|" + STUDY + r"[^:]+(:\d+)?")


def check(config: Config) -> list[str]:
    """Return every problem that the values alone show, before anything is loaded."""
    numbers = check_numbers(config)
    others = [found for found in _check(config) if found.partition("=")[0] not in numbers]
    return [*numbers.values(), *others]


def _check(config: Config) -> list[str]:
    """Return the problems that single values and several together have."""
    problems: list[str] = []

    def expect(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            problems.append(f"{key}={value!r}: expected {expected}")

    problems += paths.check_name("studies", config.studies, root=True)
    problems += paths.check_place("studies", config.studies)
    if isinstance(config, SearchConfig):
        tracking = config.tracking
        problems += check_store("tracking.uri", tracking.uri)
        experiment = tracking.experiment
        expect(bool(experiment.strip()), "tracking.experiment", experiment, "a name")
    if isinstance(config, SearchConfig | CompressConfig) and not problems:
        problems += check_study(config)
    if isinstance(config, DashboardConfig):
        problems += check_store("uri", config.uri)
        expect(bool(config.host.strip()), "host", config.host, "a name or address of this machine")
        for name in config.allowed_hosts:
            plain = re.fullmatch(r"[^\s,/@]+", name)
            expect(
                bool(plain), "allowed_hosts", name, "a host as runs.example.org, without http://"
            )
    else:
        expect(config.output in ("text", "json"), "output", config.output, "text or json")
    if isinstance(config, ReportConfig):
        names = config.study if isinstance(config.study, list) else [config.study]
        for name in names:
            problems += check_study_path("study", config.studies, str(name))
        expect(config.format in ("text", "html"), "format", config.format, "text or html")
        several = not isinstance(config.study, str) or is_pattern(config.studies, config.study)
        if config.format == "html" and several:
            problems.append(f"format=html study={config.study}: expected the name of one study")
    if isinstance(config, CompressConfig):
        expect(config.dtype in DTYPES, "dtype", config.dtype, " or ".join(DTYPES))
        expect(config.format in FORMATS, "format", config.format, " or ".join(FORMATS))
        kinds = ("link", "copy", "none")
        expect(config.register in kinds, "register", config.register, " or ".join(kinds))
        expect(
            is_point(config.point),
            "point",
            config.point,
            f"best, a trial number or keep=RATIO ({', '.join(f'{x}=RATIO' for x in LATENCIES)}, "
            "where that was measured)",
        )
        refit = config.refit
        expect(0 <= refit.blend <= 1, "refit.blend", refit.blend, "a number from 0 to 1")
        expect(
            0 <= refit.feedback < math.inf, "refit.feedback", refit.feedback, "a number from 0 on"
        )
        expect(0 <= refit.ridge < math.inf, "refit.ridge", refit.ridge, "a number from 0 on")
        power = refit.output_power
        expect(0 <= power <= 1, "refit.output_power", power, "a number from 0 to 1")
        held = refit.held_back
        share = held is None or 0 <= held < 1
        expect(share, "refit.held_back", held, "a number from 0 on and below 1, or null")
        count, named = refit.candidates, str(config.point).isdecimal()
        expect(count >= 1, "refit.candidates", count, "at least 1")
        if count > 1 and (named or not refit.enabled):
            problems.append(
                f"refit.candidates={count}: expected 1 with "
                f"{f'point={config.point}, which names one trial' if named else 'no refit'}"
            )
        problems += paths.check_new("out", config.out)
    problems += _check_cache(config)
    if isinstance(config, SearchConfig | EvaluateConfig):
        model, data = config.model, config.data
        sources = ("packaged", "hf", "tiny")
        expect(model.source in sources, "model.source", model.source, " or ".join(sources))
        expect(model.dtype in DTYPES, "model.dtype", model.dtype, " or ".join(DTYPES))
        expect(data.source in SOURCES, "data.source", data.source, " or ".join(SOURCES))
        expect(data.window >= 2, "data.window", data.window, "at least 2 tokens")
        windows = data.max_windows
        expect(windows is None or windows >= 1, "data.max_windows", windows, "at least 1, or null")
        for role in ROLES:
            found: RoleConfig = getattr(data, role)
            needed = isinstance(config, SearchConfig) or role == "test"
            if not needed:
                continue
            texts = role_paths(found)
            expect(bool(texts), f"data.{role}.path", found.path, "a text or a list of texts")
            problems += _check_format(config, role)
            tokens = found.tokens
            expect(
                tokens is None or tokens >= data.window * max(len(texts), 1),
                f"data.{role}.tokens",
                tokens,
                f"at least one window of {data.window} tokens per text",
            )
        problems += _check_model("model.path", model.path if model.source == "hf" else None)
        expect(config.seed >= 0, "seed", config.seed, "a whole number from 0 on")
    if isinstance(config, EvaluateConfig):
        problems += _check_evaluate(config)
    if isinstance(config, BenchmarkConfig):
        problems += _check_benchmark(config)
    if isinstance(config, SearchConfig):
        problems += _check_search(config)
    return problems


def _check_cache(config: Config) -> list[str]:
    """Return the problems of the cache, if a command keeps anything there."""
    parts: tuple[str, ...]
    if isinstance(config, SearchConfig | CompressConfig):
        kept, parts = "factors", CACHED
    elif (
        isinstance(config, EvaluateConfig)
        and config.checkpoint is None
        and config.model.source == "packaged"
    ):
        kept, parts = "models", ("models",)
    else:
        return []
    cache, problems = cache_folder(), []
    if not (cache / kept).is_dir():  # else all that is needed may be there already
        problems += paths.check_writable("LRBO_CACHE", str(cache))
    for path in (cache / part for part in parts):
        if (kind := paths.kind_of(path)) not in ("folder", "nothing"):
            what = "is a file, not a folder" if kind == "file" else f"is {kind}"
            problems.append(
                f"LRBO_CACHE={str(cache)!r}: {path} {what}; move it away, or set LRBO_CACHE "
                "to another folder"
            )
    return problems


def _check_format(config: SearchConfig | EvaluateConfig, role: str) -> list[str]:
    """Return the problems of how the files of a role are to be read."""
    data, key = config.data, f"data.{role}"
    given: RoleConfig = getattr(data, role)
    if given.format not in FILE_FORMATS:
        return [f"{key}.format={given.format!r}: expected {' or '.join(FILE_FORMATS)}"]
    if data.source != "files":
        return [
            f"{key}.{name}={value!r}: only files have one (data=files); leave it out. The column "
            "of a hub text stands in its path"
            for name in ("format", "column")
            if (value := getattr(given, name)) != getattr(RoleConfig(), name)
        ]
    problems = []
    earlier = ROLES[: ROLES.index(role)] if isinstance(config, SearchConfig) else ()
    for other in earlier:  # roles that name one text divide it
        same: RoleConfig = getattr(data, other)
        if (given.format, given.column) != (same.format, same.column):
            problems += [
                f"{key}: {path} is read as format={given.format} column={given.column}, but "
                f"data.{other} reads it as format={same.format} column={same.column}; give both "
                "the same"
                for path in role_paths(given)
                if path in role_paths(same)
            ]
    return problems


def require_valid(config: Config) -> None:
    """Refuse values that cannot work.

    Raises:
        ConfigError: Listing every problem.
    """
    problems = check(config)
    if problems:
        raise ConfigError(problems)


def _check_search(config: SearchConfig) -> list[str]:
    """Return the problems of a search."""
    problems: list[str] = []

    def expect(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            problems.append(f"{key}={value!r}: expected {expected}")

    problems += _check_method(config.method)
    keep = config.budget.keep_ratio
    expect(0 < keep <= 1, "budget.keep_ratio", keep, "a number above 0 and up to 1")
    storage = config.budget.storage
    expect(storage in STORAGES, "budget.storage", storage, " or ".join(STORAGES))
    problems += _check_space(config.space)
    search = config.search
    expect(search.trials >= 1, "search.trials", search.trials, "at least 1")
    expect(search.initial >= 2, "search.initial", search.initial, "at least 2: baseline and start")
    weight = search.kl_weight
    expect(0 <= weight < math.inf, "search.kl_weight", weight, "a number from 0 on")
    racing = search.racing
    expect(
        racing is None or 0.5 < racing < 1,
        "search.racing",
        racing,
        "a confidence above 0.5 and below 1, or null",
    )
    problems += check_front(config)
    for section, keys in (
        ("calibration", ("groups", "batch_windows")),
        ("evaluation", ("batch_windows", "chunk_tokens", "kl_top")),
        ("sensitivity", ("ranks", "windows")),
    ):
        for key in keys:
            value = getattr(getattr(config, section), key)
            expect(value >= 1, f"{section}.{key}", value, "at least 1")
    problems += _check_pool(config)
    calibration = config.calibration
    labels = calibration.labels
    expect(labels in ("sampled", "data"), "calibration.labels", labels, "sampled or data")
    share = calibration.gradient_share
    expect(0 < share <= 1, "calibration.gradient_share", share, "a number above 0 and up to 1")
    room = calibration.memory_gib
    expect(room >= 0, "calibration.memory_gib", room, "a number from 0 on")
    sensitivity = config.sensitivity
    points = sensitivity.layers_per_kind
    expect(points >= 0, "sensitivity.layers_per_kind", points, "at least 0")
    if config.space.type == "weights" and not sensitivity.enabled:
        problems.append(
            "sensitivity.enabled=False: space.type='weights' multiplies loss curves; enable them, "
            "or choose a space of ratios"
        )
    for name in config.warm_start:
        expect(
            bool(WARM_START.fullmatch(name)),
            "warm_start",
            name,
            "uniform, analytic, start, paper, study:NAME or study:NAME:TRIAL",
        )
        if name.startswith(STUDY) and WARM_START.fullmatch(name):
            problems += check_study_path("warm_start=study", config.studies, name.split(":")[1])
    executor = config.executor
    expect(executor.name in EXECUTORS, "executor.name", executor.name, " or ".join(EXECUTORS))
    for key in ("workers", "devices"):
        value = getattr(executor, key)
        expect(value is None or value >= 1, f"executor.{key}", value, "at least 1, or null")
    shared = {
        "workers": (executor.workers or 1) > 1,
        "address": executor.address is not None,
        "devices": (executor.devices or 0) > 0,
        "oversubscribe": executor.oversubscribe,
    }
    asked = [
        f"executor.{key}={getattr(executor, key)!r}" for key, is_set in shared.items() if is_set
    ]
    if executor.name == "inline" and asked:
        problems.append(
            f"{' and '.join(asked)}: the inline executor runs one trial at a time in this "
            "process; choose executor=ray"
        )
    return problems


def _check_evaluate(config: EvaluateConfig) -> list[str]:
    """Return the problems of an evaluation."""
    problems = _check_model("checkpoint", config.checkpoint)

    def expect(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            problems.append(f"{key}={value!r}: expected {expected}")

    for key in ("batch_windows", "batch_items", "chunk_tokens"):
        expect(getattr(config, key) >= 1, key, getattr(config, key), "at least 1")
    expect(config.limit is None or config.limit >= 1, "limit", config.limit, "at least 1, or null")
    for key in ("text_folder", "task_folder"):
        folder = getattr(config, key)
        problems += [] if folder is None else paths.check_folder(key, folder)
    if config.text_folder is not None and not config.protocols:
        problems.append("text_folder is for protocols; give protocols=[NAME], or leave it out")
    for key in ("task_folder", "limit"):
        if getattr(config, key) is not None and not config.tasks:
            problems.append(f"{key} is for tasks; give tasks=[NAME], or leave it out")
    for name, found in config.protocols.items():
        key = f"protocols.{name}"
        expect(found.bos in BOS, f"{key}.bos", found.bos, " or ".join(BOS))
        expect(found.window >= 2, f"{key}.window", found.window, "at least 2 tokens")
        for limit in ("documents", "max_windows"):
            value = getattr(found, limit)
            expect(value is None or value >= 1, f"{key}.{limit}", value, "at least 1, or null")
        file = protocol_file(found, config.text_folder)
        if file is None:
            problems += [
                f"{key}.{name}={value!r}: only files have one, and this text is the hub's; leave "
                f"it out, or give a file with {key}.path. The column of a hub text stands in "
                f"{key}.hub"
                for name in ("format", "column")
                if (value := getattr(found, name)) != getattr(ProtocolConfig, name)
            ]
        else:
            formats = " or ".join(FILE_FORMATS)
            expect(found.format in FILE_FORMATS, f"{key}.format", found.format, formats)
        if file is not None and paths.kind_of(file) != "file":
            given = "text_folder" if found.path is None else f"{key}.path"
            problems.append(f"{given}: no file {file}, which {key} needs")
    if config.record is not None:
        problems += paths.check_appended("record", config.record)
    return problems


def _check_benchmark(config: BenchmarkConfig) -> list[str]:
    """Return the problems of a benchmark."""
    problems = _check_model("checkpoint", config.checkpoint)
    if not problems and not Path(config.checkpoint).is_dir():  # a name of the hub, elsewhere
        problems.append(f"checkpoint={config.checkpoint!r}: expected a folder of lrbo compress")

    def expect(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            problems.append(f"{key}={value!r}: expected {expected}")

    expect(config.dtype in DTYPES, "dtype", config.dtype, " or ".join(DTYPES))
    lengths = config.prompts
    expect(bool(lengths) and min(lengths) >= 1, "prompts", lengths, "lengths of at least 1 token")
    for key in ("batch", "steps"):
        expect(getattr(config, key) >= 1, key, getattr(config, key), "at least 1")
    expect(config.repeats >= 3, "repeats", config.repeats, "at least 3, for a standard error")
    expect(config.warmup >= 0, "warmup", config.warmup, "a whole number from 0 on")
    expect(config.threads is None or config.threads >= 1, "threads", config.threads, "at least 1")
    if config.record is not None:
        problems += paths.check_appended("record", config.record)
    return problems


def protocol_file(protocol: ProtocolConfig, text_folder: str | None) -> Path | None:
    """Return the file of a protocol's text; ``None`` is the hub."""
    if protocol.path is not None:
        return Path(protocol.path)
    return None if text_folder is None else Path(text_folder) / protocol.file


def _check_pool(config: SearchConfig) -> list[str]:
    """Return the problems of the pool that validation windows are chosen from."""
    problems = []
    evaluation = config.evaluation
    if evaluation.pool_allocations < 2:
        problems.append(
            f"evaluation.pool_allocations={evaluation.pool_allocations!r}: expected at least 2, "
            "for windows differ in what they say of several allocations"
        )
    pool, wanted = evaluation.pool_tokens, config.data.validation.tokens
    if pool is None or config.data.window < 2:
        return problems
    given = f"evaluation.pool_tokens={pool!r}"
    if wanted is None:
        problems.append(
            f"{given}: data.validation.tokens=null takes all text, and there is nothing to choose; "
            "say how many tokens are wanted, or set the pool to null"
        )
    elif windows_of(pool, config.data) <= windows_of(wanted, config.data):
        most = config.data.max_windows
        problems.append(
            f"{given}: expected more windows of data.window={config.data.window} than the "
            f"{windows_of(wanted, config.data)} that data.validation.tokens={wanted} asks for"
            f"{'' if most is None else f', with at most data.max_windows={most}'}, or null"
        )
    return problems


def windows_of(tokens: int, data: DataConfig) -> int:
    """Return how many windows a role has that asks for so many tokens."""
    most = data.max_windows
    return tokens // data.window if most is None else min(tokens // data.window, most)


def _check_method(config: MethodConfig) -> list[str]:
    """Return the problems of the method and its options."""
    methods = {
        name: [key for key in keys if key != "name"] for name, keys in group_keys("method").items()
    }
    # The registry has them too, with the tensors behind them, and where a program has imported it
    # perhaps one more.
    if (registry := sys.modules.get("lrbo.factorization.registry")) is not None:
        methods |= {name: list(registry.options_of(name)) for name in registry.METHODS}
    if config.name not in methods:
        return [f"method.name={config.name!r}: expected one of {', '.join(methods)}"]
    known = methods[config.name]
    problems = [
        f"method.{option}={value!r}: {config.name} has no such option; it has "
        f"{', '.join(known) or 'none'}"
        for option, value in vars(config).items()
        if option != "name" and value is not None and option not in known
    ]
    if config.alpha is not None and not 0 <= config.alpha < math.inf:
        problems.append(f"method.alpha={config.alpha!r}: expected a number from 0 on")
    inputs, outputs = config.input_shrinkage, config.output_shrinkage
    if inputs is not None and not 0 <= inputs <= 1:
        problems.append(f"method.input_shrinkage={inputs!r}: expected a number from 0 to 1")
    if outputs is not None and not 0 < outputs <= 1:
        problems.append(
            f"method.output_shrinkage={outputs!r}: expected a number above 0 and up to 1"
        )
    power = config.output_power
    if power is not None and not 0 <= power <= 1:
        problems.append(f"method.output_power={power!r}: expected a number from 0 to 1")
    return problems


def _check_space(space: SpaceConfig) -> list[str]:
    """Return the problems of the search space."""
    problems: list[str] = []

    def expect(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            problems.append(f"{key}={value!r}: expected {expected}")

    expect(space.type in ("ratios", "weights"), "space.type", space.type, "ratios or weights")
    expect(space.rank_multiple >= 1, "space.rank_multiple", space.rank_multiple, "at least 1")
    least, most = RANGES.get(space.type, (-math.inf, math.inf))
    for name, value in variables(space).items():
        ends = list(value) if isinstance(value, list | tuple) else [value]
        numbers = all(isinstance(end, int | float) for end in ends)
        expect(
            numbers
            and (len(ends) == 1 or (len(ends) == 2 and ends[0] < ends[1]))
            and all(least <= end <= most for end in ends),
            f"space.variables.{name}",
            value,
            f"a number, or [low, high] with low < high, from {least:g} to {most:g}",
        )
    for names in space.tied:
        expect(len(names) > 0, "space.tied", space.tied, "lists of names or patterns of variables")
    bounds = list(space.bounds)
    if space.type == "weights":
        expect(space.minimum_rank >= 0, "space.minimum_rank", space.minimum_rank, "at least 0")
        expect(
            len(bounds) == 2 and 0 < bounds[1] == -bounds[0] <= 5,
            "space.bounds",
            bounds,
            "[-width, width] with 0 < width <= 5, in natural logarithms",
        )
        knots = space.knots
        expect(knots == 0 or knots >= 2, "space.knots", knots, "0, or at least 2")
        expect(not space.start, "space.start", dict(space.start), "nothing: weights start at 0")
        return problems
    rank = space.minimum_rank
    expect(rank == 0, "space.minimum_rank", rank, "0: only space.type=weights has one")
    granularities = ("kind", "depth", "layer")
    expect(
        space.granularity in granularities,
        "space.granularity",
        space.granularity,
        " or ".join(granularities),
    )
    expect(space.depth_groups >= 1, "space.depth_groups", space.depth_groups, "at least 1")
    expect(
        len(bounds) == 2 and 0 < bounds[0] < bounds[1] <= 1,
        "space.bounds",
        bounds,
        "[low, high] with 0 < low < high <= 1",
    )
    for group, value in space.start.items():
        ratios = list(value) if isinstance(value, list | tuple) else [value]
        good = ratios and all(isinstance(r, int | float) and 0 < r <= 1 for r in ratios)
        expect(bool(good), f"space.start.{group}", value, "a ratio in (0, 1], or a list of them")
    return problems


def variables(space: SpaceConfig) -> dict[str, Any]:
    """Return what is set of single variables; ``kind.q_proj`` may be nested, as when typed."""
    return flatten(space.variables) if space.variables else {}


def _check_model(key: str, path: str | None) -> list[str]:
    """Return the problem if a path that cannot be a hub id is no folder with a model."""
    if path is None:
        return []
    kind = paths.kind_of(Path(path)) if path.strip() else "nothing"
    if kind == "file":
        return [f"{key}={path!r}: a file; expected the folder of a model, with its config.json"]
    if kind not in ("folder", "nothing"):
        return [f"{key}={cut(path)!r}: {kind}; expected the folder of a model, or its hub id"]
    is_hub_id = path[:1] not in ("/", ".", "~", "") and path.count("/") <= 1
    if kind == "nothing" and not is_hub_id:
        return [f"{key}={path!r}: no such folder"]
    if kind == "folder" and not (Path(path) / "config.json").is_file():
        return [f"{key}={path!r}: no config.json in it; it is no model, or not a whole one"]
    return []


def check_study(config: SearchConfig | CompressConfig) -> list[str]:
    """Return the problems of the path of a study, with which no file of it can be looked at."""
    return check_study_path("study", config.studies, config.study)


def check_study_path(key: str, studies: str, study: str) -> list[str]:
    """Return the problem if a study cannot be called so, or nothing can be where it would be."""
    folder = str(study_folder(studies, study))
    return paths.check_name(key, study) or paths.check_place(key, folder)


def check_store(key: str, uri: str) -> list[str]:
    """Find the problem of an address at which MLflow could have no store.

    It would take an empty one for a place in the working folder, and others only when it is asked,
    which is long after the search began.
    """
    expected = (
        f"{key}={uri!r}: expected {SQLITE}FILE, the address of a server as "
        "http://localhost:5000, or databricks, postgresql://..., mysql://... or mssql://..."
    )
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port  # which are only read, and may be wrong, here
    except ValueError as error:
        return [f"{expected}; this is none: {error}"]
    scheme = parts.scheme.partition("+")[0]  # behind it a database may name its driver
    behind = uri.partition("://")[2]
    if not uri.isprintable() or uri != uri.strip():
        good = False
    elif scheme == "sqlite":
        good = behind.startswith("/") and len(behind) > 1
    elif parts.scheme in ("http", "https"):
        good = bool(host) and not re.search(r"\s", uri)
    elif scheme in DATABASES:
        good = bool(behind)
    elif scheme in ("", "file") and parts.path and uri != "databricks":
        good = os.environ.get(FILE_STORE, "").lower() in ("true", "1")
        expected += f"; MLflow takes folders only with the environment variable {FILE_STORE}=true"
    else:
        plugins = {found.name for found in entry_points(group="mlflow.tracking_store")}
        good = "databricks" in (uri, scheme) or parts.scheme in plugins
    return [] if good else [expected]


def check_search(config: SearchConfig) -> list[str]:
    """Return the problems of values, and those of the folder that a search is to write in."""
    problems = check(config)
    if check_study(config):  # is among the problems
        return problems
    folder = study_folder(config.studies, config.study)
    if writable := paths.check_writable("study", str(folder)):
        return problems + writable
    if folder.is_dir() and not (folder / "study.json").exists():
        others = sorted(path.name for path in folder.iterdir() if not OWN.fullmatch(path.name))
        if others:
            problems.append(
                f"study={str(folder)!r}: a folder that is no study, with {others[0]} in it; name "
                "one that is new"
            )
    return problems


def role_paths(role: RoleConfig) -> tuple[str, ...]:
    """Return the texts of a role: none, one, or several."""
    if role.path is None:
        return ()
    return tuple(map(str, role.path)) if isinstance(role.path, list) else (str(role.path),)


def is_pattern(studies: str, study: str) -> bool:
    """Tell a pattern of names from the name of a study that is there, which may be one too."""
    return bool(set(study) & set("*?[")) and paths.kind_of(study_folder(studies, study)) != "folder"


def study_folder(studies: str, study: str) -> Path:
    """Return the folder of a study: a name is one under ``studies``, a path is itself."""
    return Path(study) if os.sep in study else Path(studies) / study
