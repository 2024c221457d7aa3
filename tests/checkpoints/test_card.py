"""The card says what was given, and its head is what the Hub reads."""

import ast
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from markdown_it.token import Token
from torch import nn

from lrbo.checkpoints.card import Card, origin_of
from lrbo.checkpoints.stock import Scheme, Stock
from lrbo.files.tables import Table, columns
from lrbo.models.sources import ModelSource
from tests.support.tiny import build

ABOUT: dict[str, Any] = {
    "method": "loss_aware",
    "refit": {"trials": [{"trial": 3, "taken": True}]},
    "validation": {"dtype": "float32"},
    "data": {"calibration": {"text": "c4[calibration]"}, "test": {"text": "wiki[test]"}},
    "versions": {"lrbo": "0.1.0", "torch": "2.13.0"},
}
PACKAGED = ModelSource("packaged", "smollm2_135m")
SCORES = Table(
    "Scores",
    columns("model", "parameters kept", "validation perplexity", "test perplexity"),
    [["dense", "100.0%", "30.39", "25.89"], ["this model", "80.0%", "35.76", "-"]],
)


def card(**changes: Any) -> str:
    options: dict[str, Any] = {
        "source": PACKAGED,
        "parameters": (113_000_000, 134_515_008),
        "forms": ["pivoted"],
        "keep_ratio": 0.8,
        "scores": SCORES,
        "commands": ["lrbo search study=mine", "lrbo compress study=mine out=mine-80"],
        "measuring": "lrbo evaluate checkpoint=mine-80 data.test.tokens=8192",
    }
    name, written_as = changes.pop("name", "mine-80"), changes.pop("written_as", "lrbo")
    about = ABOUT | changes.pop("about", {})
    return Card(name, written_as, about, **(options | changes)).text()


def test_the_command_that_measures_is_shown() -> None:
    assert "`lrbo evaluate checkpoint=mine-80 data.test.tokens=8192` measures it" in card()


def test_its_head_is_what_the_hub_reads() -> None:
    head = ModelCard(card()).data.to_dict()
    assert head == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lrbo", "low-rank", "compression"],
    }


def test_it_says_numbers_data_and_commands() -> None:
    text = card()
    assert "| dense | 100.0% | 30.39 | 25.89 |" in text
    assert "| this model | 80.0% | 35.76 | - |" in text
    assert "113,000,000 parameters, the base model 134,515,008" in text
    assert r"| calibration | c4\[calibration\] |" in text
    assert "lrbo search study=mine\nlrbo compress study=mine out=mine-80\n" in text
    assert "weights solved again" in text
    assert "- best - analytic: none." in card(notes=["best - analytic: none."])
    assert "weights solved again" not in card(about={"refit": None})
    about = {"refit": {"trials": [{"trial": 3, "taken": False}]}}
    assert "weights solved again" not in card(about=about)


@pytest.mark.parametrize(
    ("written_as", "forms", "words", "others"),
    [
        (
            "lrbo",
            ["pivoted"],
            ["import lrbo", "(`pivoted`)"],
            ["trust_remote_code", "multiplied out"],
        ),
        ("remote_code", ["factored"], ["trust_remote_code=True", "(`factored`)"], ["import lrbo"]),
        ("lrbo", [], ["import lrbo"], ["multiplied out", "stored as"]),
        (
            "merged",
            ["pivoted"],
            ["multiplied out"],
            ["import lrbo", "trust_remote_code", "(`pivot"],
        ),
    ],
)
def test_it_says_how_this_kind_of_folder_is_loaded(
    written_as: str, forms: list[str], words: list[str], others: list[str]
) -> None:
    text = card(written_as=written_as, forms=forms)
    assert 'from_pretrained("mine-80"' in text
    for word in words:
        assert word in text
    for word in others:
        assert word not in text


