"""A study goes on with other packages only where its trials stay comparable, and says so."""

import logging
from pathlib import Path

import pytest

from lrbo.config.shell import command
from lrbo.study import versions as module
from lrbo.study.journal import Study
from lrbo.study.versions import PACKAGES, changes, note_changes, refusals, versions
from tests.support.commands import TINY, lrbo_command, project, searched
from tests.support.fakes import make_about

__all__ = ["project", "searched"]  # fixtures

BEGUN = dict.fromkeys(("python", *PACKAGES), "1.2.3") | {"torch": "2.8.0+cpu"}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    new_study = Study(tmp_path / "mine")
    new_study.begin(make_about(versions=BEGUN), "")
    return new_study


def installed(monkeypatch: pytest.MonkeyPatch, **changed: str) -> None:
    """Let other versions be installed; a hyphen in a name is an underscore here."""
    by_package = BEGUN | {name.replace("_", "-"): version for name, version in changed.items()}
    monkeypatch.setattr(module, "version", lambda package: by_package[package])
    monkeypatch.setattr(module.platform, "python_version", lambda: by_package["python"])


def test_the_same_versions_are_no_change(
    study: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed(monkeypatch)
    assert changes(study) == {}
    assert refusals(study, allowed=False) == []
    with study.locked():
        note_changes(study)
    assert study.journal.read_bytes() == b""
    assert not caplog.records


@pytest.mark.parametrize(
    ("package", "now"),
    [
        ("torch", "2.9.0+cpu"),
        ("torch", "3.8.0"),
        ("torch", "2.10.0"),
        ("torch", "not installed"),
        ("transformers", "1.3.0"),
    ],
)
def test_another_release_of_what_scores_is_refused_unless_it_is_accepted(
    study: Study, monkeypatch: pytest.MonkeyPatch, package: str, now: str
) -> None:
    installed(monkeypatch, **{package: now})
    (problem,) = refusals(study, allowed=False)
    search_command = command("search", **study.keys, **{"search.other_versions": True})
    assert search_command.endswith("/mine search.other_versions=true")
    for part in (BEGUN[package], now, search_command):
        assert part in problem
    assert refusals(study, allowed=True) == []


def test_both_refusals_are_said_together(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch="2.9.0", transformers="2.0.0", botorch="9.9.9")
    torch, transformers = refusals(study, allowed=False)
    assert "with torch 2.8.0+cpu" in torch
    assert "with transformers 1.2.3" in transformers


@pytest.mark.parametrize(
    ("package", "now"),
    [
        ("torch", "2.8.1"),
        ("torch", "2.8.0+cu128"),
        ("transformers", "1.2.9"),
        *((package.replace("-", "_"), "9.0.0") for package in PACKAGES
          if package not in ("torch", "transformers")),
        ("python", "3.99.0"),
    ],
)  # fmt: skip
def test_every_other_change_is_said_once_and_kept_in_the_journal(
    study: Study,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    package: str,
    now: str,
) -> None:
    installed(monkeypatch, **{package: now})
    assert refusals(study, allowed=False) == []
    for _ in range(2):
        with study.locked(), caplog.at_level(logging.WARNING):
            note_changes(study)
    (warning,) = caplog.records
    name = package.replace("_", "-")
    assert f"{name} {now} instead of {BEGUN[name]}" in warning.getMessage()
    assert Study(study.folder).state.versions == BEGUN | {name: now}
    assert len(study.journal.read_bytes().splitlines()) == 1


def test_going_back_is_a_change_as_well(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial has the versions that the journal noted last before it."""
    installed(monkeypatch, torch="2.9.0")
    with study.locked():
        note_changes(study)
    assert refusals(study, allowed=False) == []  # accepted for good
    installed(monkeypatch)
    (problem,) = refusals(study, allowed=False)
    assert "with torch 2.9.0, here is 2.8.0+cpu" in problem


def test_the_versions_of_now_are_those_of_the_packages() -> None:
    import torch
    import transformers

    by_package = versions()
    assert by_package["torch"] == torch.__version__
    assert by_package["transformers"] == transformers.__version__
    assert set(by_package) == {"python", *PACKAGES}


def test_a_package_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("no-such-package",))
    assert versions()["no-such-package"] == "not installed"


def test_a_search_is_refused_before_a_model_is_loaded_and_goes_on_if_told_to(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = versions()
    other = real | {"torch": "1.13.0", "botorch": "0.1"}
    monkeypatch.setattr(module, "versions", lambda: other)
    study = Study(project / "studies" / "tiny")
    before = study.journal.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(
            "lrbo.tasks.causal_lm.CausalLM.load", lambda *_, **__: pytest.fail("model loaded")
        )
        ran = lrbo_command("search", *TINY)
        assert ran.status == 2
        assert f"with torch {real['torch']}, here is 1.13.0" in ran.err
        # With everything else that is wrong.
        ran = lrbo_command("search", *TINY, "seed=-1")
        assert "seed=-1" in ran.err
        assert "here is 1.13.0" in ran.err
    assert study.journal.read_bytes() == before
    ran = lrbo_command("search", "study=tiny", "search.other_versions=true", "output=json")
    assert ran.status == 0, ran.err
    assert "botorch 0.1 instead of" in ran.err
    assert Study(study.folder).state.versions == other
    ran = lrbo_command("search", *TINY)  # from then on without
    assert ran.status == 0
    assert "instead of" not in ran.err
