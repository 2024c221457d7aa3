"""A checkpoint of several forms at once holds, layer by layer, what these count."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lrbo.checkpoints.export import WEIGHTS, load
from lrbo.errors import CheckpointError
from lrbo.layers.forms import Quantized, form_named
from lrbo.layers.modules import replace_module
from lrbo.layers.options import Option, account
from lrbo.models.model_map import map_model
from tests.checkpoints.test_export import (
    BOTH,
    SOME,
    TOLERANCE,
    Compressed,
    logits,
    options_of,
    relative,
)
from tests.support import reference
from tests.support.tiny import build


@pytest.mark.parametrize("moving_bias", [False, True])
@pytest.mark.parametrize("case", SOME)
def test_every_layer_holds_what_its_form_counts(
    case: str, moving_bias: bool, tmp_path: Path
) -> None:
    compressed = Compressed(case, moving_bias=moving_bias, forms=BOTH)
    compressed.save(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    forms = set()
    for name, cost in compressed.allocation.costs.items():
        own = [tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")]
        floats = [tensor for tensor in own if tensor.is_floating_point()]
        assert sum(tensor.numel() for tensor in floats) == cost.parameters, name
        assert sum(tensor.nbytes for tensor in own) == cost.bytes, name
        assert sum(tensor.numel() for tensor in own if tensor.dim() == 2) == cost.macs, name
        forms.add(compressed.allocation.options[name].form)
    assert forms == {"dense", *BOTH}
    whole = account(map_model(build(case)), compressed.allocation.cost, itemsize=4).model
    assert sum(tensor.nbytes for tensor in tensors.values()) == whole.bytes


INTEGERS = ("int4", "int3_sym", "int2", "pivoted", "int8")


@pytest.mark.parametrize("case", SOME)
def test_integers_hold_what_their_form_counts_and_are_loaded_as_they_were(
    case: str, tmp_path: Path
) -> None:
    compressed = Compressed(case, forms=INTEGERS)
    in_file = compressed.save(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    units = map_model(build(case)).by_name
    forms = set()
    for name, option in compressed.options.items():
        own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(name)}
        cost, form = compressed.allocation.costs[name], form_named(option.form)
        assert sum(tensor.nbytes for tensor in own.values()) == cost.bytes, name
        if isinstance(form, Quantized):
            forms.add(form.name)
            elements = units[name].out_features * units[name].in_features
            assert own.pop("packed").numel() * 8 == elements * form.bits
            groups = elements // option.level[0]
            assert own.pop("scale").numel() == groups
            assert form.symmetric or own.pop("zero").numel() == groups
            own.pop("factor_scale", None)
            # The others are factors and a bias.
            assert elements + sum(tensor.numel() for tensor in own.values()) == cost.parameters
    assert forms == set(INTEGERS) - {"pivoted"}
    loaded = load(tmp_path / "model")
    assert options_of(loaded) == compressed.options
    assert in_file == compressed.parameters
    before, after = compressed.model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert relative(logits(loaded), logits(compressed.model)) <= TOLERANCE["loaded"]


def other_rank(compressed: Compressed, name: str) -> nn.Module:
    option = compressed.options[name]
    other = replace(option, level=(option.level[0] + 1,))
    return compressed.prepared[name].stored(name, other, torch.float32)


def other_form(compressed: Compressed, name: str) -> nn.Module:
    option = compressed.options[name]
    other = replace(option, form={"factored": "pivoted", "pivoted": "factored"}[option.form])
    return compressed.prepared[name].stored(name, other, torch.float32)


def dense(compressed: Compressed, name: str) -> nn.Module:
    return build("llama_tied").get_submodule(name)


WRONG: dict[str, Callable[[Compressed, str], nn.Module]] = {
    "another rank": other_rank,
    "another form": other_form,
    "dense": dense,
}


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_layer_that_is_not_its_option_is_refused_by_name(
    wrong: str, form: str, tmp_path: Path
) -> None:
    compressed = Compressed("llama_tied", forms=BOTH)
    name = next(name for name, option in compressed.options.items() if option.form == form)
    cost = compressed.allocation.costs[name]
    module = WRONG[wrong](compressed, name)
    replace_module(compressed.model, name, module)
    own = [*module.parameters(), *module.buffers()]
    held = sum(t.numel() for t in own if t.is_floating_point())
    message = (
        f"the files hold {held:_} parameters in {sum(t.nbytes for t in own):_} bytes of {name}, "
        f"its form counts {cost.parameters:_} in {cost.bytes:_}; nothing was written"
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        compressed.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_dense_layer_that_is_compressed_is_refused_by_name(tmp_path: Path) -> None:
    compressed = Compressed("llama_tied", forms=BOTH)
    options = compressed.allocation.options
    name = next(name for name in options if name not in compressed.options)
    module = compressed.prepared[name].stored(name, Option("pivoted", (2,)), torch.float32)
    replace_module(compressed.model, name, module)
    with pytest.raises(CheckpointError, match=rf"not expected {re.escape(name)}\.coefficients"):
        compressed.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_of_the_right_size_in_the_wrong_form_is_refused_by_name(tmp_path: Path) -> None:
    """Where the costs that are given are those of the module, and the option is another."""
    compressed = Compressed("llama_tied", forms=BOTH)
    name = next(name for name, option in compressed.options.items() if option.form == "pivoted")
    other = replace(compressed.options[name], form="factored")
    options = {**compressed.allocation.options, name: other}
    compressed.allocation = replace(compressed.allocation, options=options)
    with pytest.raises(CheckpointError, match=rf"missing {re.escape(name)}\.left\.weight"):
        compressed.save(tmp_path / "model", parameters=reference.count_parameters(compressed.model))
    assert list(tmp_path.iterdir()) == []
