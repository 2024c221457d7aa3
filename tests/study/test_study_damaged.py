"""A part of a study that is missing or damaged is made again as it was, or refused by name."""

import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lrbo.errors import ConfigError, StudyError
from lrbo.files.caches import ABOUT
from lrbo.pipeline import build_worker, planning
from lrbo.pipeline.checks import check
from lrbo.reports import results
from lrbo.study.journal import Study
from lrbo.tasks.perplexity import DenseReference
from tests.support.commands import lrbo_command
from tests.support.small_search import RecordingReporter, small_config

ROLES = ("calibration", "validation", "test")
TEXTS = [f"data.{role}.path={role}.txt" for role in ROLES]
OPTIONS = ["study=one", "data=files", "data.window=64", *TEXTS]


def build() -> tuple[Any, RecordingReporter]:
    """Build the worker of the study, as every search does."""
    study, reporter = Study(Path("studies/one")), RecordingReporter()
    with study.locked():
        plan = planning.plan_search(small_config(*OPTIONS), study, [])
        return build_worker.build_worker(plan, study, reporter), reporter


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Begin a study once, with its cache."""
    folder = tmp_path_factory.mktemp("begun")
    for role in ROLES:
        text = f"the {role} cat sat on the mat. " * 90
        (folder / f"{role}.txt").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, chdir(folder):
        patch.setenv("LRBO_CACHE", str(folder / "cache"))
        build()
    return folder


@pytest.fixture
def there(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand beside a copy of the study, and return its folder."""
    shutil.copytree(begun, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path / "copy" / "cache"))
    return Path("studies/one")


