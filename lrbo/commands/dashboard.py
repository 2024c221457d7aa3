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

from lrbo.config.choices import SQLITE
from lrbo.config.schema import DashboardConfig
from lrbo.errors import ConfigError, StudyError
from lrbo.interrupts import listening
from lrbo.pipeline import checks
from lrbo.progress import Reporter
from lrbo.tracking.mlflow_store import absolute_uri, pages_of_studies

PAGES = 9  # that are named: of all studies, and two of each of the newest
PATIENCE_S = 5  # an open page keeps a server waiting
LOCAL = ("localhost", "127.0.0.1", "::1")
# Of the environment, what would let the server show another store, or the same one elsewhere.
OTHER_SERVERS = (
    "MLFLOW_ARTIFACTS_ONLY", "MLFLOW_ENABLE_WORKSPACES", "MLFLOW_READ_REPLICA_BACKEND_STORE_URI",
    "MLFLOW_STATIC_PREFIX", "MLFLOW_WORKSPACE", "MLFLOW_WORKSPACE_STORE_URI",
)  # fmt: skip


def run(config: DashboardConfig, reporter: Reporter) -> None:
    """Serve the MLflow UI until it is interrupted.

    Raises:
        LrboError: If a value, the port or the store cannot be used, or no study was tracked there.
    """
    file = config.uri.removeprefix(SQLITE)
    if file != config.uri and not Path(file).is_file():
        raise StudyError(
            f"there is no MLflow store at {config.uri} yet; run lrbo search first, or rebuild it "
            "with: lrbo report study=NAME sync=true"
        )
    checks.require_valid(config)
    require_free_port(config.host, config.port)
    uri = absolute_uri(config.uri)
    pages = pages_of_studies(uri)
    command = [sys.executable, "-m", "mlflow", "ui"]
    command += ["--backend-store-uri", uri, "--registry-store-uri", uri]
    command += ["--host", config.host, "--port", str(config.port), *allowing(config)]
    command += ["--workers", "1"]  # of four, each imports all of mlflow before the first page
    address = f"http://{in_address(config.host)}:{config.port}/"
    reporter.say(f"MLflow UI on {address} (Ctrl-C stops it)")
    if config.host not in LOCAL:
        note = (
            f"  from elsewhere: http://{socket.gethostname()}:{config.port}/ or an address of this "
            "machine; whoever reaches it can read and change all of it."
        )
        if "*" not in config.allowed_hosts:
            note += " Any other name, of a proxy for one, is refused unless it is given: "
            note += "allowed_hosts=[NAME]"
        reporter.say(note)
    for name, page in list(pages.items())[:PAGES]:
        reporter.say(f"  {name}: {address}{page}")
    if len(pages) > PAGES:
        reporter.say(f"  and {len(pages) - PAGES} older, which the first page lists")
    environment = {k: v for k, v in os.environ.items() if k not in OTHER_SERVERS}
    # A group of its own: mlflow starts processes that would go on without it. A terminal that is
    # closed does not reach it either, and it would hold the port.
    with (
        listening((signal.SIGHUP,)),
        subprocess.Popen(command, start_new_session=True, env=environment) as server,
    ):
        try:
            raise SystemExit(server.wait())
        except KeyboardInterrupt:
            end(server)
            raise SystemExit(0) from None


def allowing(config: DashboardConfig) -> list[str]:
    """Return the options that let browsers use the names of this machine; mlflow refuses others.

    By itself it takes private addresses, and lets only the pages of localhost ask for runs.
    """
    allowed = [*config.allowed_hosts]
    if not allowed and (config.host in LOCAL or "MLFLOW_SERVER_ALLOWED_HOSTS" in os.environ):
        return []
    if "*" in allowed:
        return ["--allowed-hosts", "*", "--cors-allowed-origins", "*"]
    own = [*LOCAL, "0.0.0.0", config.host]
    if config.host not in LOCAL:
        own += [socket.gethostname(), socket.getfqdn()]
        own += [
            address.address.partition("%")[0]
            for interface in psutil.net_if_addrs().values()
            for address in interface
            if address.family in (socket.AF_INET, socket.AF_INET6)
        ]
    bare = list(dict.fromkeys(map(in_address, [*own, *allowed])))
    hosts = [*(f"{host}:{config.port}" for host in bare), *map(in_address, allowed)]
    origins = [f"http://{host}" for host in hosts]
    origins += [f"https://{in_address(host)}" for host in allowed]
    return ["--allowed-hosts", ",".join(hosts), "--cors-allowed-origins", ",".join(origins)]


def in_address(host: str) -> str:
    """Write a host as the address of a page has it."""
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host


def end(server: subprocess.Popen[bytes]) -> None:
    """End a server and every process that it started, by force after seconds."""
    os.killpg(server.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(PATIENCE_S)
    with suppress(ProcessLookupError):  # which would be all of them
        os.killpg(server.pid, signal.SIGKILL)


def require_free_port(host: str, port: int) -> None:
    """Refuse, saying which one to take, a port that mlflow would end in a traceback on."""
    try:
        if not 0 < port < 2**16:
            raise OverflowError("expected a number from 1 to 65535")
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with closing(socket.socket(family, socket.SOCK_STREAM)) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        number, other = getattr(error, "errno", None), 5001 if port != 5001 else 5002
        reason = f"it cannot be used ({error})"
        if number == errno.EADDRINUSE:
            reason = "another program uses it already, maybe an earlier dashboard"
        problem = (
            f"port={port} host={host}: {reason}; take another one: lrbo dashboard port={other}"
        )
        if isinstance(error, socket.gaierror | UnicodeError) or number == errno.EADDRNOTAVAIL:
            problem = (
                f"host={host}: no name or address of this machine ({error}); expected one, as "
                "host=127.0.0.1, or host=0.0.0.0 for all of them"
            )
        raise ConfigError([problem]) from error
