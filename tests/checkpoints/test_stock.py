"""What is written for transformers, PEFT and vLLM gives, opened by the first two, equal outputs."""

import json
from importlib import metadata
from itertools import cycle
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrbo
from lrbo.allocation.allocate import Allocation
from lrbo.checkpoints import stock
from lrbo.checkpoints.export import WEIGHTS
from lrbo.checkpoints.stock import Scheme, Stock, schemes_of, unfit, vllm_problems
from lrbo.errors import CheckpointError
from lrbo.factorization.options import BaseOptions
from lrbo.layers.modules import low_rank_layers
from lrbo.layers.options import DENSE, Option, cost_of
from lrbo.models.loading import tiny_model
from lrbo.models.tiny import byte_tokenizer
from tests.checkpoints.test_export import TOLERANCE, Compressed, logits, relative
from tests.support.allocations import decided
from tests.support.tiny import build, token_ids

# PEFT asks a model for what transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = token_ids(8, 32)
FORMS = ("int8_sym", "int4_sym", "int3_sym", "int2_sym", "int4", "int3", "int2")
DENSE_UNIT = "model.layers.0.mlp.up_proj"
QKV = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"]


@pytest.fixture(scope="module")
def factorization() -> lrbo.Factorization:
    model = tiny_model()
    calibration = lrbo.calibrate(model, IDS, progress=False)
    bases = BaseOptions(group_sizes=(16, 32))
    return lrbo.factorize(model, calibration, forms=FORMS, bases=bases, progress=False)


@pytest.fixture
def allocation(factorization: lrbo.Factorization) -> Allocation:
    """Give each unit another form, group size and rank; one stays dense."""
    levels = cycle([(form, size, rank) for size, rank in ((32, 2), (16, 1)) for form in FORMS])
    options = {
        spec.name: Option(form, (size, 0 if form == "int8_sym" else rank))
        for spec, (form, size, rank) in zip(factorization.layers.compressible, levels, strict=False)
    }
    return decided(factorization.layers.compressible, options | {DENSE_UNIT: DENSE})


