"""The same text gives the same documents in every kind of file; anything else is named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from lrbo.config.choices import FILE_FORMATS
from lrbo.config.compose import composed
from lrbo.config.schema import DataConfig, ProtocolConfig, RoleConfig, SearchConfig
from lrbo.data.documents import documents
from lrbo.data.local_files import file_documents, matching
from lrbo.data.windows import ROLES, make_windows, protocol_windows
from lrbo.errors import DataError
from lrbo.models.tiny import byte_tokenizer
from lrbo.pipeline import checks

# What readers that guess types give back as something else.
TEXTS = [
    "NA", "null", "007", "1.50", "2020-01-01", "true", "", " blanks ", "grün 😀", "a,b\t\"c\"",
    "two\nlines\n\nand more\n", "x" * 200_000, "{\"text\": 1}", "\u2028\u0085 are no line ends",
]  # fmt: skip


def table(separator: str, texts: list[str] = TEXTS) -> bytes:
    """Write texts as the second of two columns."""
    written = io.StringIO()
    writer = csv.writer(written, delimiter=separator)
    writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    return written.getvalue().encode()


def parquet_bytes(frame: pandas.DataFrame) -> bytes:
    """Write a frame as Parquet."""
    actual: bytes = frame.to_parquet()
    return actual


ROWS = [{"id": number if number else "none", "text": text} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
PARQUET = parquet_bytes(pandas.DataFrame({"text": TEXTS}))


def zstd(content: bytes) -> bytes:
    """Compress as ``zstd`` does."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    actual: bytes = sink.getvalue().to_pybytes()
    return actual


KINDS: dict[str, bytes] = {
    "a.jsonl": LINES,
    "a.JSONL": LINES,
    "a.ndjson": LINES,
    "a.json": LINES,
    "blank lines.jsonl": b"\n  \n" + LINES.replace(b"}\n", b"}\r\n \n\n"),
    "no end.jsonl": LINES.rstrip(b"\n"),
    "escaped.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "list.json": json.dumps(ROWS).encode(),
    "list over lines.JSON": b"\n" + json.dumps(ROWS, indent=2).encode(),
    "list.jsonl": json.dumps(ROWS).encode(),
    "marked.jsonl": b"\xef\xbb\xbf" + LINES,
    "utf16.jsonl": LINES.decode().encode("utf-16"),
    "utf32.jsonl": LINES.decode().encode("utf-32"),
    "a.csv": table(","),
    "a.CSV": table(","),
    "marked.csv": b"\xef\xbb\xbf" + table(","),
    "a.tsv": table("\t"),
    "a.parquet": PARQUET,
    "a.PQ": PARQUET,
    "parquet whatever its name.txt": PARQUET,
    "a.parquet.gz": gzip.compress(PARQUET),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.json.XZ": lzma.compress(LINES),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.zst": zstd(LINES),
    "a.csv.gz": gzip.compress(table(",")),
    "compressed whatever its name.jsonl": gzip.compress(LINES),
    "plain whatever its name.jsonl.gz": LINES,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_has_the_same_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(KINDS[name])
    assert list(documents("files", str(tmp_path / name))) == TEXTS


@pytest.mark.parametrize("encode", [str.encode, lambda text: text.encode("utf-16")])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, zstd])
@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "wiki.test.raw", "a.txt.gz"])
def test_a_text_file_is_its_text_whatever_the_system_that_wrote_it(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes], encode: Callable[[str], bytes]
) -> None:
    text = "one\n\ntwo: grün\n" + "x" * 100_000
    for ends in (text, text.replace("\n", "\r\n"), text.replace("\n", "\r")):
        (tmp_path / name).write_bytes(pack(encode(ends)))
        assert list(documents("files", str(tmp_path / name))) == [text]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text.replace("\n", "\r\n")}), "utf-8")
    assert list(documents("files", str(tmp_path / "a.jsonl"))) == [text]


def test_the_same_text_gives_the_same_tokens_in_any_kind_of_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    digests = set()
    for name, content in KINDS.items():
        (tmp_path / name).write_bytes(content)
        spec = DataConfig(source="files", test=RoleConfig(str(tmp_path / name)), window=64)
        digests.add(make_windows(spec, tokenizer)["test"].digest)
    assert len(digests) == 1


