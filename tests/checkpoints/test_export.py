"""What is saved loads with the same logits and count, or is refused by name; never half there."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lrbo.allocation.apply import store_
from lrbo.checkpoints import export
from lrbo.checkpoints.export import CONFIG, WEIGHTS, is_checkpoint, load, save
from lrbo.checkpoints.merged import save_merged
from lrbo.errors import CheckpointError, ConfigError
from lrbo.factorization.base import factor_layer
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prepared import BasedWeight, Prepared, UnitFactors
from lrbo.factorization.registry import method_named
from lrbo.layers.based import BasedLinear
from lrbo.layers.low_rank import FormModule, LowRankLinear
from lrbo.layers.modules import low_rank_layers
from lrbo.layers.options import Cost, Option, account
from lrbo.layers.pivoted import PivotedLinear
from lrbo.models.model_map import linear_bias, linear_weight, map_model
from lrbo.models.tiny import byte_tokenizer
from lrbo.pipeline.in_memory import factorize
from tests.support import reference
from tests.support.allocations import decided, mixed_options
from tests.support.forms import form_of
from tests.support.tiny import CASES, build, token_ids

TOLERANCE = {
    "loaded": 1e-6,  # relative to the largest logit: the same float32 weights, and kernels that
    # may differ in attention only (a loaded model takes the default implementation)
    "merged": 1e-4,  # relative: a float32 product of factors, rounded once more, two blocks deep
}

TOKENIZER = byte_tokenizer()
TIED = {case for case in CASES if map_model(build(case)).layers[-1].tied_to}
OPTIONS = {"card", "with_code"}
every_case = pytest.mark.parametrize("case", CASES)
Forms = tuple[str, ...]
PIVOTED: Forms = ("pivoted",)
FACTORED: Forms = ("factored",)
BOTH: Forms = ("factored", "pivoted")
EVERY: tuple[Forms, ...] = (PIVOTED, FACTORED, BOTH)
# Every family in all forms at once, and some in each of them alone.
SOME = ("llama_tied", "llama_biased", "gpt2")
CASES_IN_FORMS = [(case, BOTH) for case in CASES]
CASES_IN_FORMS += [(case, forms) for case in SOME for forms in (PIVOTED, FACTORED)]
every_form = pytest.mark.parametrize(
    ("case", "forms"),
    CASES_IN_FORMS,
    ids=lambda value: value if value in CASES else "+".join(value),
)


class Compressed:
    """A model with options in place, and what should be true of it."""

    def __init__(self, case: str, *, moving_bias: bool = False, forms: Forms = PIVOTED) -> None:
        self.model = build(case)
        layers = map_model(self.model)
        svd = method_named("svd")
        rounding = BasePlan(forms, BaseOptions(method="nearest", group_sizes=(16,)))
        self.prepared: dict[str, Prepared] = {}
        for i, spec in enumerate(layers.compressible):
            module = self.model.get_submodule(spec.name)
            weight, bias = linear_weight(module), linear_bias(module)
            factors = factor_layer(svd, weight, bias, {})
            if moving_bias:
                offset, center = torch.ones(spec.out_features), torch.ones(spec.in_features)
                factors = LowRankFactors(
                    factors.left, factors.right, factors.tail, offset.double() * i, center.double()
                )
            low_rank, quantized = factors.to(dtype=self.model.dtype), {}
            for rounded in rounding.make(weight.double(), {}, self.model.dtype):
                rest = factor_layer(svd, weight - rounded.weight(weight.dtype), bias, {})
                own = BasedWeight(rounded, rest.to(dtype=self.model.dtype))
                quantized[own.base.family] = own
            self.prepared[spec.name] = UnitFactors(low_rank, quantized) if quantized else low_rank
        units = layers.compressible
        self.allocation = decided(
            units, mixed_options(units, forms), adds_bias=moving_bias, measure="bytes"
        )
        counted = account(layers, self.allocation.cost, itemsize=4)
        self.parameters = counted.model.parameters
        store_(self.model, self.allocation, self.prepared)

    @property
    def options(self) -> dict[str, Option]:
        """What is not dense."""
        return self.allocation.compressed

    @property
    def costs(self) -> dict[str, Cost]:
        """Of what is not dense, in the dtype of the model."""
        size = self.model.dtype.itemsize
        return {
            name: Cost(cost.parameters, cost.bytes - (4 - size) * cost.parameters, cost.macs)
            for name, cost in self.allocation.costs.items()
            if name in self.options
        }

    def save(
        self,
        folder: Path,
        **changes: object,
    ) -> int:
        about = {"method": "svd", "base": "tiny"}
        parameters = changes.pop("parameters", self.parameters)
        costs = changes.pop("costs", self.costs)
        options: dict[str, Any] = {k: changes.pop(k) for k in OPTIONS & changes.keys()}
        return save(
            folder,
            self.model,
            TOKENIZER,
            self.allocation,
            about | changes,
            costs=costs,
            parameters=parameters,
            **options,
        )

    def write(self, folder: Path, *, merged: bool) -> None:
        if merged:
            save_merged(folder, self.model, TOKENIZER)
        else:
            self.save(folder)


def logits(model: PreTrainedModel) -> Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(token_ids(2, 7)).logits.float()


def options_of(model: PreTrainedModel) -> dict[str, Option]:
    """Return what the layers of a model are, by their kind and shape."""
    return {
        name: Option(form_of(module), level_of(module))
        for name, module in low_rank_layers(model).items()
    }


def level_of(module: FormModule) -> tuple[int, ...]:
    if isinstance(module, BasedLinear):
        return module.in_features // module.scale.shape[1], module.rank
    return (module.rank,)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def files(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a good checkpoint, for a test to damage."""
    Compressed("llama_tied").save(tmp_path / "model")
    return tmp_path / "model"


