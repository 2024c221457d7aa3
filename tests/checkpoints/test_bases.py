"""One folder holds every form, with and without a rank, and opens as what was compressed."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import lrbo
from lrbo.allocation.allocate import Allocation
from lrbo.checkpoints.export import WEIGHTS
from lrbo.checkpoints.merged import save_merged
from lrbo.errors import CheckpointError
from lrbo.factorization.options import BaseOptions
from lrbo.layers.form import DENSE_FORM
from lrbo.layers.forms import FORMS
from lrbo.layers.options import Budget, Menu, Option
from lrbo.models.loading import tiny_model
from lrbo.models.tiny import byte_tokenizer
from tests.support.tiny import token_ids

IDS = token_ids(8, 32)
BASES = BaseOptions(group_sizes=(16, 32), percentages=(25, 50))
NAMES = [name for name in FORMS if name != DENSE_FORM]


@pytest.fixture(scope="module")
def factorization() -> lrbo.Factorization:
    model = tiny_model()
    calibration = lrbo.calibrate(model, IDS, progress=False)
    return lrbo.factorize(model, calibration, forms=NAMES, bases=BASES, progress=False)


def families(factorization: lrbo.Factorization) -> Iterator[Option]:
    """Return options of every family in turn, first with the base alone, then with ranks."""
    spec = factorization.layers.compressible[0]
    sizes = {"group_sizes": BASES.group_sizes, "percentages": BASES.percentages}
    menu = Menu.of(spec, NAMES, bias=False, itemsize=4, **sizes)
    own = [section.family for section in menu.sections[:-1]]
    bases = [family.at(0) for family in own if family.has_base]
    ranks = [f.at(2) for f in own if not f.form.startswith("int8")]
    return cycle([*bases, *ranks])


def allocations(factorization: lrbo.Factorization) -> list[Allocation]:
    """Give every unit another option, until every option had its turn."""
    options, made = families(factorization), []
    for _ in range(3):
        budget = Budget("bytes", 10**9)
        assigned = {}
        costs = {}
        for spec in factorization.layers.compressible:
            option = next(options)
            menu = Menu.of(
                spec, [option.form], bias=spec.has_bias, itemsize=4,
                group_sizes=BASES.group_sizes, percentages=BASES.percentages,
            )  # fmt: skip
            assigned[spec.name], costs[spec.name] = option, menu.cost(menu.index(option))
        made.append(Allocation(assigned, costs, budget))
    return made


def test_every_option_has_its_turn(factorization: lrbo.Factorization) -> None:
    options = {str(o) for each in allocations(factorization) for o in each.options.values()}
    assert {option.split(" ")[0] for option in options} == set(NAMES)
    assert {"int4 16 0", "int4 32 2", "lut3 2", "sparse 25 0", "sparse_2_4 2"} <= options


@pytest.mark.parametrize("index", range(3))
def test_a_folder_holds_the_model_that_was_compressed(
    index: int, factorization: lrbo.Factorization, tmp_path: Path
) -> None:
    allocation, model = allocations(factorization)[index], tiny_model()
    with torch.inference_mode(), factorization.compressed(model, allocation):
        trial = model(IDS).logits
    factorization.compress_(model, allocation)
    with torch.inference_mode():
        stored = model(IDS).logits
    assert float((stored - trial).abs().max()) < 1e-4 * float(trial.abs().max())
    factorization.save(tmp_path / "mixed", model, byte_tokenizer(), allocation)
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "mixed" / WEIGHTS).values())
    assert size == factorization.account(allocation).model.bytes
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, stored)
    save_merged(tmp_path / "merged", model, byte_tokenizer())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {type(part) for part in merged.modules() if hasattr(part, "in_features")} == {nn.Linear}
    with torch.inference_mode():
        error = (merged(IDS).logits - stored).abs().max()
    assert float(error) < 1e-4 * float(stored.abs().max())
    half = lrbo.load(tmp_path / "mixed", dtype=torch.bfloat16)
    with torch.inference_mode():
        error = (half(IDS).logits.float() - stored).abs().max()
    assert float(error) < 0.1 * float(stored.abs().max())
    assert again.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape == (1, 35)


def test_an_option_with_tensors_of_another_is_refused_by_name(
    factorization: lrbo.Factorization, tmp_path: Path
) -> None:
    allocation, model = allocations(factorization)[0], tiny_model()
    factorization.compress_(model, allocation)
    name = next(n for n, o in allocation.options.items() if o.form == "int8")
    options = {**allocation.options, name: Option("int4", (16, 0))}
    other = Allocation(options, allocation.costs, allocation.budget)
    with pytest.raises(CheckpointError, match=name):
        factorization.save(tmp_path / "mixed", model, byte_tokenizer(), other)
    assert not (tmp_path / "mixed").exists()
