"""Protocols cut what the literature's own loops cut, and score what they score."""

import gzip
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lrbo.config import compose
from lrbo.config.schema import EvaluateConfig
from lrbo.data.windows import TokenWindows, protocol_windows
from lrbo.errors import DataError
from lrbo.models.tiny import byte_tokenizer
from lrbo.tasks.perplexity import score

TOLERANCE = {"perplexity": 1e-5}  # relative: the same logits, in float32, summed in another order
Recipe = Callable[[PreTrainedTokenizerFast, Sequence[str]], list[int]]

# The recipes as their repositories have them: text and limit, then the length of a window.
LITERATURE: dict[str, tuple[Recipe, int]] = {
    "wikitext2_2048": (lambda t, rows: t("\n\n".join(rows)).input_ids, 2048),
    "wikitext2_4096": (lambda t, rows: t("\n\n".join(rows)).input_ids, 4096),
    "c4": (lambda t, rows: t(" ".join(rows[:1100])).input_ids[: 256 * 2048], 2048),
    "c4_svd_llm": (lambda t, rows: t("\n\n".join(rows[:2000])).input_ids, 2048),
    "c4_bolaco": (lambda t, rows: t("\n\n".join(rows[:5000])).input_ids, 4096),
    "ptb": (lambda t, rows: t(" ".join(rows)).input_ids, 2048),
    "ptb_svd_llm": (lambda t, rows: t("\n\n".join(rows)).input_ids, 2048),
    "ptb_bolaco": (lambda t, rows: t("\n\n".join(rows)).input_ids, 256),
}


def cut_as_printed(ids: list[int], seqlen: int) -> Tensor:
    """Cut windows as GPTQ's and Bolaco's evaluations do."""
    testenc = torch.tensor(ids)[None]
    nsamples = testenc.numel() // seqlen
    return torch.cat([testenc[:, i * seqlen : (i + 1) * seqlen] for i in range(nsamples)])


def perplexity_as_printed(model: PreTrainedModel, testenc: Tensor, seqlen: int) -> float:
    """Score a text as GPTQ, SparseGPT, Wanda and Bolaco do, down to the names."""
    nsamples = testenc.numel() // seqlen
    nlls = []
    for i in range(nsamples):
        batch = testenc[:, (i * seqlen) : ((i + 1) * seqlen)]
        with torch.no_grad():
            lm_logits = model(batch).logits
        shift_logits = lm_logits[:, :-1, :].contiguous()
        shift_labels = batch[:, 1:]
        loss = nn.CrossEntropyLoss()(
            shift_logits.reshape(-1, shift_logits.size(-1)), shift_labels.reshape(-1)
        )
        nlls.append(loss.float() * seqlen)
    return float(torch.exp(torch.stack(nlls).sum() / (nsamples * seqlen)))


def windows_of(
    name: str, path: Path | None, tokenizer: PreTrainedTokenizerFast, **changes: Any
) -> TokenWindows:
    """Cut the windows of a protocol as its file states it, but for changes."""
    config = compose.composed("evaluate", [f"protocols=[{name}]"])
    assert isinstance(config, EvaluateConfig)
    return protocol_windows(name, replace(config.protocols[name], **changes), path, tokenizer)


def rows_file(folder: Path, rows: Sequence[str], column: str) -> Path:
    """Write rows as the hub's files have them."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def adding() -> PreTrainedTokenizerFast:
    """Return a tokenizer that begins every text with bos by itself, as Llama's does."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id == 256
    return tokenizer


# --- the literature ----------------------------------------------------------------------------


def test_every_protocol_has_its_recipe_here() -> None:
    assert sorted(LITERATURE) == sorted(
        path.stem for path in (compose.conf_folder() / "protocols").glob("*.yaml")
    )


@pytest.mark.parametrize("name", LITERATURE)
def test_windows_are_those_of_the_literature_s_code(
    name: str, tmp_path: Path, adding: PreTrainedTokenizerFast
) -> None:
    rows = [f"row {number} of the text" + " and so on" * 50 for number in range(5100)]
    rows = rows[: 60 if name.startswith(("ptb", "wikitext")) else None]
    column = "sentence" if name.startswith("ptb") else "text"
    recipe, seqlen = LITERATURE[name]
    expected = cut_as_printed(recipe(adding, rows), seqlen)
    actual = windows_of(name, rows_file(tmp_path, rows, column), adding).ids
    assert len(expected) >= 7
    assert torch.equal(actual, expected)
    assert (actual == 256).sum() == actual[0, 0] // 256 == 1  # bos once, in front of everything


