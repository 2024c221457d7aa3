"""A path that cannot be read or written is refused before any work; trying it leaves nothing."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lrbo.commands.report import _names
from lrbo.config.schema import BenchmarkConfig, CompressConfig, DashboardConfig, ReportConfig
from lrbo.errors import StudyError
from lrbo.files import paths
from lrbo.pipeline.checks import check
from lrbo.pipeline.overrides import spelled, values_of
from lrbo.study.journal import Study
from tests.support.commands import TINY, lrbo_command


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with one thing of each kind."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine", encoding="utf-8")
    Path("folder").mkdir()
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    return tmp_path


# Paths that cannot be written, and the reason in the message.
UNWRITABLE = {
    "dangling": "a link to nowhere, which is not there",
    "dangling/below": "a link to nowhere, which is not there",
    "loop": "loop",
    "file/below": "is a file, not a folder",
    "/proc/x": "cannot write in /proc",
    "x" * 256: "a name of 256 bytes; expected at most 255",
    "é" * 128: "256 bytes",
    "folder/" + "x" * 300 + "/y": "expected at most 255",
    "folder/new/../x": "/folder/new to go up from; expected a path such as ",
    "y/" * 2100 + "x": "a path of more than",
    "": "got nothing",
    "a\nb": "cannot be printed",
    "a\0b": "cannot be printed",
    "~nobody-of-this-name/x": "no such user",
}


@pytest.mark.parametrize(("path", "reason"), UNWRITABLE.items(), ids=lambda text: text[:20])
@pytest.mark.parametrize("checked", [paths.check_new, paths.check_writable, paths.check_appended])
def test_a_path_that_cannot_be_written_is_refused_with_the_reason(
    path: str, reason: str, checked: Callable[[str, str], list[str]], workdir: Path
) -> None:
    before = sorted(workdir.rglob("*"))
    (problem,) = checked("out", path)
    assert problem.startswith("out=")
    is_there = checked is paths.check_new and os.path.lexists(path.replace("\0", "?"))
    assert ("exists already" if is_there else reason) in problem or path == ""
    assert sorted(workdir.rglob("*")) == before


@pytest.mark.parametrize("path", ["foo/..", "foo/../..", "foo/../new"])
def test_a_new_folder_goes_up_only_from_what_is_there(path: str, workdir: Path) -> None:
    """It was refused after the whole refit, with the folder before the dots left there."""
    written = os.path.normpath(workdir / path)
    expected = f"there is no {workdir}/foo to go up from; expected a path such as {written}"
    for checked in (paths.check_new, paths.check_appended):
        assert checked("out", path) == [f"out={path!r}: {expected}"]
    assert not Path("foo").exists()


def test_what_is_written_may_be_beside_the_working_folder(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("folder")
    for path in ("../new", "../folder/../new", "../new/deep"):
        assert paths.check_new("out", path) == []
        assert paths.check_appended("record", path) == []
    assert "exists already" in paths.check_new("out", "..")[0]
    assert "expected a folder without '..'" in check(CompressConfig("../s", out="../new"))[0]


def test_a_path_that_can_be_written_has_no_problem_and_checks_leave_nothing(workdir: Path) -> None:
    before = sorted(workdir.rglob("*"))
    for path in ("new", "new/deep/er", "folder/new", "x" * 255, str(workdir / "abs"), "ä ö", "a'b"):
        assert paths.check_new("out", path) == []
        assert paths.check_appended("record", path) == []
    assert paths.check_writable("study", "folder") == []
    assert paths.check_appended("record", "file") == []
    assert sorted(workdir.rglob("*")) == before


def test_the_longest_name_is_that_of_the_file_system(workdir: Path) -> None:
    from lrbo.files.atomic import new_folder, replacing

    name = "x" * 255
    with new_folder(workdir / name) as beside:
        (beside / "file").touch()
    with replacing(workdir / name.replace("x", "y")) as other:
        other.touch()
    assert (workdir / name / "file").is_file()
    for path in (name, f"{name}/below", f"{name}/../new"):
        assert paths.check_writable("study", path) == []


def test_a_file_system_of_shorter_names_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.pathconf", lambda *_: 143)
    assert paths.check_new("out", "x" * 143) == []
    assert "144 bytes; expected at most 143" in paths.check_new("out", "x" * 144)[0]


def test_a_file_is_no_folder_and_a_folder_no_file() -> None:
    assert "expected a folder, there is a file" in paths.check_folder("text_folder", "file")[0]
    assert "expected a file, there is a folder" in paths.check_appended("record", "folder")[0]
    assert "there is nothing" in paths.check_folder("text_folder", "x")[0]
    assert "name too long" in paths.check_folder("text_folder", "x" * 300)[0]
    assert "a link to nowhere" in paths.check_folder("text_folder", "dangling")[0]


@pytest.mark.parametrize("path", ["", " ", ".", "..", "a/..", "../a", "/", "//", "./", "a/../b"])
def test_a_study_has_a_name_of_its_own(path: str) -> None:
    (problem,) = check(CompressConfig(study=path, out="new"))
    assert problem.startswith(f"study={path!r}: expected a folder")


@pytest.mark.parametrize("config", [DashboardConfig(), BenchmarkConfig(), ReportConfig(study="s")])
@pytest.mark.parametrize("path", ["", "..", "../a", "/", "a/.."])
def test_studies_are_in_a_folder_that_is_named(path: str, config: object) -> None:
    config.studies = path  # type: ignore[attr-defined]
    assert any(problem.startswith(f"studies={path!r}: ") for problem in check(config))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [".", "folder", "/tmp/x", "./folder"])
def test_studies_may_be_in_any_other_folder(path: str) -> None:
    assert paths.check_name("studies", path, root=True) == []


def test_a_study_is_checked_only_at_its_own_path() -> None:
    """A link beside the folder of the studies that has the name of one is not looked at."""
    assert check(ReportConfig(study="dangling")) == []
    Path("studies").mkdir()
    Path("studies/dangling").symlink_to("nowhere")
    for config in (ReportConfig(study=["x", "dangling"]), CompressConfig("dangling", out="new")):
        (problem,) = check(config)
        assert problem == "study='studies/dangling': a link to nowhere, which is not there"


SEARCHES = {
    "study=": "study=''",
    "study=..": "without '..'",
    "studies=": "studies=''",
    "studies=/": "a name of its own",
    "study=folder/taken": "a folder that is no study, with thesis.txt in it",
    f"study={'x' * 256}": "expected at most 255",
    "study=dangling/x": "a link to nowhere",
    "studies=/proc/x": "cannot write in /proc",
    "study=~nobody-of-this-name/x": "no such user",
    "warm_start=[uniform,'study:../x']": "without '..'",
}


@pytest.mark.parametrize(("override", "reason"), SEARCHES.items(), ids=lambda text: text[:20])
def test_a_search_is_refused_before_it_reads_anything(
    override: str, reason: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrbo.cli.imported", lambda *_: pytest.fail("work began"))
    (workdir / "folder" / "taken").mkdir()
    (workdir / "folder" / "taken" / "thesis.txt").touch()
    before = sorted(workdir.rglob("*"))
    ran = lrbo_command("search", *TINY, override)
    assert ran.status == 2
    assert reason in " ".join(ran.err.split()), ran.err
    assert sorted(workdir.rglob("*")) == before


def test_home_is_put_in_place_of_its_sign_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from lrbo.config.compose import composed
    from lrbo.config.schema import flat

    monkeypatch.setenv("HOME", "/home/me")
    typed = ["study=~/s/t", "studies=~/s", "model=hf", "model.path=~/m", "data=files"]
    typed += ["data.calibration.path=[~/a,~/b]", "data.validation.path=~/c", "data.test.path=d~"]
    values = flat(composed("search", [spelled("search", each) for each in typed]))
    assert values["study"] == "/home/me/s/t"
    assert values["studies"] == "/home/me/s"
    assert values["tracking.uri"] == "sqlite:////home/me/s/mlflow.db"
    assert values["model.path"] == "/home/me/m"
    assert values["data.calibration.path"] == ["/home/me/a", "/home/me/b"]
    assert values["data.validation.path"] == "/home/me/c"
    assert values["data.test.path"] == "d~"
    typed = ["warm_start=[uniform,study:~/s/t:3]", "experiment=tiny"]
    values = flat(composed("search", [spelled("search", each) for each in typed]))
    assert values["warm_start"] == ["uniform", "study:/home/me/s/t:3"]
    values = flat(values_of("compress", ["study=s", "out=~/o"])[1])
    assert values["out"] == "/home/me/o"
    typed = ["studies=~", "checkpoint=~/c", "text_folder=~/t"]
    values = flat(values_of("evaluate", typed)[1])
    assert values["record"] == "/home/me/evaluations.jsonl"
    assert (values["checkpoint"], values["text_folder"]) == ("/home/me/c", "/home/me/t")


def test_a_cache_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRBO_CACHE", "file/cache")
    (problem,) = check(CompressConfig(study="s", out="new"))
    assert problem.startswith("LRBO_CACHE='file/cache': ")
    assert problem.endswith("file is a file, not a folder")


def test_an_evaluation_asks_the_cache_only_for_a_packaged_model(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint, a folder and a tiny model keep nothing there."""
    monkeypatch.setenv("LRBO_CACHE", str(workdir / "file" / "cache"))
    (workdir / "folder" / "config.json").touch()
    for typed in (["checkpoint=folder"], ["model=hf", "model.path=folder"], ["model=tiny"]):
        assert check(values_of("evaluate", [*typed, "data=generated"])[1]) == []
    packaged = values_of("evaluate", ["model=smollm2_135m", "data=generated"])[1]
    (problem,) = check(packaged)
    assert problem.endswith("file is a file, not a folder")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setenv("LRBO_CACHE", str(workdir / "cache"))
    assert "no permission to write" in check(packaged)[0]
    (workdir / "cache" / "models").mkdir(parents=True)  # in which it may be unpacked already
    assert not [problem for problem in check(packaged) if "LRBO_CACHE" in problem]


