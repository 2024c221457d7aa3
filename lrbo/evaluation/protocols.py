"""Perplexity protocols of the literature: text -> token windows, so that numbers compare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lrbo.calibration.corpus import TextTokenizer, TokenWindows, documents
from lrbo.calibration.files import COLUMN, file_documents
from lrbo.errors import DataError
from lrbo.options import AUTO


@dataclass(frozen=True)
class Protocol:
    """Everything that decides the token windows of a perplexity.

    Windows are consecutive and do not overlap; each predicts all of its tokens but the first. All
    are of one length, so the mean over tokens is the literature's mean over windows.

    Attributes:
        name: For reports and messages.
        hub: ``dataset:config:split[:column]``.
        file: Name of the data set's own file that has the same rows.
        path: The file to read; ``None`` asks the hub.
        strip: Whether blanks around the lines of a text file are taken off.
        documents: Only so many rows from the beginning; ``None`` takes all.
        join: Between rows.
        bos: One of ``BOS``: what the tokenizer adds by itself, once around the whole text; a bos
            token at the beginning of each window; or none.
        window: Tokens per window.
        max_windows: At most so many; ``None`` takes all.
        format: Of the file, one of ``lrbo.options.FILE_FORMATS``.
        column: Of a file whose rows have columns; ``None`` is the hub's.
    """

    name: str
    hub: str
    file: str
    path: Path | None
    strip: bool
    documents: int | None
    join: str
    bos: str
    window: int
    max_windows: int | None
    format: str = AUTO
    column: str | None = None

    @property
    def source(self) -> str:
        """Return where the text comes from, for reports."""
        return f"hf:{self.hub}" if self.path is None else f"files:{self.path}"


def protocol_windows(protocol: Protocol, tokenizer: TextTokenizer) -> TokenWindows:
    """Cut the windows of a protocol.

    Args:
        protocol: What to cut.
        tokenizer: Of the model.

    Returns:
        At most ``max_windows`` windows; the rest of the text behind the last one is left out.

    Raises:
        DataError: If the text is missing, or shorter than the protocol asks for; says which file
            to give.
    """
    rows = list(islice(_rows(protocol), protocol.documents))
    if protocol.documents is not None and len(rows) < protocol.documents:
        raise DataError(
            f"protocols.{protocol.name}: {protocol.source} has {len(rows):,} rows, the protocol "
            f"takes the first {protocol.documents:,}; give the whole file, or "
            f"protocols.{protocol.name}.documents={len(rows)} for another number than the "
            "protocol's"
        )
    text = protocol.join.join(rows)
    at_start = protocol.bos == "start"
    # Tokenized whole, as the literature does: rows that are tokenized alone give other tokens.
    ids: list[int] = tokenizer(text, add_special_tokens=at_start, verbose=False).input_ids
    windows = _cut(ids, protocol, tokenizer.bos_token_id)
    if not len(windows):
        raise DataError(
            f"protocols.{protocol.name}: {protocol.source} has {len(ids):,} tokens, one window "
            f"takes {protocol.window:,}; give the whole text"
        )
    return TokenWindows(windows[: protocol.max_windows], protocol.source)


def _cut(ids: list[int], protocol: Protocol, bos: Any) -> Int[Tensor, "windows tokens"]:
    """Cut token ids into windows."""
    per_window = protocol.bos == "window"
    if per_window and bos is None:
        raise DataError(
            f"protocols.{protocol.name}.bos=window, but this tokenizer has no bos token; "
            "choose start or none"
        )
    length = protocol.window - per_window
    count = len(ids) // length
    windows = torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)
    if per_window:
        windows = torch.cat([torch.full((count, 1), int(bos)), windows], dim=1)
    return windows


def _rows(protocol: Protocol) -> Iterator[str]:
    """Yield the rows of the text from the file or the hub."""
    advice = (
        f"give a file with these rows: protocols.{protocol.name}.path=FILE, for example "
        f"{protocol.file} of {protocol.hub.partition(':')[0]} (text, .jsonl, .json.gz or .parquet)"
    )

    def row(line: str) -> str:
        """Make a row of a line of text as the hub's data sets have it.

        WikiText's rows keep their blanks and line ends, and an empty line (a single blank in the
        file) is an empty row; Penn Treebank's have neither.
        """
        return line.strip() if protocol.strip or not line.strip() else line

    column = protocol.column or [*protocol.hub.split(":"), COLUMN][3]
    try:
        if protocol.path is None:
            yield from documents("hf", protocol.hub)
        else:
            yield from file_documents(
                protocol.path, format=protocol.format, column=column, line=row
            )
    except DataError as error:
        raise DataError(f"protocols.{protocol.name}: {error}; {advice}") from error
