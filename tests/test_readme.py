"""What the README says is true: its commands run, its links and targets exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import lrbo
from lrbo import cli, config
from lrbo.calibration.corpus import documents
from lrbo.loading import byte_tokenizer, tiny_model
from lrbo.overrides import quoted
from tests.commands import lrbo_command

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Return the command lines of a block, long lines joined, comments taken off."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line.split("  #")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line]


SHELL = [line for language, text in BLOCKS if language == "bash" for line in commands(text)]
PYTHON = [text for language, text in BLOCKS if language == "python"]
TINY = next(text for _, text in BLOCKS if "lrbo search experiment=tiny" in text)


def test_the_readme_has_what_the_tests_look_at() -> None:
    assert len(BLOCKS) >= 6
    assert len(SHELL) >= 14
    assert len(commands(TINY)) == 4
    assert len(PYTHON) == 3


def test_its_commands_on_the_tiny_model_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in commands(TINY):
        program, *arguments = shlex.split(line)
        assert program == "lrbo"
        ran = lrbo_command(*arguments)
        assert ran.status == 0, ran.err
    exec(compile(PYTHON[0], "README.md", "exec"), {})
    kind, parameters = capsys.readouterr().out.split()
    assert kind == "LlamaForCausalLM"
    assert 20_000 < int(parameters) < 35_104  # fewer than the dense model has
    found: dict[str, Any] = {}
    exec(compile(PYTHON[1].replace("=12", "=9"), "README.md", "exec"), found)
    assert len(found["study"].trials) == 9
    assert "analytic" in capsys.readouterr().out
    assert sum(p.numel() for p in found["model"].parameters()) < 35_104


def test_its_steps_in_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("my-model")
    byte_tokenizer().save_pretrained("my-model")
    (tmp_path / "text.txt").write_text("".join(documents("generated", "words"))[:8_000])
    exec(compile(PYTHON[2], "README.md", "exec"), {})
    uniform, least = map(float, capsys.readouterr().out.split())
    assert uniform != least
    assert sum(p.numel() for p in lrbo.load("my-model-80").parameters()) < 35_104


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("lrbo ")])
def test_every_other_command_line_is_one_that_lrbo_takes(line: str) -> None:
    command, *arguments = shlex.split(line)[1:]
    assert command in cli.NAMES
    if command == "transfer":
        command, *arguments = cli.transfer_arguments(arguments)
    overrides = [quoted(argument) for argument in arguments if argument != "-m"]
    jobs = config.jobs(overrides) if "-m" in arguments else [overrides]
    assert (len(jobs) > 1) == ("-m" in arguments)
    for job in jobs:
        assert config.find_problems(command, job) == {}


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^(\w+):", makefile, re.MULTILINE)
    used = [line.split()[1] for line in SHELL if line.startswith("make ")]
    assert sorted(set(used)) == ["bench", "quickstart", "test"]
    assert set(used) <= set(targets)


def test_ci_runs_the_readme_s_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert [line for line in script.splitlines() if line.startswith("make")] == ["make test"]


def test_every_link_and_every_file_it_names_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    paths = re.findall(r"`((?:lrbo|conf)/[\w./]+|registry\.py)`", README)
    assert len(links) + len(paths) >= 8
    for link in links + [p for p in paths if "/" in p]:
        assert (ROOT / link).exists(), link


def test_its_table_of_commands_is_whole() -> None:
    rows = re.findall(r"^\| `lrbo (\w+)", README, re.MULTILINE)
    assert rows == list(cli.NAMES)