@pytest.mark.parametrize("adds_bos", [True, False])
def test_perplexity_is_that_of_the_literature_s_loop(
    adds_bos: bool,
    model: PreTrainedModel,
    adding: PreTrainedTokenizerFast,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    rows = ["", " = A heading = \n", "", " the first paragraph .\n"] * 12
    used = adding if adds_bos else tokenizer
    windows = windows_of("wikitext2_2048", rows_file(tmp_path, rows, "text"), used, window=32)
    testenc = torch.tensor(used("\n\n".join(rows)).input_ids)[None]
    assert testenc.numel() % 32, "else the rest behind the last window is not tested"
    expected = perplexity_as_printed(model, testenc, 32)
    actual = score(model, windows.ids, batch_windows=5)
    assert actual.value == pytest.approx(expected, rel=TOLERANCE["perplexity"])
    assert actual.tokens == windows.scored == testenc.numel() // 32 * 31
    # What SliceGPT divides by is another number: a window predicts one token less than it has.
    other = math.exp(actual.nll / windows.ids.numel())
    assert other != pytest.approx(expected, rel=1e-2)


# --- bos ---------------------------------------------------------------------------------------


def test_bos_may_begin_every_window_or_none(
    tmp_path: Path, adding: PreTrainedTokenizerFast
) -> None:
    path = rows_file(tmp_path, ["abcdef" * 10], "sentence")
    every = windows_of("ptb", path, adding, window=8, bos="window").ids
    none = windows_of("ptb", path, adding, window=8, bos="none").ids
    assert every.shape == (60 // 7, 8)
    assert (every[:, 0] == 256).all()
    assert adding.decode(every[:, 1:].flatten()) == ("abcdef" * 10)[: 60 // 7 * 7]
    assert none.shape == (60 // 8, 8)
    assert adding.decode(none.flatten()) == ("abcdef" * 10)[:56]


def test_a_tokenizer_without_bos_cannot_begin_windows_with_it(tmp_path: Path) -> None:
    plain = byte_tokenizer()
    plain.bos_token = None
    path = rows_file(tmp_path, ["abcdef" * 10], "sentence")
    with pytest.raises(DataError, match=r"protocols\.ptb\.bos=window, but .* no bos token"):
        windows_of("ptb", path, plain, bos="window", window=8)


# --- texts -------------------------------------------------------------------------------------

ROWS = ["", " = Title = \n", "", " Grün . \n"]


def text_of(path: Path, tokenizer: PreTrainedTokenizerFast, name: str = "wikitext2_2048") -> str:
    """Return the text that a protocol reads from a file, up to its last whole window."""
    windows = windows_of(name, path, tokenizer, window=2, documents=None, max_windows=None)
    return tokenizer.decode(windows.ids.flatten())


def test_files_of_every_kind_have_the_same_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    lines = "".join(json.dumps({"id": 1, "text": row}) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines))
    pandas.DataFrame({"text": ROWS}).to_parquet(tmp_path / "a.parquet")
    # As in the data set's own file, where an empty line is a single blank.
    (tmp_path / "wiki.test.raw").write_text("".join(row or " \n" for row in ROWS), "utf-8")
    expected = "\n\n".join(ROWS)
    assert len(expected.encode()) % 2 == 0
    for name in ("a.jsonl", "a.json.gz", "a.parquet", "wiki.test.raw"):
        assert text_of(tmp_path / name, tokenizer) == expected, name


def test_penn_treebank_s_lines_have_no_blanks_around_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "ptb.test.txt"
    path.write_text(" no it was n't black <unk> \n but whil\n", encoding="utf-8")
    assert text_of(path, tokenizer, "ptb") == "no it was n't black <unk> but whil"


def test_a_mark_of_bytes_is_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "ptb.test.txt"
    path.write_text("no it", encoding="utf-8-sig")
    assert text_of(path, tokenizer, "ptb") == "no i"


def test_a_text_that_is_cut_off_is_not_the_protocol_s(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = rows_file(tmp_path, ["a page"] * 1099, "text")
    with pytest.raises(DataError, match=r"has 1,099 rows, the protocol takes the first 1,100"):
        windows_of("c4", path, tokenizer)
    short = rows_file(tmp_path, ["a line"], "sentence")
    with pytest.raises(DataError, match=r"protocols\.ptb: .* has 6 tokens, one window takes 2,048"):
        windows_of("ptb", short, tokenizer)


@pytest.mark.parametrize("content", ['{"body": "x"}\n', '{"text": 3}\n', "no json\n"])
def test_a_file_without_the_rows_is_named_with_one_that_has_them(
    content: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(
        DataError, match=r"protocols\.c4: .*a\.jsonl.*c4-validation\.00000"
    ) as caught:
        windows_of("c4", path, tokenizer)
    assert "protocols.c4.path=FILE" in str(caught.value)


def test_without_the_hub_the_file_to_give_is_named(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*arguments: object, **options: object) -> object:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as caught:
        windows_of("wikitext2_2048", None, tokenizer)
    (problem,) = caught.value.problems
    assert problem.startswith("protocols.wikitext2_2048: cannot read 'Salesforce/wikitext")
    assert "no route to the hub" in problem
    assert "protocols.wikitext2_2048.path=FILE, for example wiki.test.raw of Salesforce" in problem


def test_the_hub_is_asked_for_the_rows_of_the_protocol(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load(*arguments: object, **options: object) -> list[dict[str, str]]:
        calls.append((arguments, options["split"]))
        return [{"sentence": "ab"}, {"sentence": "cde"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    actual = windows_of("ptb", None, tokenizer, window=6)
    assert tokenizer.decode(actual.ids[0]) == "ab cde"
    assert calls == [(("ptb-text-only/ptb_text_only", "penn_treebank"), "test")]
    assert actual.text == "hf:ptb-text-only/ptb_text_only:penn_treebank:test:sentence"
