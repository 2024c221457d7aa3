"""Serve the MLflow UI on the store of the studies."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import psutil

from lrbo import checks
from lrbo.errors import ConfigError, StudyError
from lrbo.interrupts import listening
from lrbo.mlflow_store import absolute_uri, pages_of_runs
from lrbo.options import SQLITE
from lrbo.progress import Reporter
from lrbo.schema import DashboardConfig

PAGES = 8  # that are named; the UI's menu of views has all of them
PATIENCE_S = 5  # an open page keeps a server waiting
LOCAL = ("localhost", "127.0.0.1", "::1")
# Of the environment, what would let the server show another store, or the same one elsewhere.
OTHER_SERVERS = (
    "MLFLOW_ARTIFACTS_ONLY", "MLFLOW_ENABLE_WORKSPACES", "MLFLOW_READ_REPLICA_BACKEND_STORE_URI",
    "MLFLOW_STATIC_PREFIX", "MLFLOW_WORKSPACE", "MLFLOW_WORKSPACE_STORE_URI",
)  # fmt: skip


def run(chosen: DashboardConfig, reporter: Reporter) -> None:
    """Serve the MLflow UI until it is interrupted.

    Raises:
        ConfigError: If a value cannot work, or the port is taken or cannot be used.
        StudyError: If no study was tracked there yet.
        TrackingError: If the store cannot be read.
    """
    file = chosen.uri.removeprefix(SQLITE)
    if file != chosen.uri and not Path(file).is_file():
        raise StudyError(
            f"there is no MLflow store at {chosen.uri} yet; run lrbo search first, or rebuild it "
            "with: lrbo report study=NAME sync=true"
        )
    checks.require_valid(chosen)
    require_free_port(chosen.host, chosen.port)
    uri = absolute_uri(chosen.uri)
    pages = pages_of_runs(uri)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--registry-store-uri", uri]
    command += ["--host", chosen.host, "--port", str(chosen.port)]
    command += ["--workers", "1"]  # of four, each imports all of mlflow before the first page
    command += allowing(chosen)
    address = f"http://{in_address(chosen.host)}:{chosen.port}/"
    reporter.say(f"MLflow UI on {address} (Ctrl-C stops it)")
    if chosen.host not in LOCAL:
        others = (
            ""
            if "*" in chosen.allowed_hosts
            else " Any other name, of a proxy for one, is refused unless it is given: "
            "allowed_hosts=[NAME]"
        )
        reporter.say(
            f"  from elsewhere: http://{socket.gethostname()}:{chosen.port}/ or an address of this "
            f"machine; whoever reaches it can read and change all of it.{others}"
        )
    for name, page in list(pages.items())[:PAGES]:
        reporter.say(f"  {name}: {address}{page}")
    if len(pages) > PAGES:
        reporter.say(f"  and {len(pages) - PAGES} older: in the menu of views over the table")
    environment = {k: v for k, v in os.environ.items() if k not in OTHER_SERVERS}
    # A group of its own: mlflow starts processes that would go on without it. A terminal that is
    # closed does not reach it either, and it would hold the port.
    with (
        listening((signal.SIGHUP,)),
        subprocess.Popen(command, start_new_session=True, env=environment) as server,
    ):
        try:
            status = server.wait()
        except KeyboardInterrupt:
            end(server)
            status = 0
    raise SystemExit(status)


def allowing(chosen: DashboardConfig) -> list[str]:
    """Name to mlflow what a browser may call the server; it refuses every other name.

    That protects from pages which let a name of their own lead here. By itself it knows localhost
    and patterns of private addresses, and lets the pages of localhost alone ask for runs. The
    names and addresses of this machine are as safe.
    """
    given = list(chosen.allowed_hosts)
    if not given and (chosen.host in LOCAL or "MLFLOW_SERVER_ALLOWED_HOSTS" in os.environ):
        return []
    if "*" in given:
        return ["--allowed-hosts", "*", "--cors-allowed-origins", "*"]
    own = [*LOCAL, "0.0.0.0", chosen.host]
    if chosen.host not in LOCAL:
        own += [socket.gethostname(), socket.getfqdn()]
        own += [
            found.address.partition("%")[0]
            for interface in psutil.net_if_addrs().values()
            for found in interface
            if found.family in (socket.AF_INET, socket.AF_INET6)
        ]
    bare = list(dict.fromkeys(map(in_address, [*own, *given])))
    hosts = [*(f"{host}:{chosen.port}" for host in bare), *map(in_address, given)]
    origins = [f"http://{host}" for host in hosts]
    origins += [f"https://{in_address(host)}" for host in given]
    return ["--allowed-hosts", ",".join(hosts), "--cors-allowed-origins", ",".join(origins)]


def in_address(host: str) -> str:
    """Write a host as the address of a page has it."""
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host


def end(server: subprocess.Popen[bytes]) -> None:
    """End a server and every process that it started; at once if it takes longer than seconds."""
    os.killpg(server.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(PATIENCE_S)
    with suppress(ProcessLookupError):  # which would be all of them
        os.killpg(server.pid, signal.SIGKILL)


def require_free_port(host: str, port: int) -> None:
    """Refuse a port that the server could not use; mlflow would end in a traceback.

    Raises:
        ConfigError: Says why, and which one to take.
    """
    try:
        if not 0 < port < 2**16:
            raise OverflowError("expected a number from 1 to 65535")
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with closing(socket.socket(family, socket.SOCK_STREAM)) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        no_host = isinstance(error, socket.gaierror | UnicodeError)
        if no_host or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
            raise ConfigError(
                [
                    f"host={host}: no name or address of this machine ({error}); expected one, as "
                    "host=127.0.0.1, or host=0.0.0.0 for all of them"
                ]
            ) from error
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            reason = "another program uses it already, maybe an earlier dashboard"
        else:
            reason = f"it cannot be used ({error})"
        other = 5001 if port != 5001 else 5002
        raise ConfigError(
            [f"port={port} host={host}: {reason}; take another one: lrbo dashboard port={other}"]
        ) from error
