"""Documents from local files: text, JSON (lines or a list), CSV, TSV, Parquet, compressed or not.

The first bytes decide what a file is where they are certain (compression, Parquet, UTF-16), then
its suffix in any case. The readers of ``datasets`` are not used: they guess a type for each column
and change text like ``NA`` or ``007``.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import json
import lzma
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from lrbo.config.choices import AUTO, SUFFIXES
from lrbo.config.shell import text as quoted
from lrbo.errors import DataError, cut, reading, some

COLUMN = "text"
# Compressed files: first bytes, suffixes, and what opens them.
COMPRESSIONS: tuple[tuple[bytes, tuple[str, ...], Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b", (".gz", ".gzip"), gzip.open),
    (b"BZh", (".bz2",), bz2.open),
    (b"\xfd7zXZ\x00", (".xz",), lzma.open),
    (b"\x28\xb5\x2f\xfd", (".zst", ".zstd"), lambda file: pyarrow.input_stream(file, "zstd")),
)
# UTF-32 first: the mark of its little-endian files begins with that of UTF-16.
MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
PARQUET = b"PAR1"
SEPARATORS = {"csv": ",", "tsv": "\t"}

Lines = Iterator[tuple[int, str]]


def matching(path: str) -> list[Path]:
    """Return the file of a path, or the files that match it as a pattern.

    ``~``, ``*``, ``?``, ``[a-z]`` and ``**`` match as in a shell, unless a file has that very name.
    """
    if "://" in path:
        raise DataError(
            f"{cut(path)!r} is an address, and texts are read from files: download it, or take a "
            "dataset of the hub with data=hf"
        )
    with reading(DataError, f"cannot read text file {cut(path)!r}"):
        whole = Path(path).expanduser()
        whole.resolve()  # a ValueError for a name that no file can have
        if whole.exists() or not set(path) & set("*?["):
            return [whole]
    # Path.glob takes no absolute pattern.
    names = glob.glob(str(whole), recursive=True)  # noqa: PTH207
    files = [file for name in sorted(names) if not (file := Path(name)).is_dir()]
    if not files:
        raise DataError(
            f"no file fits the pattern {path!r}; look with: ls {shlex.quote(str(whole.parent))}"
        )
    return files


def file_documents(
    path: Path,
    *,
    format: str = AUTO,
    column: str = COLUMN,
    line: Callable[[str], str] | None = None,
) -> Iterator[str]:
    """Yield the documents of a file: the text column of each row, or a whole text file.

    ``line`` makes a document of each line of a text file instead. Rows without text and files of
    another kind are DataErrors.
    """
    with reading(DataError, f"cannot read text file {cut(str(path))!r}"):
        if path.is_dir():
            raise DataError(
                f"cannot read text file {path}: it is a folder; give its files, as "
                f"path={quoted(f'{path}/*.txt')}"
            )
        with path.open("rb") as raw:
            start = raw.peek(8)
            opener = next((o for mark, _, o in COMPRESSIONS if start.startswith(mark)), None)
            file = io.BufferedReader(opener(raw)) if opener else raw
            kind = _kind(path, file.peek(len(PARQUET)), format)
            if kind == "parquet":
                seekable = raw if file is raw else io.BytesIO(file.read())
                yield from _parquet_documents(path, seekable, column)
                return
            start = file.peek(256)[:256]  # to guess an encoding from
            encoding = next((e for e, marks in MARKS.items() if start.startswith(marks)), None)
            as_utf8 = io.BytesIO(file.read().decode(encoding).encode()) if encoding else file
            lines = _lines(path, as_utf8, start)
            if kind == "json":
                yield from (_text(path, *row, column) for row in _json_rows(path, lines))
            elif kind in SEPARATORS:
                yield from _table_documents(path, lines, column, SEPARATORS[kind])
            else:
                if format == AUTO:
                    lines = _without_rows(path, lines, column)
                content = (content for _, content in lines)
                yield from ["".join(content)] if line is None else map(line, content)


def _kind(path: Path, start: bytes, format: str) -> str:
    """Return the format of a file, by its first bytes or its suffix."""
    if format != AUTO:
        return format
    if start.startswith(PARQUET):
        return "parquet"
    name = path.name.lower()
    if name.endswith(tuple(suffix for _, suffixes, _ in COMPRESSIONS for suffix in suffixes)):
        name = Path(name).stem
    for kind, suffixes in SUFFIXES.items():
        if name.endswith(suffixes):
            return kind
    expected = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
    raise DataError(
        f"cannot read text file {path}: its name does not say what it is; expected one of the "
        f"suffixes {expected}, or beside its path format={' or '.join(SUFFIXES)}"
    )


def _lines(path: Path, file: io.BufferedIOBase, start: bytes) -> Lines:
    r"""Yield the number and text of each line, with ``\n`` for ``\r\n``."""
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: the byte 0x{line[error.start]:02X} in column "
                f"{error.start + 1} is not UTF-8; {_advice(start)}"
            ) from error
        if "\0" in text:
            raise DataError(
                f"{path}, line {number}: a zero byte, expected text in UTF-8, or in UTF-16 with a "
                f"mark at the beginning; {_advice(start)}"
            )
        yield number, f"{text[:-2]}\n" if text.endswith("\r\n") else text


def _advice(start: bytes) -> str:
    """Say how to convert a file to UTF-8, judged by its first bytes."""
    if start.startswith(PARQUET):
        return "its first bytes are those of a Parquet file; give format=parquet beside its path"
    for encoding, high, low in (
        ("UTF-16LE", start[1::2], start[::2]),
        ("UTF-16BE", start[::2], start[1::2]),
    ):
        if high.count(0) > len(high) / 2 > 2 * low.count(0):
            return (
                f"its first bytes look like {encoding} without a mark; convert the file with: "
                f"iconv -f {encoding} -t UTF-8"
            )
    return (
        "convert the file with: iconv -f ENCODING -t UTF-8, from the encoding that it was written "
        "in; if that is UTF-8, the file is damaged here"
    )


def _without_rows(path: Path, lines: Lines, column: str) -> Lines:
    """Yield the lines of a file that is text by its suffix alone, but refuse rows of JSON."""
    for number, line in lines:
        row = None
        with suppress(DataError):
            row = _parsed(path, line)
        row = row[0] if isinstance(row, list) and row else row
        if isinstance(row, dict) and column in row:
            raise DataError(
                f"{path}, line {number}: a row of JSON in a file whose name says text; give "
                f"format=json beside its path to read the field {column!r} of each row, or "
                "format=text to read the file as it is"
            )
        yield number, line
        if line.strip():
            break
    yield from lines


def _parsed(path: Path, text: str, number: int | None = None) -> Any:
    """Parse JSON: the line of a number, or a whole file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of too many digits, deep nesting
        problem, line = str(error), 1
        if isinstance(error, json.JSONDecodeError):
            problem, line = f"{error.msg} in column {error.colno}", error.lineno
        raise DataError(f"{path}, line {number or line}: expected JSON: {problem}") from error


