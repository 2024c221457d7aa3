"""A damaged checkpoint, or one of another kind, is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrbo.errors import CheckpointError
from lrbo.export import ABOUT, ALLOCATION, WEIGHTS, load
from tests.test_export import TOLERANCE, Compressed, checkpoint, logits, relative

__all__ = ["checkpoint"]  # a fixture


@pytest.mark.parametrize("name", [ABOUT, ALLOCATION, WEIGHTS, "config.json"])
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


def rewrite(path: Path, **changes: object) -> None:
    fields = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(fields), encoding="utf-8")


@pytest.mark.parametrize("found", [3, None, "1"])
def test_another_format_is_refused(checkpoint: Path, found: object) -> None:
    rewrite(checkpoint / ABOUT, format=found)
    message = rf"{ABOUT} has format {found!r}, this lrbo reads 1 and 2"
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_another_count_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint / ABOUT, parameters=1234)
    with pytest.raises(CheckpointError, match=r"holds [\d_]+ parameters, 1234 are stated"):
        load(checkpoint)


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "null"])
@pytest.mark.parametrize("name", [ABOUT, ALLOCATION])
def test_json_of_another_kind_is_refused(checkpoint: Path, name: str, text: str) -> None:
    (checkpoint / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{name} holds no JSON object"):
        load(checkpoint)


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"model.layers.9.mlp.up_proj": 2}, r"model\.layers\.9\.mlp\.up_proj in allocation\.json"),
        ({LAYER: 3}, "size mismatch"),
        ({LAYER: None}, rf"missing \['{LAYER}\.weight'\]"),
        ({LAYER: "2"}, "wrong types"),
        ({LAYER: -1}, "rank -1"),
    ],
)
def test_ranks_that_do_not_fit_the_weights_are_refused(
    checkpoint: Path, ranks: dict[str, object], message: str
) -> None:
    before = json.loads((checkpoint / ALLOCATION).read_text(encoding="utf-8"))["ranks"]
    assert before[LAYER] == 1
    rewrite(checkpoint / ALLOCATION, ranks=before | ranks)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(checkpoint)
    assert str(checkpoint) in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "strange"])
def test_tensors_that_do_not_fit_are_named(checkpoint: Path, change: str) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    if change == "missing":
        del tensors["model.norm.weight"]
    else:
        tensors["model.extra.weight"] = torch.ones(3)
    save_file(tensors, checkpoint / WEIGHTS)
    name = "model.norm.weight" if change == "missing" else "model.extra.weight"
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} does not fit .*{name}"):
        load(checkpoint)


# --- storage forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("found", ["dense", None, 3])
def test_another_storage_is_refused(checkpoint: Path, found: object) -> None:
    rewrite(checkpoint / ABOUT, storage=found)
    message = rf"{ABOUT} has storage {found!r}, expected factored or pivoted"
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_a_storage_that_the_weights_are_not_in_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint / ABOUT, storage="factored")
    with pytest.raises(
        CheckpointError, match=rf"does not fit .* missing \['{LAYER}\.right\.weight"
    ):
        load(checkpoint)


def test_the_first_format_is_read_as_factored(tmp_path: Path) -> None:
    compressed = Compressed("llama_tied", storage="factored")
    compressed.save(tmp_path / "model")
    about = json.loads((tmp_path / "model" / ABOUT).read_text(encoding="utf-8"))
    del about["storage"]
    text = json.dumps(about | {"format": 1})
    (tmp_path / "model" / ABOUT).write_text(text, encoding="utf-8")
    loaded = load(tmp_path / "model")
    assert relative(logits(loaded), logits(compressed.model)) <= TOLERANCE["loaded"]


@pytest.mark.parametrize("damage", ["twice", "outside", "missing"])
def test_an_order_that_is_none_is_refused_by_name(checkpoint: Path, damage: str) -> None:
    """It would be read as other outputs, or beyond the end."""
    tensors = load_file(checkpoint / WEIGHTS)
    places = tensors[f"{LAYER}.places"]
    if damage == "missing":
        del tensors[f"{LAYER}.places"]
    else:
        places[0] = places[1] if damage == "twice" else len(places)
    save_file(tensors, checkpoint / WEIGHTS)
    expected = "does not fit" if damage == "missing" else "is no order"
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}.*{LAYER}|{WEIGHTS} {expected}"):
        load(checkpoint)