@pytest.mark.parametrize("name", ["journal.jsonl", "study.json"])
def test_a_folder_where_a_file_of_a_study_belongs_is_named(name: str) -> None:
    Path("studies/mine").mkdir(parents=True)
    Path("studies/mine/study.json").write_text('{"format": 1}', encoding="utf-8")
    Path("studies/mine", name).unlink(missing_ok=True)
    Path("studies/mine", name).mkdir()
    for command in (["report"], ["compress", "out=new"]):
        ran = lrbo_command(*command, "study=mine")
        assert ran.status == 2
        assert f"studies/mine/{name} cannot be read: Is a directory" in " ".join(ran.err.split())


@pytest.mark.parametrize("pattern", ["**", "*", "mi*", "mi[n]e"])
def test_a_pattern_names_folders_directly_among_the_studies(pattern: str) -> None:
    """MLflow keeps copies of study.json in folders below, which are no studies."""
    for folder in ("mine", "mlflow-artifacts/1/ab/artifacts"):
        Path("studies", folder).mkdir(parents=True)
        Path("studies", folder, "study.json").touch()
    assert _names(ReportConfig(study=pattern)) == ["mine"]
    with pytest.raises(StudyError, match="no study in studies fits"):
        _names(ReportConfig(study="mlflow-artifacts/*/*/*"))


