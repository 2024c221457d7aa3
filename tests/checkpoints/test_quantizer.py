"""transformers opens checkpoints by itself, and what it offers for models works on them."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)
from transformers.trainer_utils import validate_quantization_for_training

from lrbo.checkpoints.export import CARD, CONFIG, INDEX, WEIGHTS, load
from lrbo.checkpoints.quantizer import FORMAT, LowRankConfig
from lrbo.errors import CheckpointError, ModelError
from lrbo.layers.form import DENSE_FORM, Grid
from lrbo.layers.forms import FORMS, is_joint
from lrbo.layers.low_rank import FormModule
from lrbo.layers.modules import empty_module, parameters_of
from lrbo.layers.options import Option, cost_of
from lrbo.layers.pivoted import PivotedLinear
from lrbo.models.loading import load_skeleton
from lrbo.models.sources import ModelSource
from lrbo.models.specs import LayerSpec
from lrbo.tasks.perplexity import score
from tests.checkpoints.test_export import EVERY, Compressed, Forms, every_form, options_of
from tests.checkpoints.test_shared import SHARE_AND_METHOD
from tests.checkpoints.test_shared import stored as stored_shared
from tests.checkpoints.test_shared import write as write_shared
from tests.support import reference
from tests.support.tiny import CASES, build, token_ids

TOLERANCE = {
    "compiled": 1e-5,  # relative: fused float32 operations round elsewhere
    "merged adapters": 1e-5,  # relative: float32, one product instead of two sums
}
# Grouped queries with a tied embedding; biases; Conv1D with biases.
SOME = ("llama_tied", "qwen2", "gpt2")
some_cases = pytest.mark.parametrize("case", SOME)
in_every_form = pytest.mark.parametrize("forms", EVERY, ids="+".join)
IDS = token_ids(2, 7)


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """Give every tensor memory of its own: at another alignment, kernels may round otherwise.

    Loaded tensors lie in mapped files, and those of a compressed model in larger ones.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return model