def content(path: Path) -> object:
    """Return what a file says; safetensors writes its metadata in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: (t.dtype, t.tolist()) for name, t in load_file(path).items()}
        return file.metadata(), tensors


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def other_tokens(path: Path) -> None:
    tensors = load_file(path)
    tensors["validation"][0, 0] += 1
    save_file(tensors, path, metadata={role: f"words[{role}]" for role in ROLES})


def one_role_less(path: Path) -> None:
    tensors = load_file(path)
    del tensors["test"]
    save_file(tensors, path, metadata={role: f"words[{role}]" for role in ROLES})


def fewer_rows(path: Path) -> None:
    dense = DenseReference.load(path)
    tensors = {"ids": dense.ids[:-1], "log_probs": dense.log_probs, "log_rest": dense.log_rest}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"nll": "1"})


def of_another_study(path: Path) -> None:
    dense = DenseReference.load(path)
    tensors = {"ids": dense.ids, "log_probs": dense.log_probs - 1, "log_rest": dense.log_rest}
    about = {"nll": "1.5", "tokens": str(dense.perplexity.tokens)}
    save_file(tensors, path, metadata=about)


REMADE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no tokens": ("tokens.safetensors", Path.unlink),
    "tokens cut off": ("tokens.safetensors", truncate),
    "no bytes of tokens": ("tokens.safetensors", lambda path: path.write_bytes(b"")),
    "other tokens": ("tokens.safetensors", other_tokens),
    "tokens of fewer roles": ("tokens.safetensors", one_role_less),
    "no dense model": ("dense.safetensors", Path.unlink),
    "dense model cut off": ("dense.safetensors", truncate),
    "dense model of fewer rows": ("dense.safetensors", fewer_rows),
    "dense model of another study": ("dense.safetensors", of_another_study),
    "no configuration": ("config.yaml", Path.unlink),
}


@pytest.mark.parametrize("damage", REMADE)
def test_what_follows_from_the_rest_is_made_again_as_it_was(there: Path, damage: str) -> None:
    name, spoil = REMADE[damage]
    before = content(there / name)
    journal = (there / "journal.jsonl").read_bytes()
    spoil(there / name)
    build()
    Study(there).config_yaml()
    assert content(there / name) == before
    assert (there / "journal.jsonl").read_bytes() == journal


@pytest.mark.parametrize("damage", [name for name in REMADE if "tokens" in name])
def test_tokens_that_no_text_gives_any_more_are_refused(there: Path, damage: str) -> None:
    """Trials on other tokens would be compared with those before."""
    name, spoil = REMADE[damage]
    spoil(there / name)
    spoiled = (there / name).read_bytes() if (there / name).exists() else None
    for role in ROLES:
        Path(f"{role}.txt").write_text(f"a {role} dog ran over the hill. " * 90, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tokens\.safetensors .*digests.*study=NAME") as caught:
        build()
    assert "Restore" in str(caught.value)
    assert ((there / name).read_bytes() if (there / name).exists() else None) == spoiled


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("budget", {"measure": "parameters", "limit": 999}),
        ("forms", ["factored"]),
        ("model_parameters", 7),
        ("added_biases", ["model.layers.0.self_attn.q_proj"]),
        ("seed", 5),
        ("timed", True),
    ],
)
def test_a_start_that_the_model_and_configuration_do_not_give_is_refused(
    there: Path, key: str, value: object
) -> None:
    path = there / "study.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    assert about[key] != value
    path.write_text(json.dumps(about | {key: value}), encoding="utf-8")
    with pytest.raises(StudyError, match=rf"study\.json says other {key} than configuration and"):
        build()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a: [1"], "is no YAML"),
        (["[" * 100_000], "is no YAML"),
        (["- 1"], r"it is \[1\], expected"),
        (["budget: {keep_ratio: maybe}"], r"budget\.keep_ratio is \"maybe\""),
        (["budget: 3"], "budget is 3, expected"),
    ],
)
def test_a_configuration_that_is_none_is_refused_by_field(
    there: Path, lines: list[str], message: str
) -> None:
    about = json.loads((there / "study.json").read_text(encoding="utf-8"))
    (there / "study.json").write_text(json.dumps(about | {"config": lines}), encoding="utf-8")
    (there / "config.yaml").unlink()
    with pytest.raises(StudyError, match=message):
        _ = Study(there).config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "says other seed than the configuration in it"),
        ({"timed": True, "forms": ["factored"]}, "says other timed, forms than the"),
        ({"forms": ["woven"]}, "says other forms than the"),
        ({"budget": {"measure": "parameters", "limit": 999}}, "says other budget than the"),
        ({"budget": {"measure": "bytes", "limit": 999}}, "says other budget than the"),
    ],
)
@pytest.mark.parametrize("command", ["search", "report"])
def test_a_start_that_contradicts_itself_is_refused_by_every_command(
    there: Path, command: str, change: dict[str, Any], message: str
) -> None:
    about = json.loads((there / "study.json").read_text(encoding="utf-8"))
    (there / "study.json").write_text(json.dumps(about | change), encoding="utf-8")
    ran = lrbo_command(command, "study=one")
    assert ran.status == 2
    assert f"study.json {message}" in ran.err


def test_a_front_of_what_is_not_measured_is_refused_by_a_report(there: Path) -> None:
    about = json.loads((there / "study.json").read_text(encoding="utf-8"))
    (size,) = [i for i, line in enumerate(about["config"]) if line == "  size: keep_ratio"]
    about["config"][size] = "  size: weight"
    (there / "study.json").write_text(json.dumps(about), encoding="utf-8")
    (there / "config.yaml").unlink()
    ran = lrbo_command("report", "study=one")
    assert ran.status == 2
    assert "search.size='weight': expected keep_ratio or" in ran.err
    assert not (there / "config.yaml").exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (["name: asvd"], r"method\.alpha is missing: expected a number from 0 on"),
        (["name: asvd", "alpha: '0.5'"], r"method\.alpha='0.5': expected a number from 0 on"),
        (["name: asvd", "alpha: 0.5", "beta: 1"], r"method\.beta=1: asvd has no such option"),
        (["alpha: 0.5"], r"method\.name=None: expected one of svd, "),
        (["name: mine", "power: 2"], None),  # of a program that added it
    ],
)
def test_the_method_of_a_study_has_its_options_and_no_others(
    there: Path, method: list[str], message: str | None
) -> None:
    about = json.loads((there / "study.json").read_text(encoding="utf-8"))
    lines = about["config"]
    begin = lines.index("method:") + 1
    end = next(i for i in range(begin, len(lines)) if not lines[i].startswith(" "))
    lines[begin:end] = [f"  {line}" for line in method]
    (there / "study.json").write_text(json.dumps(about), encoding="utf-8")
    (there / "config.yaml").unlink()
    if message is None:
        assert Study(there).config.method == {"name": "mine", "power": 2}
        return
    with pytest.raises(StudyError, match=message):
        _ = Study(there).config


def test_a_configuration_that_is_no_yaml_is_not_written_again(there: Path) -> None:
    about = json.loads((there / "study.json").read_text(encoding="utf-8"))
    (there / "study.json").write_text(json.dumps(about | {"config": ["a: [1"]}), encoding="utf-8")
    (there / "config.yaml").unlink()
    for command in ("search", "report"):
        ran = lrbo_command(command, "study=one")
        assert ran.status == 2, command
        assert f"configuration in {there / 'study.json'} is no YAML" in ran.err
        assert "written again" not in ran.err
        assert not (there / "config.yaml").exists()


@pytest.mark.parametrize(
    "content",
    ["", "[1", "{}", '{"fits": 3, "measurements": []}', '{"measurements": [{"rank": -1}]}'],
)
def test_measurements_that_are_damaged_are_refused_or_made_again(there: Path, content: str) -> None:
    path = there / "sensitivity.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(StudyError, match=r"sensitivity\.json: .*Delete the file"):
        results.sensitivity(Study(there))


def test_the_command_line_says_what_is_missing_and_leaves_all_as_it_was(there: Path) -> None:
    """It took any configuration, and said that it went on."""
    (there / "journal.jsonl").write_bytes(
        (there / "journal.jsonl").read_bytes() or b'{"event": "dense"}\n'
    )
    (there / "study.json").unlink()
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    for arguments in (
        ("search", *OPTIONS, "budget.keep_ratio=0.5"),
        ("report", "study=one"),
        ("report", "study=o*"),
        ("compress", "study=one", "out=new"),
    ):
        ran = lrbo_command(*arguments)
        assert ran.status == 2, arguments
        assert "study.json is missing, and" in ran.err
        assert "Traceback" not in ran.err
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before


# --- the cache ---------------------------------------------------------------------------------


def changed(path: Path, at: int) -> None:
    """Change a byte, and nothing of the length."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def changed_both(cache: Path, at: int) -> None:
    for kind in ("factors", "calibration"):
        changed(next(cache.glob(f"{kind}/*/part_*")), at)


