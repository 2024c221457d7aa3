"""Local files -> documents: the same text, whatever kind of file it lies in.

Text, JSON (lines or one list), CSV, TSV and Parquet, compressed or not. What the first bytes say
for certain decides (compression, Parquet, UTF-16), then the suffix in any case; a file that has
neither is read only as the kind that the configuration names. The readers of ``datasets`` guess
a type for every column: text like ``NA``, ``007`` or ``2020-01-01`` comes back as another value.
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
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from lrbo.errors import DataError, cut, reading
from lrbo.options import AUTO, SUFFIXES
from lrbo.shell import text as quoted

COLUMN = "text"
# First bytes of compressed files, the suffixes that they have, and what unpacks them.
COMPRESSIONS: tuple[tuple[bytes, tuple[str, ...], Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b", (".gz", ".gzip"), gzip.open),
    (b"BZh", (".bz2",), bz2.open),
    (b"\xfd7zXZ\x00", (".xz",), lzma.open),
    (b"\x28\xb5\x2f\xfd", (".zst", ".zstd"), lambda file: pyarrow.input_stream(file, "zstd")),
)
# UTF-32 first: the mark of its little-endian files begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
PARQUET = b"PAR1"
START = 256  # bytes that an encoding is guessed from
LONGEST_FIELD = 2**31 - 1  # of CSV: what a C long holds everywhere
FIELDS = 8  # so many names are listed in a message

Lines = Iterator[tuple[int, str]]


def matching(path: str) -> list[Path]:
    """Expand a path to the files that it means: itself, or those that fit it as a pattern.

    Args:
        path: With ``~`` for the home folder; ``*``, ``?``, ``[a-z]`` and ``**`` as in a shell,
            unless there is a file of that very name.

    Raises:
        DataError: If no file fits the pattern.
    """
    if "://" in path:
        raise DataError(
            f"{cut(path)!r} is an address, and texts are read from files: download it, or take a "
            "dataset of the hub with data=hf"
        )
    with reading(DataError, f"cannot read text file {cut(path)!r}"):
        whole = Path(path).expanduser()
        try:
            whole.stat()
        except (FileNotFoundError, NotADirectoryError):
            is_there = False
        else:
            is_there = True
    if is_there or not set(path) & set("*?["):
        return [whole]
    # Not Path.glob, which takes no absolute pattern.
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
    """Yield the documents of a file: the column of each row, or a text file whole.

    Args:
        path: Of the file.
        format: One of ``lrbo.options.FILE_FORMATS``.
        column: Field or column that holds the text.
        line: Makes a document of each line of a text file; ``None`` takes such a file whole.

    Raises:
        DataError: If there is no text in it, with the line; or if nothing says for certain what
            the file is.
    """
    with reading(DataError, f"cannot read text file {cut(str(path))!r}"):
        is_folder = path.is_dir()
    if is_folder:
        raise DataError(
            f"cannot read text file {path}: it is a folder; give its files, as "
            f"path={quoted(f'{path}/*.txt')}"
        )
    with reading(DataError, f"cannot read text file {path}"), path.open("rb") as raw:
        file, packed = _unpacked(raw)
        kind = _kind(path, file.peek(len(PARQUET)), format)
        if kind == "parquet":
            yield from _parquet_documents(path, io.BytesIO(file.read()) if packed else raw, column)
            return
        start = file.peek(START)[:START]
        lines = _lines(path, _as_utf8(file), start)
        if kind == "json":
            yield from (_text(path, *row, column) for row in _json_rows(path, lines, column))
        elif kind in ("csv", "tsv"):
            yield from _table_documents(path, lines, column, "," if kind == "csv" else "\t")
        else:
            content = (content for _, content in _refuse_rows(path, lines, format, column))
            yield from ["".join(content)] if line is None else map(line, content)


def _unpacked(raw: io.BufferedReader) -> tuple[io.BufferedReader, bool]:
    """Return the content of a file, and whether it was compressed."""
    start = raw.peek(8)
    for mark, _, opened in COMPRESSIONS:
        if start.startswith(mark):
            return io.BufferedReader(opened(raw)), True
    return raw, False


def _kind(path: Path, start: bytes, format: str) -> str:
    """Decide what a file is, by its first bytes or its suffix.

    Raises:
        DataError: If neither says it.
    """
    if format != AUTO:
        return format
    if start.startswith(PARQUET):
        return "parquet"
    name = path.name.lower()
    for _, suffixes, _ in COMPRESSIONS:
        if name.endswith(suffixes):
            name = Path(name).stem
            break
    for kind, suffixes in SUFFIXES.items():
        if name.endswith(suffixes):
            return kind
    known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
    raise DataError(
        f"cannot read text file {path}: its name does not say what it is; expected one of the "
        f"suffixes {known}, or beside its path format={', '.join(list(SUFFIXES)[:-1])} or parquet"
    )


def _as_utf8(file: io.BufferedReader) -> io.BufferedIOBase:
    """Translate a file whose first bytes say UTF-16 or UTF-32."""
    start = file.peek(4)
    for mark, encoding in MARKS:
        if start.startswith(mark):
            return io.BytesIO(file.read().decode(encoding).encode())
    return file


def _lines(path: Path, file: io.BufferedIOBase, start: bytes) -> Lines:
    r"""Yield number and text of each line; its end is ``\n``, also where that is ``\r\n``.

    Args:
        path: Of the file.
        file: Its content.
        start: Its first bytes, which may say what it is if it is no text.

    Raises:
        DataError: At the first line that is no text.
    """
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
                f"{path}, line {number}: a zero byte, which text has none of; expected a text in "
                f"UTF-8, or in UTF-16 with its mark at the beginning; {_advice(start)}"
            )
        yield number, f"{text[:-2]}\n" if text.endswith("\r\n") else text


def _advice(start: bytes) -> str:
    """Say how to make a text of a file that is none in UTF-8, by what its first bytes look like."""
    if start.startswith(PARQUET):
        return "its first bytes are those of a Parquet file; give format=parquet beside its path"
    for encoding, zeros, others in (
        ("UTF-16LE", start[1::2], start[::2]),
        ("UTF-16BE", start[::2], start[1::2]),
    ):
        if zeros.count(0) > len(zeros) / 2 > 2 * others.count(0):
            return (
                f"its first bytes look like {encoding} without a mark; convert the file with: "
                f"iconv -f {encoding} -t UTF-8"
            )
    return (
        "convert the file with: iconv -f ENCODING -t UTF-8, where ENCODING is the one that it was "
        "written in; if that is UTF-8, the file is damaged here"
    )


def _refuse_rows(path: Path, lines: Lines, format: str, column: str) -> Lines:
    """Pass lines on, unless a file that is text by its suffix alone begins with a row of JSON.

    Raises:
        DataError: If it does.
    """
    for number, line in lines:
        if format == AUTO and line.strip():
            row, _, _ = _parsed(line)
            row = row[0] if isinstance(row, list) and row else row
            if isinstance(row, dict) and column in row:
                raise DataError(
                    f"{path}, line {number}: a row of JSON in a file whose name says text; give "
                    f"format=json beside its path to read the field {column!r} of each row, or "
                    "format=text to read the file as it is"
                )
            format = "text"  # which the first line has decided
        yield number, line


def _parsed(text: str) -> tuple[Any, str | None, int]:
    """Parse JSON; return the value, why there is none, and in which line."""
    try:
        return json.loads(text), None, 1
    except json.JSONDecodeError as error:
        return None, f"{error.msg} in column {error.colno}", error.lineno
    except (ValueError, RecursionError) as error:  # a number of too many digits, deep nesting
        return None, str(error), 1


def _json_rows(path: Path, lines: Lines, column: str) -> Iterator[tuple[str, Any]]:
    """Yield where and what each row of a JSON file is: of lines, a list, or a single object.

    Raises:
        DataError: With the first line that is not JSON.
    """
    blank, first = 0, ""
    for _, first in lines:
        if first.strip():
            break
        blank += 1
    if not first.strip():
        return
    row, _, _ = _parsed(first)
    if isinstance(row, dict):  # a row per line; blank ones are none
        for number, line in chain([(blank + 1, first)], lines):
            if line.strip():
                row, problem, _ = _parsed(line)
                if problem is not None:
                    raise DataError(_expected(path, f"line {number}", column, problem))
                yield f"line {number}", row
        return
    whole, problem, place = _parsed("\n" * blank + first + "".join(line for _, line in lines))
    if problem is not None:
        raise DataError(_expected(path, f"line {place}", column, problem))
    if isinstance(whole, list):
        yield from ((f"item {number}", row) for number, row in enumerate(whole, start=1))
    else:
        yield f"line {blank + 1}", whole


def _expected(path: Path, where: str, column: str, came: str) -> str:
    """Return the message about a row of JSON that is none."""
    return f"{path}, {where}: expected a JSON object with a field {column!r} of text, got {came}"


def _text(path: Path, where: str, row: object, column: str) -> str:
    """Return the text of a row.

    Raises:
        DataError: If it has none, saying what it has.
    """
    hint = "; another field is named with column=NAME beside the path"
    if not isinstance(row, dict):
        raise DataError(_expected(path, where, column, f"{type(row).__name__} {row!r:.40}"))
    if column not in row:
        raise DataError(_expected(path, where, column, f"the fields {_listed(row)}") + hint)
    value = row[column]
    if not isinstance(value, str):
        raise DataError(_expected(path, where, column, f"{value!r:.40} there") + hint)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise DataError(
            f"{path}, {where}: {half} in the field {column!r} is half of a character, as where a "
            f"text was cut off; expected whole ones: remove the row, or write \\ufffd for it"
        ) from error
    return value


def _table_documents(path: Path, lines: Lines, column: str, separator: str) -> Iterator[str]:
    """Yield the column of each row of a CSV or TSV file, as it is written there.

    Raises:
        DataError: If there is no such column, or with the first row that has more or fewer.
    """
    reader = csv.reader((line for _, line in lines), delimiter=separator, strict=True)
    try:
        names = _next_row(reader) or []
        if names.count(column) != 1:
            raise DataError(
                f"{path}, line 1: expected one column {column!r}, got {_listed(names)}; another "
                "one is named with column=NAME beside the path"
            )
        place = names.index(column)
        while (row := _next_row(reader)) is not None:
            if row and len(row) != len(names):
                raise DataError(
                    f"{path}, line {reader.line_num}: expected {len(names)} columns, as in line "
                    f"1, got {len(row)}; quote texts that have {separator!r} or line ends in them"
                )
            if row:  # a blank line is none
                yield row[place]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; quote it as CSV does") from error


def _next_row(reader: Iterator[list[str]]) -> list[str] | None:
    """Return the next row, whose fields may be longer than the 128 KiB that are usual.

    The limit is one for all of the process: what imports this package keeps its own.
    """
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _parquet_documents(path: Path, file: io.BufferedIOBase, column: str) -> Iterator[str]:
    """Yield a column of a Parquet file.

    Raises:
        DataError: If there is none of that name, or it does not hold text everywhere.
    """
    table = parquet.ParquetFile(file)
    names = table.schema_arrow.names
    if column not in names:
        raise DataError(
            f"{path}: expected a column {column!r}, got {_listed(names)}; another one is named "
            "with column=NAME beside the path"
        )
    number = 0
    for batch in table.iter_batches(columns=[column]):
        for value in batch.column(0).to_pylist():
            number += 1
            if not isinstance(value, str):
                raise DataError(
                    f"{path}, row {number}: expected text in the column {column!r}, got "
                    f"{value!r:.40}; another column is named with column=NAME beside the path"
                )
            yield _text(path, f"row {number}", {column: value}, column)


def _listed(names: Any) -> str:
    """Return the first of some names for a message."""
    known = [repr(name) for name in names]
    more = f" and {len(known) - FIELDS} more" if len(known) > FIELDS else ""
    return ", ".join(known[:FIELDS]) + more if known else "none"
