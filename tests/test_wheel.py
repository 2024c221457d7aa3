"""The wheel works where the sources are not: in an environment of its own, from any folder."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

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
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "COMP_LINE"):
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Build the wheel from the checkout and install it beside the running environment."""
    folder = tmp_path_factory.mktemp("elsewhere")
    empty = folder / "empty"
    empty.mkdir()
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    home = folder / "venv"
    python("-m", "venv", "--without-pip", str(home))
    schemes = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", schemes))
    scripts = Path(sysconfig.get_path("scripts", "venv", schemes))
    interpreter = str(scripts / "python")
    # pip of the running environment, told to install into the other one.
    python("-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index",
           str(wheel))  # fmt: skip
    # The dependencies: torch is a gigabyte. A .pth file adds the folder after our own, and does
    # not follow the .pth files in it, so the editable install that may lie there stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return Environment(wheel, site, scripts, empty)


def test_the_wheel_holds_package_and_configuration_and_no_tests(installed: Environment) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "lrbo").rglob("*.py")}
    values = {f"lrbo/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert len(sources) > 30
    assert len(values) > 15
    assert len(names) == len(set(names))
    in_package = {name for name in names if ".dist-info/" not in name}
    assert in_package == sources | values
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_what_is_imported_is_the_wheel(installed: Environment) -> None:
    code = "import lrbo, lrbo.config; print(lrbo.__file__); print(lrbo.config.conf_folder())"
    module, conf = map(Path, installed.run("python", "-c", code).splitlines())
    assert module == installed.site / "lrbo" / "__init__.py"
    assert conf == installed.site / "lrbo" / "conf"


def test_the_script_shows_help_in_an_empty_folder(installed: Environment) -> None:
    out = installed.run("lrbo", "search", "--help")
    assert out.startswith("lrbo search:")
    for option in ("smollm2_135m", "per_kind_and_depth", "keep_60", "quickstart"):
        assert option in out
    assert list(installed.empty.iterdir()) == []


def test_a_search_runs_where_no_checkout_is(installed: Environment) -> None:
    out = installed.run(
        "lrbo", "search", "experiment=tiny", "search.trials=2", "search.initial=2", "output=json"
    )  # fmt: skip
    found = json.loads(out.splitlines()[-1])
    assert (found["study"], found["trials_completed"], found["trials_failed"]) == ("tiny", 2, 0)
    assert found["best"]["nll"] == min(point["nll"] for point in found["front"])
    assert {path.name for path in installed.empty.iterdir()} == {"studies"}
    about = json.loads((installed.empty / "studies/tiny/study.json").read_text(encoding="utf-8"))
    assert about["versions"]["lrbo"] == installed.wheel.name.split("-")[1]
