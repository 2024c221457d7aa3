"""Settings of the whole set; what tests share is in support/fixtures.py."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once
os.environ.setdefault("RAY_worker_niceness", "0")  # else tests beside them starve Ray's actors

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Import what tests share, which takes ten seconds: not where others run the tests."""
    distributes = getattr(config.option, "numprocesses", None) and not hasattr(
        config, "workerinput"
    )
    if not distributes:
        config.pluginmanager.import_plugin("tests.support.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of slow tests: no process then waits for one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
