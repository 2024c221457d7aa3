"""Values that cannot work are named before anything is loaded, all of them at once."""

import copy
import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lrbo.config import compose, refusals
from lrbo.config.schema import (
    CompressConfig,
    DashboardConfig,
    EvaluateConfig,
    ReportConfig,
    SearchConfig,
)
from lrbo.errors import ConfigError
from lrbo.pipeline.checks import check, check_search, check_store, protocol_file, require_valid
from lrbo.study.study_record import study_folder

composed = cache(compose.composed)


def search(*overrides: str) -> SearchConfig:
    """Return a configuration of one's own, which is composed only once."""
    config = copy.deepcopy(composed("search", overrides))
    assert isinstance(config, SearchConfig)
    return config


BAD_SEARCH: dict[str, Any] = {
    "budget.keep_ratio": [0.0, -0.1, 1.01, math.nan],
    "budget.lowest": [0.8, 0.9, 0.0, math.nan],
    "budget.measure": ["flops", "storage"],
    "space.forms": [["banded"], ["dense"], [], ["pivoted", "pivoted"], ["pivoted", "banded"]],
    "search.trials": [0],
    "search.initial": [1],
    "search.size": ["latency", "nll"],
    "search.racing": [0.5, 1.0, math.nan],
    "search.kl_weight": [-0.1, math.inf, math.nan],
    "seed": [-1],
    "data.window": [1],
    "data.max_windows": [0],
    "data.source": ["nowhere"],
    "data.validation.tokens": [511],
    "data.test.path": [None],
    "model.source": ["nowhere"],
    "model.dtype": ["int8"],
    "model.path": ["/no/such/folder", "./none"],
    "method.name": ["magic"],
    "space.granularity": ["block"],
    "space.depth_groups": [0],
    "space.rank_multiple": [0],
    "space.bounds": [[0.9, 0.2], [0.0, 1.0], [0.5], [0.2, 1.1]],
    "space.start": [{"qk": 0.0}, {"qk": [0.5, 1.5]}, {"qk": []}, {"qk": "much"}],
    "space.type": ["ranks"],
    "space.minimum_rank": [8],  # which only weights have
    "method.alpha": [0.5],  # which bolaco does not have
    "calibration.groups": [0],
    "calibration.batch_windows": [0],
    "calibration.labels": ["guessed"],
    "calibration.gradient_share": [0.0, 1.1, math.nan],
    "calibration.memory_gib": [-1.0, math.nan],
    "sensitivity.layers_per_kind": [-1],
    "sensitivity.ranks": [0],
    "sensitivity.windows": [0],
    "warm_start": [["best"], ["study:"], ["study:a:b"]],
    "space.variables": [
        {"qk": 1.5},
        {"qk": [0.5, 0.2]},
        {"qk": "much"},
        {"q": {"k": [0.1, 0.2, 0.3]}},
    ],
    "space.tied": [[[]]],
    "executor.name": ["slurm"],
    "executor.workers": [0, 2],  # of which the inline executor has one
    "executor.devices": [0, 1],  # of which it shares out none
    "executor.oversubscribe": [True],
    "evaluation.batch_windows": [0],
    "evaluation.chunk_tokens": [0],
    "evaluation.kl_top": [0],
    "latency.tokens": [4, 513],  # decoding steps, and more than a window
    "latency.repeats": [2],
    "latency.warmup": [-1],
    "evaluation.pool_tokens": [0, 16384, 16895],  # no more windows than are wanted
    "evaluation.pool_allocations": [1],
    "output": ["yaml"],
    "tracking.uri": [
        "", " ", "sqlite:///", "sqlite://", "sqlite:file.db", "sqlite+pysqlite:///", "http://[::1",
        "http://", "https://:80", "http://host:port", "http://a b", "ftp://host", "mlruns",
        "/mlruns", "file:///mlruns", "postgresql://", "postgres://host/base", "s3://bucket",
        "sqlite:///a\nb", "http:/host", " http://host",
    ],
    "tracking.experiment": ["", "  "],
}  # fmt: skip


RATIOS = ["method=bolaco", "space=per_kind"]
BAD_WEIGHTS: dict[str, Any] = {
    "space.bounds": [[-0.5, 0.4], [0.2, 1.0], [0.5], [0.0, 0.0], [-6.0, 6.0]],
    "space.knots": [1, -1],
    "space.minimum_rank": [-1],
    "space.rank_multiple": [0],
    "space.start": [{"q_proj": 0.5}],
    "sensitivity.enabled": [False],
    "method.input_shrinkage": [-0.1, 1.1, math.nan],
    "method.output_shrinkage": [0.0, 1.1, math.nan],
}


