"""Check values before anything is loaded, and report every problem at once."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit

from lrbo.config.choices import BLOCKS, FILE_FORMATS, SQLITE, STUDY, WARM_START
from lrbo.config.conflicts import check_values
from lrbo.config.options import check_options, one_of
from lrbo.config.schema import (
    BenchmarkConfig,
    CompressConfig,
    Config,
    DashboardConfig,
    EvaluateConfig,
    ProtocolConfig,
    RecoverConfig,
    ReportConfig,
    SearchConfig,
)
from lrbo.errors import ConfigError, cut
from lrbo.factorization.options import METHOD_OPTIONS, BaseOptions
from lrbo.files import paths
from lrbo.files.atomic import CACHED, cache_folder
from lrbo.layers.form import DENSE_FORM
from lrbo.layers.forms import FORMS, is_delta, is_joint
from lrbo.layers.options import MEASURES
from lrbo.study.study_record import study_folder
from lrbo.tasks.metrics import TASKS

# Databases that MLflow keeps runs in, and what lets it write to a folder of files.
DATABASES = ("postgresql", "mysql", "mssql")
FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"

ALONE_TOO = "expected a form of single layers too, such as pivoted, for uniform allocations"
MEASURED = "expected budget.measure=bytes or parameters"
ROTATED = "smollm2_135m_rotated"  # by its name in lrbo.models.sources, whose import takes seconds

# What may lie in the folder of a study that was not begun yet.
OWN = re.compile(r"\..*|lock|journal\..*|(config|study)\..*|(tokens|dense)\.safetensors")


def check(config: Config) -> list[str]:
    """Find every problem that shows before anything is loaded."""
    problems = check_values(config)
    keys = {problem.partition("=")[0] for problem in problems}
    names = [p for p in _check_names(config) if p.partition("=")[0] not in keys]
    return [*problems, *names, *_check_machine(config)]


def require_valid(config: Config) -> None:
    """Raise ConfigError, listing every problem, if values cannot work."""
    if problems := check(config):
        raise ConfigError(problems)


def _check_names(config: Config) -> list[str]:
    if not isinstance(config, SearchConfig):
        return []
    problems = one_of(MEASURES).problems("budget.measure", config.budget.measure)
    problems += one_of(TASKS).problems("task", config.task)
    made = {key: value for key, value in vars(config.bases).items() if key != "factor_bits"}
    forms = list(config.space.forms)
    known = {*forms} & {*FORMS}
    if len(known) < len(forms) or not known - {DENSE_FORM}:
        problems.append(
            f"space.forms={forms}: expected some of {', '.join(FORMS)}, each once, and one beside "
            "dense"
        )
    forms = [form for form in forms if form in known]
    problems += _check_joint(config, forms)
    problems += _check_base(config, forms)
    problems += of_tables_alone("space.forms", forms, "budget.include", config.budget.include)
    problems += check_options("bases", {"name": "bases", **made}, {"bases": BaseOptions})
    registry = sys.modules.get("lrbo.factorization.registry")  # whose import takes seconds
    added = {} if registry is None else registry.METHODS  # also those of a program
    return problems + check_options("method", config.method, {**METHOD_OPTIONS, **added})


def _check_joint(config: SearchConfig, forms: list[str]) -> Iterator[str]:
    """Check what forms of whole attentions and MLPs need of the others and of the space."""
    joint = [form for form in forms if is_joint(form)]
    if not joint:
        return
    named = f"space.forms={list(config.space.forms)}"
    if not {*forms} - {*joint, DENSE_FORM}:
        yield f"{named}: {ALONE_TOO}"
    if config.space.type != "weights":
        yield (
            f"{named}: only space=weights decides about options of several layers together "
            f"({', '.join(joint)}); take it, or leave them out"
        )


def of_tables_alone(
    key: str, forms: Sequence[str], include_key: str, include: Sequence[str]
) -> Iterator[str]:
    """Check that forms of tables alone have some, and that layers of blocks have another form."""
    own = [form for form in forms if not FORMS[form].in_blocks]
    if own and {*include} <= {BLOCKS}:
        yield (
            f"{key}={list(forms)}: {', '.join(own)} is of embedding and head alone, and "
            f"{include_key}={list(include)} has neither; add one to it, or leave the form out"
        )
    if own and all(f in own or f == DENSE_FORM or is_joint(f) for f in forms):
        yield f"{key}={list(forms)}: expected a form of layers in blocks too, such as pivoted"


def _check_base(config: SearchConfig, forms: list[str]) -> Iterator[str]:
    """Check what a base model needs of forms, budget and model, and deltas of a base."""
    base, model = config.model.base, config.model
    named = f"space.forms={list(config.space.forms)}"
    deltas = [form for form in forms if is_delta(form)]
    others = [form for form in forms if form not in (*deltas, DENSE_FORM)]
    if base is None:
        if deltas:
            yield (
                f"{named}: {', '.join(deltas)} need the model that this one was fine-tuned from; "
                "give it with model.base=FOLDER, or leave them out"
            )
        return
    given = f"model.base={cut(base)!r}"
    if others:
        yield (
            f"{given}: {', '.join(others)} in {named[: named.index('=')]} need no base; expected "
            "only forms of the change of a weight, as space.forms=[deltas]"
        )
    if list(config.budget.include) != [BLOCKS]:
        yield (
            f"budget.include={list(config.budget.include)}: expected [{BLOCKS}] with {given}; an "
            "embedding or head that changed is stored as it is, and reported"
        )
    if config.budget.measure == "macs":
        yield f"budget.measure='macs': a delta adds to all that the base runs; {MEASURED}"
    if (model.source, model.path) == ("packaged", ROTATED):
        yield (
            f"{given}: model={ROTATED} is in a random basis, and a base is not; take the model as "
            "it is, or fine-tune the rotated one and give it as the base"
        )
    if base == model.path or Path(base).absolute() == Path(model.path).absolute():
        yield f"{given}: it is the model itself, and there is no change to compress"
    if not is_source(base):
        yield from _check_model("model.base", base)


def is_source(name: str) -> bool:
    """Whether a base is named that is no folder and no model of the hub."""
    return name in ("tiny", "smollm2_135m", ROTATED)


def _check_machine(config: Config) -> Iterator[str]:
    problems = paths.check_name("studies", config.studies, root=True)
    problems += paths.check_place("studies", config.studies)
    yield from problems
    if isinstance(config, SearchConfig):
        yield from check_store("tracking.uri", config.tracking.uri)
    if isinstance(config, SearchConfig | CompressConfig) and not problems:
        yield from check_study_path("study", config.studies, config.study)
    if isinstance(config, SearchConfig):
        for name in config.warm_start:
            if name.startswith(STUDY) and WARM_START.fullmatch(name):
                donor = name.split(":")[1]
                yield from check_study_path("warm_start=study", config.studies, donor)
    elif isinstance(config, DashboardConfig):
        yield from check_store("uri", config.uri)
    elif isinstance(config, ReportConfig):
        yield from _check_report(config)
    elif isinstance(config, CompressConfig):
        yield from paths.check_new("out", config.out)
    elif isinstance(config, RecoverConfig):
        yield from paths.check_new("out", config.out)
        problems = _check_model("checkpoint", config.checkpoint)
        yield from problems
        if not problems and not Path(config.checkpoint).is_dir():
            yield f"checkpoint={config.checkpoint!r}: expected a folder of lrbo compress"
        if config.model.path is not None and not is_source(config.model.path):
            yield from _check_model("model.path", config.model.path)
    yield from _check_cache(config)
    if isinstance(config, SearchConfig | EvaluateConfig) and config.model.source == "hf":
        yield from _check_model("model.path", config.model.path)
    if isinstance(config, EvaluateConfig):
        if config.model.base is not None:
            yield f"model.base={config.model.base!r}: expected null; checkpoints name their base"
        yield from _check_evaluate(config)
    if isinstance(config, BenchmarkConfig):
        problems = _check_model("checkpoint", config.checkpoint)
        yield from problems
        if not problems and not Path(config.checkpoint).is_dir():  # a name of the hub, elsewhere
            yield f"checkpoint={config.checkpoint!r}: expected a folder of lrbo compress"
    if isinstance(config, EvaluateConfig | BenchmarkConfig) and config.record is not None:
        yield from paths.check_appended("record", config.record)


def _check_report(config: ReportConfig) -> Iterator[str]:
    names = config.study if isinstance(config.study, list) else [config.study]
    for name in names:
        yield from check_study_path("study", config.studies, str(name))
    several = not isinstance(config.study, str) or is_pattern(config.studies, config.study)
    if config.format == "html" and several:
        yield f"format=html study={config.study}: expected the name of one study"


def _check_evaluate(config: EvaluateConfig) -> Iterator[str]:
    folder = config.checkpoint
    if folder is not None and not (Path(folder) / "adapter_config.json").is_file():
        yield from _check_model("checkpoint", paths.model_folder(folder))
    for key in ("text_folder", "task_folder"):
        if (folder := getattr(config, key)) is not None:
            yield from paths.check_folder(key, folder)
    for name, protocol in config.protocols.items():
        yield from _check_protocol(f"protocols.{name}", protocol, config.text_folder)


def _check_protocol(key: str, protocol: ProtocolConfig, text_folder: str | None) -> Iterator[str]:
    file = protocol_file(protocol, text_folder)
    if file is None:
        for name in ("format", "column"):
            if (value := getattr(protocol, name)) != getattr(ProtocolConfig, name):
                yield (
                    f"{key}.{name}={value!r}: only files have one, and this text is the hub's; "
                    f"leave it out, or give a file with {key}.path. The column of a hub text "
                    f"stands in {key}.hub"
                )
        return
    yield from one_of(FILE_FORMATS).problems(f"{key}.format", protocol.format)
    if paths.kind_of(file) != "file":
        given = "text_folder" if protocol.path is None else f"{key}.path"
        yield f"{given}: no file {file}, which {key} needs"


def protocol_file(protocol: ProtocolConfig, text_folder: str | None) -> Path | None:
    """Return the file of a protocol's text; ``None`` is the hub."""
    if protocol.path is not None:
        return Path(protocol.path)
    return None if text_folder is None else Path(text_folder) / protocol.file