def opened(folder: Path) -> nn.Module:
    """Open a base, and its adapter if it has one, as the model card says."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model.set_attn_implementation("eager")
    model(torch.tensor([[0]]))
    if not (folder / "adapter").exists():
        return model
    adapted: nn.Module = PeftModel.from_pretrained(model, folder / "adapter").eval()
    return adapted


def outputs(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        said: Tensor = model(ids).logits.float()
    return said


@pytest.mark.parametrize("vllm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_libraries_open_what_was_compressed(
    dtype: torch.dtype,
    vllm: bool,
    factorization: lrbo.Factorization,
    allocation: Allocation,
    tmp_path: Path,
) -> None:
    model = tiny_model()
    model.set_attn_implementation("eager")
    model.to(dtype)
    factorization.compress_(model, allocation)
    expected = outputs(model)
    parts = Stock.of(model, allocation.compressed, vllm=vllm)
    parts.save(tmp_path / "model", model, byte_tokenizer())
    again = opened(tmp_path / "model")
    own = [p for n, p in again.named_parameters() if p.is_floating_point() and "lora_" not in n]
    assert {parameter.dtype for parameter in own} == {dtype}
    # bfloat16: PEFT runs adapters in float32.
    few = IDS[:1, :8]
    near = 1e-6 if dtype == torch.float32 else 0.02
    assert relative(outputs(again, few), outputs(model, few)) <= near
    # Of many tokens lrbo adds the low rank to the weight, in its dtype, and PEFT runs it beside.
    assert relative(outputs(again), expected) <= 2 * near
    assert torch.equal(outputs(model), expected)
    without = outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "model/base"))
    assert relative(without, expected) > 0.05
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model/base")
    assert tokenizer("grün").input_ids == byte_tokenizer()("grün").input_ids


def test_its_files_hold_what_was_counted_and_said(
    factorization: lrbo.Factorization, allocation: Allocation, tmp_path: Path
) -> None:
    """Beside a form's count: 16 bytes for a shape, factors of 4 bytes without a scale.

    And a bit more for every integer, where a form counts a byte for every zero point.
    """
    model = tiny_model()
    factorization.compress_(model, allocation)
    parts = Stock.of(model, allocation.compressed)
    parts.save(tmp_path / "model", model, byte_tokenizer())
    base = load_file(tmp_path / "model/base" / WEIGHTS)
    adapter = load_file(tmp_path / "model/adapter/adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in base.values()) == parts.base_bytes
    assert sum(tensor.nbytes for tensor in adapter.values()) == parts.adapter_bytes
    counted = factorization.account(allocation).model
    assert parts.parameters == counted.parameters
    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    assert set(ranks) == set(allocation.compressed)
    shapes = [factorization.layers.by_name[name] for name in ranks]
    wide = sum(
        rank * (spec.out_features + spec.in_features)
        for rank, spec in zip(ranks.values(), shapes, strict=True)
    )
    assert parts.adapter_bytes == 4 * wide
    low_ranks = wide + 4 * sum(ranks.values())
    wider = sum(
        spec.out_features * spec.in_features // 8 - layer.get_buffer("zero").nbytes
        for spec, layer in zip(shapes, low_rank_layers(model).values(), strict=True)
        if hasattr(layer, "zero")
    )
    assert parts.base_bytes == counted.bytes - low_ranks + 16 * len(ranks) + wider


def test_factors_in_floats_are_the_adapter_as_they_are(tmp_path: Path) -> None:
    model, forms = tiny_model().to(torch.bfloat16), ("int4_sym_float", "int3_float")
    calibration = lrbo.calibrate(model, IDS, progress=False)
    bases = BaseOptions(group_sizes=(32,))
    made = lrbo.factorize(model, calibration, forms=forms, bases=bases, progress=False)
    units = made.layers.compressible
    options = {spec.name: Option(forms[i % 2], (32, 1)) for i, spec in enumerate(units)}
    allocation = decided(units, options, measure="bytes")
    model.set_attn_implementation("eager")
    made.compress_(model, allocation)
    parts = Stock.of(model, options)
    for name, layer in low_rank_layers(model).items():
        tensors = layer.state_dict()
        assert "factor_scale" not in tensors
        inner, outer = (parts.adapter[f"base_model.model.{name}.lora_{s}.weight"] for s in "AB")
        assert torch.equal(inner, tensors["right"])
        assert torch.equal(outer, tensors["left"])
        assert inner.dtype == outer.dtype == torch.bfloat16
        cost = cost_of(made.layers.by_name[name], options[name], bias=False, itemsize=2)
        assert cost.bytes == sum(tensor.nbytes for tensor in tensors.values())
    parts.save(tmp_path / "model", model, byte_tokenizer())
    assert parts.parameters == made.account(allocation).model.parameters
    assert relative(outputs(opened(tmp_path / "model")), outputs(model)) <= 0.03  # of bfloat16


def test_the_library_unpacks_what_it_was_given(
    factorization: lrbo.Factorization, allocation: Allocation
) -> None:
    model = tiny_model()
    factorization.compress_(model, allocation)
    parts = Stock.of(model, allocation.compressed, vllm=True)
    config = QuantizationConfig.model_validate(
        {k: v for k, v in parts.quantization().items() if k != "version"}
    )
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    schemes = {t: group for group in config.config_groups.values() for t in group.targets}
    layers = low_rank_layers(model)
    assert set(schemes) == set(layers)
    assert config.ignore == [DENSE_UNIT, "lm_head"]
    for name, layer in layers.items():
        own = {k.removeprefix(f"{name}."): t for k, t in parts.base.items() if name in k}
        weight = compressor.decompress(own, schemes[name])["weight"]
        assert torch.equal(weight, layer.base(torch.float32))  # type: ignore[operator]


def test_an_adapter_scales_nothing(
    factorization: lrbo.Factorization, allocation: Allocation, tmp_path: Path
) -> None:
    """vLLM reads the one rank and alpha, and the shapes."""
    model = tiny_model()
    factorization.compress_(model, allocation)
    Stock.of(model, allocation.compressed).save(tmp_path / "model", model, byte_tokenizer())
    config = json.loads((tmp_path / "model/adapter/adapter_config.json").read_text("utf-8"))
    ranks = {name: o.level[1] for name, o in allocation.compressed.items() if o.level[1]}
    assert config["rank_pattern"] == config["alpha_pattern"] == ranks
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert sorted(config["target_modules"]) == sorted(ranks)
    tensors = load_file(tmp_path / "model/adapter/adapter_model.safetensors")
    assert all(float(t.abs().max()) <= 1 for name, t in tensors.items() if "lora_A" in name)


def with_biases(case: str) -> Compressed:
    """Compress a model, and give every layer that is not dense another bias, or one at all."""
    compressed = Compressed(case, forms=("int4_sym", "int3_sym"))
    for layer in low_rank_layers(compressed.model).values():
        layer.bias = nn.Parameter(torch.randn(layer.out_features), requires_grad=False)
    return compressed


@pytest.mark.parametrize("case", ["llama_tied", "llama_biased", "opt", "gpt_neox", "phi"])
def test_families_ties_and_added_biases(case: str, tmp_path: Path) -> None:
    compressed = with_biases(case)
    parts = Stock.of(compressed.model, compressed.options)
    parts.save(tmp_path / "model", compressed.model, byte_tokenizer())
    assert parts.schemes
    again = opened(tmp_path / "model")
    with torch.inference_mode():
        said = again(token_ids(2, 7)).logits.float()
    assert relative(said, logits(compressed.model)) <= TOLERANCE["loaded"]


def test_a_bias_that_an_architecture_lacks_is_refused() -> None:
    compressed = with_biases("mistral")
    with pytest.raises(CheckpointError, match="MistralForCausalLM has no parameter for the bias"):
        Stock.of(compressed.model, compressed.options)


def test_a_model_without_low_ranks_has_no_adapter(tmp_path: Path) -> None:
    compressed = Compressed("llama_tied", forms=("int8_sym",))
    parts = Stock.of(compressed.model, compressed.options)
    parts.save(tmp_path / "model", compressed.model, byte_tokenizer())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["base"]
    again = opened(tmp_path / "model")
    with torch.inference_mode():
        said = again(token_ids(2, 7)).logits
    assert relative(said, logits(compressed.model)) <= TOLERANCE["loaded"]
    with pytest.raises(CheckpointError, match="exists already"):
        parts.save(tmp_path / "model", compressed.model, byte_tokenizer())


def test_it_is_opened_here_too_and_a_damaged_adapter_refused(
    factorization: lrbo.Factorization, allocation: Allocation, tmp_path: Path
) -> None:
    model = tiny_model()
    factorization.compress_(model, allocation)
    parts = Stock.of(model, allocation.compressed)
    parts.save(tmp_path / "model", model, byte_tokenizer())
    cpu = torch.device("cpu")
    again = stock.load(str(tmp_path / "model"), dtype=None, device=cpu)
    assert relative(outputs(again), outputs(model)) <= TOLERANCE["loaded"]
    assert not any(parameter.requires_grad for parameter in again.parameters())
    base = stock.load(str(tmp_path / "model/base"), dtype=None, device=cpu)
    assert relative(outputs(base), outputs(model)) > 0.05
    (tmp_path / "model/adapter/adapter_model.safetensors").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"cannot read .*adapter: "):
        stock.load(str(tmp_path / "model"), dtype=None, device=cpu)


def test_what_it_cannot_hold_is_listed_by_form_and_layer() -> None:
    dense = build("llama_tied")
    names = [name for name, part in dense.named_modules() if type(part) is nn.Linear]
    options = {name: Option("pivoted", (3,)) for name in names[:5]}
    options |= {names[5]: Option("int8", (16, 0)), names[6]: Option("int4", (16, 0))}
    reason = unfit(options | {names[7]: DENSE}, dense)
    assert reason is not None
    assert f"pivoted ({', '.join(names[:3])} and 2 more), int8 ({names[5]})" in reason
    assert "holds int4, int3, int2, int8_sym, int4_sym, int3_sym, int2_sym, int4_float, " in reason
    assert names[6] not in reason
    assert unfit({names[6]: Option("int2_sym", (16, 1)), names[7]: DENSE}, dense) is None
    transposed = unfit({"transformer.h.0.mlp.c_fc": Option("int4_sym", (16, 0))}, build("gpt2"))
    assert transposed is not None
    assert "int4_sym of a Conv1D (transformer.h.0.mlp.c_fc)" in transposed


def test_layers_that_vllm_runs_as_one_are_packed_alike() -> None:
    dense = build("llama_tied")
    options = {
        QKV[0]: Option("int3_sym", (64, 8)),
        QKV[1]: Option("int8_sym", (128, 0)),
        QKV[2]: Option("int4", (256, 0)),
        "model.layers.0.mlp.down_proj": Option("int3", (256, 0)),
    }
    apart = schemes_of(options, dense, vllm=False)
    assert (apart[QKV[0]], apart[QKV[2]]) == (Scheme(3, 64), Scheme(5, 256))
    problems = " ".join(vllm_problems(apart, 513, dense))
    assert "3 bits in groups of 64" in problems
    assert f"it runs {' and '.join(QKV)} as one layer" in problems
    assert "ranks up to 512, not 513" in problems
    alike = schemes_of(options, dense, vllm=True)
    assert alike == dict.fromkeys(QKV, Scheme(8, 64)) | {
        "model.layers.0.mlp.down_proj": Scheme(4, 128)
    }
    assert vllm_problems(alike, 8, dense) == []
    # What no packing mends: a dense layer among the others, and groups of 16.
    others = {QKV[0]: Option("int4_sym", (16, 0)), QKV[1]: Option("int4_sym", (64, 0))}
    clauses = vllm_problems(schemes_of(others, dense, vllm=True), 0, dense)
    assert len(clauses) == 2


@pytest.mark.parametrize("release", ["0.17.1", None])
def test_missing_and_old_packages_are_named(
    release: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stock.missing_packages() is None
    of = metadata.version

    def version(name: str) -> str:
        if name == "peft":
            return of(name)
        if release is None:
            raise metadata.PackageNotFoundError
        return release

    monkeypatch.setattr(metadata, "version", version)
    problem = stock.missing_packages()
    assert problem is not None
    assert "needs compressed-tensors, 0.18 or newer; run: pip install 'lrbo[export]'" in problem