def _json_rows(path: Path, lines: Lines) -> Iterator[tuple[str, Any]]:
    """Yield position and value of each row of a JSON file: lines, a list, or one object."""
    lines = dropwhile(lambda line: not line[1].strip(), lines)
    first, text = next(lines, (1, "[]"))
    row = None
    with suppress(DataError):
        row = _parsed(path, text)
    if isinstance(row, dict):  # a row per line; blank ones are skipped
        yield f"line {first}", row
        for number, line in lines:
            if line.strip():
                yield f"line {number}", _parsed(path, line, number)
        return
    whole = _parsed(path, "\n" * (first - 1) + text + "".join(line for _, line in lines))
    if isinstance(whole, list):
        yield from ((f"item {number}", row) for number, row in enumerate(whole, start=1))
    else:
        yield f"line {first}", whole


def _no_text(path: Path, where: str, column: str, got: str) -> DataError:
    return DataError(
        f"{path}, {where}: expected text in one column {column!r}, got {got}; another one is named "
        "with column=NAME beside the path"
    )


def _text(path: Path, where: str, row: object, column: str) -> str:
    """Return the text of a row of JSON or Parquet."""
    if not isinstance(row, dict):
        raise _no_text(path, where, column, f"{type(row).__name__} {row!r:.40}")
    if column not in row:
        raise _no_text(path, where, column, f"the fields {_listed(row)}")
    value = row[column]
    if not isinstance(value, str):
        raise _no_text(path, where, column, f"{value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise DataError(
            f"{path}, {where}: {half} in the field {column!r} is half of a character; expected "
            "whole ones: remove the row, or write \\ufffd for it"
        ) from error
    return value


def _table_documents(path: Path, lines: Lines, column: str, separator: str) -> Iterator[str]:
    """Yield the text column of a CSV or TSV file, unchanged."""
    reader = csv.reader((line for _, line in lines), delimiter=separator, strict=True)
    try:
        names = _next_row(reader) or []
        if names.count(column) != 1:
            raise _no_text(path, "line 1", column, _listed(names))
        index = names.index(column)
        while (row := _next_row(reader)) is not None:
            if row and len(row) != len(names):
                raise DataError(
                    f"{path}, line {reader.line_num}: expected {len(names)} columns, as in line "
                    f"1, got {len(row)}; quote texts that have {separator!r} or line ends in them"
                )
            if row:  # not a blank line
                yield row[index]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; quote it as CSV does") from error


def _next_row(reader: Iterator[list[str]]) -> list[str] | None:
    """Read a row, of fields beyond the 128 KiB of csv; the process keeps its own limit."""
    limit = csv.field_size_limit(2**31 - 1)  # what a C long holds everywhere
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _parquet_documents(path: Path, file: io.BufferedIOBase, column: str) -> Iterator[str]:
    table = parquet.ParquetFile(file)
    names = table.schema_arrow.names
    if names.count(column) != 1:
        raise _no_text(path, "schema", column, _listed(names))
    batches = table.iter_batches(columns=[column])
    values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
    for number, value in enumerate(values, start=1):
        yield _text(path, f"row {number}", {column: value}, column)


def _listed(names: Iterable[Any]) -> str:
    return some(map(repr, names), 8, "none")
