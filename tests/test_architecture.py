"""The house: who imports whom, which library stands behind which border, what a file says."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import lrbo

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lrbo"

# From top to bottom, as a model passes through them. A room imports only from rooms further down.
ROOMS = """
    __main__ cli __init__ api
    commands pipeline reports optimization tracking study trials evaluation refit recovery
    checkpoints allocation factorization calibration layers tasks data models config
    files linalg progress cores interrupts errors
""".split()  # noqa: SIM905

# Library: the modules that may import it.
BORDERS = {
    "ax": {"optimization.proposals"},
    "botorch": {"optimization.proposals"},
    "gpytorch": set[str](),
    "mlflow": {"tracking.mlflow_store", "tracking.mlflow_runs"},
    "hydra": {"config.compose", "config.refusals", "cli"},
    "omegaconf": {"config.compose", "config.saved", "cli"},
    "datasets": {"data.documents"},
    "pyarrow": {"data.local_files"},
    "matplotlib": {
        "reports.style",
        "reports.plots",
        "reports.studies",
    },
    "pandas": {
        "allocation.loss_calibration",
        "optimization.proposals",
        "reports.allocations",
        "reports.comparison",
        "reports.page",
        "reports.pictures",
        "reports.plots",
        "reports.results",
        "reports.studies",
        "reports.terminal",
    },
    "plotly": {"reports.page"},
    "accelerate": {"checkpoints.merged"},
    "huggingface_hub": {"models.sources", "checkpoints.card", "checkpoints.export"},
    "jinja2": {"files.rendering"},
    "tokenizers": {"models.tiny"},
    "lm_eval": {"evaluation.zero_shot"},
    "pydantic": {
        "allocation.loss_calibration",
        "checkpoints.quantizer",
        "files.parsing",
        "study.events",
    },
    "ray": {"trials.ray_executor"},
    "compressed_tensors": {"checkpoints.stock"},
    "peft": {"checkpoints.lora", "checkpoints.stock"},
}
# Of transformers everybody may name these types, and only these rooms do more.
TRANSFORMERS_TYPES = {"PreTrainedModel", "PreTrainedTokenizerBase"}
TRANSFORMERS = {"cli", "models", "checkpoints", "evaluation", "recovery"}


@cache
def sources() -> dict[str, ast.Module]:
    """Parse every file of the package, by dotted name without the package's own."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imports(tree: ast.AST) -> Iterator[tuple[str, set[str]]]:
    """Yield (module, imported names) of every import statement below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, set[str]()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            yield node.module or "", {alias.name for alias in node.names}


def own_imports(tree: ast.AST) -> set[str]:
    """Return the modules of the package that are imported, without the package's own name."""
    own_modules = set()
    for module, names in imports(tree):
        if module == "lrbo":  # `from lrbo import config` imports a module, or the version
            own_modules |= names - {"__version__"}
        elif module.startswith("lrbo."):
            home = module.removeprefix("lrbo.")  # of names, or a room of modules
            own_modules |= {home} if home in sources() else {f"{home}.{name}" for name in names}
    return own_modules


def modules() -> dict[str, ast.Module]:
    """Return the modules that are not the front of a room."""
    return {name: tree for name, tree in sources().items() if not name.endswith(".__init__")}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_is_known_and_none_is_empty() -> None:
    assert {room_of(name) for name in modules()} == set(ROOMS)
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    fronts = {room_of(name) for name in sources() if name.endswith(".__init__")}
    assert folders == fronts


def test_imports_point_downwards() -> None:
    arrows = 0
    for name, tree in modules().items():
        for other in own_imports(tree):
            if room_of(other) != room_of(name):
                above, below = ROOMS.index(room_of(name)), ROOMS.index(room_of(other))
                assert above < below, f"{name} imports {other}"
                arrows += 1
    assert arrows >= 300


def test_no_imports_go_in_a_circle_within_a_room() -> None:
    inside = {
        name: {other for other in own_imports(tree) if room_of(other) == room_of(name)} - {name}
        for name, tree in modules().items()
    }
    order = [*TopologicalSorter(inside).static_order()]  # which raises CycleError, naming it
    assert set(order) >= set(inside)


def test_every_room_has_its_tests_in_the_folder_of_its_name() -> None:
    tests = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"__pycache__"}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert tests == rooms - {"commands"} | {"command_line", "under_fire", "support", "stored"}


def test_no_function_imports_the_package() -> None:
    for name, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert not own_imports(node), f"{name}.{node.name}"


