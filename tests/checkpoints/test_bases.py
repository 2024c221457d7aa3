"""One folder holds every form, with and without a rank, and opens as what was compressed."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import lrbo
from lrbo.allocation.allocate import Allocation
from lrbo.checkpoints.export import WEIGHTS
from lrbo.checkpoints.merged import save_merged
from lrbo.errors import CheckpointError
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.registry import method_named
from lrbo.layers.form import DENSE_FORM
from lrbo.layers.forms import FORMS, is_delta, is_joint
from lrbo.layers.options import Budget, Menu, Option
from lrbo.models.loading import tiny_model
from lrbo.models.specs import LayerSpec
from lrbo.models.tiny import byte_tokenizer
from lrbo.pipeline.search_space import menus_of
from tests.support.tiny import token_ids

IDS = token_ids(8, 32)
BASES = BaseOptions(
    group_sizes=(16, 32), percentages=(25, 50), row_percentages=(20,), blocks=((2, 1), (4, 4))
)
COUNT = 6  # of allocations, in which every option has its turn
NAMES = [
    name
    for name, form in FORMS.items()
    if name != DENSE_FORM and form.in_blocks and not (is_joint(name) or is_delta(name))
]


@pytest.fixture(scope="module")
def factorization() -> lrbo.Factorization:
    model = tiny_model()
    calibration = lrbo.calibrate(model, IDS, progress=False)
    return lrbo.factorize(model, calibration, forms=NAMES, bases=BASES, progress=False)


def turns(spec: LayerSpec) -> Iterator[tuple[int, int]]:
    """Return sections of a menu and levels: the first of every section, then the third."""
    sections = list(enumerate(menu_of(spec, NAMES).sections[:-1]))
    return cycle([(index, at) for at in (0, 2) for index, s in sections if at < len(s.levels)])


def menu_of(spec: LayerSpec, forms: list[str]) -> Menu:
    return menus_of([spec], forms, method_named("svd"), torch.float32, options=BASES)[spec.name]


def allocations(factorization: lrbo.Factorization) -> list[Allocation]:
    """Give every unit another option, until every option had its turn."""
    units, made = factorization.layers.compressible, []
    order = turns(units[0])
    for _ in range(COUNT):
        assigned, costs = {}, {}
        for spec in units:
            index, at = next(order)
            menu = menu_of(spec, NAMES)
            section = menu.sections[index]
            at = min(at, len(section.levels) - 1)  # of narrow layers
            option = Option(section.form, tuple(map(int, section.levels[at])))
            assigned[spec.name], costs[spec.name] = option, menu.cost(menu.index(option))
        made.append(Allocation(assigned, costs, Budget("bytes", 10**9)))
    return made


def test_every_option_has_its_turn(factorization: lrbo.Factorization) -> None:
    options = {str(o) for each in allocations(factorization) for o in each.options.values()}
    assert {option.split(" ")[0] for option in options} == set(NAMES)
    assert {"int4 16 0", "int4 32 2", "lut3 2", "sparse 25 0", "sparse_2_4 2"} <= options
    assert {"sparse_rows 20 0", "sparse_rows 20 2"} <= options
    terms = {option.split(" ")[-1] for option in options if option.startswith("kronecker")}
    assert {"1", "3"} <= terms


@pytest.mark.parametrize("index", range(COUNT))
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
        loaded = again(IDS).logits
    # Tensors of a file begin at other addresses, for which products are summed in another order.
    assert float((loaded - stored).abs().max()) < 1e-5 * float(stored.abs().max())
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


def test_kept_outputs_out_of_order_are_refused(
    factorization: lrbo.Factorization, tmp_path: Path
) -> None:
    every, model = allocations(factorization), tiny_model()
    allocation = next(a for a in every if any(o.form == "sparse_rows" for o in a.options.values()))
    factorization.compress_(model, allocation)
    factorization.save(tmp_path / "mixed", model, byte_tokenizer(), allocation)
    tensors = load_file(tmp_path / "mixed" / WEIGHTS)
    name = next(name for name in tensors if name.endswith(".rows"))
    count = factorization.layers.by_name[name.removesuffix(".rows")].out_features
    for rows in (tensors[name].flip(0), tensors[name] - count, tensors[name] + count):
        changed = tensors | {name: rows.contiguous()}
        save_file(changed, tmp_path / "mixed" / WEIGHTS, {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name} are no rising numbers of the layer's"):
            lrbo.load(tmp_path / "mixed")