# --- save, load --------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("moving_bias", [False, True])
def test_a_loaded_model_says_what_the_saved_one_said(
    case: str, moving_bias: bool, forms: Forms, tmp_path: Path
) -> None:
    compressed = Compressed(case, moving_bias=moving_bias, forms=forms)
    in_file = compressed.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    assert type(loaded) is type(compressed.model)
    assert relative(logits(loaded), logits(compressed.model)) <= TOLERANCE["loaded"]
    counts = {
        in_file,
        compressed.parameters,
        reference.count_parameters(loaded),
        sum(t.numel() for t in tensors.values() if t.is_floating_point()),
    }
    assert len(counts) == 1
    assert options_of(loaded) == compressed.options
    assert {option.form for option in compressed.options.values()} == set(forms)
    before, after = compressed.model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("case", sorted(TIED))
def test_tied_embeddings_are_stored_once_and_tied_again(case: str, tmp_path: Path) -> None:
    Compressed(case).save(tmp_path / "model")
    embedding = build(case).get_input_embeddings().weight
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    assert sum(torch.equal(tensor, embedding) for tensor in tensors.values()) == 1
    loaded = load(tmp_path / "model")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_some_cases_are_tied_and_some_are_not() -> None:
    assert 3 <= len(TIED) < len(CASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_is_that_of_the_file_unless_another_is_asked_for(
    checkpoint: Path, dtype: torch.dtype
) -> None:
    assert {p.dtype for p in load(checkpoint).parameters()} == {torch.float32}
    loaded = load(checkpoint, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    pivoted = [m for m in loaded.modules() if isinstance(m, PivotedLinear)]
    assert {module.index.dtype for module in pivoted} == {torch.int32}
    # Rotary frequencies in bfloat16 would be wrong by radians at a distance of 1,000 tokens.
    exact, buffers = dict(build("llama_tied").named_buffers()), dict(loaded.named_buffers())
    own = {f"{name}.{own}" for name, m in loaded.named_modules() for own in ("index", "weight")}
    assert buffers.keys() - own == exact.keys()
    assert all(torch.equal(buffers[name], exact[name]) for name in exact)


def test_a_device_that_is_not_there_is_named_before_anything_is_read(checkpoint: Path) -> None:
    assert load(checkpoint, device="auto").device.type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match="device='gpu' cannot be used here"):
        load(checkpoint, device="gpu")


def test_a_model_in_half_precision_comes_back_with_exact_positions(tmp_path: Path) -> None:
    compressed = Compressed("llama_tied")
    compressed.model.config = copy.deepcopy(compressed.model.config)
    compressed.model.config.dtype = torch.bfloat16
    for parameter in compressed.model.parameters():
        parameter.data = parameter.data.bfloat16()
    compressed.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), logits(compressed.model))