def changed(config: Any, key: str, value: Any) -> Any:
    """Return a copy of a configuration with one nested value replaced."""
    name, _, rest = key.partition(".")
    if isinstance(config, dict):
        return {**config, name: value}
    inner = changed(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: inner})


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD_SEARCH.items() for value in values]
)
def test_a_value_that_cannot_work_is_named_with_what_was_expected(
    key: str, value: Any, tmp_path: Path
) -> None:
    config = search("model=hf", "model.path=organisation/name", *RATIOS)
    good = changed(config, "studies", str(tmp_path))
    assert check(good) == []
    (problem,) = check(changed(good, key, value))
    assert problem.startswith(key)
    if not isinstance(value, dict | list):
        assert repr(value) in problem


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD_WEIGHTS.items() for value in values]
)
def test_a_value_that_weights_cannot_work_with_is_named(
    key: str, value: Any, tmp_path: Path
) -> None:
    good = changed(search("method=loss_aware", "space=weights"), "studies", str(tmp_path))
    assert check(good) == []
    (problem,) = check(changed(good, key, value))
    assert problem.startswith(key)


def test_thresholds_are_of_what_a_front_minimises(tmp_path: Path) -> None:
    one = changed(search(), "studies", str(tmp_path))
    (problem,) = check(changed(one, "search.thresholds", {"loss": 4.0}))
    assert problem.startswith("search.thresholds are for a front; give budget.lowest")
    front = changed(search("budget=front"), "studies", str(tmp_path))
    assert check(changed(front, "search.thresholds", {"loss": 4.0, "keep_ratio": 0.85})) == []
    assert len(check(changed(front, "search.thresholds", {"nll": 4.0, "loss": 0.0}))) == 2
    (problem,) = check(changed(front, "search.thresholds", {"keep_ratio": 0.3}))
    assert "expected a number above budget.lowest=0.5" in problem
    assert check(changed(front, "search.size", "macs_per_token")) == []
    (problem,) = check(changed(one, "search.size", "macs_per_token"))
    assert "is minimised where a front is searched" in problem
    ratios = changed(search("budget=front", *RATIOS), "studies", str(tmp_path))
    assert check(ratios) == []
    (problem,) = check(changed(ratios, "space.bounds", [0.2, 0.85]))
    assert problem.startswith("space.bounds=[0.2, 0.85]: expected an upper bound of at least")
    (problem,) = check(changed(front, "search.racing", 0.99))
    assert "have no single best to race against" in problem
    assert front.study.endswith("_keep0.5-0.9_seed0")
    assert one.study.endswith("_keep0.8_seed0")


def test_a_latency_is_an_objective_where_it_is_measured(tmp_path: Path) -> None:
    timed = ["budget=front", "latency.enabled=true", "search.size=decode_latency_ratio"]
    front = changed(search(*timed), "studies", str(tmp_path))
    assert check(changed(front, "search.thresholds", {"decode_latency_ratio": 0.9})) == []
    (problem,) = check(changed(front, "search.thresholds", {"prefill_latency_ratio": 0.9}))
    assert problem.endswith("a threshold of what is minimised: loss or decode_latency_ratio")
    (problem,) = check(changed(front, "latency.enabled", False))
    assert "decode_latency_ratio' is measured only with latency.enabled=true" in problem
    (problem,) = check(changed(front, "search.size", "latency"))
    for known in ("macs_per_token", "latency.enabled=true", "prefill_latency_ratio"):
        assert known in problem
    (problem,) = check(changed(front, "budget.lowest", None))
    assert problem.startswith("search.size='decode_latency_ratio' is minimised where a front is")
    (problem,) = check(changed(front, "data.window", 4))
    assert problem.startswith("latency.tokens=None: expected more than the 4 decoding steps")


def test_a_front_without_bounds_of_ratios_is_no_crash(tmp_path: Path) -> None:
    ratios = changed(search("budget=front", *RATIOS), "studies", str(tmp_path))
    (problem,) = check(changed(ratios, "space.bounds", []))
    assert problem == "space.bounds=[]: expected [low, high] with 0 < low < high <= 1"


def test_a_pool_has_more_windows_than_are_wanted(tmp_path: Path) -> None:
    config = changed(search("evaluation.pool_tokens=16896"), "studies", str(tmp_path))
    assert config.data.validation.tokens == 16384
    assert check(config) == []  # one window more
    (problem,) = check(changed(config, "data.validation.tokens", None))
    assert "takes all text, and there is nothing to choose" in problem
    assert check(changed(config, "data.max_windows", 33)) == []
    (problem,) = check(changed(config, "data.max_windows", 32))  # which bounds the pool too
    assert "the 32 that data.validation.tokens=16384 asks for, with at most data.max_w" in problem
    (problem,) = refusals.find_problems("search", ["evaluation.pool_token=1"]).values()
    assert "did you mean evaluation.pool_tokens?" in problem


