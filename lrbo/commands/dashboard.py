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

from lrbo.errors import ConfigError, StudyError
from lrbo.interrupts import listening
from lrbo.mlflow_store import absolute_uri, pages_of_runs
from lrbo.progress import Reporter
from lrbo.schema import DashboardConfig

PAGES = 8  # that are named; the UI's menu of views has all of them
PATIENCE_S = 5  # an open page keeps a server waiting


def run(chosen: DashboardConfig, reporter: Reporter) -> None:
    """Serve the MLflow UI until it is interrupted.

    Raises:
        ConfigError: If the port is taken, or cannot be used.
        StudyError: If no study was tracked there yet.
        TrackingError: If the store cannot be read.
    """
    file = chosen.uri.removeprefix("sqlite:///")
    if file != chosen.uri and not Path(file).is_file():
        raise StudyError(
            f"there is no MLflow store at {chosen.uri} yet; run lrbo search first, or rebuild it "
            "with: lrbo report study=NAME sync=true"
        )
    require_free_port(chosen.host, chosen.port)
    uri = absolute_uri(chosen.uri)
    pages = pages_of_runs(uri)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--host", chosen.host, "--port", str(chosen.port)]
    command += ["--workers", "1"]  # of four, each imports all of mlflow before the first page
    address = f"http://{chosen.host}:{chosen.port}/"
    reporter.say(f"MLflow UI on {address} (Ctrl-C stops it)")
    for name, page in list(pages.items())[:PAGES]:
        reporter.say(f"  {name}: {address}{page}")
    if len(pages) > PAGES:
        reporter.say(f"  and {len(pages) - PAGES} older: in the menu of views over the table")
    # A group of its own: mlflow starts processes that would go on without it. A terminal that is
    # closed does not reach it either, and it would hold the port.
    with (
        listening((signal.SIGHUP,)),
        subprocess.Popen(command, start_new_session=True) as server,
    ):
        try:
            status = server.wait()
        except KeyboardInterrupt:
            end(server)
            status = 0
    raise SystemExit(status)


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
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            reason = "another program uses it already, maybe an earlier dashboard"
        else:
            reason = f"it cannot be used ({error})"
        other = 5001 if port != 5001 else 5002
        raise ConfigError(
            [f"port={port} host={host}: {reason}; take another one: lrbo dashboard port={other}"]
        ) from error
