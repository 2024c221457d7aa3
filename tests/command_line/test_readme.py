"""What README and docs say is true: commands run, links exist, tables are the code's."""

import itertools
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest

import lrbo
from lrbo import cli
from lrbo.config import compose, refusals
from lrbo.data import documents as sources
from lrbo.layers.form import INDEX_BYTES
from lrbo.layers.forms import FORMS
from lrbo.layers.modules import PRODUCTS
from lrbo.models.specs import LayerSpec
from lrbo.models.tiny import byte_tokenizer, tiny_model
from lrbo.pipeline.overrides import spelled
from tests.support.commands import lrbo_command

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]


def blocks(page: str) -> list[tuple[str, str]]:
    """Return language and text of the code on a page, that inside of lists too."""
    matches = re.findall(r"^( *)```(\w+)\n(.*?)^\1```", page, re.MULTILINE | re.DOTALL)
    return [(language, textwrap.dedent(text)) for _, language, text in matches]


BLOCKS = blocks(README)


def commands(text: str) -> list[str]:
    """Return the command lines of a block, long lines joined, comments taken off."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line.split("  #")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line]


def shell(page: str) -> list[str]:
    """Return the command lines of a page."""
    return [
        line for language, text in blocks(page) if language == "bash" for line in commands(text)
    ]


def in_text(page: str) -> list[str]:
    """Return the command lines of lrbo within sentences; those with gaps are left out."""
    prose = re.sub(r"^ *```.*?^ *```", "", page, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^\| `lrbo.*", "", prose, flags=re.MULTILINE)  # which only names commands
    lines = [" ".join(line.split()) for line in re.findall(r"`(lrbo \w+ [^`]+)`", prose)]
    return [line for line in lines if not re.search(r"\.\.\.|--|[$]", line)]


SHELL = shell(README)
EVERY = sorted({line for page in PAGES.values() for line in (*shell(page), *in_text(page))})
LRBO = [line.removeprefix("srun ") for line in EVERY if re.match(r"(srun )?lrbo ", line)]
PYTHON = [text for language, text in BLOCKS if language == "python"]
TINY = next(text for _, text in BLOCKS if "lrbo search experiment=tiny" in text)


def test_the_readme_has_what_the_tests_look_at() -> None:
    assert len(BLOCKS) >= 6
    assert len(SHELL) >= 14
    assert len(commands(TINY)) == 4
    assert len(PYTHON) == 3
    names = {"concepts", "numbers", "families", "cluster", "faq"}
    assert set(PAGES) >= {"README.md", *(f"docs/{name}.md" for name in names)}
    assert len(LRBO) >= 40
    assert sum(len(in_text(page)) for page in PAGES.values()) >= 3


@pytest.mark.slow
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
    namespace: dict[str, Any] = {}
    exec(compile(PYTHON[1].replace("=12", "=9"), "README.md", "exec"), namespace)
    assert len(namespace["study"].trials) == 9
    assert "analytic" in capsys.readouterr().out
    assert sum(p.numel() for p in namespace["model"].parameters()) < 35_104


def test_its_steps_in_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("my-model")
    byte_tokenizer().save_pretrained("my-model")
    (tmp_path / "text.txt").write_text("".join(sources.documents("generated", "words"))[:8_000])
    exec(compile(PYTHON[2], "README.md", "exec"), {})
    uniform, least = map(float, capsys.readouterr().out.split())
    assert uniform != least
    assert sum(p.numel() for p in lrbo.load("my-model-80").parameters()) < 35_104


@pytest.mark.parametrize("line", LRBO)
def test_every_other_command_line_is_one_that_lrbo_takes(line: str) -> None:
    command, *arguments = shlex.split(line)[1:]
    assert command in cli.NAMES
    if command == "transfer":
        command, *arguments = cli.transfer_arguments(arguments)
    overrides = [spelled(command, argument) for argument in arguments if argument != "-m"]
    jobs = refusals.jobs(overrides) if "-m" in arguments else [overrides]
    assert (len(jobs) > 1) == ("-m" in arguments)
    for job in jobs:
        assert refusals.find_problems(command, job) == {}


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^(\w+):", makefile, re.MULTILINE)
    used = [line.split()[1] for line in EVERY if line.startswith("make ")]
    assert sorted(set(used)) == ["bench", "newest", "quickstart", "test"]
    assert set(used) <= set(targets)


def test_ci_runs_the_readme_s_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert [line for line in script.splitlines() if line.startswith("make")] == ["make test"]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_and_every_file_that_a_page_names_exists(name: str) -> None:
    page, here = PAGES[name], (ROOT / name).parent
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page):
        assert (here / link).exists(), link
    for path in re.findall(r"`((?:lrbo|conf|tests|experiments|docs)/[\w./]+)`", page):
        assert (ROOT / path).exists() or "NAME" in path, path


def test_the_readme_links_every_page_of_the_docs() -> None:
    assert {name for name in PAGES if f"]({name})" in README} == set(PAGES) - {"README.md"}


@pytest.mark.parametrize("name", [name for name in PAGES if name != "README.md"])
def test_python_on_a_page_is_python_and_its_tests_exist(name: str) -> None:
    for language, text in blocks(PAGES[name]):
        if language == "python":
            compile(text, name, "exec")
        for path in re.findall(r"tests/[\w/]+\.py", text):
            assert (ROOT / path).is_file(), path


def test_the_table_of_protocols_is_that_of_their_files() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \| ([\d,]+) \| ([^|]+) \|$",
        PAGES["docs/numbers.md"],
        re.MULTILINE,
    )
    names = sorted(path.stem for path in (compose.conf_folder() / "protocols").glob("*.yaml"))
    assert sorted(row[0] for row in rows) == names
    config = compose.composed("evaluate", [f"protocols=[{','.join(names)}]"])
    for name, documents, join, window, windows in rows:
        protocol = config.protocols[name]
        limits = protocol.documents, protocol.max_windows
        stated = [re.sub(r"^first ", "", cell).replace(",", "") for cell in (documents, windows)]
        assert stated == ["all" if limit is None else str(limit) for limit in limits], name
        assert join == {"\n\n": "two line ends", " ": "a blank"}[protocol.join], name
        assert int(window.replace(",", "")) == protocol.window, name
        assert protocol.bos == "start", name


def test_the_formulas_of_forms_are_those_of_the_accountant() -> None:
    spec = LayerSpec("layer", "kind", 0, 7, 5, has_bias=False, site="layer")
    page = PAGES["docs/concepts.md"]
    rows = dict(re.findall(r"^\| `(\w+)`[^|]* \| [^|]+ \| `([^`]+)` \|$", page, re.MULTILINE))
    for name, formula in ((name, rows[name]) for name in PRODUCTS):
        for rank, bias in itertools.product(range(6), (False, True)):
            formula_ = formula.replace("^", "**").replace("in)", "in_)")
            macs = eval(formula_, {"r": rank, "out": 7, "in_": 5})
            parameters = macs + 7 * bias
            size = 2 * parameters + INDEX_BYTES * 7 * (name == "pivoted")
            cost = FORMS[name].cost(spec, (rank,), bias=bias, itemsize=2)
            assert cost == (parameters, size, macs)
    examples = re.findall(r"`(int\w+)` in groups of (\d+) takes (?:[^=`]* = )?([\d.]+) bits", page)
    assert examples
    for name, group, bits in examples:
        wide = LayerSpec("layer", "kind", 0, 256, 256, has_bias=False, site="layer")
        _, size, _ = FORMS[name].cost(wide, (int(group), 0), bias=False, itemsize=2)
        assert size * 8 / wide.parameters == float(bits), name


def test_its_table_of_commands_is_whole() -> None:
    rows = re.findall(r"^\| `lrbo (\w+)", README, re.MULTILINE)
    assert rows == list(cli.NAMES)
