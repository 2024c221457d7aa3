"""A damaged checkpoint, or one of another kind, is refused by name, by transformers too."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lrbo.checkpoints import export
from lrbo.checkpoints.export import CONFIG, INDEX, WEIGHTS, is_checkpoint, load
from lrbo.errors import CheckpointError
from tests.checkpoints.test_export import Compressed, checkpoint

__all__ = ["checkpoint"]  # a fixture

Loader = Callable[[Path], PreTrainedModel]
both_loaders = pytest.mark.parametrize("loader", [load, AutoModelForCausalLM.from_pretrained])
LAYER = "model.layers.0.self_attn.q_proj"


def change(checkpoint: Path, **values: object) -> None:
    """Change what ``config.json`` says of the low-rank layers."""
    config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    config["quantization_config"] |= values
    (checkpoint / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def units(checkpoint: Path) -> dict[str, Any]:
    config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    options: dict[str, Any] = config["quantization_config"]["units"]
    return options


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "binary"])
def test_a_damaged_file_is_refused_by_name(checkpoint: Path, name: str, damage: str) -> None:
    path = checkpoint / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[:-30], "binary": b"\xff\xfe\x00"}[damage])
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["model.norm.weight", f"{LAYER}.rows.weight"])
def test_weights_that_are_not_finite_are_refused(checkpoint: Path, name: str) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    tensors[name].view(-1)[2] = float("nan")
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"in float32: 1 of .*{name} are not .*copy it aga"):
        load(checkpoint)


def test_weights_that_only_a_dtype_cannot_hold_are_said_with_one_that_can(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    tensors["model.norm.weight"][2] = 1e6
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"in float16: 1 of .* Take bfloat16 or float32"):
        load(checkpoint, dtype=torch.float16)
    assert load(checkpoint, dtype=torch.bfloat16)


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "null"])
def test_json_of_another_kind_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / CONFIG).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{CONFIG} holds no JSON object"):
        load(checkpoint)


def test_json_that_is_nested_too_deep_is_refused(checkpoint: Path) -> None:
    (checkpoint / CONFIG).write_text("[" * 100_000, encoding="utf-8")
    assert not is_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=rf"{CONFIG} cannot be read.* nested too deep"):
        load(checkpoint)


def test_a_model_that_is_not_compressed_is_not_taken_for_one(checkpoint: Path) -> None:
    config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    del config["quantization_config"]
    (checkpoint / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    assert not is_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=rf"{CONFIG} says nothing of low-rank layers"):
        load(checkpoint)


def test_an_architecture_that_transformers_lacks_is_named(checkpoint: Path) -> None:
    config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    config["model_type"] = "llama99"
    config["architectures"] = ["Llama99ForCausalLM"]
    (checkpoint / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    message = rf"{CONFIG} cannot be read by transformers \d.*llama99"
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


@pytest.mark.parametrize(
    "value",
    [
        {"hidden_size": "16"},
        {"num_attention_heads": 0},
        {"hidden_act": "nope"},
        {"dtype": "float99"},
        {"auto_map": 3},
    ],
)
def test_values_that_transformers_stumbles_over_are_errors_of_the_checkpoint(
    checkpoint: Path, value: dict[str, object]
) -> None:
    """It raises a kind of its own, a ZeroDivisionError, a KeyError, an AttributeError."""
    config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    (checkpoint / CONFIG).write_text(json.dumps(config | value), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model.* (cannot be read by|is not a whole)"):
        load(checkpoint)


# --- formats -----------------------------------------------------------------------------------


@both_loaders
@pytest.mark.parametrize(
    ("version", "message"),
    [
        (5, "has format 5, this lrbo reads format 4; a newer lrbo wrote it: upgrade lrbo"),
        (2, r"has format 2, .* an older lrbo wrote it: write it again with: lrbo compress study=s"),
        (None, r"has format None, this lrbo reads format 4; restore config\.json"),
        ("4", r"has format '4', this lrbo reads format 4; restore config\.json"),
        (True, r"has format True, this lrbo reads format 4; restore config\.json"),
    ],
)
def test_another_format_is_refused(
    checkpoint: Path, loader: Loader, version: object, message: str
) -> None:
    change(checkpoint, format=version, provenance={"study": "s", "trial": 7})
    with pytest.raises(CheckpointError, match=message):
        loader(checkpoint)


@pytest.mark.parametrize("key", ["quantization_config", "lrbo"])
def test_a_checkpoint_of_ranks_in_one_storage_says_how_to_write_it_again(
    checkpoint: Path, key: str
) -> None:
    """Format 3, as written for this package and, under the other key, with a modelling file."""
    config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    config.pop("quantization_config")
    config[key] = {
        "quant_method": "lrbo",
        "format": 3,
        "storage": "pivoted",
        "parameters": 9000,
        "ranks": {LAYER: 1},
        "added_biases": [],
        "provenance": {"study": "mine", "trial": 7, "budget": 4000},
    }
    (checkpoint / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    assert is_checkpoint(checkpoint)
    message = (
        r"has format 3, this lrbo reads format 4; an older lrbo wrote it: write it again with: "
        "lrbo compress study=mine point=7 out=FOLDER"
    )
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("version", [1, 2])
def test_a_checkpoint_of_the_first_formats_says_how_to_write_it_again(
    tmp_path: Path, version: int
) -> None:
    about = {"format": version, "storage": "pivoted", "study": "mine", "trial": 7}
    (tmp_path / "lrbo.json").write_text(json.dumps(about), encoding="utf-8")
    (tmp_path / CONFIG).write_text('{"model_type": "llama"}', encoding="utf-8")
    assert is_checkpoint(tmp_path)  # so that it comes to `load`, which says what to do
    message = (
        rf"has format {version}, this lrbo reads format 4; an older lrbo wrote it: write it again "
        "with: lrbo compress study=mine point=7 out=FOLDER"
    )
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


# --- what config.json says ---------------------------------------------------------------------


@both_loaders
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"storage": "pivoted"}, "there is no field storage"),
        ({"ranks": {LAYER: 1}}, "there is no field ranks"),
        ({"parameters": "many"}, 'parameters is "many", expected a whole number'),
        ({"parameters": 1234}, r"model holds [\d_]+ parameters, its config\.json states 1_234"),
        ({"units": [1, 2]}, r"units is \[1, 2\], expected an object"),
        (
            {"added_biases": [f"{LAYER}x"]},
            f"added_biases has {LAYER}x, expected layers among its units",
        ),
        ({"added_biases": [{}]}, r"added_biases\.0 is \{\}, expected text"),
        ({"units": 3, "added_biases": ["x"]}, "units is 3, expected an object"),
        ({"added_biases": [LAYER]}, rf"missing {LAYER}\.bias, not expected nothing"),
        ({"provenance": None}, "provenance is null, expected an object"),
        ({"runs": "code"}, "there is no field runs"),
    ],
)
def test_values_that_cannot_be_right_are_refused(
    checkpoint: Path, loader: Loader, values: dict[str, object], message: str
) -> None:
    change(checkpoint, **values)
    with pytest.raises(CheckpointError, match=message):
        loader(checkpoint)


@both_loaders
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model.layers.9.mlp.up_proj": "pivoted 2"},
            r"model\.layers\.9\.mlp\.up_proj in the units .* Llama",
        ),
        (
            {"model.norm": "pivoted 2"},
            r"model\.norm in the units of the checkpoint is no linear la",
        ),
        (
            {LAYER: "pivoted 3"},
            rf"{LAYER}.* has shape \(\d+, \d+\), config\.json wants \(\d+, \d+\)",
        ),
        (
            {LAYER: "pivoted 17"},
            rf"{LAYER} cannot be 'pivoted 17': the layer is 16 by 16, and .* 0 to 16, got \[17\]",
        ),
        ({LAYER: "pivoted"}, rf"{LAYER} cannot be 'pivoted': .* one rank from 0 to 16, got \[\]"),
        ({LAYER: "factored 1 2"}, rf"{LAYER} cannot be 'factored 1 2': .* one rank .* \[1, 2\]"),
        ({LAYER: "dense"}, rf"{LAYER} cannot be 'dense': the layer is 16 by 16; restore config"),
        (
            {LAYER: "woven 2"},
            rf"{LAYER}: 'woven 2' is no option: expected one of dense, factored, p",
        ),
        ({LAYER: "pivoted -1"}, rf"{LAYER}: 'pivoted -1' is no option"),
        ({LAYER: "pivoted 1.5"}, rf"{LAYER}: 'pivoted 1\.5' is no option"),
        ({LAYER: ""}, rf"{LAYER}: '' is no option"),
        ({LAYER: 2}, rf"units\.{LAYER} is 2, expected text"),
        ({LAYER: None}, rf"units\.{LAYER} is null, expected text"),
        ({LAYER: ["pivoted", 1]}, rf"units\.{LAYER} is \[\"pivoted\", 1\], expected text"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    checkpoint: Path, loader: Loader, options: dict[str, object], message: str
) -> None:
    assert units(checkpoint)[LAYER] == "pivoted 1"
    change(checkpoint, units=units(checkpoint) | options)
    with pytest.raises(CheckpointError, match=message):
        loader(checkpoint)


@both_loaders
def test_a_unit_that_is_gone_is_missed(checkpoint: Path, loader: Loader) -> None:
    left = units(checkpoint)
    del left[LAYER]
    change(checkpoint, units=left)
    message = rf"do not fit its config\.json: missing nothing, not expected {LAYER}\.coeff"
    with pytest.raises(CheckpointError, match=message):
        loader(checkpoint)


@both_loaders
def test_a_form_that_the_weights_are_not_in_is_refused(checkpoint: Path, loader: Loader) -> None:
    change(checkpoint, units=units(checkpoint) | {LAYER: "factored 1"})
    message = rf"missing {LAYER}\.left\.weight.*right\.weight.* not expected {LAYER}\.coefficients"
    with pytest.raises(CheckpointError, match=message):
        loader(checkpoint)


# --- what the files hold -----------------------------------------------------------------------


def rewrite(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@both_loaders
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing model\.norm\.weight, not expected noth"),
        (lambda t: t.pop(f"{LAYER}.index"), rf"missing {LAYER}\.index"),
        (lambda t: t.update(extra=torch.ones(3)), "missing nothing, not expected extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight in .* has shape \(3,\), config\.json wants \(16,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    checkpoint: Path, loader: Loader, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    """transformers alone would start a missing one at random and pass over one too many."""
    rewrite(checkpoint / WEIGHTS, edit)
    with pytest.raises(CheckpointError, match=message):
        loader(checkpoint)


@both_loaders
@pytest.mark.parametrize("damage", ["twice", "outside"])
def test_an_order_that_is_none_is_refused_by_name(
    checkpoint: Path, loader: Loader, damage: str
) -> None:
    """It would be read as other outputs, or beyond the end."""

    def edit(tensors: dict[str, Tensor]) -> None:
        index = tensors[f"{LAYER}.index"]
        index[0] = index[1] if damage == "twice" else len(index)

    rewrite(checkpoint / WEIGHTS, edit)
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.index is no order"):
        loader(checkpoint)


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkpoint of several files."""
    monkeypatch.setattr(export, "SHARD_BYTES", 8_000)
    Compressed("llama_tied").save(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) >= 2
    return tmp_path / "model"


@both_loaders
def test_a_missing_shard_is_named(shards: Path, loader: Loader) -> None:
    gone = sorted(shards.glob("model-*.safetensors"))[-1]
    gone.unlink()
    with pytest.raises((CheckpointError, OSError), match=gone.name):
        loader(shards)


@pytest.mark.parametrize("text", ["[]", "{}", '{"metadata": {}, "weight_map": null}', "{"])
def test_an_index_that_is_none_is_refused(shards: Path, text: str) -> None:
    (shards / INDEX).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        load(shards)


@both_loaders
def test_shards_that_hold_the_same_tensor_are_refused(shards: Path, loader: Loader) -> None:
    first, *_, last = sorted(shards.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    rewrite(last, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(CheckpointError, match=rf"{last.name} holds {name}, and so does another"):
        loader(shards)


@both_loaders
def test_a_pickle_is_not_opened(
    checkpoint: Path, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a pickle was opened")

    tensors = load_file(checkpoint / WEIGHTS)
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    (checkpoint / WEIGHTS).unlink()
    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is no safetensors|model\.safet"):
        loader(checkpoint)
