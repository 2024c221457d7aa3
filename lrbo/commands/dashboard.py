"""Serve the MLflow UI on the store of the studies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lrbo.commands.view import absolute_uri
from lrbo.errors import StudyError
from lrbo.mlflow_store import pages_of_runs
from lrbo.progress import Reporter
from lrbo.schema import DashboardConfig


def run(chosen: DashboardConfig, reporter: Reporter) -> None:
    """Serve the MLflow UI until it is interrupted.

    Raises:
        StudyError: If no study was tracked there yet.
    """
    file = chosen.uri.removeprefix("sqlite:///")
    if file != chosen.uri and not Path(file).is_file():
        raise StudyError(
            f"there is no MLflow store at {chosen.uri} yet; run lrbo search first, or rebuild it "
            "with: lrbo report study=NAME sync=true"
        )
    uri = absolute_uri(chosen.uri)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--host", chosen.host, "--port", str(chosen.port)]
    address = f"http://{chosen.host}:{chosen.port}/"
    reporter.say(f"MLflow UI on {address} (Ctrl-C stops it)")
    for experiment, page in pages_of_runs(uri).items():
        reporter.say(f"  trials of {experiment}: {address}{page}")
    try:
        raise SystemExit(subprocess.run(command, check=False).returncode)
    except KeyboardInterrupt:
        raise SystemExit(0) from None
