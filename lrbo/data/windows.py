"""Cut texts into token windows, for the roles of a search and as the literature cuts them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lrbo.config import choices
from lrbo.config.schema import DataConfig, ProtocolConfig, RoleConfig, role_paths
from lrbo.data.documents import documents
from lrbo.data.local_files import COLUMN, file_documents, matching
from lrbo.errors import DataError, reading
from lrbo.files.atomic import replacing

Role = choices.Role
ROLES: tuple[Role, ...] = choices.ROLES[::-1]  # in the order of a text that they share
SHARES: Mapping[Role, int] = {"test": 1, "validation": 1, "calibration": 2}
JOIN = "\n\n"  # between documents, as in the literature's WikiText protocol
RUN = 32  # tokens: shorter runs may recur by chance in other roles


@runtime_checkable
class RoleExamples(Protocol):
    """The examples of one role, of any task."""

    @property
    def text(self) -> str:
        """What they are, for reports."""

    def only(self, indices: Sequence[int]) -> RoleExamples:
        """Return some of them."""

    @property
    def examples(self) -> Any:
        """The examples, as the task takes them."""

    @property
    def digest(self) -> str:
        """A short hash of them."""

    @property
    def scored(self) -> int:
        """How many predictions of them are scored."""


@dataclass(frozen=True)
class TokenWindows:
    """The windows of one role: token ids, int64, and the name of their text for reports."""

    ids: Int[Tensor, "windows tokens"]
    text: str

    def only(self, indices: Sequence[int]) -> TokenWindows:
        """Select windows."""
        text = f"{self.text}, {len(indices)} of {len(self.ids)} windows"
        return TokenWindows(self.ids[list(indices)], text)

    @property
    def digest(self) -> str:
        """A short hash of the token ids."""
        data = self.ids.to(torch.int32).contiguous().numpy().tobytes()
        return hashlib.sha256(data).hexdigest()[:16]

    @property
    def examples(self) -> Int[Tensor, "windows tokens"]:
        """The token ids."""
        return self.ids

    @property
    def scored(self) -> int:
        """Tokens with a prediction: all but the first of each window."""
        return self.ids.shape[0] * (self.ids.shape[1] - 1)


def make_windows(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    only: Collection[Role] = ROLES,
    pool_tokens: int | None = None,
) -> dict[Role, TokenWindows]:
    """Cut token windows for each role that has a text.

    A text is tokenized whole and cut into consecutive windows. Roles that name the same text
    divide it, 1 : 1 : 2 for test, validation and calibration, also where they are not in ``only``,
    so that no role's size changes another. Test takes the first windows of its part, as the
    literature does; the others draw theirs by seed. ``pool_tokens`` are those of validation where
    its windows are selected from a pool. Texts that are missing, short or shared are a DataError.
    """
    texts: dict[Role, RoleConfig] = {role: getattr(data, role) for role in ROLES}
    keys = {role: f"data.{role}.tokens" for role in ROLES}
    if pool_tokens is not None:
        texts["validation"] = replace(texts["validation"], tokens=pool_tokens)
        keys["validation"] = "evaluation.pool_tokens"
    corpus = _Corpus(data, texts, tokenizer, seed, _bos_token(data, tokenizer))
    problems: list[str] = []
    windows: dict[Role, TokenWindows] = {}
    for role, text in texts.items():
        paths = role_paths(text)
        if not paths or role not in only:
            continue
        if repetition := _repetition(data.source, paths):
            problems.append(f"data.{role}: {repetition}")
            continue
        parts: list[Tensor] = []
        for path in paths:
            try:
                parts.append(corpus.part(role, path, keys[role]))
            except DataError as error:
                problems.append(f"data.{role}: {error}")
        if len(parts) == len(paths):
            name = f"{data.source}:{'+'.join(paths)}[{role}]"
            windows[role] = TokenWindows(torch.cat(parts), name)
    if problems := problems or overlaps(windows):
        raise DataError(*problems)
    return windows


def _bos_token(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    bos = tokenizer.bos_token_id
    if data.bos and bos is None:
        raise DataError("data.bos=true, but this tokenizer has no bos token.")
    adds = tokenizer("a").input_ids[:1] == [bos] if data.bos is None else data.bos
    return int(bos) if adds else None


def _repetition(source: str, paths: Sequence[str]) -> str | None:
    """Return the problem of a text that a role names twice."""
    paths_before: dict[str, str] = {}  # by text
    for path in paths:
        texts = [] if source == "files" else [path]
        with suppress(DataError):  # reported where the text is read
            texts = texts or [os.path.realpath(file) for file in matching(path)]
        for text in texts:
            if text in paths_before:
                return (
                    f"text {text!r} is named twice, by {paths_before[text]!r} and by {path!r}, "
                    "and would count twice; name it once"
                )
            paths_before[text] = path
    return None


@dataclass
class _Corpus:
    """The texts of all roles, each of which is tokenized once."""

    data: DataConfig
    texts: Mapping[Role, RoleConfig]
    tokenizer: PreTrainedTokenizerBase
    seed: int
    bos: int | None
    windows: dict[str, Tensor] = field(default_factory=dict)  # by path

    def part(self, role: Role, path: str, tokens_key: str) -> Tensor:
        """Return the windows of a role out of its part of a text."""
        text, length = self.texts[role], self.data.window
        if path not in self.windows:
            self.windows[path] = self._cut(path, text)
        windows = self.windows[path]
        sharing = [r for r in ROLES if path in role_paths(self.texts[r])]
        total = sum(SHARES[r] for r in sharing)
        before = sum(SHARES[r] for r in sharing[: sharing.index(role)])
        start = len(windows) * before // total
        part = windows[start : len(windows) * (before + SHARES[role]) // total]
        paths = role_paths(text)
        remainder = len(paths) - 1 - paths.index(path)  # taken by the first paths of the role
        need = len(part)
        if text.tokens is not None:
            need = (text.tokens // length + remainder) // len(paths)
        if self.data.max_windows is not None:
            need = min(need, (self.data.max_windows + remainder) // len(paths))
        if len(part) < max(need, 1):
            others = ", ".join(r for r in sharing if r != role)
            raise DataError(
                f"text {path!r} has {len(part)} windows of {length} tokens for this role"
                f"{f' (shared with {others})' if others else ''}, {max(need, 1)} are needed; use a "
                f"longer text, or lower {tokens_key} or data.window."
            )
        if role == "test":
            return part[:need]
        generator = torch.Generator().manual_seed(self.seed)
        return part[torch.randperm(len(part), generator=generator)[:need].sort().values]

    def _cut(self, path: str, text: RoleConfig) -> Tensor:
        """Tokenize a text and cut it into consecutive windows."""
        sizes = [each.tokens for each in self.texts.values() if path in role_paths(each)]
        is_limited = self.data.source == "hf" and None not in sizes
        # Of a hub text, four times the tokens that its roles need.
        limit = 4 * max(size or 0 for size in sizes) * (1 + len(sizes)) if is_limited else None
        ids: list[int] = []
        pending: list[str] = []
        characters = 0
        for document in documents(
            self.data.source, path, self.seed, format=text.format, column=text.column
        ):
            pending += [JOIN, document] if ids or pending else [document]
            characters += len(document)
            if limit is not None and characters > 4 * limit:
                ids += self._tokenize(pending)
                pending, characters = [], 0
                if len(ids) >= limit:
                    break
        return cut_ids(ids + self._tokenize(pending), self.data.window, self.bos)

    def _tokenize(self, texts: Sequence[str]) -> list[int]:
        encoding = self.tokenizer("".join(texts), add_special_tokens=False, verbose=False)
        return list(encoding.input_ids)


def cut_ids(ids: Sequence[int], window: int, bos: int | None) -> Int[Tensor, "windows tokens"]:
    """Cut token ids into consecutive windows, each after a ``bos`` token if there is one."""
    length = window - (bos is not None)
    count = len(ids) // length
    tokens = torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)
    return tokens if bos is None else torch.cat([torch.full((count, 1), bos), tokens], dim=1)


def protocol_windows(
    name: str, protocol: ProtocolConfig, path: Path | None, tokenizer: PreTrainedTokenizerBase
) -> TokenWindows:
    """Cut the windows of a protocol from a file, or from the hub; DataError if it is too short.

    All are of one length, so that the mean over tokens is the literature's mean over windows.
    """
    source = f"hf:{protocol.hub}" if path is None else f"files:{path}"
    rows = [*islice(_protocol_rows(name, protocol, path), protocol.documents)]
    if protocol.documents is not None and len(rows) < protocol.documents:
        raise DataError(
            f"protocols.{name}: {source} has {len(rows):,} rows, the protocol takes the first "
            f"{protocol.documents:,}; give the whole file, or set "
            f"protocols.{name}.documents={len(rows)}"
        )
    text = protocol.join.join(rows)
    # Tokenized whole, as the literature does: rows that are tokenized alone give other tokens.
    ids = tokenizer(text, add_special_tokens=protocol.bos == "start", verbose=False).input_ids
    bos = tokenizer.bos_token_id if protocol.bos == "window" else None
    if protocol.bos == "window" and bos is None:
        raise DataError(
            f"protocols.{name}.bos=window, but this tokenizer has no bos token; take start or none"
        )
    windows = cut_ids(ids, protocol.window, bos)
    if not len(windows):
        raise DataError(
            f"protocols.{name}: {source} has {len(ids):,} tokens, one window "
            f"takes {protocol.window:,}; give the whole text"
        )
    return TokenWindows(windows[: protocol.max_windows], source)


def _protocol_rows(name: str, protocol: ProtocolConfig, path: Path | None) -> Iterator[str]:
    advice = (
        f"give a file with these rows: protocols.{name}.path=FILE, for example "
        f"{protocol.file} of {protocol.hub.partition(':')[0]} (text, .jsonl, .json.gz or .parquet)"
    )

    def row(line: str) -> str:
        # WikiText's rows keep blanks and line ends, except in blank lines; Penn Treebank's do not.
        return line.strip() if protocol.strip or not line.strip() else line

    column = protocol.column or [*protocol.hub.split(":"), COLUMN][3]
    try:
        if path is None:
            yield from documents("hf", protocol.hub)
        else:
            yield from file_documents(path, format=protocol.format, column=column, line=row)
    except DataError as error:
        raise DataError(f"protocols.{name}: {error}; {advice}") from error


def overlaps(windows: Mapping[Role, TokenWindows]) -> list[str]:
    """Return a sentence per pair of roles that share text.

    A window is shared if half of its runs of 32 tokens occur within windows of another role: from
    ``3 * RUN - 3`` tokens per window on every alignment is detected, below only small shifts.
    """
    hashes = {role: run_hashes(each.ids, RUN) for role, each in windows.items()}
    problems = []
    for first, second in combinations([role for role in ROLES if role in windows], 2):
        shared = np.isin(hashes[first], hashes[second]).mean(axis=1) >= 0.5
        if shared.any():
            problems.append(
                f"{int(shared.sum())} of {len(shared)} windows of {first} "
                f"({windows[first].text}) also occur in {second} ({windows[second].text}); "
                "roles must not share text: a score on text that was used before means nothing"
            )
    return problems


def run_hashes(ids: Int[Tensor, "windows tokens"], run: int) -> NDArray[np.uint64]:
    """Hash the runs of tokens in each window: ``(windows, tokens - run + 1)``, uint64."""
    run = min(run, ids.shape[1])
    powers = np.full(run, 0x9E3779B97F4A7C15, dtype=np.uint64)
    with np.errstate(over="ignore"):
        powers = np.cumprod(powers)
        runs = sliding_window_view(ids.numpy().astype(np.uint64) + np.uint64(1), run, axis=1)
        hashed: NDArray[np.uint64] = (runs * powers).sum(axis=-1, dtype=np.uint64)
    return hashed


def save_windows(path: Path, windows: Mapping[Role, TokenWindows]) -> None:
    """Write token windows to a safetensors file."""
    with replacing(path) as beside:
        tensors = {role: each.ids.to(torch.int32) for role, each in windows.items()}
        save_file(tensors, beside, metadata={role: each.text for role, each in windows.items()})


def load_windows(path: Path) -> dict[Role, TokenWindows]:
    """Read the file of :func:`save_windows`; DataError if it is damaged."""
    with reading(DataError, f"{path} is damaged"), safe_open(str(path), framework="pt") as file:
        names = file.metadata() or {}
        return {
            role: TokenWindows(file.get_tensor(role).to(torch.int64), names[role])
            for role in ROLES
            if role in names
        }
