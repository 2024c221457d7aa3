"""Models whose layers share factors: they run, remember and are opened as any other."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lrbo.allocation.allocate import Allocation
from lrbo.allocation.apply import compressed, on_device, store_
from lrbo.checkpoints.export import CONFIG, load, save
from lrbo.checkpoints.merged import save_merged
from lrbo.checkpoints.modeling_low_rank import HOLDERS
from lrbo.errors import CheckpointError
from lrbo.evaluation.timing import TimingSettings, dense_twin, measure_kinds
from lrbo.factorization.cache import factor_model
from lrbo.factorization.prepared import Prepared
from lrbo.factorization.registry import method_named
from lrbo.layers.modules import low_rank_layers
from lrbo.layers.options import Option, account
from lrbo.layers.shared import SharedLinear
from lrbo.models.model_map import map_model
from lrbo.models.specs import sharing
from lrbo.models.tiny import byte_tokenizer
from tests.support import reference
from tests.support.allocations import decided
from tests.support.forms import form_of
from tests.support.methods import RandomStatistics
from tests.support.tiny import CASES, build, token_ids

TOLERANCE = {
    "stored": 1e-5,  # relative: the same numbers, from other views
    "loaded": 1e-6,  # relative: another kernel of attention
    "merged": 1e-4,  # relative: a float32 product of factors, rounded once more, two blocks deep
}
SHARE = [case for case in CASES if sharing(map_model(build(case)).compressible)]
every_case = pytest.mark.parametrize("case", SHARE)
# With biases that a method adds; OPT makes k and v before q.
SHARE_AND_METHOD = {"llama_biased": "svd", "qwen2": "bolaco", "opt": "svd"}


@cache
def prepared(case: str, method: str) -> dict[str, Prepared]:
    model = build(case)
    made = factor_model(
        model,
        map_model(model),
        method_named(method),
        RandomStatistics(),
        joint=("shared_factored",),
    )
    return {name: each for part in made for name, each in part.items()}


def allocated(case: str, method: str = "svd") -> tuple[PreTrainedModel, Allocation]:
    """Share a factor in all groups but the last, and give one layer a rank of its own."""
    model = build(case)
    units = map_model(model).compressible
    groups = sharing(units)
    options = {
        spec.name: Option("shared_factored", (3 + index,))
        for index, group in enumerate(groups[:-1] or groups)
        for spec in group
    }
    options[units[-1 if units[-1].block is not None else -2].name] = Option("pivoted", (2,))
    adds_bias = method_named(method).adds_bias
    return model, decided(units, options, measure="bytes", adds_bias=adds_bias)


def stored(case: str, method: str = "svd") -> tuple[PreTrainedModel, Allocation]:
    model, allocation = allocated(case, method)
    store_(model, allocation, prepared(case, method))
    return model, allocation


def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(token_ids(2, 9) if ids is None else ids).logits


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def write(
    folder: Path, model: PreTrainedModel, allocation: Allocation, *, with_code: bool = False
) -> int:
    return save(
        folder,
        model,
        byte_tokenizer(),
        allocation,
        {"method": "svd"},
        costs={name: allocation.costs[name] for name in allocation.compressed},
        parameters=reference.count_parameters(model),
        with_code=with_code,
    )


@every_case
def test_a_trial_is_what_is_stored_and_leaves_no_trace(case: str) -> None:
    model, allocation = allocated(case)
    before = logits(model), dict(model.named_modules())
    factors = on_device(model, prepared(case, "svd"), allocation.ranks)
    for tokens in (0, 1000):  # of so many, products are multiplied out
        with compressed(model, allocation, factors, tokens=tokens):
            trial = logits(model)
        assert relative(logits(stored(case)[0]), trial) <= TOLERANCE["stored"]
    assert torch.equal(logits(model), before[0])
    assert dict(model.named_modules()) == before[1]
    assert relative(trial, before[0]) > 100 * TOLERANCE["stored"]


@every_case
def test_a_checkpoint_holds_what_is_counted_and_is_loaded_as_it_was(
    case: str, tmp_path: Path
) -> None:
    method = SHARE_AND_METHOD.get(case, "svd")
    model, allocation = stored(case, method)
    in_file = write(tmp_path / "model", model, allocation)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert relative(logits(opened), logits(model)) <= TOLERANCE["loaded"]
    counted = account(map_model(build(case)), allocation.cost, itemsize=4)
    assert in_file == reference.count_parameters(opened) == counted.model.parameters
    for name, option in allocation.compressed.items():
        assert form_of(opened.get_submodule(name)) == option.form
    firsts = [m for m in opened.modules() if isinstance(m, SharedLinear) and m.right is not None]
    assert firsts
    assert all(first.peers for first in firsts)
    opened.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(opened))
    ids = token_ids(1, 5)
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    cached, plain = (opened.generate(ids, use_cache=cache, **how) for cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("case", SHARE_AND_METHOD)
def test_a_merged_model_is_a_plain_one(case: str, tmp_path: Path) -> None:
    model, _ = stored(case)
    save_merged(tmp_path / "merged", model, byte_tokenizer())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not low_rank_layers(opened)
    assert relative(logits(opened), logits(model)) <= TOLERANCE["merged"]


@every_case
def test_the_modelling_file_knows_which_layer_holds_the_factor_of_others(case: str) -> None:
    for group in sharing(map_model(build(case)).compressible):
        (holder, *others) = [spec.name.rpartition(".")[::2] for spec in group]
        assert holder[1] not in HOLDERS
        assert {HOLDERS[last] for _, last in others} == {holder[1]}
        assert {parent for parent, _ in others} == {holder[0]}


UP = "model.layers.0.mlp.up_proj"
DAMAGED: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "a layer less": (
        lambda units: units.pop(UP),
        rf"mlp\.gate_proj is 'shared_factored 4' and {UP} is 'dense': all layers with one input",
    ),
    "two ranks": (
        lambda units: units.update({UP: "shared_factored 3"}),
        rf"is 'shared_factored 4' and {UP} is 'shared_factored 3': all layers with one input",
    ),
    "another form": (
        lambda units: units.update({UP: "factored 4"}),
        rf"is 'shared_factored 4' and {UP} is 'factored 4': all layers with one input",
    ),
    "alone": (
        lambda units: units.update({"model.layers.0.mlp.down_proj": "shared_factored 4"}),
        r"down_proj cannot be 'shared_factored 4': it shares its input with no other layer",
    ),
    "too large": (
        lambda units: units.update(
            {f"model.layers.0.mlp.{kind}_proj": "shared_factored 17" for kind in ("gate", "up")}
        ),
        r"gate_proj cannot be 'shared_factored 17': the layer is 24 by 16, and shared_factored has",
    ),
    "another rank": (
        lambda units: units.update(
            {f"model.layers.0.mlp.{kind}_proj": "shared_factored 5" for kind in ("gate", "up")}
        ),
        r"has shape \(24, 4\), config\.json wants \(24, 5\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_configuration_that_cannot_be_is_refused(damage: str, tmp_path: Path) -> None:
    model, allocation = stored("llama_untied")
    write(tmp_path / "model", model, allocation)
    file = tmp_path / "model" / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    change, message = DAMAGED[damage]
    change(config["quantization_config"]["units"])
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model")


def test_the_dense_twin_has_every_layer_again_and_kinds_are_timed() -> None:
    model, allocation = stored("llama_biased")
    units = map_model(build("llama_biased"))
    twin = dense_twin(model)
    assert reference.count_parameters(twin) == units.parameters
    assert not low_rank_layers(twin)
    timed = measure_kinds(model, twin, TimingSettings((3,), repeats=1, warmup=0))
    kinds = {units.by_name[name].kind for name in allocation.compressed}
    assert {kind.kind for kind in timed} == kinds