@pytest.mark.parametrize(
    ("text", "license_"),
    [
        ("---\nlicense: mit\n---\n# Base\n", "mit"),
        ("# Base, without a head\n", None),
        ("---\nlicense: [unclosed\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
        (None, None),
    ],
)
def test_the_license_is_that_of_the_card_in_the_base_model_s_folder(
    tmp_path: Path, text: str | None, license_: str | None
) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
    source = ModelSource("hf", str(tmp_path))
    assert origin_of(source) == (None, license_)
    head = ModelCard(card(source=source)).data.to_dict()
    assert "base_model" not in head  # a folder is no hub id
    assert head.get("license") == license_


def test_a_hub_id_is_named_and_the_hub_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert origin_of(ModelSource("hf", "Qwen/Qwen3-0.6B")) == ("Qwen/Qwen3-0.6B", None)
    assert origin_of(ModelSource("hf", "no/hub/id")) == (None, None)
    assert origin_of(ModelSource("tiny", "tiny")) == (None, None)


HOSTILE = """a](https://x) <img src=x onerror=alert(1)> `b` ```c | d\n---\n# e "f" 'g' \U0001f600"""


def stock_of(**changes: Any) -> Stock:
    """Return parts of a tiny model whose layers are all packed alike, and one has a low rank."""
    frame = build("llama_tied")
    names = [name for name, part in frame.named_modules() if type(part) is nn.Linear]
    parts: dict[str, Any] = {
        "schemes": dict.fromkeys(names, Scheme(4, 64)),
        "ranks": {names[0]: 9},
        "base": {"weight": torch.ones(1000)},
        "adapter": {"lora": torch.ones(3000)},
    }
    return Stock(frame, **(parts | changes))


def test_it_says_what_vllm_reads_and_what_not() -> None:
    text = card(written_as="adapter", stock=stock_of(), counted_bytes=12_345, measuring=None)
    for words in (
        "`base`, 4,000 bytes",
        "`adapter`, 12,000\nbytes, ranks up to 9",
        "takes 12,345 bytes",
    ):
        assert words in text
    assert "--max-lora-rank 16 --lora-modules mine-80=mine-80/adapter" in text
    assert "import lrbo" not in text
    stock = stock_of(schemes={"model.layers.0.mlp.down_proj": Scheme(3, 64)})
    text = card(written_as="adapter", stock=stock, measuring=None)
    assert "vLLM does not read this model: its kernels do not take 3 bits in groups of 64" in text
    assert "vllm serve" not in text
    text = card(written_as="adapter", stock=stock_of(ranks={}, adapter={}), measuring=None)
    assert "PeftModel" not in text
    assert "vllm serve mine-80/base\n" in text


@pytest.mark.parametrize("written_as", ["lrbo", "remote_code", "merged", "adapter"])
def test_names_paths_and_licences_are_text(tmp_path: Path, written_as: str) -> None:
    """A card of hostile words has the parts of a harmless one, and says the words."""

    def read(word: str) -> tuple[str, list[Token], dict[str, Any]]:
        folder = tmp_path / word.replace("/", "")
        folder.mkdir()
        head = yaml.safe_dump({"license": word})
        (folder / "README.md").write_text(f"---\n{head}---\n", encoding="utf-8")
        source = ModelSource("hf", str(folder))
        made = card(
            name=word, written_as=written_as, source=source, forms=["factored"],
            stock=stock_of() if written_as == "adapter" else None,
            scores=Table(word, columns(word), [[word]]), commands=[f"lrbo search study={word}"],
            about={
                "method": word, "validation": {"dtype": word}, "data": {word: {"text": word}},
                "versions": {word: word},
            },
        )  # fmt: skip
        model_card = ModelCard(made)
        reader = MarkdownIt("commonmark").enable("table")
        return made, reader.parse(model_card.text), model_card.data.to_dict()

    made, tokens, head = read(HOSTILE)
    _, usual, usual_head = read("word")

    def kinds(tokens: list[Token]) -> list[str]:
        return [
            one.type for token in tokens for one in [token, *(token.children or [])]
            if one.type not in ("text_special", "text")
        ]  # fmt: skip

    assert kinds(tokens) == kinds(usual)
    assert head.pop("license") == HOSTILE
    assert usual_head.pop("license") == "word"
    assert head == usual_head
    code, *served, commands = [token.content for token in tokens if token.type == "fence"]
    names = [
        argument.value
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
        for argument in node.args
        if isinstance(argument, ast.Constant)
    ]
    if written_as == "adapter":
        assert sorted(names) == [f"{HOSTILE}/{part}" for part in ("adapter", "base", "base")]
        assert shlex.split(served[0])[2] == f"{HOSTILE}/base"
    else:
        assert names == [HOSTILE, HOSTILE]
        assert served == []
    assert commands == f"lrbo search study={HOSTILE}\n"
    for block in (*served, commands):
        made = made.replace(block, "")
    assert "\n---\n# e" not in made