def says(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    """Return the logits."""
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def opened(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model


@pytest.fixture(params=SOME)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a checkpoint."""
    Compressed(request.param).save(tmp_path / "model")
    return tmp_path / "model"


# --- from_pretrained -----------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("moving_bias", [False, True])
def test_what_transformers_opens_scores_exactly_what_was_saved(
    case: str, forms: Forms, moving_bias: bool, tmp_path: Path
) -> None:
    compressed = Compressed(case, moving_bias=moving_bias, forms=forms)
    compressed.save(tmp_path / "model")
    model = opened(tmp_path / "model")
    assert type(model) is type(compressed.model)
    model.set_attn_implementation("eager")  # that of the saved one
    windows = token_ids(4, 16)
    actual, expected = score(aligned(model), windows), score(aligned(compressed.model), windows)
    assert (actual.nll, actual.tokens) == (expected.nll, expected.tokens)
    assert reference.count_parameters(model) == compressed.parameters
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_dtype_and_device_map_are_taken(
    folder: Path, dtype: torch.dtype, device_map: str | None
) -> None:
    model = opened(folder, dtype=dtype, device_map=device_map)
    assert {p.dtype for p in model.parameters()} == {dtype}
    places = [m.index for m in model.modules() if isinstance(m, PivotedLinear)]
    assert len(places) >= 4
    assert {tensor.dtype for tensor in places} == {torch.int32}
    assert says(model).dtype == dtype
    assert torch.equal(says(model), says(load(folder, dtype=dtype)))


def test_blocks_may_stay_on_disk(tmp_path: Path) -> None:
    Compressed("llama_tied").save(tmp_path / "model")
    outside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    places = {**dict.fromkeys(outside, "cpu"), "model.layers.1": "disk"}
    model = opened(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(says(model), says(load(tmp_path / "model")))


def test_a_model_moves_to_another_dtype(folder: Path) -> None:
    model = opened(folder).to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert says(model).isfinite().all()


def test_nothing_is_forbidden_as_it_is_of_quantized_models(folder: Path) -> None:
    model = opened(folder)
    assert {p.dtype for p in model.half().parameters()} == {torch.float16}
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}


@pytest.mark.parametrize("case", CASES)
def test_it_can_be_pickled_whatever_lies_side_by_side_in_the_file(
    case: str, tmp_path: Path
) -> None:
    """torch.save refuses tensors of two dtypes at one address, an empty one and its neighbour."""
    Compressed(case, moving_bias=True).save(tmp_path / "model")
    model = opened(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("first", ["lrbo", "transformers.modeling_utils"])
def test_it_is_enough_to_import_lrbo(first: str, tmp_path: Path) -> None:
    """In any order, whatever part of it came first; and it is lrbo that does it."""
    Compressed("llama_tied").save(tmp_path / "model")
    code = (
        f"import {first}, lrbo, sys; assert 'torch' not in sys.modules or {first!r} != 'lrbo'\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})\n"
        "print(sum(p.numel() for p in model.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == Compressed("llama_tied").parameters


@pytest.mark.slow
def test_without_lrbo_transformers_stops(tmp_path: Path) -> None:
    """It would start the layers that it does not know at random."""
    folders = {forms: tmp_path / "+".join(forms) for forms in EVERY}
    for forms, folder in folders.items():
        Compressed("llama_tied", forms=forms).save(folder)
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        "    try: AutoModelForCausalLM.from_pretrained(folder)\n"
        "    except RuntimeError as error: print(error)\n"
        "    else: sys.exit(f'{folder} was opened')"
    )
    command = [sys.executable, "-c", code, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Unknown quantization type, got lrbo") == len(EVERY)
    assert done.stdout.count("You set `ignore_mismatched_sizes` to `False`") == len(EVERY)


def test_a_dense_model_is_not_compressed_by_loading_it(tmp_path: Path) -> None:
    build("llama_tied").save_pretrained(tmp_path)
    wanted = LowRankConfig(
        format=FORMAT,
        auto_class="AutoModelForCausalLM",
        parameters=1,
        units={},
        added_biases=[],
        provenance={},
    )
    with pytest.raises(ValueError, match="lrbo does require the model to be pre-quantized"):
        opened(tmp_path, quantization_config=wanted)


@pytest.mark.parametrize(
    "kind", [AutoModel, AutoModelForSequenceClassification], ids=lambda kind: kind.__name__
)
def test_a_model_without_the_head_says_how_to_open_it(kind: Any, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"open it with AutoModelForCausalLM, whose base_mod"):
        kind.from_pretrained(folder)


# --- save_pretrained -----------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("max_shard_size", ["50GB", "6KB"])
def test_save_pretrained_writes_it_again(
    case: str, forms: Forms, max_shard_size: str, tmp_path: Path
) -> None:
    Compressed(case, moving_bias=case == "opt", forms=forms).save(tmp_path / "model")
    model = opened(tmp_path / "model")
    model.save_pretrained(tmp_path / "again", max_shard_size=max_shard_size)
    assert (tmp_path / "again" / INDEX).exists() == (max_shard_size == "6KB")
    reloaded = load(tmp_path / "again")
    before, after = model.state_dict(), reloaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    stored: dict[str, Tensor] = {}
    for file in (tmp_path / "again").glob("*.safetensors"):
        stored |= load_file(file)
    assert stored.keys() == load_file(tmp_path / "model" / WEIGHTS).keys()
    texts = [(tmp_path / name / CONFIG).read_text(encoding="utf-8") for name in ("model", "again")]
    assert texts[0] == texts[1]


def test_a_larger_vocabulary_is_counted_when_it_is_saved(tmp_path: Path) -> None:
    Compressed("llama_tied").save(tmp_path / "model")
    model = opened(tmp_path / "model")
    model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(tmp_path / "again")
    reloaded = load(tmp_path / "again")
    assert reloaded.get_input_embeddings().weight.shape[0] == 70
    more = reference.count_parameters(reloaded) - Compressed("llama_tied").parameters
    assert more == 6 * model.config.hidden_size


# --- what models are used for --------------------------------------------------------------------


def test_generating_with_a_cache_is_generating_without(folder: Path) -> None:
    model = opened(folder)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = IDS[:1]
    cached = model.generate(ids, **options)
    assert cached.shape == (1, 15)
    assert torch.equal(cached, model.generate(ids, **options, use_cache=False))


def test_a_pipeline_opens_it_by_its_folder(tmp_path: Path) -> None:
    Compressed("llama_tied").save(tmp_path / "model")
    run = pipeline("text-generation", model=str(tmp_path / "model"))
    options = {"max_new_tokens": 6, "do_sample": False}
    (output,) = run("#%'", **options)  # tokens below 64, which the model has
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("#%'", return_tensors="pt")
    (expected,) = opened(tmp_path / "model").generate(**ids, **options)
    assert len(expected) > 4
    assert output["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_all_of_it_can_be_trained(folder: Path) -> None:
    model = opened(folder)
    validate_quantization_for_training(model)  # the Trainer's own check
    model(IDS, labels=IDS).loss.backward()
    without = [name for name, p in model.named_parameters() if p.numel() and p.grad is None]
    assert without == []


COMPILED = """
import sys
import lrbo, torch
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = model(ids).logits
        logits = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
    print(float((logits - expected).abs().max() / expected.abs().max()))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_block")
def test_it_compiles_as_one_graph(tmp_path: Path) -> None:
    """In a process of its own: the shape checks of the tests are no graph."""
    folders = [tmp_path / "+".join(forms) for forms in EVERY]
    for forms, folder in zip(EVERY, folders, strict=True):
        Compressed("one block", forms=forms).save(folder)
    folders.append(tmp_path / "shared")
    write_shared(folders[-1], *stored_shared("llama_biased"))
    torch.save(IDS, tmp_path / "ids")
    command = [sys.executable, "-c", COMPILED, str(tmp_path / "ids"), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = list(map(float, done.stdout.split()))
    assert len(errors) == len(folders)
    assert max(errors) <= TOLERANCE["compiled"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks it
@in_every_form
def test_adapters_sit_on_the_thin_matrices_and_can_be_merged(forms: Forms, tmp_path: Path) -> None:
    """The merged model is a checkpoint of the same options and size."""
    peft = pytest.importorskip("peft")
    compressed = Compressed("llama_tied", forms=forms)
    compressed.save(tmp_path / "model")
    wanted = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(opened(tmp_path / "model"), wanted)
    adapted(IDS, labels=IDS).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    thin = {"pivoted": ("rows", "coefficients"), "factored": ("left", "right")}
    for name, option in compressed.options.items():
        for part in thin[option.form]:
            assert any(f"{name}.{part}.lora_A." in each for each in trained), (name, part)
    expected = says(adapted.eval())
    assert not torch.equal(expected, says(opened(tmp_path / "model")))
    adapted.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(opened(tmp_path / "model"), tmp_path / "adapter")
    assert torch.equal(says(reloaded.eval()), expected)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert reference.count_parameters(merged) == compressed.parameters
    assert options_of(merged) == compressed.options
    distance = float((says(merged) - expected).abs().max() / expected.abs().max())
    assert distance <= TOLERANCE["merged adapters"]


@pytest.mark.parametrize("with_code", [False, True])
def test_it_is_not_compressed_a_second_time(with_code: bool, tmp_path: Path) -> None:
    Compressed("llama_tied").save(tmp_path / "model", with_code=with_code)
    with pytest.raises(ModelError, match=r"compressed already .*, expected a dense one"):
        load_skeleton(ModelSource("hf", str(tmp_path / "model")))


# --- with a modelling file -----------------------------------------------------------------------

WITHOUT_LRBO = """
import sys
sys.modules["lrbo"] = None  # to import it is an error
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", trust_remote_code=True)
    model.set_attn_implementation("eager")
    ids = torch.load(sys.argv[1], weights_only=True)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # at another alignment, kernels may round otherwise
    with torch.no_grad():
        torch.save(model(ids).logits, f"{folder}/logits")
    print(sum(p.numel() for p in model.parameters()), type(model).__mro__[1].__name__)
    model.save_pretrained(f"{folder}/again")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}/again", trust_remote_code=True)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys(), folder
    assert all(torch.equal(before[k], after[k]) for k in before), folder
"""


@pytest.mark.slow
def test_folders_with_a_modelling_file_open_where_lrbo_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    models: dict[Path, Compressed] = {}
    for case, forms in product(SOME, EVERY):
        folder = tmp_path / f"{case}-{'+'.join(forms)}"
        models[folder] = Compressed(case, forms=forms, moving_bias=case == "gpt2")
        models[folder].save(folder / "model", with_code=True)
    shared = {case: stored_shared(case, method) for case, method in SHARE_AND_METHOD.items()}
    for case, own in shared.items():
        write_shared(tmp_path / f"shared-{case}" / "model", *own, with_code=True)
    others = [tmp_path / f"shared-{case}" for case in shared]
    torch.save(IDS, tmp_path / "ids")
    command = [sys.executable, "-c", WITHOUT_LRBO, str(tmp_path / "ids"), *map(str, models)]
    done = subprocess.run([*command, *map(str, others)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [(each.parameters, each.model) for each in models.values()]
    expected += [(reference.count_parameters(model), model) for model, _ in shared.values()]
    lines = [f"{count} {type(model).__name__}" for count, model in expected]
    assert done.stdout.splitlines() == lines
    for word in ("MISSING", "UNEXPECTED", "Unknown quantization", "Traceback"):
        assert word not in done.stderr
    for folder, compressed in models.items():
        logits = torch.load(folder / "logits", weights_only=True)
        assert torch.equal(logits, says(aligned(compressed.model))), folder.name
    for folder, (model, _) in zip(others, shared.values(), strict=True):
        logits = torch.load(folder / "logits", weights_only=True)
        assert torch.equal(logits, says(aligned(model))), folder.name


def test_lrbo_reads_such_a_folder_without_its_code(tmp_path: Path) -> None:
    compressed = Compressed("qwen2")
    compressed.save(tmp_path / "model", with_code=True)
    (tmp_path / "model" / "modeling_low_rank.py").write_text("raise SystemExit('was executed')")
    model = load(tmp_path / "model")
    assert type(model) is type(compressed.model)
    model.set_attn_implementation("eager")
    assert torch.equal(says(aligned(model)), says(aligned(compressed.model)))
    model.save_pretrained(tmp_path / "again")
    reloaded = aligned(opened(tmp_path / "again"))
    assert torch.equal(says(reloaded), says(aligned(load(tmp_path / "model"))))
    assert not (tmp_path / "again" / "modeling_low_rank.py").exists()


def test_a_loaded_model_can_be_given_a_modelling_file(tmp_path: Path) -> None:
    compressed = Compressed("llama_tied")
    compressed.save(tmp_path / "model")
    compressed.model = load(tmp_path / "model")
    compressed.save(tmp_path / "coded", with_code=True)
    config = json.loads((tmp_path / "coded" / CONFIG).read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert torch.equal(says(load(tmp_path / "coded")), says(load(tmp_path / "model")))


def test_a_card_lies_beside_the_weights_where_one_is_given(tmp_path: Path) -> None:
    Compressed("llama_tied").save(tmp_path / "with", card="# Mine\n")
    Compressed("llama_tied").save(tmp_path / "without")
    assert (tmp_path / "with" / CARD).read_text(encoding="utf-8") == "# Mine\n"
    assert not (tmp_path / "without" / CARD).exists()


ALONE = [form for form in FORMS if form != DENSE_FORM and not is_joint(form)]


@pytest.mark.parametrize("form", ALONE)
def test_the_forms_with_a_module_are_those_that_budgets_count(form: str) -> None:
    spec = LayerSpec("unit", "kind", 0, 16, 32, False, site="x")
    run = FORMS[form].levels(spec, Grid(group_sizes=(16,)))[0]
    option = Option(form, tuple(map(int, run[0])))
    module = empty_module("unit", option, 16, 32, bias=True)
    assert isinstance(module, FormModule)
    tensors, unit = module.state_dict(), LayerSpec("unit", "kind", 0, 16, 32, False, site="x")
    cost = cost_of(unit, option, bias=True, itemsize=4)
    assert parameters_of(option, tensors) == cost.parameters
    assert sum(tensor.nbytes for tensor in tensors.values()) == cost.bytes
