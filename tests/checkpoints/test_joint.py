"""Models with thinner MLPs and skipped parts: they run, remember and are opened as any other."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import lrbo
from lrbo.allocation.allocate import Allocation
from lrbo.allocation.apply import compressed, on_device, store_
from lrbo.checkpoints.export import CONFIG, load, save
from lrbo.checkpoints.merged import save_merged
from lrbo.errors import CheckpointError
from lrbo.evaluation.timing import TimingSettings, dense_twin, measure_kinds
from lrbo.factorization.cache import factor_model
from lrbo.factorization.prepared import Prepared
from lrbo.factorization.registry import method_named
from lrbo.layers.modules import low_rank_layers, thin_layers
from lrbo.layers.options import DENSE, Option, account
from lrbo.models.model_map import is_tied, linear_weight, map_model
from lrbo.models.specs import LayerSpec
from lrbo.models.tiny import byte_tokenizer
from tests.support import reference
from tests.support.allocations import decided
from tests.support.forms import form_of
from tests.support.methods import RandomStatistics
from tests.support.tiny import BLOCKS, CASES, INNER, build, token_ids

TOLERANCE = {
    "stored": 1e-5,  # relative: the same numbers, from other views
    "loaded": 1e-6,  # relative: another kernel of attention
    "token by token": 1e-5,  # relative: products of other shapes
    "merged": 1e-5,  # relative: sums in another order, with zeros between
}
Options = dict[str, Option]
Choice = Callable[[list[LayerSpec]], Options]


def parts(units: list[LayerSpec], *, mlp: bool) -> list[str]:
    return [unit.name for unit in units if unit.is_closing and bool(unit.neurons) == mlp]


def taken(units: list[LayerSpec], option: str, chosen: list[str]) -> Options:
    return {unit.name: Option.parse(option) for unit in units if unit.closing in chosen}


CHOICES: dict[str, Choice] = {
    "first attention skipped": lambda u: taken(u, "skip", parts(u, mlp=False)[:1]),
    "all attention skipped": lambda u: taken(u, "skip", parts(u, mlp=False)),
    "first MLP skipped": lambda u: taken(u, "skip", parts(u, mlp=True)[:1]),
    "thin": lambda u: taken(u, "neurons 10", parts(u, mlp=True)),
    "last block skipped, thin": lambda u: {
        **taken(u, "neurons 7", parts(u, mlp=True)[:1]),
        **taken(u, "skip", [parts(u, mlp=mlp)[-1] for mlp in (False, True)]),
    },
    "two widths": lambda u: {
        **taken(u, "neurons 7", parts(u, mlp=True)[:1]),
        **taken(u, "neurons 10", parts(u, mlp=True)[1:]),
    },
}
every_case = pytest.mark.parametrize("case", CASES)
every_choice = pytest.mark.parametrize("choice", CHOICES)
# Every family and every choice, each choice in a third of the families.
some_pairs = pytest.mark.parametrize(
    ("case", "choice"),
    [
        (case, choice)
        for i, case in enumerate(CASES)
        for j, choice in enumerate(CHOICES)
        if (i + j) % 3 == 0
    ],
)
# A family that computes positions, one that learns them, one whose parts are side by side.
SOME = ("llama_tied", "gpt2", "phi")
some_cases = pytest.mark.parametrize("case", SOME)


@cache
def prepared(case: str) -> dict[str, Prepared]:
    model, method = build(case), method_named("svd")
    forms = ("neurons", "skip")
    made = factor_model(model, map_model(model), method, RandomStatistics(), joint=forms)
    return {name: each for part in made for name, each in part.items()}


def allocated(case: str, choice: str) -> tuple[PreTrainedModel, Allocation]:
    model = build(case)
    units = list(map_model(model).compressible)
    return model, decided(units, CHOICES[choice](units), measure="bytes")


def stored(case: str, choice: str) -> tuple[PreTrainedModel, Allocation]:
    model, allocation = allocated(case, choice)
    store_(model, allocation, prepared(case))
    return model, allocation


def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(token_ids(2, 9) if ids is None else ids).logits


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def write(folder: Path, model: PreTrainedModel, allocation: Allocation) -> int:
    units = allocation.compressed
    return save(
        folder,
        model,
        byte_tokenizer(),
        allocation,
        {"method": "svd"},
        costs={name: allocation.costs[name] for name in units},
        parameters=reference.count_parameters(model),
    )


@every_case
def test_a_trial_is_what_is_stored_and_leaves_no_trace(case: str) -> None:
    for choice in CHOICES:
        model, allocation = allocated(case, choice)
        before = logits(model), dict(model.named_modules())
        factors = on_device(model, prepared(case), allocation.ranks)
        with compressed(model, allocation, factors):
            trial = logits(model)
        assert torch.equal(logits(model), before[0])
        assert dict(model.named_modules()) == before[1]
        assert relative(logits(stored(case, choice)[0]), trial) <= TOLERANCE["stored"], choice
        assert relative(trial, before[0]) > 100 * TOLERANCE["stored"], choice


@every_case
def test_what_is_skipped_is_not_run(case: str) -> None:
    model, _ = stored(case, "last block skipped, thin")
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    logits(model)
    dense = list(map_model(build(case)).compressible)
    attention, mlp = (parts(dense, mlp=mlp) for mlp in (False, True))
    inside = {unit.name for unit in dense if unit.closing == attention[-1]}
    assert {*ran} & inside == {attention[-1]}  # which gives the mean
    assert attention[0] in ran
    units = map_model(build(case)).by_name
    whole = logits(build(case)).shape
    assert logits(model).shape == whole
    for name in {unit.name for unit in dense if unit.closing == mlp[-1]} - {mlp[-1]}:
        x = torch.ones(3, units[name].in_features)
        assert model.get_submodule(name)(x).numel() == 0


@some_pairs
def test_token_by_token_from_a_cache_is_as_all_at_once(case: str, choice: str) -> None:
    """Whichever attention the positions and masks are read off."""
    model, _ = stored(case, choice)
    ids = token_ids(2, 9)
    expected, cache = logits(model, ids), DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [
            model(piece, past_key_values=cache, use_cache=True).logits
            for piece in (ids[:, :4], ids[:, 4:5], ids[:, 5:6], ids[:, 6:])
        ]
    assert relative(torch.cat(pieces, 1), expected) <= TOLERANCE["token by token"]
    assert cache.get_seq_length() == 9


@some_cases
@pytest.mark.parametrize("choice", ["first attention skipped", "all attention skipped"])
def test_generation_with_and_without_a_cache_is_the_same(case: str, choice: str) -> None:
    model, _ = stored(case, choice)
    prompt, mask = token_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0  # a shorter prompt, padded on the left
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    kinds = [{"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}]
    kinds += [{"num_beams": 2, "use_cache": cache} for cache in (False, True)]
    plain, cached, static, *beams = (model.generate(prompt, **how, **kind) for kind in kinds)
    assert torch.equal(plain, cached)
    assert torch.equal(plain, static)
    assert torch.equal(*beams)


@some_pairs
def test_a_checkpoint_holds_what_is_counted_and_is_loaded_as_it_was(
    case: str, choice: str, tmp_path: Path
) -> None:
    model, allocation = stored(case, choice)
    in_file = write(tmp_path / "model", model, allocation)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert relative(logits(opened), logits(model)) <= TOLERANCE["loaded"]
    counted = account(map_model(build(case)), allocation.cost, itemsize=4)
    assert in_file == reference.count_parameters(opened) == counted.model.parameters
    size = sum(tensor.nbytes for tensor in opened.state_dict().values())
    tied = opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
    again = opened.get_output_embeddings().weight.nbytes if tied else 0
    assert size - again == counted.model.bytes
    for name, option in allocation.compressed.items():
        assert form_of(opened.get_submodule(name)) == option.form
    opened.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(opened))


DAMAGED: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "a layer less": (
        lambda units: units.pop("model.layers.0.mlp.up_proj"),
        r"model\.layers\.0\.mlp\.\w+ is 'neurons 7' and model\.layers\.0\.mlp\.up_proj is 'dense'",
    ),
    "two widths": (
        lambda units: units.update({"model.layers.0.mlp.up_proj": "neurons 8"}),
        r"is 'neurons 7' and model\.layers\.0\.mlp\.up_proj is 'neurons 8': all layers of an",
    ),
    "neurons of an attention": (
        lambda units: units.update({"model.layers.0.self_attn.q_proj": "neurons 7"}),
        r"q_proj cannot be 'neurons 7': an attention has no neurons",
    ),
    "no layer of a block": (
        lambda units: units.update({"lm_head": "skip"}),
        r"lm_head cannot be 'skip': it is of no attention or MLP",
    ),
    "another width": (
        lambda units: units.update(
            {f"model.layers.0.mlp.{kind}_proj": "neurons 8" for kind in ("gate", "up", "down")}
        ),
        r"has shape \(16, 7\), config\.json wants \(16, 8\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_configuration_that_cannot_be_is_refused(damage: str, tmp_path: Path) -> None:
    model, allocation = stored("llama_untied", "two widths")
    write(tmp_path / "model", model, allocation)
    file = tmp_path / "model" / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    change, message = DAMAGED[damage]
    change(config["quantization_config"]["units"])
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model")


@some_pairs
def test_a_merged_model_is_a_plain_one_of_fewer_neurons_and_blocks(
    case: str, choice: str, tmp_path: Path
) -> None:
    model, allocation = stored(case, choice)
    options = allocation.compressed.values()
    lacking = case in ("mistral", "qwen2", "phi3") or (
        case == "qwen3" and "attention" not in choice
    )
    if lacking and "skip" in map(str, options):  # qwen3 may have biases in attention
        with pytest.raises(CheckpointError, match=r"no parameter for the bias of \d layers"):
            save_merged(tmp_path / "merged", model, byte_tokenizer())
        return
    save_merged(tmp_path / "merged", model, byte_tokenizer())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not low_rank_layers(opened)
    assert not thin_layers(opened)
    assert relative(logits(opened), logits(model)) <= TOLERANCE["merged"]
    units = [unit for unit in map_model(opened).compressible if unit.neurons]
    widths = {"thin": 10, "two widths": 10, "last block skipped, thin": 7}
    assert {unit.neurons for unit in units} == {widths.get(choice, INNER)}
    blocks = 1 if choice == "last block skipped, thin" else BLOCKS
    assert opened.config.num_hidden_layers == map_model(opened).blocks == blocks
    ids = token_ids(2, 6)
    cached, plain = (
        opened.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("case", ["llama_biased", "qwen3", "gpt2"])
@every_choice
def test_the_dense_twin_has_every_layer_again(case: str, choice: str) -> None:
    model, allocation = stored(case, choice)
    units = map_model(build(case))
    twin = dense_twin(model)
    assert reference.count_parameters(twin) == units.parameters
    assert not low_rank_layers(twin)
    assert not thin_layers(twin)
    for unit in units.compressible:
        layer = twin.get_submodule(unit.name)
        assert linear_weight(layer).shape == (unit.out_features, unit.in_features)
    ran: list[str] = []
    for unit in units.compressible:
        twin.get_submodule(unit.name).register_forward_hook(
            lambda *_, name=unit.name: ran.append(name)
        )
    logits(twin)
    assert sorted(ran) == sorted(unit.name for unit in units.compressible)
    timed = measure_kinds(model, twin, TimingSettings((3,), repeats=1, warmup=0))
    thin = {n for n, option in allocation.options.items() if option.form == "neurons"}
    assert {kind.kind for kind in timed} == {units.by_name[name].kind for name in thin}
    assert all(option in (DENSE, Option("skip")) or n in thin
               for n, option in allocation.options.items())  # fmt: skip


@pytest.mark.filterwarnings("ignore::lrbo.calibration.collect.CalibrationWarning")
def test_a_compressed_table_beside_joint_options_is_stored_loaded_merged_and_timed(
    tmp_path: Path,
) -> None:
    model, include = build("llama_tied"), ("blocks", "embedding")
    calibration = lrbo.calibrate(model, token_ids(4, 16), include=include, progress=False)
    factorization = lrbo.factorize(
        model, calibration, forms=["pivoted", "neurons", "skip"], include=include, progress=False
    )
    units = list(factorization.layers.compressible)
    options = CHOICES["last block skipped, thin"](units) | {units[-1].name: Option("pivoted", (2,))}
    assert units[-1].is_lookup
    allocation = decided(units, options, measure="bytes")
    with factorization.compressed(model, allocation):
        trial = logits(model)
    factorization.compress_(model, allocation)
    assert relative(logits(model), trial) <= TOLERANCE["stored"]
    factorization.save(tmp_path / "model", model, byte_tokenizer(), allocation)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert is_tied(opened)
    assert relative(logits(opened), logits(model)) <= TOLERANCE["loaded"]
    counted = factorization.account(allocation)
    assert reference.count_parameters(opened) == counted.model.parameters
    save_merged(tmp_path / "merged", model, byte_tokenizer())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative(logits(merged), trial) <= TOLERANCE["merged"]
    assert is_tied(merged)
    assert map_model(merged).blocks == 1
    twin = dense_twin(opened)
    assert reference.count_parameters(twin) == factorization.layers.parameters
    timed = measure_kinds(opened, twin, TimingSettings((3,), repeats=1, warmup=0))
    assert {kind.kind for kind in timed} == {"embed_tokens", "gate_proj", "up_proj", "down_proj"}
