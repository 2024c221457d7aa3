"""A compressed embedding is one table with its tied head: in memory, in files and in counting."""

import copy
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import lrbo
from lrbo.allocation.allocate import Allocation
from lrbo.checkpoints.export import WEIGHTS
from lrbo.checkpoints.merged import save_merged
from lrbo.errors import CheckpointError, ModelError
from lrbo.evaluation.timing import dense_twin
from lrbo.factorization.options import BaseOptions
from lrbo.layers import based
from lrbo.layers.form import DENSE_FORM
from lrbo.layers.forms import FORMS
from lrbo.layers.options import DENSE, Budget, Menu
from lrbo.layers.packing import unpack
from lrbo.models.model_map import is_tied
from lrbo.models.tiny import byte_tokenizer
from tests.support.tiny import CASES, VOCABULARY, build, token_ids

IDS = token_ids(8, 16)
BASES = BaseOptions(group_sizes=(16,))
FORM_NAMES = [name for name, form in FORMS.items() if name != DENSE_FORM and form.by_rows]
TIED = ("blocks", "embedding")
PARTS = {
    "llama_tied": TIED,
    "gpt2": TIED,
    "opt": TIED,
    "llama_untied": (*TIED, "head"),
    "phi": (*TIED, "head"),
}
SAME = 1e-5  # of the largest logit: sums of float32 in another order


def wide(case: str) -> PreTrainedModel:
    """Build a model in which groups of 16 divide everything."""
    with pytest.MonkeyPatch.context() as patch:
        config = copy.deepcopy(CASES[case])
        for name in ("intermediate_size", "n_inner", "ffn_dim"):
            if hasattr(config, name):
                setattr(config, name, 32)
        patch.setitem(CASES, case, config)
        return build(case)


@cache
def factored(case: str) -> lrbo.Factorization:
    model, include = wide(case), PARTS[case]
    calibration = lrbo.calibrate(model, IDS, include=include, progress=False)
    forms = FORM_NAMES if case == "llama_tied" else ["int4"]
    return lrbo.factorize(
        model, calibration, forms=forms, bases=BASES, include=include, progress=False
    )


def allocated(factorization: lrbo.Factorization, form: str) -> Allocation:
    """Give embedding and head a form, and leave the blocks dense."""
    options, costs = {}, {}
    for spec in factorization.layers.compressible:
        menu = Menu.of(spec, [form], bias=spec.has_bias, itemsize=4, group_sizes=(16,))
        option = DENSE
        if spec.block is None:
            section = menu.sections[0]
            option = section.family.at(int(section.levels[min(2, len(section.levels) - 1), -1]))
        options[spec.name], costs[spec.name] = option, menu.cost(menu.index(option))
    return Allocation(options, costs, Budget("bytes", 10**9))


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(IDS).logits
    return result


def assert_close(one: Tensor, other: Tensor, share: float = SAME) -> None:
    assert float((one - other).abs().max()) <= share * float(other.abs().max())


every_model = pytest.mark.parametrize(
    ("case", "form"),
    [*(("llama_tied", form) for form in FORM_NAMES), *((case, "int4") for case in PARTS)],
)


@pytest.mark.filterwarnings("ignore::lrbo.calibration.collect.CalibrationWarning")
@every_model
def test_a_table_is_stored_once_counted_once_and_loaded_tied(
    case: str, form: str, tmp_path: Path
) -> None:
    model, factorization = wide(case), factored(case)
    dense, allocation, tied = logits(model), allocated(factorization, form), is_tied(model)
    with factorization.compressed(model, allocation):
        assert is_tied(model) == tied
        trial = logits(model)
    assert torch.equal(logits(model), dense)
    assert not torch.equal(trial, dense)
    factorization.compress_(model, allocation)
    stored = logits(model)
    assert_close(stored, trial)
    factorization.save(tmp_path / "model", model, byte_tokenizer(), allocation)
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    counted = factorization.account(allocation)
    assert sum(tensor.nbytes for tensor in tensors.values()) == counted.model.bytes
    heads = [name for name in tensors if name.startswith("lm_head")]
    assert bool(heads) == (not tied)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert is_tied(loaded) == tied
    assert_close(logits(loaded), stored)
    assert torch.equal(logits(lrbo.load(tmp_path / "model")), logits(loaded))
    assert loaded.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape == (1, 19)