def test_keys_of_the_other_space_are_not_judged(tmp_path: Path) -> None:
    config = changed(search("space=weights"), "studies", str(tmp_path))
    for key, value in (("space.granularity", "none"), ("space.depth_groups", 0)):
        assert check(changed(config, key, value)) == []


def test_all_bad_values_are_named_in_one_error(tmp_path: Path) -> None:
    config = search("model=hf", "model.path=organisation/name", *RATIOS)
    bad = changed(config, "studies", str(tmp_path))
    # These are judged by others: by the source of the model, the length of a window, the method,
    # the type of the space, the number of budgets, the executor and the tokens that are wanted.
    judged = {"model.path", "data.validation.tokens", "method.alpha", "space.type"}
    judged |= {"search.racing", "executor.oversubscribe", "evaluation.pool_tokens"}
    names = sorted(set(BAD_SEARCH) - judged)
    for key in names:
        bad = changed(bad, key, BAD_SEARCH[key][0])
    with pytest.raises(ConfigError) as caught:
        require_valid(bad)
    assert len(caught.value.problems) == len(names)
    for problem in caught.value.problems:
        assert problem in str(caught.value)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    (problem,) = check_search(changed(search(), "studies", str(file / "studies")))
    assert "is a file, not a folder" in problem
    existing = CompressConfig(study="s", out=str(tmp_path))
    (problem,) = check(existing)
    assert "exists already; lrbo overwrites nothing" in problem


def test_no_permission_to_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The superuser may write anywhere, so the answer of the system is replaced.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path / "cache"))
    cache, problem = check_search(changed(search(), "studies", str(tmp_path / "studies")))
    assert f"no permission to write in {tmp_path}" in problem
    assert cache == f"LRBO_CACHE='{tmp_path}/cache': no permission to write in {tmp_path}"
    problem, _ = check(CompressConfig(study="s", out=str(tmp_path / "new" / "folder")))
    assert f"no permission to write in {tmp_path}" in problem


@pytest.mark.parametrize("point", ["best", "7", "keep=0.75", "decode_latency_ratio=1.1"])
def test_a_point_is_best_a_number_or_a_ratio(point: Any, tmp_path: Path) -> None:
    assert check(CompressConfig(study="s", out=str(tmp_path / "new"), point=point)) == []


@pytest.mark.parametrize(
    "point", ["worst", "-1", "keep=0", "keep=1.5", "keep=much", "0.75", "nll=2", "keep"]
)
def test_any_other_point_is_refused(point: Any, tmp_path: Path) -> None:
    (problem,) = check(CompressConfig(study="s", out=str(tmp_path / "new"), point=point))
    assert "expected best, a trial number or keep=RATIO" in problem


def test_evaluate_needs_only_the_test_text_and_a_checkpoint_that_is_there(tmp_path: Path) -> None:
    config = compose.composed("evaluate", ["data=files", "data.test.path=a.txt"])
    assert isinstance(config, EvaluateConfig)
    assert check(config) == []
    config.checkpoint = str(tmp_path / "none")
    assert check(config) == [f"checkpoint={config.checkpoint!r}: no such folder"]
    Path(config.checkpoint).mkdir()
    (problem,) = check(config)
    assert "no config.json in it" in problem
    Path(config.checkpoint, "config.json").touch()
    assert check(config) == []
    config.checkpoint += "/config.json"
    assert check(config) == [
        f"checkpoint={config.checkpoint!r}: a file; expected the folder of a model, with its "
        "config.json"
    ]


def test_a_page_is_of_one_study() -> None:
    assert check(ReportConfig(study="mine", format="html")) == []
    for study in ("sweep_*", ["one", "other"]):
        (problem,) = check(ReportConfig(study=study, format="html"))
        assert "expected the name of one study" in problem
    (problem,) = check(ReportConfig(study="mine", format="pdf"))
    assert problem == "format='pdf': expected text or html"


BAD_EVALUATION: dict[str, Any] = {
    "batch_windows": [0],
    "batch_items": [0],
    "chunk_tokens": [0],
    "limit": [0],
    "text_folder": ["/no/such/folder"],
    "task_folder": ["/no/such/folder"],
    "record": [f"{__file__}/evaluations.jsonl"],
    "protocols.bos": ["always"],
    "protocols.window": [1],
    "protocols.documents": [0],
    "protocols.max_windows": [0],
    "protocols.path": ["/no/such/file"],
}