def test_a_record_is_a_regular_file(workdir: Path) -> None:
    os.mkfifo("pipe")
    for path, kind in (("pipe", "a named pipe"), ("/dev/full", "a device")):
        assert paths.check_appended("record", path) == [
            f"record={path!r}: expected a file, there is {kind}"
        ]


@pytest.mark.parametrize(
    "name",
    ["journal.jsonl", "config.yaml", "study.json", "tokens.safetensors", "sensitivity.json"],
)
def test_a_pipe_among_the_files_of_a_study_is_refused_by_name(name: str) -> None:
    """Reading it would wait forever."""
    Path("studies/mine").mkdir(parents=True)
    os.mkfifo(f"studies/mine/{name}")
    with pytest.raises(StudyError, match=rf"studies/mine/{name} is a named pipe; expected a file"):
        Study(Path("studies/mine"))


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 2>&-"])
def test_what_is_printed_is_printed_where_stderr_is_closed(closed: str) -> None:
    line = f"{sys.executable} -m lrbo report study=none output=json {closed}"
    ran = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")  # refused as ever, not by a traceback
    code = "import lrbo.__main__ as m, os, sys; m._open_streams(); print(sys.stderr.fileno())"
    ran = subprocess.run(
        ["sh", "-c", f"{sys.executable} -c '{code}' {closed}"], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (0, "2\n")
