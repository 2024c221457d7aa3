"""What `lrbo dashboard` starts, tells and refuses, without a server that runs."""

import itertools
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from lrbo.commands import dashboard
from lrbo.config.schema import DashboardConfig
from lrbo.errors import ConfigError, StudyError
from tests.support.small_search import RecordingReporter


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own, and an empty folder to work in."""
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


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
    command_lines: list[list[str]] = []

    def start(command: list[str], *, start_new_session: bool, env: dict[str, str]) -> Server:
        assert start_new_session
        assert not set(dashboard.OTHER_SERVERS) & set(env)
        assert set(env) <= set(os.environ)
        command_lines.append(command)
        return Server()

    monkeypatch.setattr(dashboard.subprocess, "Popen", start)
    monkeypatch.setattr(dashboard, "pages_of_studies", lambda uri: {"mine": "#/runs"})
    return command_lines


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
        dashboard.run(config, RecordingReporter())
    assert commands == []


@pytest.mark.parametrize("uri", ["sqlite:///my store/mlflow.db", "http://127.0.0.1:8080"])
def test_a_dashboard_serves_the_store_on_host_and_port(
    cache: Path, commands: list[list[str]], uri: str
) -> None:
    store = cache.parent / "my store" / "mlflow.db"
    store.parent.mkdir()
    store.touch()
    reporter, port = RecordingReporter(), free_port()
    with pytest.raises(SystemExit) as caught:
        dashboard.run(DashboardConfig(uri=uri, port=port), reporter)
    assert caught.value.code == 3  # that of the server
    absolute = f"sqlite:///{store}" if uri.startswith("sqlite") else uri
    assert commands == [
        [
            sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", absolute,
            "--registry-store-uri", absolute, "--host", "127.0.0.1", "--port", str(port),
            "--workers", "1",
        ]
    ]  # fmt: skip
    assert f"http://127.0.0.1:{port}" in reporter.lines[0]
    assert reporter.lines[1].endswith(f"mine: http://127.0.0.1:{port}/#/runs")


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
    reporter, port, name = RecordingReporter(), free_port(), socket.gethostname()
    given = ["runs.example.org", "*.cluster:8080"]
    config = DashboardConfig(
        uri="http://127.0.0.1:8080", host="0.0.0.0", port=port, allowed_hosts=given
    )
    with pytest.raises(SystemExit):
        dashboard.run(config, reporter)
    assert f"http://{name}:{port}/" in reporter.lines[1]
    assert "allowed_hosts=[NAME]" in reporter.lines[1]
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
    reporter, port = RecordingReporter(), free_port()
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with pytest.raises(SystemExit):
        dashboard.run(DashboardConfig(uri="http://127.0.0.1:8080", host="::1", port=port), reporter)
    assert f"http://[::1]:{port}/ " in reporter.lines[0]


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
        dashboard.run(DashboardConfig(**values), RecordingReporter())
    assert commands == []


def test_a_dashboard_whose_port_is_taken_names_it(cache: Path, commands: list[list[str]]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        config = DashboardConfig(uri="http://127.0.0.1:8080", port=port)
        with pytest.raises(ConfigError, match=rf"port={port} .*uses it.*dashboard port=5001"):
            dashboard.run(config, RecordingReporter())
    with pytest.raises(ConfigError, match=r"port=70000 .*cannot be used.*dashboard port=5001"):
        dashboard.run(
            DashboardConfig(uri="http://127.0.0.1:8080", port=70_000), RecordingReporter()
        )
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
            dashboard.run(config, RecordingReporter())
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
