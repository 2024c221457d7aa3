"""The MLflow UI shows a study as it is meant to be read: in a real browser, on a served store."""

import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from lrbo.config.saved import continued
from lrbo.config.schema import flat
from lrbo.reports import mlflow_view
from lrbo.study.journal import Study
from tests.support.journal import Journal

pytestmark = pytest.mark.slow

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
SOON = 90  # seconds; a busy machine takes its time to start a server and to draw a page
FRONT = [(0.9, 2.125), (0.8, 2.5), (0.7, 3.0), (0.6, 3.75)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Return a study of a front that is in MLflow, made of a journal alone."""
    studies = tmp_path_factory.mktemp("dashboard") / "studies"
    journal = Journal(
        studies / "fronts", "budget.lowest=0.5", f"studies={studies}", "space=weights"
    )
    journal.score_dense(2.0)
    for index, (ratio, nll) in enumerate(FRONT):
        journal.complete(index, nll, "model", keep_ratio=ratio)
    journal.fail(len(FRONT), "NonFiniteError: loss is nan")
    study = journal.study
    config = continued(study.config, [f"studies={studies}", "tracking.enabled=true"])
    tracker = mlflow_view.make_tracker(config, study, strict=True)
    tracker.start(flat(config))
    tracker.sync(study.state.records)
    mlflow_view.show(study, tracker)
    tracker.finish(completed=True)
    return study


@pytest.fixture(scope="module")
def pages(study: Study) -> Iterator[dict[str, str]]:
    """Serve the dashboard and return the addresses that it names."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from lrbo.cli import main; main()", "dashboard"]
    log = study.folder.parent / "dashboard.log"
    with log.open("w", encoding="utf-8") as out:
        server = subprocess.Popen(
            [*command, f"studies={study.folder.parent}", f"port={port}"],
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + SOON
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(0.5)
        lines = log.read_text(encoding="utf-8").splitlines()
        named = [line.strip().partition(": http") for line in lines if "#/experiments/" in line]
        yield {name: f"http{address}" for name, _, address in named}
    finally:
        server.terminate()
        try:
            assert server.wait(SOON) == 0
            assert not answers(f"http://127.0.0.1:{port}/health")  # mlflow's processes ended too
        finally:
            server.kill()


def answers(address: str) -> bool:
    """Return whether a server is there."""
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start Chromium without a screen."""
    if BROWSER is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed: the UI cannot be looked at")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1800,1300")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def text_of(browser: Any, *wanted: str) -> str:
    """Wait until the page shows all that is wanted, and return its text."""
    content: str = until(  # a page that is still loading has no body
        lambda: browser.execute_script("return document.body?.innerText ?? ''"),
        lambda text: all(part in text for part in wanted),
    )
    return content


def until(look: Callable[[], Any], holds: Callable[[Any], bool]) -> Any:
    """Look until something holds, and return what was seen."""
    end = time.monotonic() + SOON
    while not holds(value := look()):
        assert time.monotonic() < end, value
        time.sleep(0.5)
    return value


def test_the_study_is_a_row(browser: Any, pages: dict[str, str]) -> None:
    browser.get(pages["studies of lrbo"])
    text = text_of(browser, "fronts", "1 matching run")
    assert "trial-000" not in text


def test_its_trials_are_charts_of_every_metric_over_trials_the_best_first(
    browser: Any, pages: dict[str, str]
) -> None:
    browser.get(pages["trials of fronts (lrbo)"])
    text = text_of(browser, "trial-003", "5 matching runs", "Model metrics")
    rows = [line for line in text.splitlines() if re.fullmatch(r"trial-\d+", line)]
    assert rows[:4] == ["trial-000", "trial-001", "trial-002", "trial-003"]  # by the objective
    assert until(lambda: browser.find_elements("css selector", ".scatterlayer .point"), bool)


def test_its_own_page_has_its_results(browser: Any, pages: dict[str, str]) -> None:
    browser.get(pages["fronts (lrbo)"])
    text_of(browser, "fronts", "Budget: from 0.5", "best_perplexity", "Show more")
    browser.find_element("xpath", "//button[contains(., 'Show more')]").click()
    text_of(browser, "validation perplexity", f"{math.exp(2.125):.2f}")


def test_its_report_is_drawn_among_the_artifacts(browser: Any, pages: dict[str, str]) -> None:
    browser.get(f"{pages['fronts (lrbo)']}/artifacts/report.html")
    text_of(browser, "report.html", "figures")
    until(lambda: browser.find_elements("tag name", "iframe"), bool)
    browser.switch_to.frame(browser.find_element("tag name", "iframe"))
    try:
        text_of(browser, "Loss against size", "dense", "To repeat it")
        assert until(lambda: browser.find_elements("css selector", ".scatterlayer .point"), bool)
    finally:
        browser.switch_to.default_content()
