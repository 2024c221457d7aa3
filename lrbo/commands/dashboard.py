"""Serve the MLflow UI on the store of the studies."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from lrbo.commands.view import absolute_uri
from lrbo.errors import ConfigError, StudyError
from lrbo.mlflow_store import pages_of_runs
from lrbo.progress import Reporter
from lrbo.schema import DashboardConfig

PAGES = 8  # that are named; the UI's menu of views has all of them


def run(chosen: DashboardConfig, reporter: Reporter) -> None:
    """Serve the MLflow UI until it is interrupted.

    Raises:
        ConfigError: If the port is taken, or cannot be used.
        StudyError: If no study was tracked there yet.
        TrackingError: If another version of mlflow made the store.
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
    try:
        raise SystemExit(subprocess.run(command, check=False).returncode)
    except KeyboardInterrupt:
        raise SystemExit(0) from None


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