@pytest.mark.filterwarnings("ignore::lrbo.calibration.collect.CalibrationWarning")
@pytest.mark.parametrize("case", ["llama_tied", "llama_untied"])
def test_what_was_loaded_is_saved_copied_moved_and_merged(case: str, tmp_path: Path) -> None:
    model, factorization = wide(case), factored(case)
    allocation = allocated(factorization, "int4")
    factorization.compress_(model, allocation)
    factorization.save(tmp_path / "model", model, byte_tokenizer(), allocation)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected, size = logits(loaded), (tmp_path / "model" / WEIGHTS).stat().st_size
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).stat().st_size == pytest.approx(size, rel=0.01)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    again.tie_weights()  # which changes nothing
    for other in (again, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(logits(other), expected)
        assert is_tied(other) == is_tied(loaded)
    half = copy.deepcopy(loaded).to(torch.bfloat16)
    assert_close(logits(half).float(), expected, 0.1)
    twin = dense_twin(loaded)
    assert is_tied(twin) == is_tied(loaded)
    assert logits(twin).shape == expected.shape
    save_merged(tmp_path / "merged", model, byte_tokenizer())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged.get_input_embeddings()) is nn.Embedding
    assert is_tied(merged) == is_tied(loaded)
    assert_close(logits(merged), expected)


@pytest.mark.filterwarnings("ignore::lrbo.calibration.collect.CalibrationWarning")
def test_another_number_of_tokens_is_refused(tmp_path: Path) -> None:
    model, factorization = wide("llama_untied"), factored("llama_untied")
    allocation = allocated(factorization, "int4")
    factorization.compress_(model, allocation)
    factorization.save(tmp_path / "model", model, byte_tokenizer(), allocation)
    for one in (model, lrbo.load(tmp_path / "model")):
        before = logits(one)
        expected = r"resize_token_embeddings\(70\): .* compressed for its 64 tokens"
        with pytest.raises(ModelError, match=expected):
            one.resize_token_embeddings(70)
        assert one.resize_token_embeddings(VOCABULARY) is one.get_input_embeddings()
        assert torch.equal(logits(one), before)


@pytest.mark.filterwarnings("ignore::lrbo.calibration.collect.CalibrationWarning")
@pytest.mark.parametrize(
    ("part", "expected"), [("index", "is no order of the 64 rows"), ("ranks", "do not add up")]
)
def test_groups_that_are_damaged_are_refused_by_name(
    part: str, expected: str, tmp_path: Path
) -> None:
    model, factorization = wide("llama_tied"), factored("llama_tied")
    allocation = allocated(factorization, "frequency_groups")
    factorization.compress_(model, allocation)
    factorization.save(tmp_path / "model", model, byte_tokenizer(), allocation)
    file = tmp_path / "model" / WEIGHTS
    tensors = load_file(file)
    tensors[f"model.embed_tokens.{part}"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model\.embed_tokens\.{part} {expected}"):
        lrbo.load(tmp_path / "model")


def test_only_the_rows_that_are_looked_up_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, factorization = wide("llama_tied"), factored("llama_tied")
    factorization.compress_(model, allocated(factorization, "int4"))
    counts: list[int] = []

    def counted(packed: Tensor, bits: int) -> Tensor:
        counts.append(len(packed))
        return unpack(packed, bits)

    monkeypatch.setattr(based, "unpack", counted)
    table = model.get_input_embeddings()
    with torch.inference_mode():
        rows = table(torch.tensor([[5, 9]]))
    assert counts == [2]
    assert rows.shape == (1, 2, 16)
