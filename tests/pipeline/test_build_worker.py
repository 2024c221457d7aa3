"""Made once, used again; made anew as soon as anything that matters is different."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from lrbo import builders, loading, mlflow_store, texts
from lrbo.accounting import STORAGES
from lrbo.builders import model_source
from lrbo.commands import compress, dashboard, search, view
from lrbo.config import composed, to_yaml
from lrbo.errors import ConfigError, ModelError, StudyError
from lrbo.factorization.loss_aware import LossAware
from lrbo.factorization.registry import METHODS
from lrbo.model import fingerprint, map_model
from lrbo.optimization.study import Study, follows, stored_parameters
from lrbo.progress import Reporter
from lrbo.schema import CompressConfig, DashboardConfig, SearchConfig
from lrbo.spaces import build_search_space
from lrbo.tracking import MlflowTracker, NullTracker
from tests.fakes import make_about, make_layers
from tests.tiny import build_on_meta

SMALL = ["experiment=tiny", "search.trials=1", "search.initial=2", "tracking.enabled=false"]
SMALL += [f"data.{role}.tokens=512" for role in ("calibration", "validation", "test")]


class Said(Reporter):
    """Notes what was said and which steps were done."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        """Note a line; what a step took is told as one too."""
        self.lines.append(message)

    @property
    def steps(self) -> list[str]:
        """Return which of the two expensive things were made."""
        found = [line.partition(":")[0] for line in self.lines]
        return [name for name in ("Calibration", "Factorization") if name in found]


def chosen(*overrides: str) -> SearchConfig:
    found = composed("search", [*SMALL, *overrides])
    assert isinstance(found, SearchConfig)
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own, and an empty folder to work in."""
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def other_weights(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the tiny model come out with one number of its weights changed, from then on."""

    def change() -> None:
        original = loading.tiny_model

        def changed(seed: int = 0) -> PreTrainedModel:
            model = original(seed)
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.5
            return model

        monkeypatch.setattr(loading, "tiny_model", changed)

    return change


def make_worker(name: str, *overrides: str) -> tuple[Any, Said]:
    """Build the worker of a study, which is begun if it is new."""
    study, said = Study(Path("studies") / name), Said()
    with study.locked():
        plan = builders.plan_search(chosen(f"study={name}", *overrides), study, [])
        return builders.build_worker(plan, study, said), said


def made(cache: Path) -> dict[str, int]:
    """Return how many results of each sort the cache holds."""
    return {
        folder: len(list((cache / folder).iterdir())) if (cache / folder).is_dir() else 0
        for folder in ("calibration", "factors")
    }


# --- cache -------------------------------------------------------------------------------------


def test_statistics_and_factors_are_made_once(cache: Path) -> None:
    first, said = make_worker("one")
    assert said.steps == ["Calibration", "Factorization"]
    assert made(cache) == {"calibration": 1, "factors": 1}
    # Another study of the same model and text: budget, space and trials are none of their business.
    again, said = make_worker(
        "two",
        "budget.keep_ratio=0.7",
        "space=per_layer",
        "search.trials=3",
        "space.rank_multiple=2",
    )
    assert said.steps == []
    assert made(cache) == {"calibration": 1, "factors": 1}
    assert set(again.factors) == set(first.factors) != set()
    for name, found in first.factors.items():
        assert torch.equal(found.left, again.factors[name].left)
        assert torch.equal(found.right, again.factors[name].right)


BOTH = ["Calibration", "Factorization"]


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["method=svd", "sensitivity.enabled=false"], ["Factorization"]),  # needs no statistics
        (["calibration.gradient_share=1"], BOTH),
        pytest.param(["data.calibration.tokens=256"], BOTH, marks=pytest.mark.slow),
        pytest.param(["data.window=32"], BOTH, marks=pytest.mark.slow),
        pytest.param(["seed=1"], BOTH, marks=pytest.mark.slow),  # it chooses the windows
        pytest.param(["model.dtype=bfloat16"], BOTH, marks=pytest.mark.slow),
        (["calibration.batch_windows=1"], []),  # another order of the same sums
        pytest.param(["data.test.tokens=256"], [], marks=pytest.mark.slow),
        pytest.param(["evaluation.batch_windows=2"], [], marks=pytest.mark.slow),
    ],
)
def test_only_what_matters_is_made_again(
    cache: Path, overrides: list[str], steps: list[str]
) -> None:
    make_worker("one")
    _, said = make_worker("two", *overrides)
    assert said.steps == steps
    assert made(cache) == {
        "calibration": 1 + ("Calibration" in steps),
        "factors": 1 + ("Factorization" in steps),
    }


def test_other_weights_get_factors_of_their_own(
    cache: Path, other_weights: Callable[[], None]
) -> None:
    first, _ = make_worker("one")
    other_weights()
    second, said = make_worker("two")
    assert said.steps == BOTH
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(first.factors[name].right, second.factors[name].right)


def test_factors_that_were_deleted_come_from_the_statistics_that_are_left(cache: Path) -> None:
    first, _ = make_worker("one")
    shutil.rmtree(cache / "factors")
    second, said = make_worker("one")
    assert said.steps == ["Factorization"]
    for name, found in first.factors.items():
        assert torch.equal(found.left, second.factors[name].left)


def test_a_continued_study_keeps_its_dense_scores(cache: Path) -> None:
    make_worker("one")
    journal = Path("studies/one/journal.jsonl").read_bytes()
    _, said = make_worker("one")
    assert not any("Dense" in line for line in said.lines)
    assert Path("studies/one/journal.jsonl").read_bytes() == journal


def test_a_study_keeps_its_windows_when_its_text_is_gone(cache: Path) -> None:
    roles = ("calibration", "validation", "test")
    for role in roles:
        Path(f"{role}.txt").write_text(f"the {role} cat sat on the mat. " * 90, encoding="utf-8")
    texts = [f"data.{role}.path={role}.txt" for role in roles]
    first, _ = make_worker("one", "data=files", "data.window=64", *texts)
    for role in roles:
        Path(f"{role}.txt").unlink()
    again, _ = make_worker("one", "data=files", "data.window=64", *texts)
    assert torch.equal(first.windows, again.windows)


def test_a_beginning_that_was_cut_off_leaves_no_text_to_the_next(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Study, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_worker("one", "data.window=64")
    assert Path("studies/one/tokens.safetensors").is_file()
    again, _ = make_worker("one", "data.window=32")
    other, _ = make_worker("two", "data.window=32")
    assert torch.equal(again.windows, other.windows)


# --- the same model, or none -------------------------------------------------------------------


def fingerprints(change: Callable[[], None]) -> Iterator[str]:
    """Yield the fingerprint of the tiny model before and after its change."""
    yield fingerprint(loading.tiny_model())
    change()
    yield fingerprint(loading.tiny_model())


def test_a_study_begun_with_other_weights_is_refused_with_both_fingerprints(
    cache: Path, other_weights: Callable[[], None]
) -> None:
    config = chosen("study=mine")
    search.run(config, SMALL, Said())
    folder = Path("studies/mine")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}
    old, new = fingerprints(other_weights)
    assert old != new
    wanted = rf"mine was begun with .* {old}, .* {new}.*study=NAME"
    config.search.trials = 2
    with pytest.raises(StudyError, match=wanted):
        search.run(config, SMALL, Said())
    target = CompressConfig(study="mine", out="new")
    with pytest.raises(StudyError, match=wanted):
        compress.run(target, Said())
    assert not Path("new").exists()
    assert {p: p.read_bytes() for p in before} == before


def test_the_model_of_a_study_is_compared_in_the_dtype_of_the_study(cache: Path) -> None:
    make_worker("half", "model.dtype=bfloat16")
    study = Study(Path("studies/half"))
    model = loading.tiny_model()  # float32: the same weights, not yet rounded
    assert fingerprint(model) != study.about()["model_fingerprint"]
    builders.require_same_model(study, model)
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1.0
    with pytest.raises(StudyError, match=r"its weights or config\.json changed"):
        builders.require_same_model(study, model)


# --- plan --------------------------------------------------------------------------------------


def test_a_plan_lists_every_problem_of_model_budget_and_text_at_once(cache: Path) -> None:
    config = chosen("budget.keep_ratio=0.05", "data.test.tokens=9000000")
    with pytest.raises(ConfigError) as caught:
        builders.plan_search(config, Study(Path("studies/none")), [])
    budget, text = caught.value.problems
    assert "smallest feasible budget.keep_ratio" in budget
    assert "data.test" in text


def test_where_values_are_wrong_the_model_is_not_looked_at(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builders, "load_skeleton", lambda _: pytest.fail("model looked at"))
    config = chosen("model.device=cuda:99")
    with pytest.raises(ConfigError) as caught:
        builders.plan_search(config, Study(Path("studies/none")), ["found before"])
    first, device = caught.value.problems
    assert first == "found before"
    assert "model.device='cuda:99' cannot be used here" in device


def test_a_model_that_cannot_be_read_is_named_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: object) -> None:
        raise ModelError("cannot load model 'gone'")

    # Skeleton and tokenizer come from the same place and fail with the same words.
    monkeypatch.setattr(builders, "load_skeleton", missing)
    monkeypatch.setattr(texts, "load_tokenizer", missing)
    with pytest.raises(ConfigError) as caught:
        builders.plan_search(chosen(), Study(Path("studies/none")), [])
    assert caught.value.problems == ["cannot load model 'gone'"]


def test_a_study_says_what_it_was_begun_with(cache: Path) -> None:
    make_worker("one", "method=svd")
    about = Study(Path("studies/one")).about()
    assert about["model_fingerprint"] == fingerprint(loading.tiny_model())
    assert about["model_parameters"] == sum(p.numel() for p in loading.tiny_model().parameters())
    assert (about["dtype"], about["device"], about["adds_bias"]) == ("float32", "cpu", False)
    assert {role: found["windows"] for role, found in about["data"].items()} == {
        "calibration": 512 // 64,
        "validation": 512 // 64,
        "test": 512 // 64,
    }
    assert about["versions"]["torch"] == torch.__version__
    make_worker("two", "method=bolaco")
    other = Study(Path("studies/two")).about()
    assert other["adds_bias"] is True
    assert other["study_id"] != about["study_id"]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_study_counts_a_layer_as_its_budget_does(storage: Any) -> None:
    """Qwen2 has a bias in its first layers and none in the others."""
    config = chosen(f"budget.storage={storage}", "space=weights")
    for case in ("qwen2", "llama_tied", "llama_biased"):
        layers = map_model(build_on_meta(case))
        for method in (*METHODS.values(), LossAware(centred=True)):
            space = build_search_space(config, layers, method)
            plan = builders.Plan(config, model_source(config.model), layers, method, space, {})
            about = builders._about(plan, "a digest", torch.float32, torch.device("cpu"))
            for spec in layers.compressible:
                assert stored_parameters(spec, None, about) == spec.parameters
                for rank in (1, 3, min(spec.out_features, spec.in_features)):
                    counted = stored_parameters(spec, rank, about)
                    assert counted == space.cost(spec, rank), (case, method.name, spec.name)


# --- tracking and dashboard --------------------------------------------------------------------


def begun() -> Study:
    study = Study(Path("studies/mine"))
    config, layers = chosen("study=mine"), make_layers()
    study.begin(make_about(layers, **follows(config, layers)), to_yaml(config))
    return study


def test_tracking_can_be_switched_off(cache: Path) -> None:
    config = chosen("study=mine")
    assert isinstance(view.make_tracker(config, begun()), NullTracker)
    search.run(chosen("study=other"), SMALL, Said())
    assert not Path("studies/mlflow.db").exists()
    config.tracking.enabled = True
    assert isinstance(view.make_tracker(config, begun()), MlflowTracker)


def test_a_relative_store_stays_where_it_is_when_the_folder_changes(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = mlflow_store.absolute_uri("sqlite:///below/this/mlflow.db")
    assert found == f"sqlite:///{cache.parent}/below/this/mlflow.db"
    assert not (cache.parent / "below").exists()  # only who writes there makes it
    monkeypatch.chdir("/")
    assert mlflow_store.absolute_uri(found) == found


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "sqlite:///", "postgresql://u@h/db"])
def test_other_addresses_are_left_as_they_are(cache: Path, uri: str) -> None:
    assert mlflow_store.absolute_uri(uri) == uri


class Server:
    """A process that ended with status 3."""

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> int:
        return 3


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Collect what would be run; it ends with status 3."""
    found: list[list[str]] = []

    def start(command: list[str], *, start_new_session: bool, env: dict[str, str]) -> Server:
        assert start_new_session
        assert not set(dashboard.OTHER_SERVERS) & set(env)
        assert set(env) <= set(os.environ)
        found.append(command)
        return Server()

    monkeypatch.setattr(dashboard.subprocess, "Popen", start)
    monkeypatch.setattr(dashboard, "pages_of_runs", lambda uri: {"mine": "#/runs"})
    return found


def free_port() -> int:
    """Return a port that nobody listens on."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port: int = server.getsockname()[1]
    return port


def test_a_dashboard_without_a_store_says_how_to_make_one(
    cache: Path, commands: list[list[str]]
) -> None:
    config = DashboardConfig(uri="sqlite:///nowhere/mlflow.db")
    with pytest.raises(StudyError, match=r"no MLflow store at .*nowhere/mlflow\.db.*sync=true"):
        dashboard.run(config, Said())
    assert commands == []


@pytest.mark.parametrize("uri", ["sqlite:///my store/mlflow.db", "http://127.0.0.1:8080"])
def test_a_dashboard_serves_the_store_on_host_and_port(
    cache: Path, commands: list[list[str]], uri: str
) -> None:
    store = cache.parent / "my store" / "mlflow.db"
    store.parent.mkdir()
    store.touch()
    said, port = Said(), free_port()
    with pytest.raises(SystemExit) as caught:
        dashboard.run(DashboardConfig(uri=uri, port=port), said)
    assert caught.value.code == 3  # that of the server
    absolute = f"sqlite:///{store}" if uri.startswith("sqlite") else uri
    assert commands == [
        [
            sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", absolute,
            "--registry-store-uri", absolute, "--host", "127.0.0.1", "--port", str(port),
            "--workers", "1",
        ]
    ]  # fmt: skip
    assert f"http://127.0.0.1:{port}" in said.lines[0]
    assert said.lines[1].endswith(f"mine: http://127.0.0.1:{port}/#/runs")


@pytest.fixture
def guard() -> Any:
    """Import what mlflow's server checks requests with; it runs programs while it is imported."""
    from mlflow.server import security_utils

    return security_utils


def test_a_dashboard_for_other_machines_names_what_they_may_call_it(
    guard: Any, cache: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_SERVER_ALLOWED_HOSTS", raising=False)
    monkeypatch.setenv("MLFLOW_WORKSPACE", "a team of another server")
    said, port, name = Said(), free_port(), socket.gethostname()
    given = ["runs.example.org", "*.cluster:8080"]
    chosen = DashboardConfig(
        uri="http://127.0.0.1:8080", host="0.0.0.0", port=port, allowed_hosts=given
    )
    with pytest.raises(SystemExit):
        dashboard.run(chosen, said)
    assert f"http://{name}:{port}/" in said.lines[1]
    assert "allowed_hosts=[NAME]" in said.lines[1]
    options = dict(itertools.pairwise(commands[0]))
    hosts = options["--allowed-hosts"].split(",")
    origins = options["--cors-allowed-origins"].split(",")
    for host in (f"{name}:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", f"localhost:{port}",
                 f"runs.example.org:{port}", "runs.example.org", "n7.cluster:8080"):  # fmt: skip
        assert guard.is_allowed_host_header(hosts, host), host
        assert not guard.should_block_cors_request(f"http://{host}", "POST", origins), host
    for host in ("evil.example.org", f"evil.example.org:{port}", f"10.evil.org:{port}"):
        assert not guard.is_allowed_host_header(hosts, host), host
        assert guard.should_block_cors_request(f"http://{host}", "POST", origins), host


def test_an_address_of_ipv6_stands_in_brackets(cache: Path, commands: list[list[str]]) -> None:
    said, port = Said(), free_port()
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with pytest.raises(SystemExit):
        dashboard.run(DashboardConfig(uri="http://127.0.0.1:8080", host="::1", port=port), said)
    assert f"http://[::1]:{port}/ " in said.lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": ""}, "host='': expected a name or address"),
        ({"allowed_hosts": ["http://x"]}, "allowed_hosts='http://x': expected a host"),
        ({"port": 0}, "port=0 .*from 1 to 65535"),
        ({"port": 65_536}, "port=65536 .*from 1 to 65535"),
        ({"port": -1}, "port=-1 .*from 1 to 65535"),
        (
            {"host": "no.such.host.invalid"},
            "host=no.such.host.invalid: no name or address of this machine",
        ),
        ({"host": "a" * 300}, "host=aaa.*: no name or address of this machine"),
    ],
)
def test_a_dashboard_that_cannot_be_served_is_refused(
    cache: Path, commands: list[list[str]], changes: dict[str, Any], message: str
) -> None:
    values = {"uri": "http://127.0.0.1:8080", "port": free_port()} | changes
    with pytest.raises(ConfigError, match=message):
        dashboard.run(DashboardConfig(**values), Said())
    assert commands == []


