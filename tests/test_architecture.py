"""The house: who imports whom, which library stands behind which border, what a file says."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import lrbo

PACKAGE = Path(__file__).resolve().parent.parent / "lrbo"

# From top to bottom. A module imports only from further down.
ROOMS = """
    __main__ cli api overrides
    commands.search commands.report commands.compress commands.evaluate commands.benchmark
    commands.dashboard
    commands.live commands.trials commands.view commands.finalists commands.tables commands.asked
    html_report
    builders steps studies versions spaces starts donors pool texts checks command_lines
    ranges
    preparation
    report tabular figures comparison results plots drawing pictures
    gains
    peak_memory speed
    merging export remote_code modeling_low_rank model_card
    optimization.loop optimization.client optimization.study optimization.events
    optimization.front_space
    optimization.restricted optimization.weights optimization.space
    optimization.base front_checks optimization.front
    tracking mlflow_store mlflow_registry mlflow_ui mlflow_entities presentation
    executors.ray_tasks executors.inline executors.base
    worker trial racing paired
    evaluation.divergence evaluation.perplexity evaluation.latency evaluation.selection
    evaluation.protocols evaluation.zero_shot evaluation.limits
    refit sensitivity
    compression transfer checkpoint
    factorization.store allocation
    knapsack
    relaxation
    streams reduced_rank
    calibration.store calibration.collect calibration.gradients calibration.sites
    blockwise
    factorization.registry factorization.loss_aware
    factorization.pooled factorization.weighted factorization.base
    accounting nested layers pivoting
    calibration.seen
    calibration.corpus calibration.moments
    calibration.files
    config
    loss_calibration lazy loading stored cache model specs families linalg parsing storage
    rendering progress terminal shell schema options strict_json paths errors interrupts
""".split()  # noqa: SIM905

# Library: the modules that may import it.
BORDERS = {
    "ax": {"optimization.client"},
    "botorch": {"optimization.client"},
    "gpytorch": set[str](),
    "mlflow": {"mlflow_store", "mlflow_entities"},
    "hydra": {"config", "cli"},
    "omegaconf": {"config", "cli"},
    "datasets": {"calibration.corpus"},
    "pyarrow": {"calibration.files"},
    "matplotlib": {"drawing", "figures", "plots", "studies"},
    "pandas": {
        "commands.view",
        "comparison",
        "figures",
        "html_report",
        "loss_calibration",
        "optimization.client",
        "plots",
        "report",
        "results",
        "studies",
    },
    "plotly": {"html_report"},
    "accelerate": {"merging", "lazy"},
    "huggingface_hub": {"loading", "model_card"},
    "jinja2": {"rendering"},
    "tokenizers": {"loading"},
    "lm_eval": {"evaluation.zero_shot"},
    "pydantic": {
        "cache",
        "checkpoint",
        "optimization.events",
        "parsing",
        "loss_calibration",
    },
    "ray": {"executors.ray_tasks"},
}
# Of transformers everybody may name these types, and only these modules do more.
TRANSFORMERS_TYPES = {"PreTrainedModel", "PreTrainedTokenizerBase"}
TRANSFORMERS = {"model", "loading", "lazy", "export", "cli", "speed", "peak_memory"}
TRANSFORMERS |= {"checkpoint", "merging", "remote_code", "modeling_low_rank"}


@cache
def sources() -> dict[str, ast.Module]:
    """Parse every file of the package, by dotted name without the package's own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


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
    found = set()
    for module, names in imports(tree):
        if module == "lrbo":  # `from lrbo import config` imports a module, or the version
            found |= names - {"__version__"}
        elif module == "lrbo.calibration":
            found |= {f"calibration.{name}" for name in names}
        elif module.startswith("lrbo."):
            found.add(module.removeprefix("lrbo."))
    return found


def rooms() -> dict[str, ast.Module]:
    """Return the modules that are not the front of a package."""
    return {name: tree for name, tree in sources().items() if not name.endswith("__init__")}


def test_every_module_has_its_place() -> None:
    assert sorted(rooms()) == sorted(ROOMS)
    assert len(ROOMS) >= 30


def test_imports_point_downwards() -> None:
    seen = 0
    for name, tree in rooms().items():
        for other in own_imports(tree):
            assert ROOMS.index(other) > ROOMS.index(name), f"{name} imports {other}"
            seen += 1
    assert seen >= 100


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
        for name, tree in rooms().items()
        if any(module.split(".")[0] == library for module, _ in imports(tree))
    }
    assert users == BORDERS[library]


def test_transformers_is_used_in_few_places() -> None:
    for name, tree in rooms().items():
        for module, names in imports(tree):
            if module.split(".")[0] == "transformers" and name not in TRANSFORMERS:
                assert names, name
                assert names <= TRANSFORMERS_TYPES, name


def test_every_module_says_in_one_line_what_it_is() -> None:
    for name, tree in sources().items():
        docstring = ast.get_docstring(tree)
        assert docstring, name
        assert len(docstring.splitlines()[0]) <= 96, name
        if name != "allocation":  # which explains its one algorithm there
            assert len(docstring.splitlines()) <= 12, name


def test_public_functions_name_every_argument() -> None:
    """A docstring with an Args section must have all of the arguments, under their names."""
    seen = 0
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
            seen += 1
    assert seen >= 30


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


ROOT = PACKAGE.parent


def test_what_is_imported_is_declared_and_pinned() -> None:
    """Else it is there only as long as another package brings it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    declared = {
        re.split(r"[<>=!~ \[;]", each)[0].lower().replace("_", "-")
        for each in [*project["dependencies"], *optional["ray"], *optional["eval"]]
    }
    brought = packages_distributions()
    known = {*sys.stdlib_module_names, "lrbo"}
    seen = {module.split(".")[0] for tree in sources().values() for module, _ in imports(tree)}
    assert len(seen - known) > 20
    for module in sorted(seen - known):
        names = {name.lower().replace("_", "-") for name in brought.get(module, [module])}
        assert names & declared, f"{module} is imported, and {names} not among the dependencies"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    pinned = set(re.findall(r"^([\w.-]+)==", pins, re.MULTILINE))
    assert declared <= pinned
