"""Models and tokenizers arrive as they were saved, or the message says what to do."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lrbo.errors import ModelError
from lrbo.models.loading import load_model, load_skeleton, load_tokenizer
from lrbo.models.model_map import map_model
from lrbo.models.sources import ModelSource
from lrbo.models.tiny import byte_tokenizer, tiny_model
from tests.support.tiny import CASES, build

# What is loaded is compared to the bit: nothing here has a tolerance.

CPU = torch.device("cpu")
TINY = ModelSource("tiny", "tiny")
BYTES = byte_tokenizer()
LOADERS: dict[str, Callable[[ModelSource], object]] = {
    "model": partial(load_model, dtype=None, device=CPU),
    "skeleton": load_skeleton,
    "tokenizer": load_tokenizer,
}


def floating_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: b for name, b in model.named_buffers() if b.is_floating_point()}


def test_the_tiny_model_keeps_its_rotary_frequencies_in_half_precision() -> None:
    exact = floating_buffers(tiny_model())
    actual = floating_buffers(load_model(TINY, dtype=torch.bfloat16, device=CPU))
    assert actual.keys() == exact.keys()
    assert len(exact) > 0
    assert all(torch.equal(actual[name], exact[name]) for name in exact)


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Return a tiny model and the folder that it was saved to."""
    model = build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    BYTES.save_pretrained(folder)
    return model, ModelSource("hf", str(folder))


def test_a_saved_model_comes_back(saved: tuple[PreTrainedModel, ModelSource]) -> None:
    model, source = saved
    loaded = load_model(source, dtype=None, device=CPU)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert map_model(loaded) == map_model(model)
    half = load_model(source, dtype=torch.bfloat16, device=CPU)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    # Rotary frequencies in bfloat16 would be wrong by radians at a distance of 1,000 tokens.
    exact, actual = floating_buffers(model), floating_buffers(half)
    assert actual.keys() == exact.keys()
    assert all(torch.equal(actual[name], exact[name]) for name in exact)


def test_a_skeleton_has_the_map_of_the_model_and_no_weights(
    saved: tuple[PreTrainedModel, ModelSource],
) -> None:
    model, source = saved
    skeleton = load_skeleton(source)
    assert all(p.is_meta for p in skeleton.parameters())
    assert map_model(skeleton) == map_model(model)


def test_the_skeleton_of_the_tiny_model_has_its_map() -> None:
    skeleton = load_skeleton(TINY)
    assert all(p.is_meta for p in skeleton.parameters())
    assert map_model(skeleton) == map_model(tiny_model())


def test_the_dtype_of_the_checkpoint_is_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    model = build("llama_tied")
    model.config = copy.deepcopy(model.config)  # saving writes the dtype into it
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    source = ModelSource("hf", str(tmp_path))
    assert load_model(source, dtype=None, device=CPU).dtype == torch.bfloat16
    assert load_model(source, dtype=torch.float32, device=CPU).dtype == torch.float32


def test_a_saved_tokenizer_comes_back(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelSource("hf", str(tmp_path)))
    assert isinstance(loaded, PreTrainedTokenizerFast)
    text = "grün \n\t語 \U0001f40d"
    assert loaded(text).input_ids == BYTES(text).input_ids
    assert (loaded.bos_token_id, loaded.eos_token_id) == (256, 257)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("kind", ["absent", "empty"])
def test_a_folder_without_a_model_is_refused_by_name(load: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "there" / "is" / "none"
    if kind == "empty":
        folder.mkdir(parents=True)
    with pytest.raises(ModelError, match=r"cannot load .*there/is/none") as caught:
        LOADERS[load](ModelSource("hf", str(folder)))
    assert ("which is no folder here" in str(caught.value)) == (kind == "absent")
    if (load, kind) == ("tokenizer", "empty"):
        assert "the folder has none; write the model's there" in str(caught.value)


def test_a_damaged_weight_file_is_refused_by_name(tmp_path: Path) -> None:
    build("llama_tied").save_pretrained(tmp_path)
    assert load_model(ModelSource("hf", str(tmp_path)), dtype=None, device=CPU)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_model(ModelSource("hf", str(tmp_path)), dtype=None, device=CPU)


def test_a_missing_tensor_is_not_started_at_random(tmp_path: Path) -> None:
    build("llama_tied").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 of the tensors .*model\.layers\.1\.mlp\.up_proj\.weig"
    ):
        load_model(ModelSource("hf", str(tmp_path)), dtype=None, device=CPU)


@pytest.mark.parametrize(
    ("load", "file", "changes", "message"),
    [
        ("model", "config.json", {"hidden_act": "nope"}, "cannot load model .*KeyError: 'nope'"),
        ("skeleton", "config.json", {"hidden_act": "nope"}, "cannot load model .*KeyError: 'nope'"),
        ("skeleton", "config.json", {"hidden_size": "16"}, "(?s)cannot load model .*expected int"),
        (
            "model",
            "config.json",
            {"vocab_size": 3},
            r"embed_tokens\.weight is \(64, 16\), not \(3, ",
        ),
        ("tokenizer", "tokenizer.json", {"added_tokens": 3}, "cannot load the tokenizer of"),
    ],
)
def test_what_transformers_stumbles_over_is_an_error_of_the_model(
    load: str, file: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    build("llama_tied").save_pretrained(tmp_path)
    BYTES.save_pretrained(tmp_path)
    values = json.loads((tmp_path / file).read_text(encoding="utf-8"))
    (tmp_path / file).write_text(json.dumps(values | changes), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        LOADERS[load](ModelSource("hf", str(tmp_path)))


@pytest.mark.parametrize("load", LOADERS)
def test_no_code_of_a_folder_is_executed_nor_asked_for(
    load: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself transformers asks on a terminal, and executes it after a yes."""
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (tmp_path / "evil.py").write_text("raise SystemExit('was executed')", encoding="utf-8")
    config = {"model_type": "evil", "auto_map": code}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    expected = "cannot load .*custom code"
    if load != "tokenizer":
        expected = "is of type 'evil', for which .*runs no code .*format=lrbo"
    with pytest.raises(ModelError, match=expected):
        LOADERS[load](ModelSource("hf", str(tmp_path)))