def _check_cache(config: Config) -> list[str]:
    parts: tuple[str, ...]
    if isinstance(config, SearchConfig | CompressConfig):
        needed, parts = "factors", CACHED
    elif (
        isinstance(config, EvaluateConfig)
        and config.checkpoint is None
        and config.model.source == "packaged"
    ):
        needed, parts = "models", ("models",)
    else:
        return []
    cache, problems = cache_folder(), []
    if not (cache / needed).is_dir():  # else all that is needed may be there already
        problems += paths.check_writable("LRBO_CACHE", str(cache))
    for path in (cache / part for part in parts):
        if (kind := paths.kind_of(path)) not in ("folder", "nothing"):
            what = "is a file, not a folder" if kind == "file" else f"is {kind}"
            problems.append(
                f"LRBO_CACHE={str(cache)!r}: {path} {what}; move it away, or set LRBO_CACHE "
                "to another folder"
            )
    return problems


def _check_model(key: str, path: str) -> list[str]:
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


def check_study_path(key: str, studies: str, study: str) -> list[str]:
    """Find the problem of the name of a study, or of its path."""
    folder = study_folder(studies, study)
    return paths.check_name(key, study) or paths.check_place(key, str(folder))


def check_store(key: str, uri: str) -> list[str]:
    """Refuse an address where MLflow can have no store: it would itself do so hours later."""
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
        plugins = {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}
        good = "databricks" in (uri, scheme) or parts.scheme in plugins
    return [] if good else [expected]


def check_search(config: SearchConfig) -> list[str]:
    """Find the problems of values, and those of the folder that a search is to write in."""
    problems = check(config)
    if check_study_path("study", config.studies, config.study):  # is among the problems
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


def is_pattern(studies: str, study: str) -> bool:
    """Whether a text is a pattern of names, and no study has it as its name."""
    return bool(set(study) & set("*?[")) and paths.kind_of(study_folder(studies, study)) != "folder"
