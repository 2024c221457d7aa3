"""What is released works where the checkout is not, with the oldest packages that it allows too."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@dataclass
class Environment:
    """A virtual environment with the wheel in it, and an empty folder to stand in."""

    wheel: Path
    site: Path
    bin: Path
    empty: Path

    def run(self, *command: str) -> str:
        """Run a program of the environment in the empty folder and return its stdout."""
        variables = {
            **os.environ,
            "LRBO_CACHE": str(self.empty.parent / "cache"),
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
        }
        # Of the last: nothing is compiled when it is installed, only what is imported, and once.
        left_out = (
            "PYTHONPATH",
            "PYTHONHOME",
            "VIRTUAL_ENV",
            "COMP_LINE",
            "PYTHONDONTWRITEBYTECODE",
        )
        for name in left_out:
            variables.pop(name, None)
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.empty, env=variables, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


def python(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def environment(folder: Path, wheel: Path) -> Environment:
    """Make a virtual environment without anything in it."""
    home, empty = folder / "venv", folder / "empty"
    empty.mkdir(parents=True)
    python("-m", "venv", "--without-pip", str(home))
    schemes = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", schemes))
    return Environment(wheel, site, Path(sysconfig.get_path("scripts", "venv", schemes)), empty)


def install(target: Environment, *arguments: str) -> None:
    """Install with the pip of the running environment, told to install into the other one.

    Without compiling what is installed, of which a search imports a tenth.
    """
    pip = ["-m", "pip", "--python", str(target.bin / "python"), "install", "--quiet"]
    python(*pip, "--no-compile", *arguments)


def beside(folder: Path, wheel: Path) -> Environment:
    """Install the wheel beside the running environment."""
    target = environment(folder, wheel)
    install(target, "--no-deps", "--no-index", str(wheel))
    # The dependencies: torch is a gigabyte. A .pth file adds the folder after our own, and does
    # not follow the .pth files in it, so the editable install that may lie there stays out.
    path = target.site / "dependencies.pth"
    path.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution, and beside it a wheel from what was packed."""
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--outdir", str(folder), str(ROOT))
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """Return the wheel."""
    (path,) = source.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Install the wheel beside the running environment."""
    return beside(tmp_path_factory.mktemp("elsewhere"), wheel)


def test_the_wheel_holds_package_and_configuration_and_no_tests(installed: Environment) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "lrbo").rglob("*.py")}
    values = {f"lrbo/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    templates = {
        f"lrbo/files/templates/{path.name}" for path in (ROOT / "lrbo/files/templates").iterdir()
    }
    assert len(sources) > 30
    assert len(values) > 15
    assert templates
    assert len(names) == len(set(names))
    in_package = {name for name in names if ".dist-info/" not in name}
    assert in_package == sources | values | templates | {"lrbo/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_what_is_imported_is_the_wheel(installed: Environment) -> None:
    code = (
        "import lrbo, lrbo.config.compose as compose;"
        "print(lrbo.__file__); print(compose.conf_folder())"
    )
    module, conf = map(Path, installed.run("python", "-c", code).splitlines())
    assert module == installed.site / "lrbo" / "__init__.py"
    assert conf == installed.site / "lrbo" / "conf"


def test_the_script_shows_help_in_an_empty_folder(installed: Environment) -> None:
    out = installed.run("lrbo", "search", "--help")
    assert out.startswith("lrbo search:")
    for option in ("smollm2_135m", "per_kind_and_depth", "keep_60", "quickstart"):
        assert option in out
    assert list(installed.empty.iterdir()) == []


def test_the_source_distribution_has_all_that_make_test_needs(source: Path) -> None:
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = set(listed.stdout.split())
    if listed.returncode == 0 and files:  # not in what was unpacked from a source distribution
        assert files - names == set()
    for name in (
        "README.md",
        "LICENSE",
        "Makefile",
        "conf/search.yaml",
        "tests/command_line/test_wheel.py",
        "lrbo/py.typed",
    ):
        assert name in names


def lower_bounds() -> dict[str, str]:
    """Return the oldest version that is allowed of each package, except of torch."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = dict(each.split(">=") for each in tomllib.loads(text)["project"]["dependencies"])
    del bounds["torch"]
    assert len(bounds) > 15
    return bounds


def link_torch(target: Environment) -> None:
    """Let an environment have the torch of the running one, which no test may download again."""
    linked = target.bin.parent / "torch"
    linked.mkdir()
    here = Path(sysconfig.get_path("purelib"))
    for path in [*here.glob("torch-*.dist-info"), here / "torch", here / "torchgen"]:
        (linked / path.name).symlink_to(path)
    (target.site / "torch.pth").write_text(f"{linked}\n", encoding="utf-8")


ALL_COMMANDS = """
from lrbo.cli import main
main(["search", "experiment=tiny", "search.trials=2", "search.initial=2"])
main(["compress", "study=tiny", "out=small"])
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained("small")
main(["report", "study=tiny", "sync=true", "format=html", "output=json"])
"""
# Of the packages that are first on the path, and so imported.
VERSIONS = """
import importlib.metadata, sys
print(*map(importlib.metadata.version, sys.argv[1:]))
"""


@pytest.mark.parametrize("which", ["lowest", "newest"])
def test_a_search_runs_where_no_checkout_is(which: str, wheel: Path, tmp_path: Path) -> None:
    if which == "newest" and "LRBO_NEWEST" not in os.environ:
        pytest.skip("what is newest changes from day to day: make newest")
    if which == "newest":
        target = environment(tmp_path, wheel)
        link_torch(target)
        install(target, str(wheel))
    else:  # what the lowest leave open are the running versions; pip leaves those alone
        target, bounds = beside(tmp_path, wheel), lower_bounds()
        pins = tmp_path / "lowest.txt"
        pins.write_text("".join(f"{k}=={v}\n" for k, v in bounds.items()), encoding="utf-8")
        install(target, "lrbo", "-c", str(pins))
        versions = target.run("python", "-c", VERSIONS, *bounds).split()
        assert list(map(Version, versions)) == list(map(Version, bounds.values()))
    assert target.run("lrbo", "--version").split() == ["lrbo", wheel.name.split("-")[1]]
    # One process: what they import takes longest.
    out = target.run("python", "-c", ALL_COMMANDS)
    answer = json.loads(out.splitlines()[-1])
    assert (answer["study"], answer["trials_completed"], answer["trials_failed"]) == ("tiny", 2, 0)
    assert answer["best"]["nll"] <= answer["analytic"]["nll"]
    assert {path.name for path in target.empty.iterdir()} == {"studies", "small"}
    about = json.loads((target.empty / "studies/tiny/study.json").read_text(encoding="utf-8"))
    assert about["versions"]["lrbo"] == wheel.name.split("-")[1]
    if which == "lowest":
        for name in ("transformers", "ax-platform", "mlflow"):
            assert about["versions"][name].startswith(bounds[name])