BAD_BENCHMARK: dict[str, Any] = {
    "checkpoint": ["/no/such/folder", "nowhere", "organisation/name"],
    "dtype": ["int8"],
    "prompts": [[], [0]],
    "batch": [0],
    "steps": [0],
    "repeats": [2],
    "warmup": [-1],
    "threads": [0],
    "record": [f"{__file__}/benchmarks.jsonl"],
    "output": ["yaml"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD_BENCHMARK.items() for value in values]
)
def test_a_value_that_a_benchmark_cannot_work_with_is_named(
    key: str, value: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = compose.composed("benchmark", [f"checkpoint={tmp_path}", f"studies={tmp_path}"])
    assert check(config) == []
    (problem,) = check(changed(config, key, value))
    assert problem.startswith(key)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD_EVALUATION.items() for value in values]
)
def test_a_value_that_an_evaluation_cannot_work_with_is_named(
    key: str, value: Any, tmp_path: Path
) -> None:
    config = compose.composed("evaluate", ["protocols=[ptb]", "tasks=[piqa]"])
    assert isinstance(config, EvaluateConfig)
    config = changed(config, "record", str(tmp_path / "evaluations.jsonl"))
    assert check(config) == []
    if key.startswith("protocols."):
        name = key.removeprefix("protocols.")
        bad = changed(config.protocols["ptb"], name, value)
        config = dataclasses.replace(config, protocols={"ptb": bad})
        key = f"protocols.ptb.{name}"
    else:
        config = changed(config, key, value)
    problems = check(config)
    assert problems
    assert problems[0].startswith(key)


def test_the_file_of_a_protocol_is_looked_for_in_the_folder_unless_it_is_named(
    tmp_path: Path,
) -> None:
    config = compose.composed("evaluate", ["protocols=[ptb]", f"text_folder={tmp_path}"])
    assert isinstance(config, EvaluateConfig)
    ptb = config.protocols["ptb"]
    (problem,) = check(config)
    assert problem == f"text_folder: no file {tmp_path / 'ptb.test.txt'}, which protocols.ptb needs"
    (tmp_path / "ptb.test.txt").touch()
    assert check(config) == []
    assert protocol_file(ptb, str(tmp_path)) == tmp_path / "ptb.test.txt"
    assert protocol_file(ptb, None) is None
    mine = dataclasses.replace(ptb, path="mine.txt")
    assert protocol_file(mine, str(tmp_path)) == Path("mine.txt")


def test_what_only_a_file_has_is_refused_for_a_protocol_of_the_hub() -> None:
    """It was passed over."""
    line = ["protocols=[ptb]", "protocols.ptb.format=csv", "protocols.ptb.column=body"]
    assert [
        problem.partition("; leave")[0] for problem in check(compose.composed("evaluate", line))
    ] == [
        f"protocols.ptb.{given}: only files have one, and this text is the hub's"
        for given in ("format='csv'", "column='body'")
    ]
    assert check(compose.composed("evaluate", [*line, f"protocols.ptb.path={__file__}"])) == []


def test_what_is_for_protocols_or_tasks_is_not_taken_without_them(tmp_path: Path) -> None:
    alone = EvaluateConfig(text_folder=str(tmp_path), task_folder=str(tmp_path), limit=3)
    config = dataclasses.replace(compose.composed("evaluate", []), **{
        key: getattr(alone, key) for key in ("text_folder", "task_folder", "limit")
    })  # fmt: skip
    assert [problem.partition(";")[0] for problem in check(config)] == [
        "text_folder is for protocols",
        "task_folder is for tasks",
        "limit is for tasks",
    ]


def test_a_study_is_a_name_or_a_path(tmp_path: Path) -> None:
    assert study_folder("studies", "mine") == Path("studies/mine")
    assert study_folder("studies", str(tmp_path / "mine")) == tmp_path / "mine"


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///mlflow.db", "sqlite:////srv/mlflow.db", "sqlite+pysqlite:///mlflow.db",
        "http://localhost:5000", "https://user:word@example.org/mlflow", "HTTP://host",
        "http://[::1]:5000", "databricks", "databricks://profile", "postgresql://user@host/base",
        "mysql+pymysql://host/base", "mssql+pyodbc://host/base",
    ],
)  # fmt: skip
def test_every_address_that_mlflow_keeps_runs_at_is_taken(uri: str) -> None:
    assert check_store("uri", uri) == []


def test_a_folder_is_a_store_only_where_mlflow_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert check_store("uri", "/srv/mlruns") == check_store("uri", "file:///srv/mlruns") == []
    assert len(check_store("uri", "")) == 1


def test_a_dashboard_is_asked_for_an_address(tmp_path: Path) -> None:
    config = DashboardConfig(studies=str(tmp_path))
    assert check(config) == []
    (problem,) = check(dataclasses.replace(config, uri=""))
    assert problem.startswith("uri='': expected sqlite:///FILE")


def test_the_name_of_a_study_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    report = ReportConfig(study="run[1]", studies=str(tmp_path), format="html")
    assert "format=html study=run[1]: expected the name of one study" in check(report)
    (tmp_path / "run[1]").mkdir()
    assert check(report) == []