def test_the_tokenizer_and_what_was_decided_lie_beside_the_weights(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer("grün").input_ids == TOKENIZER("grün").input_ids
    compressed = Compressed("llama_tied")
    config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    quantization = config["quantization_config"]
    units = {name: f"pivoted {option.level[0]}" for name, option in compressed.options.items()}
    assert quantization == {
        "quant_method": "lrbo",
        "format": 4,
        "auto_class": "AutoModelForCausalLM",
        "parameters": compressed.parameters,
        "units": units,
        "added_biases": [],
        "provenance": {
            "method": "svd",
            "base": "tiny",
            "budget": asdict(compressed.allocation.budget),
        },
    }
    assert 0 < len(units) < len(compressed.allocation.options)
    assert is_checkpoint(checkpoint)
    assert not is_checkpoint(checkpoint.parent)


def test_a_loaded_model_can_be_saved_again(checkpoint: Path, tmp_path: Path) -> None:
    compressed = Compressed("llama_tied")
    compressed.model = load(checkpoint)
    compressed.save(tmp_path / "again")
    assert relative(logits(load(tmp_path / "again")), logits(load(checkpoint))) == 0.0


def test_loading_executes_no_pickle(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the folder offers one."""

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return pytest.fail, ("a pickle was executed",)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a pickle was opened")

    for name in ("pytorch_model.bin", "lrbo_model.bin", "model.pt", "training_args.bin"):
        (checkpoint / name).write_bytes(pickle.dumps(Trap()))
    (checkpoint / "modeling_tiny.py").write_text("raise SystemExit('code was executed')")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_tiny.Model"}
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    expected = Compressed("llama_tied").model
    assert relative(logits(load(checkpoint)), logits(expected)) <= TOLERANCE["loaded"]


@pytest.mark.parametrize("merged", [False, True])
def test_code_of_the_dense_model_is_not_named(merged: bool, tmp_path: Path) -> None:
    """Phi-3 of the hub names a class of its own, which is not copied."""
    compressed = Compressed("phi3")
    compressed.model.config = copy.deepcopy(compressed.model.config)
    compressed.model.config.auto_map = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    compressed.write(tmp_path / "model", merged=merged)
    assert "auto_map" not in json.loads((tmp_path / "model" / CONFIG).read_text(encoding="utf-8"))
    assert hasattr(compressed.model.config, "auto_map")


# --- merged ------------------------------------------------------------------------------------


@every_form
def test_a_merged_model_opens_anywhere(case: str, forms: Forms, tmp_path: Path) -> None:
    compressed = Compressed(case, forms=forms)
    count = save_merged(tmp_path / "merged", compressed.model, TOKENIZER)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not any(isinstance(m, LowRankLinear | PivotedLinear) for m in opened.modules())
    assert count == reference.count_parameters(opened) == reference.count_parameters(build(case))
    assert relative(logits(opened), logits(compressed.model)) <= TOLERANCE["merged"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("grün").input_ids == TOKENIZER("grün").input_ids


HAS_PLACE = {"llama_untied", "llama_tied", "llama_biased", "gpt2", "opt", "gpt_neox", "phi"}
HAS_PLACE |= {"smollm3"}


@every_case
def test_an_added_bias_finds_its_place_or_is_refused(case: str, tmp_path: Path) -> None:
    compressed = Compressed(case, moving_bias=True)
    folder = tmp_path / "merged"
    if case in HAS_PLACE:
        save_merged(folder, compressed.model, TOKENIZER)
        opened = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert relative(logits(opened), logits(compressed.model)) <= TOLERANCE["merged"]
    else:
        kind = type(compressed.model).__name__
        with pytest.raises(
            CheckpointError, match=rf"{kind} has no parameter for the bias of \d+ lay"
        ):
            save_merged(folder, compressed.model, TOKENIZER)
        assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("case", "switch"), [("gpt_neox", "attention_bias"), ("opt", "enable_bias")]
)
def test_a_switch_of_the_family_gives_added_biases_their_place(
    case: str, switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**CASES[case].to_dict(), switch: False}
    monkeypatch.setitem(CASES, case, type(CASES[case])(**values))
    compressed = Compressed(case, moving_bias=True)
    save_merged(tmp_path / "merged", compressed.model, TOKENIZER)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert getattr(opened.config, switch)
    assert not getattr(compressed.model.config, switch)
    assert relative(logits(opened), logits(compressed.model)) <= TOLERANCE["merged"]


def test_a_bias_of_some_layers_gives_the_others_none(tmp_path: Path) -> None:
    values = {**CASES["llama_biased"].to_dict(), "mlp_bias": False}
    model = LlamaForCausalLM(LlamaConfig(**values)).eval()
    dense = sum(parameter.numel() for parameter in model.parameters())
    factorization = factorize(model, None, "svd", progress=False)
    factorization.compress_(model, factorization.uniform(0.6))
    assert save_merged(tmp_path / "merged", model, TOKENIZER) == dense


def test_merging_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    compressed = Compressed("llama_tied", moving_bias=True)
    before = dict(compressed.model.named_parameters())
    outputs, config = logits(compressed.model), compressed.model.config.to_dict()
    save_merged(tmp_path / "merged", compressed.model, TOKENIZER)
    after = dict(compressed.model.named_parameters())
    assert all(after[name] is tensor for name, tensor in before.items())
    assert torch.equal(logits(compressed.model), outputs)
    assert compressed.model.config.to_dict() == config


# --- whole or not at all -----------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_an_existing_folder_is_refused_and_untouched(merged: bool, tmp_path: Path) -> None:
    compressed = Compressed("llama_tied")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model exists already"):
        compressed.write(folder, merged=merged)
    assert files(tmp_path) == {"model/precious.txt": b"mine"}


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt("by hand")])
@pytest.mark.parametrize("merged", [False, True])
def test_an_interrupted_save_leaves_nothing(
    error: BaseException, merged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressed = Compressed("llama_tied")

    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(type(TOKENIZER), "save_pretrained", fail)  # after the weights
    with pytest.raises(type(error)):
        compressed.write(tmp_path / "model", merged=merged)
    assert list(tmp_path.iterdir()) == []


def test_a_count_that_the_accountant_does_not_confirm_is_refused(tmp_path: Path) -> None:
    compressed = Compressed("llama_tied")
    with pytest.raises(CheckpointError, match=r"model: the files hold [\d_]+ parameters, .* 1_234"):
        compressed.save(tmp_path / "model", parameters=1234)
    assert list(tmp_path.iterdir()) == []


# --- several files ----------------------------------------------------------------------------


def test_a_large_checkpoint_is_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 8_000)
    compressed = Compressed("llama_tied")
    compressed.save(tmp_path / "model")
    shards = sorted(path.name for path in (tmp_path / "model").glob("model-*"))
    count = len(shards)
    assert count > 1
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert (
        relative(logits(load(tmp_path / "model")), logits(compressed.model))
        <= (TOLERANCE["loaded"])
    )
    (tmp_path / "model" / shards[0]).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read .*{shards[0]}"):
        load(tmp_path / "model")