def test_fronts_of_packages_import_nothing() -> None:
    fronts = [name for name in sources() if name.endswith("__init__")]
    assert len(fronts) >= 6
    for name in fronts:
        loaded = {module for module, _ in imports(sources()[name])}
        if name == "__init__":  # whose public names are imported for type checkers alone
            loaded -= set(lrbo._HOMES.values())
        light = {"importlib", "sys", "lrbo.interrupts"} if name == "__init__" else set()
        assert loaded <= {*light, "typing", "wrapt"}, name


@pytest.mark.parametrize("library", BORDERS)
def test_libraries_stay_behind_their_borders(library: str) -> None:
    users = {
        name
        for name, tree in modules().items()
        if any(module.split(".")[0] == library for module, _ in imports(tree))
    }
    assert users == BORDERS[library]


def test_transformers_is_used_in_few_places() -> None:
    for name, tree in modules().items():
        for module, names in imports(tree):
            if module.split(".")[0] == "transformers" and room_of(name) not in TRANSFORMERS:
                assert names, name
                assert names <= TRANSFORMERS_TYPES, name


def test_every_module_says_in_one_line_what_it_is() -> None:
    for name, tree in sources().items():
        docstring = ast.get_docstring(tree)
        assert docstring, name
        assert len(docstring.splitlines()[0]) <= 96, name
        if name != "allocation.allocate":  # which explains its one algorithm there
            assert len(docstring.splitlines()) <= 12, name


def test_no_module_is_longer_than_400_lines() -> None:
    lengths = {
        str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {name: count for name, count in lengths.items() if count > 400} == {}


def test_public_functions_name_every_argument() -> None:
    """A docstring with an Args section must have all of the arguments, under their names."""
    count = 0
    for name, tree in sources().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            docstring = ast.get_docstring(node) or ""
            section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", docstring, re.MULTILINE)
            if section is None:
                continue
            described = set(re.findall(r"^    (\w+):", section.group(1), re.MULTILINE))
            taken = {a.arg for a in [*node.args.args, *node.args.kwonlyargs]} - {"self", "cls"}
            assert described == taken, f"{name}.{node.name}"
            count += 1
    assert count >= 30


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, lrbo; heavy = {'torch', 'transformers', 'ax', 'mlflow', 'hydra', 'pandas'};"
        "heavy |= {'numpy', 'rich', 'pydantic', 'scipy'};"
        "print(sorted(heavy & set(sys.modules)), lrbo.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[] {lrbo.__version__}"


def test_public_names_are_listed_found_and_not_hidden_by_modules() -> None:
    """A module of the package, once imported, would stand in place of a function of its name."""
    assert set(lrbo.__all__) == {"__version__", *lrbo._HOMES} == set(dir(lrbo))
    tops = {name.partition(".")[0] for name in sources()}
    typed = {
        alias.asname: node.module
        for node in ast.walk(sources()["__init__"])
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lrbo.")
        for alias in node.names
        if alias.asname  # the others are used here
    }
    assert typed == lrbo._HOMES
    for name, home in lrbo._HOMES.items():
        assert getattr(lrbo, name) is getattr(importlib.import_module(home), name)
        assert name not in tops
        assert getattr(lrbo, name).__doc__


def test_the_command_line_starts_without_what_does_the_work() -> None:
    code = (
        "import sys, lrbo.cli; heavy = {'torch', 'transformers', 'ax', 'mlflow', 'pandas'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'; it has"):
        _ = lrbo.lode


def test_what_is_imported_is_declared_and_pinned() -> None:
    """Else it is there only as long as another package brings it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    declared = {
        re.split(r"[<>=!~ \[;]", each)[0].lower().replace("_", "-")
        for each in [
            *project["dependencies"],
            *optional["ray"],
            *optional["eval"],
            *optional["export"],
        ]
    }
    brought = packages_distributions()
    known = {*sys.stdlib_module_names, "lrbo"}
    top_modules = {
        module.split(".")[0] for tree in sources().values() for module, _ in imports(tree)
    }
    assert len(top_modules - known) > 20
    for module in sorted(top_modules - known):
        names = {name.lower().replace("_", "-") for name in brought.get(module, [module])}
        assert names & declared, f"{module} is imported, and {names} not among the dependencies"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    pinned = set(re.findall(r"^([\w.-]+)==", pins, re.MULTILINE))
    assert declared <= pinned
