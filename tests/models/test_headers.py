"""The model that is mapped is the one that is loaded: what its files hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    T5Config,
    ViTConfig,
    ViTForImageClassification,
)

import lrbo
from lrbo.checkpoints.merged import save_merged
from lrbo.errors import CheckpointError, LrboError, ModelError
from lrbo.models import loading, sources
from lrbo.models.families import MODEL_TYPES
from lrbo.models.headers import INDEX, SINGLE
from lrbo.models.loading import load_config, load_model, load_skeleton, load_tokenizer
from lrbo.models.model_map import is_tied, map_model
from lrbo.models.parameters import not_finite
from lrbo.models.sources import ModelSource
from lrbo.models.tiny import byte_tokenizer, tiny_model
from tests.checkpoints.test_export import TOKENIZER, TOLERANCE, Compressed, logits, relative
from tests.support import reference
from tests.support.tiny import BLOCKS, CASES, build

CPU = torch.device("cpu")
every_case = pytest.mark.parametrize("case", CASES)
Changes = Callable[[dict[str, Tensor]], object]


def source(folder: Path) -> ModelSource:
    return ModelSource("hf", str(folder))


LOADERS: dict[str, Callable[[Path], object]] = {
    "model": lambda folder: load_model(source(folder), dtype=None, device=CPU),
    "skeleton": lambda folder: load_skeleton(source(folder)),
}
every_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


def change(folder: Path, change_tensors: Changes, *, pickled: bool = False) -> None:
    """Change what the one file of weights holds, and perhaps its kind."""
    tensors = load_file(folder / SINGLE)
    change_tensors(tensors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if pickled:
        (folder / SINGLE).unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def configure(folder: Path, **values: object) -> None:
    """Change what ``config.json`` says."""
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(about | values), encoding="utf-8")


def head_and_embedding(model: PreTrainedModel) -> tuple[str, str]:
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight"


def with_head(case: str, folder: Path, *, own: bool, pickled: bool = False) -> None:
    """Write a model that its configuration ties, whose files hold a head nevertheless."""
    model = build(case)
    model.save_pretrained(folder)
    head, embedding = head_and_embedding(model)
    if case == "gpt_neox":  # whose files call it otherwise
        head = "embed_out.weight"
    stored = load_file(folder / SINGLE)[embedding]
    other = torch.full_like(stored, 0.1).normal_(generator=torch.Generator().manual_seed(3))
    change(folder, lambda t: t.update({head: other if own else stored}), pickled=pickled)
    configure(folder, tie_word_embeddings=True)


# --- ties --------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("own", [True, False])
def test_the_head_is_tied_where_the_files_tie_it(case: str, own: bool, tmp_path: Path) -> None:
    with_head(case, tmp_path, own=own)
    loaded = load_model(source(tmp_path), dtype=None, device=CPU)
    skeleton = load_skeleton(source(tmp_path))
    assert is_tied(loaded) is is_tied(skeleton) is loaded.config.tie_word_embeddings is not own
    assert map_model(skeleton) == map_model(loaded)
    assert map_model(loaded).parameters == reference.count_parameters(loaded)
    assert (map_model(loaded).layers[-1].tied_to is None) is own


def head_weight(model: PreTrainedModel) -> Tensor:
    weight: Tensor = model.get_output_embeddings().weight
    return weight


@pytest.mark.parametrize("own", [True, False])
def test_files_of_torch_are_read_the_same_way(own: bool, tmp_path: Path) -> None:
    with_head("llama_tied", tmp_path, own=own, pickled=True)
    skeleton = load_skeleton(source(tmp_path))
    assert is_tied(skeleton) is not own
    assert map_model(skeleton) == map_model(load_model(source(tmp_path), dtype=None, device=CPU))


def test_a_head_of_its_own_is_counted(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    configure(tmp_path, tie_word_embeddings=True)
    assert map_model(load_skeleton(source(tmp_path))).parameters == 35_104
    change(tmp_path, lambda t: t.pop("lm_head.weight"))
    assert map_model(load_skeleton(source(tmp_path))).parameters == 26_848


@every_case
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_what_is_written_has_the_head_of_the_model(
    case: str, tied: bool, merged: bool, tmp_path: Path
) -> None:
    """Whatever the configuration of the model in memory says."""
    compressed = Compressed(case)
    model = compressed.model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    before = reference.count_parameters(model)
    number = torch.Generator().manual_seed(1)
    other = torch.empty_like(head.weight).normal_(generator=number)
    head.weight = embedding.weight if tied else torch.nn.Parameter(other, requires_grad=False)
    model.config.tie_word_embeddings = not tied  # which is wrong
    compressed.parameters += reference.count_parameters(model) - before
    if merged:
        save_merged(tmp_path / "model", compressed.model, TOKENIZER)
        opened = load_model(source(tmp_path / "model"), dtype=None, device=CPU)
    else:
        compressed.save(tmp_path / "model")
        opened = lrbo.load(tmp_path / "model")
        assert reference.count_parameters(opened) == compressed.parameters
    assert is_tied(opened) is tied
    kind = "merged" if merged else "loaded"
    assert relative(logits(opened), logits(compressed.model)) <= TOLERANCE[kind]


# --- tensors that do not fit -------------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj"
MISFITS: dict[str, tuple[Changes, dict[str, object], str]] = {
    "fewer blocks": (
        lambda _: None,
        {"num_hidden_layers": BLOCKS - 1},
        r"holds 9 tensors .*rs\.1\.",
    ),
    "more blocks": (lambda _: None, {"num_hidden_layers": BLOCKS + 1}, r"lacks 9 .*layers\.2\."),
    "a bias": (lambda t: t.update({f"{UP}.bias": torch.ones(24)}), {}, rf"{UP}\.bias first"),
    "scales": (
        lambda t: t.update({f"{UP}.weight_scale": torch.ones(1)}),
        {},
        r"weight_scale first",
    ),
    "another head": (lambda t: t.update({"score.weight": torch.ones(2, 16)}), {}, r"score\.weight"),
    "an adapter": (lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(2, 16)}), {}, "lora_A"),
    "a size": (lambda _: None, {"intermediate_size": 20}, r"holds 6 tensors of another shape.*24"),
    "integers": (
        lambda t: t.update({f"{UP}.weight": torch.ones(24, 16, dtype=torch.int8)}),
        {},
        rf"{UP}\.weight holds integers",
    ),
}


@every_loader
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("misfit", MISFITS)
def test_files_of_another_model_are_refused_by_name(
    load: Callable[[Path], object], misfit: str, pickled: bool, tmp_path: Path
) -> None:
    build("llama_untied").save_pretrained(tmp_path)
    tensors, values, message = MISFITS[misfit]
    change(tmp_path, tensors, pickled=pickled)
    configure(tmp_path, **values)
    with pytest.raises(ModelError, match=f"(?s){message}") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_all_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    build("llama_untied").save_pretrained(tmp_path)
    change(tmp_path, lambda t: t.update({"renamed": t.pop("model.norm.weight")}))
    configure(tmp_path, intermediate_size=20)
    with pytest.raises(ModelError, match=r"lacks 1 .*norm.* holds 1 .*renamed.* holds 6 .*mlp"):
        load_skeleton(source(tmp_path))


def test_a_tensor_that_is_stored_twice_is_refused(tmp_path: Path) -> None:
    build("gpt_neox").save_pretrained(tmp_path)
    change(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(64, 16)}))
    with pytest.raises(ModelError, match=r"holds lm_head\.weight 2 times, as lm.* and embed_out"):
        load_skeleton(source(tmp_path))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("llama_tied", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.cos_cached"),
    ],
)
def test_constants_of_old_checkpoints_are_no_weights(case: str, name: str, tmp_path: Path) -> None:
    build(case).save_pretrained(tmp_path)
    change(tmp_path, lambda t: t.update({name: torch.ones(1, dtype=torch.uint8)}))
    for load in LOADERS.values():
        assert load(tmp_path)


@every_loader
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda tensors: {"state_dict": tensors}, "holds 'state_dict' of type dict"),
        (lambda tensors: {**tensors, "rng": [torch.ones(2)]}, "holds 'rng' of type list"),
        (lambda tensors: {**tensors, "step": 3}, "holds 'step' of type int"),
        (lambda tensors: {0: next(iter(tensors.values()))}, "holds 0 of type Tensor"),
        (lambda tensors: list(tensors.values()), "holds a value of type list"),
    ],
)
def test_a_pickle_of_something_else_than_tensors_by_name_is_refused(
    load: Callable[[Path], object], wrap: Any, message: str, tmp_path: Path
) -> None:
    build("llama_tied").save_pretrained(tmp_path)
    change(tmp_path, lambda t: None, pickled=True)
    file = tmp_path / "pytorch_model.bin"
    torch.save(wrap(torch.load(file)), file)
    with pytest.raises(ModelError, match=rf"pytorch_model\.bin {message}.*save_pretrained"):
        load(tmp_path)


@every_loader
def test_a_tensor_that_two_shards_hold_is_refused(
    load: Callable[[Path], object], tmp_path: Path
) -> None:
    """Although the index names one of them: transformers reads all of each file."""
    build("llama_untied").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    (tmp_path / SINGLE).unlink()
    one, two = "model-1-of-2.safetensors", "model-2-of-2.safetensors"
    last = tensors.pop("model.norm.weight")
    head = torch.zeros_like(tensors["lm_head.weight"])
    save_file(tensors, tmp_path / one, metadata={"format": "pt"})
    save_file(
        {"model.norm.weight": last, "lm_head.weight": head},
        tmp_path / two,
        metadata={"format": "pt"},
    )
    where = dict.fromkeys(tensors, one) | {"model.norm.weight": two}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with pytest.raises(ModelError, match=rf"lm_head\.weight twice, in {one} and in {two}"):
        load(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    (tmp_path / SINGLE).unlink()
    for load in LOADERS.values():
        with pytest.raises(ModelError, match=r"holds no weights, expected .* or "):
            load(tmp_path)


# --- numbers that are none ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_whatever_the_dtype(
    dtype: torch.dtype | None, tmp_path: Path
) -> None:
    build("llama_tied").save_pretrained(tmp_path)
    change(tmp_path, lambda t: t[f"{UP}.weight"][3, :5].fill_(float("nan")))
    with pytest.raises(ModelError, match=rf"5 of 384 numbers of {UP}\.weight are not") as caught:
        load_model(source(tmp_path), dtype=dtype, device=CPU)
    assert "float32" not in str(caught.value)  # no dtype would help
    assert "take another copy" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_eight_bits_are_judged_too(dtype: torch.dtype) -> None:
    """torch neither adds them up nor says which are finite: that ended in a traceback."""
    model = build("llama_tied").requires_grad_(False)
    weight = model.get_parameter(f"{UP}.weight")
    weight.data = weight.data.to(dtype)
    assert not_finite(model) is None
    weight.data = weight.data.float().fill_(torch.nan).to(dtype)
    problem = not_finite(model)
    assert problem is not None
    assert problem.startswith(f"384 of 384 numbers of {UP}.weight are not finite")


def test_what_only_a_dtype_cannot_hold_is_said_with_one_that_can(tmp_path: Path) -> None:
    build("llama_tied").save_pretrained(tmp_path)
    change(tmp_path, lambda t: t[f"{UP}.weight"][3, :2].fill_(1e6))
    with pytest.raises(ModelError, match=rf"in float16: 2 of 384 .*{UP}.* take bfloat16 or flo"):
        load_model(source(tmp_path), dtype=torch.float16, device=CPU)
    assert load_model(source(tmp_path), dtype=torch.bfloat16, device=CPU)


# --- adapters ----------------------------------------------------------------------------------

ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_beside_a_model_is_refused_by_name(name: str, tmp_path: Path) -> None:
    build("llama_tied").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text("{}", encoding="utf-8")
    loaders: list[Callable[[Path], object]] = [*LOADERS.values()]
    loaders += [lambda folder: load_config(source(folder))]
    loaders += [lambda folder: load_tokenizer(source(folder))]
    for load in loaders:
        with pytest.raises(ModelError, match=rf"adapter \({name}\).*merge_and_unload.*save_pr"):
            load(tmp_path)


def test_an_adapter_at_the_hub_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None]] = []

    def find(name: str, *, revision: str | None) -> str:
        calls.append((name, revision))
        return "adapter_config.json"

    monkeypatch.setattr(loading, "find_adapter_config_file", find)
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda *_, **__: "config.json")
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda *_, **__: CASES["gpt2"])
    for load in (load_config, load_skeleton):
        with pytest.raises(ModelError, match=r"no/such.* comes with an adapter \(adapter_config"):
            load(ModelSource("hf", "no/such", "v2"))
    assert calls == [("no/such", "v2")] * 2


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks it
def test_a_real_adapter_is_refused_with_its_base_and_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, alone = tmp_path / "base", tmp_path / "alone"
    build("llama_untied").save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    wanted = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, wanted)
    for folder in (base, alone):
        adapted.save_pretrained(folder)
        for load in LOADERS.values():
            with pytest.raises(ModelError, match=r"comes with an adapter \(adapter_config\.json\)"):
                load(folder)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    opened = load_model(source(tmp_path / "merged"), dtype=None, device=CPU)
    assert relative(logits(opened), logits(merged.eval())) <= TOLERANCE["loaded"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_beside_a_checkpoint_is_refused_by_name(name: str, tmp_path: Path) -> None:
    Compressed("llama_tied").save(tmp_path / "model")
    (tmp_path / "model" / name).write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"adapter \({name}\)"):
        lrbo.load(tmp_path / "model")


# --- files elsewhere ---------------------------------------------------------------------------


def sharded(folder: Path, shard: str, write: Callable[[Path], object]) -> None:
    """Write weights to a file of some name, and an index that names it."""
    write(folder)
    tensors = load_file(folder / SINGLE)
    (folder / shard).parent.mkdir(exist_ok=True)
    (folder / SINGLE).rename(folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, shard)}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("kind", ["../out.safetensors", "sub/in.safetensors", "absolute"])
def test_a_shard_elsewhere_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    shard = str(tmp_path / "x.safetensors") if kind == "absolute" else kind
    sharded(tmp_path / "dense", shard, build("llama_tied").save_pretrained)
    for load in LOADERS.values():
        with pytest.raises(ModelError, match=rf"{INDEX} names the file '{shard}'"):
            load(tmp_path / "dense")
    sharded(tmp_path / "model", shard, lambda folder: Compressed("llama_tied").save(folder))
    with pytest.raises(CheckpointError, match=rf"{INDEX} names the file '{shard}'"):
        lrbo.load(tmp_path / "model")
    if not kind.startswith("sub"):  # transformers, which may be given a subfolder
        with pytest.raises(CheckpointError, match="expected one in the folder"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("shard", ["", "..", "a\\b.safetensors", "C:x.safetensors", 3, None])
def test_no_name_of_a_file_is_taken_for_one(shard: Any, tmp_path: Path) -> None:
    build("llama_tied").save_pretrained(tmp_path)
    (tmp_path / SINGLE).unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (tmp_path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match="expected the name of a file beside it"):
        load_skeleton(source(tmp_path))


@pytest.mark.parametrize("name", ["../out.safetensors", "sub/in.safetensors", 3])
def test_weights_elsewhere_that_config_json_names_are_refused(name: Any, tmp_path: Path) -> None:
    build("llama_tied").save_pretrained(tmp_path / "model")
    configure(tmp_path / "model", transformers_weights=name)
    for load in LOADERS.values():
        with pytest.raises(ModelError, match=rf"config\.json names the file {name!r}, expected"):
            load(tmp_path / "model")


def test_links_are_followed_as_in_a_cache(tmp_path: Path) -> None:
    """The hub's client keeps files elsewhere, and links in the folder of a revision."""
    build("llama_tied").save_pretrained(tmp_path / "blobs", max_shard_size="4KB")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    assert (snapshot / INDEX).is_file()
    loaded = load_model(source(snapshot), dtype=None, device=CPU)
    assert map_model(load_skeleton(source(snapshot))) == map_model(loaded)


# --- models of another kind --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "vit", "none", "unknown"])
def test_a_model_of_another_kind_is_refused_in_a_few_words(kind: str, tmp_path: Path) -> None:
    if kind == "t5":
        T5Config(num_layers=1, d_model=8).save_pretrained(tmp_path)
    elif kind == "vit":
        small = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        ViTForImageClassification(small).save_pretrained(tmp_path)
    else:
        about = {"model_type": "nosuch"} if kind == "unknown" else {}
        (tmp_path / "config.json").write_text(json.dumps(about), encoding="utf-8")
    loaders: list[Callable[[Path], object]] = [*LOADERS.values()]
    if kind != "t5":  # of which transformers makes an empty one
        loaders.append(lambda folder: load_tokenizer(source(folder)))
    for load in loaders:
        with pytest.raises(LrboError) as caught:
            load(tmp_path)
        assert len(str(caught.value)) < 900
        assert str(tmp_path) in str(caught.value)
    if kind in ("t5", "vit"):
        with pytest.raises(ModelError, match=f"of type '{kind}'.*{', '.join(MODEL_TYPES)}"):
            load_skeleton(source(tmp_path))