def test_a_dashboard_whose_port_is_taken_names_it(cache: Path, commands: list[list[str]]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        config = DashboardConfig(uri="http://127.0.0.1:8080", port=port)
        with pytest.raises(ConfigError, match=rf"port={port} .*uses it.*dashboard port=5001"):
            dashboard.run(config, Said())
    with pytest.raises(ConfigError, match=r"port=70000 .*cannot be used.*dashboard port=5001"):
        dashboard.run(DashboardConfig(uri="http://127.0.0.1:8080", port=70_000), Said())
    for host in ("nowhere.invalid", "a" * 70, "192.0.2.1"):
        with pytest.raises(ConfigError, match=rf"host={host}: no name or address of this"):
            dashboard.require_free_port(host, 5000)
    assert commands == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_end_a_dashboard_in_order(
    number: int, cache: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        signal.raise_signal(number)

    ended: list[object] = []
    monkeypatch.setattr(Server, "wait", interrupted)
    monkeypatch.setattr(dashboard, "end", ended.append)
    config = DashboardConfig(uri="http://127.0.0.1:8080", port=free_port())
    # A shell that runs the tests in the background lets them ignore both signals.
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)
    try:
        with pytest.raises(SystemExit) as caught:
            dashboard.run(config, Said())
    finally:
        signal.signal(number, before)
    assert caught.value.code == 0
    assert [type(one) for one in ended] == [Server]


@pytest.mark.parametrize("ignored", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN);"])
def test_a_server_ends_with_what_it_started(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that does not listen, as mlflow's does not while a page is open."""
    monkeypatch.setattr(dashboard, "PATIENCE_S", 0.3)
    code = (
        f"import signal, subprocess, time; {ignored} child = subprocess.Popen(['sleep', '60']); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as server:
        assert server.stdout is not None
        child = psutil.Process(int(server.stdout.readline()))
        dashboard.end(server)
        assert server.wait() == -(signal.SIGKILL if ignored else signal.SIGTERM)
    _, alive = psutil.wait_procs([child], timeout=10)
    # Nobody may be there to collect what is left of a child whose parent is gone.
    assert all(one.status() == psutil.STATUS_ZOMBIE for one in alive)