def test_protocols_read_the_same_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    digests = set()
    for name, content in KINDS.items():
        path = tmp_path / name
        path.write_bytes(content)
        stated = ProtocolConfig("allenai/c4:en:validation", "c4", join=" ", bos="none", window=64)
        digests.add(protocol_windows("c4", stated, path, tokenizer).digest)
    assert len(digests) == 1


def test_a_protocol_s_text_file_may_have_the_line_ends_of_another_system_or_be_compressed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    lines = [" = Title = ", " ", " Grün . "]
    digests = set()
    for name, end, pack in (
        ("wiki.test.raw", "\n", bytes),
        ("dos.raw", "\r\n", bytes),
        ("wiki.test.raw.gz", "\n", gzip.compress),
    ):
        path = tmp_path / name
        path.write_bytes(pack("".join(f"{line}{end}" for line in lines).encode()))
        stated = ProtocolConfig("a:b:c", name, bos="none", window=2)
        digests.add(protocol_windows("w", stated, path, tokenizer).digest)
    assert len(digests) == 1


# --- what is refused, with file and line ---------------------------------------------------------

REFUSED: dict[str, tuple[str, bytes, str]] = {
    "half a character": (
        "a.jsonl", b'{"text":"x"}\n\n{"text":"x \\ud83d"}\n', r"a\.jsonl, line 3: \\ud83d in",
    ),
    "half a character in a list": ("a.json", b'["",{"text":"\\udc00"}]', "item 1: expected"),
    "null": ("a.jsonl", b'{"text":null}\n', "line 1: expected .* got None;"),
    "a number": ("a.json", b'[{"text":"x"},{"text":3}]', "item 2: expected .* got 3;"),
    "a list": ("a.jsonl", b'{"text":["x"]}\n', "line 1: expected .* got .*x.*;"),
    "another field": ("a.jsonl", b'{"body":"x","id":1}', "fields 'body', 'id'; .*column=NAME"),
    "a nested field": ("a.jsonl", b'{"meta":{"text":"x"}}', "got the fields 'meta'"),
    "an object around rows": ("a.json", b'{"data":[\n{"text":"x"}]}', "got the fields 'data'"),
    "cut off": ("a.jsonl", b'{"text":"x"}\n{"text":"x', "line 2: expected .* Unterminated"),
    "cut off list": ("a.json", b'[{"text":"x"},\n{"text":"x"}', "line 2: expected .* Expecting"),
    "two in a line": ("a.jsonl", b'{"text":"x"}{"text":"x"}', "line 1: expected .* Extra data"),
    "deep nesting": ("a.json", b"[" * 200_000, "line 1: expected .* recursion"),
    "many digits": ("a.jsonl", b'{"text":"x"}\n{"text":1' + b"0" * 5000 + b"}", "line 2: .*digits"),
    "Latin-1": ("a.txt", b"fine\nl\xe4nger\n", "line 2: the byte 0xE4 in column 2 is not UTF-8"),
    "Latin-1 in rows": ("a.csv", b"text\nl\xe4nger\n", "line 2: the byte 0xE4"),
    "UTF-16 without a mark": ("a.txt", "ab\ncd".encode("utf-16-le"), "line 1: a zero byte"),
    "binary": ("a.txt", b"\x7fELF\0\0\0", "line 1: a zero byte"),
    "zip": ("a.txt", b"PK\x03\x04\x14\x00\x00", "line 1: a zero byte"),
    "cut off gzip": ("a.txt.gz", gzip.compress(b"text" * 99)[:-9], r"cannot read .*a\.txt\.gz"),
    "cut off zstd": ("a.txt.zst", zstd(b"text" * 99)[:12], r"cannot read .*a\.txt\.zst"),
    "no Parquet": ("a.parquet", LINES[:99], r"cannot read .*a\.parquet"),
    "cut off Parquet": ("a.parquet", PARQUET[:-9], r"cannot read .*a\.parquet"),
    "Parquet without the column": (
        "a.parquet", parquet_bytes(pandas.DataFrame({"body": ["x"]})), "column 'text', got 'body'",
    ),
    "Parquet with nulls": (
        "a.parquet", parquet_bytes(pandas.DataFrame({"text": ["x", None]})), "row 2: .* got None",
    ),
    "Parquet of numbers": (
        "a.parquet", parquet_bytes(pandas.DataFrame({"text": [1]})), "row 1: .* got 1;",
    ),
    "CSV without the column": ("a.csv", b"id,body\n1,x\n", "one column 'text', got 'id', 'body'"),
    "CSV with two of it": ("a.csv", b"text,text\n1,x\n", "one column 'text', got 'text', 'text'"),
    "CSV of another separator": ("a.csv", b"id;text\n1;x\n", "got 'id;text'"),
    "CSV without quotes": ("a.csv", b"id,text\n1,a\n2,a, b\n", "line 3: expected 2 columns"),
    "CSV of too few": ("a.csv", b"id,text\n1,a\n2\n", "line 3: expected 2 columns"),
    "CSV with an open quote": ("a.csv", b'text\n"a\n', "line 2: unexpected end"),
    "an empty CSV": ("a.csv", b"", "line 1: expected .* one column 'text', got none"),
    "rows that are called text": ("a.txt", b'\n{"text":"x"}\n', "line 2: a row of JSON in a file"),
    "a list that is called text": ("a.md", b'[{"text":"x"}]', "line 1: a row of JSON in a file"),
    "an unknown suffix": ("a.html", b"<p>", "does not say what it is; expected one of .*format"),
    "no suffix": ("corpus", b"text", "name does not say what it is"),
    "Arrow": ("a.arrow", b"ARROW1\0\0", "name does not say what it is"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_text_is_refused_with_file_and_line(tmp_path: Path, what: str) -> None:
    name, content, message = REFUSED[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(documents("files", str(tmp_path / name)))
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.txt.gz"])
def test_an_empty_file_has_no_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    assert "".join(documents("files", str(tmp_path / name))) == ""


# --- what the configuration says -----------------------------------------------------------------


def test_the_format_that_is_given_goes_before_suffix_and_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(LINES)
    assert list(file_documents(path, format="json")) == TEXTS
    assert list(file_documents(path, format="text")) == [LINES.decode()]
    (tmp_path / "corpus").write_bytes(table("\t"))
    assert list(file_documents(tmp_path / "corpus", format="tsv"))[:3] == TEXTS[:3]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"body":"x","text":1}\n'),
        ("a.csv", b"id,body\n1,x\n"),
        ("a.parquet", parquet_bytes(pandas.DataFrame({"text": [1], "body": ["x"]}))),
    ],
)
def test_another_column_may_hold_the_text(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(file_documents(tmp_path / name, column="body")) == ["x"]


def search_of(*more: str) -> SearchConfig:
    """Compose a search in files."""
    paths = [f"data.{role}.path=a.txt" for role in ROLES]
    actual = composed("search", ["experiment=tiny", "data=files", *paths, *more])
    assert isinstance(actual, SearchConfig)
    return actual


def test_formats_are_checked_before_anything_is_read() -> None:
    (problem,) = checks.check(search_of("data.test.format=jsonl"))
    assert problem == f"data.test.format='jsonl': expected {' or '.join(FILE_FORMATS)}"
    problems = checks.check(search_of("data.test.format=json"))
    assert problems == [
        f"data.test: a.txt is read as format=json column=text, but data.{other} reads it as "
        "format=auto column=text; give both the same"
        for other in ("calibration", "validation")
    ]
    problems = checks.check(search_of("data=generated", "data.test.format=json"))
    assert any("data.test.format='json': only files have one" in one for one in problems)
    actual = composed("evaluate", ["protocols=[ptb]", "protocols.ptb.format=pdf"])
    assert any(one.startswith("protocols.ptb.format='pdf'") for one in checks.check(actual))


# --- patterns and repetitions --------------------------------------------------------------------


@pytest.mark.parametrize("address", ["https://example.org/a.txt", "s3://b/*.jsonl", "file:///a"])
def test_an_address_is_no_file(address: str) -> None:
    with pytest.raises(DataError, match="is an address, and texts are read from files: download"):
        list(documents("files", address))


def test_a_pattern_is_one_text_of_all_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("two", "utf-8")
    (tmp_path / "a.jsonl").write_text('{"text":"one"}', "utf-8")
    (tmp_path / "deep" / "er" / "c.csv").write_text("text\nthree\n", "utf-8")
    everything = ["one", "two", "three"]
    assert list(documents("files", f"{tmp_path}/*.*")) == everything[:2]
    assert list(documents("files", f"{tmp_path}/**")) == everything
    assert list(documents("files", f"{tmp_path}/**/[c]*")) == ["three"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(documents("files", "*.txt")) == list(documents("files", "~/*.txt")) == ["two"]
    with pytest.raises(DataError, match=r"no file fits the pattern '/none/\*'"):
        matching("/none/*")
    (tmp_path / "[x].txt").write_text("itself", "utf-8")
    assert list(documents("files", "[x].txt")) == ["itself"]


def test_the_limit_of_csv_is_that_of_the_program(tmp_path: Path) -> None:
    """It is one for the process, and a field may be longer than a program that reads CSV allows."""
    text = "x" * 200_000
    (tmp_path / "long.csv").write_text(f"text\n{text}\n{text}\n", encoding="utf-8")
    before = csv.field_size_limit(100)
    try:
        for actual in file_documents(tmp_path / "long.csv"):
            assert actual == text
            assert csv.field_size_limit() == 100
    finally:
        csv.field_size_limit(before)


def test_a_folder_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"it is a folder; give its files, as path='.*/\*\.txt'"):
        list(documents("files", str(tmp_path)))


@pytest.mark.parametrize("second_path", ["a.txt", "./a.txt", "link.txt", "*.txt"])
def test_a_text_that_a_role_names_twice_is_refused(
    tmp_path: Path,
    second_path: str,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("abc " * 99, "utf-8")
    Path("link.txt").symlink_to("a.txt")
    Path("other.txt").write_text("xyz " * 99, "utf-8")
    spec = DataConfig(source="files", test=RoleConfig(["a.txt", second_path]), window=8)
    with pytest.raises(DataError, match=r"data\.test: text .* is named twice, by 'a.txt'"):
        make_windows(spec, tokenizer)


def test_a_packaged_text_that_a_role_names_twice_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    spec = DataConfig(source="generated", test=RoleConfig(["words", "words"]), window=8)
    with pytest.raises(DataError, match="'words' is named twice"):
        make_windows(spec, tokenizer)


def test_reading_a_part_of_a_large_file_reads_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A protocol takes the first rows of a file of gigabytes."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text":"x"}\n' * 3 + b"no json\n")
    rows: Any = file_documents(path)
    assert [next(rows) for _ in range(3)] == ["x"] * 3
    rows.close()
    assert csv.field_size_limit() in (131072, sys.maxsize)


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ("Grün".encode("utf-16-le"), "look like UTF-16LE without a mark"),
        ("Many words".encode("utf-16-be"), "look like UTF-16BE without a mark"),
        ("words\nGrün".encode("cp1252"), "iconv -f ENCODING -t UTF-8"),
        ("Grün".encode()[:3], "if that is UTF-8, the file is damaged here"),
    ],
)
def test_what_is_not_in_utf8_is_named_by_its_first_bytes(
    tmp_path: Path, content: bytes, advice: str
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=advice) as raised:
        list(file_documents(file))
    assert "LATIN1" not in str(raised.value)


@pytest.mark.parametrize("value", [None, b"text", 7])
def test_a_row_of_parquet_without_text_is_named_by_its_column(
    tmp_path: Path, value: object
) -> None:
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [value]})
    parquet.write_table(table, file)
    with pytest.raises(
        DataError, match=r"row 1: expected text in one column 'text', got"
    ) as caught:
        list(file_documents(file))
    assert "JSON" not in str(caught.value)
    with pytest.raises(DataError, match="those of a Parquet file; give format=parquet"):
        list(file_documents(file, format="text"))


@pytest.mark.parametrize("path", [f"{'n' * 300}.txt", "a\0b.txt"])
def test_a_path_that_no_file_can_have_is_a_data_error(tmp_path: Path, path: str) -> None:
    whole = str(tmp_path / path)
    with pytest.raises(DataError, match="cannot read text file"):
        matching(whole)
    with pytest.raises(DataError, match="cannot read text file"):
        list(file_documents(Path(whole)))
    spec = DataConfig(source="files", test=RoleConfig(whole), window=8)
    with pytest.raises(DataError, match="cannot read text file"):
        make_windows(spec, byte_tokenizer())