PARTS = {
    "all of it": lambda cache: shutil.rmtree(cache),
    "the factors": lambda cache: shutil.rmtree(cache / "factors"),
    "a part of the factors": lambda cache: next(cache.glob("factors/*/part_*")).unlink(),
    "a part cut off": lambda cache: truncate(next(cache.glob("factors/*/part_*"))),
    "the list of factors": lambda cache: next(cache.glob(f"factors/*/{ABOUT}")).unlink(),
    "a header of the factors": lambda cache: changed(next(cache.glob("factors/*/part_*")), at=20),
    "a number of the factors": lambda cache: changed(next(cache.glob("factors/*/part_*")), at=-1),
    "a header of both": lambda cache: changed_both(cache, at=20),
    "a number of both": lambda cache: changed_both(cache, at=-1),
    "a part of both": lambda cache: [
        next(cache.glob(f"{kind}/*/part_*")).unlink() for kind in ("factors", "calibration")
    ],
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_cache_that_is_gone_is_made_again(there: Path, part: str) -> None:
    before, _ = build()
    expected = {name: factors.left.clone() for name, factors in before.prepared.items()}
    PARTS[part](Path("cache"))
    after, reporter = build()
    is_calibrated = part == "all of it" or "both" in part
    assert reporter.steps == ["Calibration"] * is_calibrated + ["Factorization"]
    assert after.prepared.keys() == expected.keys()
    for name, left in expected.items():
        assert torch.equal(after.prepared[name].left, left)


def test_statistics_that_are_deleted_while_factors_are_made_are_made_again(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree("cache/factors")
    real, deleted = planning.method_named, []

    def method_named(*arguments: Any) -> Any:
        method = real(*arguments)
        factor = type(method).factor

        def factored(self: Any, *given: Any) -> Any:
            if not deleted:
                deleted.append(shutil.rmtree("cache/calibration"))
            return factor(self, *given)

        monkeypatch.setattr(type(method), "factor", factored)
        return method

    monkeypatch.setattr(planning, "method_named", method_named)
    worker, reporter = build()
    assert deleted
    assert reporter.steps == ["Calibration", "Factorization"]
    assert worker.prepared


def test_a_cache_that_cannot_be_written_is_refused_with_the_values(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("occupied").touch()
    monkeypatch.setenv("LRBO_CACHE", "occupied/cache")
    (problem,) = check(small_config(*OPTIONS))
    assert problem.startswith("LRBO_CACHE='occupied/cache': ")
    assert problem.endswith(" is a file, not a folder")


@pytest.mark.parametrize("part", ["calibration", "factors", "models"])
def test_a_file_where_the_cache_has_a_folder_is_refused_with_the_values(
    there: Path, part: str
) -> None:
    """It was refused after the calibration, as something that another process deletes."""
    folder = (Path("cache") / part).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.touch()
    (problem,) = check(small_config(*OPTIONS))
    assert problem.startswith("LRBO_CACHE=")
    assert f"{folder} is a file, not a folder" in problem
