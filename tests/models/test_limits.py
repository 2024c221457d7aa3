"""What a model cannot read is refused by every command, before any work."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lrbo
from lrbo.commands import benchmark
from lrbo.errors import ConfigError, DataError
from lrbo.models.limits import Limits
from lrbo.models.tiny import byte_tokenizer, tiny_model
from tests.checkpoints.test_export import Compressed
from tests.support.commands import lrbo_command
from tests.support.tiny import CASES, build, token_ids

TINY = ["experiment=tiny", "search.trials=4", "search.initial=4"]
LONG = ["data.window=600", *(f"data.{role}.tokens=2400" for role in ("validation", "test"))]


@pytest.mark.parametrize("case", CASES)
def test_every_family_states_its_limits_and_reads_up_to_them(case: str) -> None:
    model = build(case)
    limits = Limits.of(model.config, case)
    assert (limits.vocabulary, limits.positions) == (64, 64)
    longest = token_ids(1, 64)
    assert limits.of_windows({"text": longest}) == []
    assert math.isfinite(lrbo.score(model, longest).mean)
    with pytest.raises(DataError, match="windows of 65 tokens, but the model has 64 positions"):
        lrbo.score(model, token_ids(1, 65))
    with pytest.raises(DataError, match=r"the id 64 is beyond .* of the model, 0\.\.63; give"):
        lrbo.score(model, longest + 64 - longest.max())


def test_problems_of_several_texts_are_said_together_each_once() -> None:
    limits = Limits("mine", 10, 4)
    windows = {
        "one": torch.full((2, 5), 3),
        "two": torch.full((2, 5), 12),
        "three": -torch.ones(1, 4).long(),
    }
    assert limits.of_windows(windows) == [
        "two: the id 12 is beyond the vocabulary of mine, 0..9; restore tokenizer and config.json",
        "three: the id -1 is below 0, expected tokens; restore tokenizer and config.json",
        "one, two: windows of 5 tokens, but mine has 4 positions; choose shorter windows",
    ]
    assert limits.of_prompt("prompts", 3, 1) == []
    assert limits.of_prompt("prompts", 3, 2) == [
        "prompts: 3 tokens and 2 more, but mine has 4 positions; choose fewer"
    ]
    assert limits.of_tokenizer(10) == []
    assert "has 11 tokens, but mine has a vocabulary of 10" in limits.of_tokenizer(11)[0]


@pytest.mark.parametrize("positions", [None, 0, -1, "many"])
def test_a_model_that_states_no_limit_has_none(positions: object) -> None:
    limits = Limits.of(SimpleNamespace(max_position_embeddings=positions), "mine")
    assert limits == Limits("mine", None, None)
    assert limits.of_windows({"text": token_ids(1, 9999)}) == []
    (problem,) = limits.of_windows({"text": torch.tensor([[5, -100]])}, "pad nothing")
    assert problem == "text: the id -100 is below 0, expected tokens; pad nothing"
    assert limits.of_prompt("prompts", 9999, 1) == limits.of_tokenizer(9999) == []


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make it an error of its own if a model is loaded."""

    def load(*arguments: object, **options: object) -> object:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lrbo.tasks.causal_lm.CausalLM.load", load)
    monkeypatch.setattr(benchmark.export, "load", load)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("unloadable")
def test_a_search_refuses_windows_that_the_model_cannot_read() -> None:
    ran = lrbo_command("search", *TINY, *LONG, "data.calibration.tokens=2400")
    assert ran.status == 2
    assert "600 tokens, but tiny has 512 positions; choose shorter windows" in ran.err
    assert "data.calibration" in ran.err
    assert not Path("studies/tiny").exists()


@pytest.mark.usefixtures("unloadable")
def test_a_search_refuses_the_tokenizer_of_another_model() -> None:
    """Tokens that the model does not have end in an IndexError, or bring a GPU down."""
    small = tiny_model()
    small.resize_token_embeddings(100)
    small.save_pretrained("small")
    byte_tokenizer().save_pretrained("small")
    ran = lrbo_command("search", *TINY, "model=hf", "model.path=small", "model.name=small")
    assert ran.status == 2
    for role in ("calibration", "validation", "test"):
        assert f"data.{role}: the id 220 is beyond the vocabulary of small, 0..99" in ran.err
    with pytest.raises(ConfigError, match="the vocabulary of small"):
        lrbo.search(*TINY, "model=hf", "model.path=small", "model.name=small")


@pytest.mark.usefixtures("unloadable")
def test_a_benchmark_refuses_prompts_that_the_model_cannot_read() -> None:
    Compressed("llama_tied").save(Path("small"))
    line = ("benchmark", "checkpoint=small", "prompts=[8,60]", "steps=16", "device=none")
    ran = lrbo_command(*line)
    assert ran.status == 2
    assert "prompts: 60 tokens and 16 more, but small has 64 positions" in ran.err
    assert "device='none' cannot be used here" in ran.err
    Path("small/adapter_config.json").write_text("{}", encoding="utf-8")
    ran = lrbo_command(*line)
    assert "small' comes with an adapter" in ran.err
    assert "device='none' cannot be used here" in ran.err


@pytest.mark.usefixtures("unloadable")
def test_a_benchmark_refuses_what_is_no_checkpoint_with_the_device() -> None:
    tiny_model().save_pretrained("dense")
    ran = lrbo_command("benchmark", "checkpoint=dense", "device=none")
    assert ran.status == 2
    assert "2 problems" in ran.err
    assert "says nothing of low-rank layers, so this is no compressed checkpoint" in ran.err
    Path("dense/config.json").write_text("{", encoding="utf-8")
    assert "config.json cannot be read" in lrbo_command("benchmark", "checkpoint=dense").err
