"""What a model adds to its base: a folder that adds to it, an adapter, and dense weights."""

import copy
import json
import pickle
from itertools import cycle
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import lrbo
from lrbo.allocation.allocate import Allocation
from lrbo.checkpoints.export import WEIGHTS
from lrbo.checkpoints.lora import DeltaAdapter
from lrbo.checkpoints.merged import save_merged
from lrbo.errors import CheckpointError, ConfigError, ModelError
from lrbo.factorization.options import BaseOptions
from lrbo.layers.options import DENSE, Budget, Option
from lrbo.models.loading import tiny_model
from lrbo.models.model_map import map_model
from lrbo.models.tiny import byte_tokenizer
from lrbo.pipeline.delta import Difference
from lrbo.pipeline.search_space import menus_of
from tests.support import tiny
from tests.support.pairs import tuned, write

pytestmark = [
    # PEFT asks a model for what transformers deprecates,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # and warns where a tied table changed: the adapter has it for both of its places.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

IDS = tiny.token_ids(8, 32)
FORMS = ("delta_bands", "delta_int8", "delta")
BASES = BaseOptions(bands=((2, 4), (0, 1)))
OPTIONS = ("delta_bands 2 4 9", "delta_int8 5", "delta 3", "delta_bands 0 1 4", "delta 0", "dense")
CHANGED = ("_proj", "input_layernorm", "embed")


class Pair:
    """A model, its base on disk, and its deltas in memory."""

    def __init__(self, folder: Path, base: PreTrainedModel, *parts: str) -> None:
        write(folder, base)
        self.base = base.requires_grad_(False)
        self.ids = IDS % base.config.vocab_size
        self.model = tuned(base, *parts)
        self.calibration = lrbo.calibrate(self.tuned(), self.ids, progress=False)
        self.deltas = lrbo.factorize(
            self.tuned(),
            self.calibration,
            forms=FORMS,
            bases=BASES,
            base=base,
            progress=False,
        )

    def tuned(self) -> PreTrainedModel:
        return copy.deepcopy(self.model)

    def allocation(self) -> Allocation:
        """Give every unit another option, one of each in turn."""
        units, options = self.deltas.layers.compressible, cycle(OPTIONS)
        menus = menus_of(units, FORMS, self.deltas.method, torch.float32, options=BASES)
        chosen = {name: Option.parse(next(options)) for name in menus}
        indices = {name: menus[name].index(option) for name, option in chosen.items()}
        costs = {name: menus[name].cost(index) for name, index in indices.items()}
        assert all(menus[n].option(i) == chosen[n] for n, i in indices.items())
        return Allocation(chosen, costs, Budget("bytes", 10**9))

    def compressed(self) -> tuple[PreTrainedModel, Allocation]:
        model, allocation = self.tuned(), self.allocation()
        self.deltas.compress_(model, allocation)
        return model, allocation

    def save(self, folder: Path) -> PreTrainedModel:
        model, allocation = self.compressed()
        self.deltas.save(folder, model, byte_tokenizer(), allocation)
        return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair") / "base", tiny_model(), *CHANGED)


def outputs(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        said: Tensor = model(ids).logits.float()
    return said


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_the_weight_of_a_layer_is_that_of_the_base_and_the_low_rank(pair: Pair) -> None:
    """At rank 0 that of the base, to the bit; with more, nearer to the fine-tuned one."""
    model, allocation = pair.compressed()
    dense = pair.tuned()
    options = {o: name for name, o in allocation.options.items()}
    nothing = options[Option("delta", (0,))]
    base = pair.base.get_submodule(nothing).weight
    assert torch.equal(model.get_submodule(nothing).dense_weight(torch.float32), base)
    for form in ("delta_bands 2 4 9", "delta_int8 5", "delta 3"):
        name = options[Option.parse(form)]
        wanted, start = (each.get_submodule(name).weight.double() for each in (dense, pair.base))
        left = float((model.get_submodule(name).dense_weight() - wanted).norm())
        assert left < 0.9 * float((start - wanted).norm()), form


def test_a_folder_adds_to_the_base_and_holds_what_is_counted(pair: Pair, tmp_path: Path) -> None:
    model, allocation = pair.compressed()
    expected = outputs(model)
    with pair.deltas.compressed(pair.tuned(), allocation) as trial:
        assert difference(outputs(trial), expected) < 1e-4
    pair.deltas.save(tmp_path / "delta", model, byte_tokenizer(), allocation)
    stored = load_file(tmp_path / "delta" / WEIGHTS)
    counted = pair.deltas.account(allocation).model
    assert sum(tensor.nbytes for tensor in stored.values()) == counted.bytes
    norms = [n for n in stored if n.endswith("norm.weight")]
    assert sorted(norms) == [f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)]
    assert "model.embed_tokens.weight" in stored
    assert "model.norm.weight" not in stored
    config = json.loads((tmp_path / "delta/config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["parameters"] == counted.parameters
    assert config["quantization_config"]["base"]["path"] == pair.base.name_or_path
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert difference(outputs(again), expected) < 1e-6
    assert torch.equal(outputs(pickle.loads(pickle.dumps(again))), outputs(again))
    again.save_pretrained(tmp_path / "again")  # now with all that it does not share by layers
    assert difference(outputs(lrbo.load(tmp_path / "again")), expected) < 1e-6
    half = lrbo.load(tmp_path / "delta", dtype=torch.bfloat16)
    assert difference(outputs(half), expected) < 0.1
    assert again.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape == (1, 35)


@pytest.mark.parametrize("case", ["llama_tied", "llama_biased", "gpt2", "opt"])
def test_models_of_other_families_open_on_their_bases(case: str, tmp_path: Path) -> None:
    """With biases that were trained, weights by columns, and tables that are tied and shared."""
    own = Pair(tmp_path / "base", tiny.build(case), "bias", "proj", "fc", "c_attn")
    model = own.save(tmp_path / "delta")
    stored = load_file(tmp_path / "delta" / WEIGHTS)
    assert not any("embed" in name or "wte" in name or "lm_head" in name for name in stored)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert difference(outputs(again, own.ids), outputs(model, own.ids)) < 1e-5
    save_merged(tmp_path / "merged", model, byte_tokenizer())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert difference(outputs(merged, own.ids), outputs(model, own.ids)) < 1e-4


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("llama_tied", ("_proj", "norm", "embed")),
        ("gpt2", ("c_attn.weight", "c_proj.weight", "c_fc.weight", "ln_", "wte")),
    ],
)
def test_peft_opens_the_adapter_on_the_base_without_lrbo(
    case: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    """Norms and a tied table that changed, dense layers and ranks, all equal to the folder."""
    own = Pair(tmp_path / "base", tiny.build(case), *parts)
    model, allocation = own.compressed()
    expected = outputs(model, own.ids)
    found = own.deltas.difference
    assert found is not None
    adapter = DeltaAdapter.of(
        model, allocation.options, found.changed, found.base, by_columns=found.by_columns
    )
    adapter.save(tmp_path / "adapter", model, byte_tokenizer())
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == adapter.bytes
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    ranks = {n: o.rank for n, o in allocation.options.items() if o.rank and o != DENSE}
    assert config["rank_pattern"] == config["alpha_pattern"] == ranks
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert difference(outputs(adapted, own.ids), expected) < 1e-5


def test_merged_it_is_dense(pair: Pair, tmp_path: Path) -> None:
    model, _ = pair.compressed()
    save_merged(tmp_path / "merged", model, byte_tokenizer())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {type(part) for part in merged.modules() if hasattr(part, "in_features")} == {nn.Linear}
    assert difference(outputs(merged), outputs(model)) < 1e-4


@pytest.fixture
def folder(pair: Pair, tmp_path: Path) -> Path:
    pair.save(tmp_path / "delta")
    return tmp_path / "delta"


def test_another_base_or_none_is_refused(pair: Pair, folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", pair.tuned())
    with pytest.raises(CheckpointError, match=r"fingerprint \w+, and the delta is of one with"):
        lrbo.load(folder, base=other)
    with pytest.raises(CheckpointError, match=r"nowhere of the checkpoint is not there; put it"):
        lrbo.load(folder, base=tmp_path / "nowhere")
    moved = write(tmp_path / "moved", tiny_model())
    assert torch.equal(outputs(lrbo.load(folder, base=moved)), outputs(lrbo.load(folder)))
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.0.input_layernorm.weight"]

    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds [\d_]+ parameters, its config\.json states"):
        lrbo.load(folder)


def test_what_is_no_pair_is_refused_with_the_layers(pair: Pair) -> None:
    with torch.random.fork_rng(devices=[]):
        others = {case: tiny.build(case) for case in ("llama_untied", "gpt2", "llama_biased")}

    def factorize(base: PreTrainedModel, case: str = "llama_untied", **more: object) -> None:
        forms = more.pop("forms", "delta")
        lrbo.factorize(others[case], None, "svd", forms=forms, base=base, progress=False, **more)

    with pytest.raises(ModelError, match=r"base: it is of type 'gpt2', the model of type 'llama'"):
        factorize(others["gpt2"])
    with pytest.raises(ModelError, match=r"vocabulary has 258 tokens, that of the model 64") as err:
        factorize(pair.base)
    assert "q_proj.weight is [32, 32], that of the model [16, 16]" in str(err.value)
    with pytest.raises(ModelError, match=r"it lacks nothing of the model, and has model\.layers"):
        factorize(others["llama_biased"])
    with pytest.raises(ModelError, match="its weights are those of the model"):
        factorize(tiny.build("llama_untied"))
    with pytest.raises(ConfigError, match="pivoted need no base"):
        factorize(others["llama_biased"], forms=["pivoted", "delta"])
    with pytest.raises(ConfigError, match="delta need the model that this one was fine-tuned from"):
        lrbo.factorize(others["gpt2"], None, "svd", forms="delta", progress=False)


def test_what_an_adapter_cannot_hold_is_refused_by_name() -> None:
    """Biases that were trained or that a method adds, and settings that outputs depend on."""
    base = tiny.build("llama_biased")
    model = tuned(base, "layers.1.self_attn.q_proj", "down_proj.weight")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5000.0}
    model.config.use_cache = not model.config.use_cache
    layers = map_model(model)
    found = Difference.in_memory(model, base, layers)
    assert found.biases == ("model.layers.1.self_attn.q_proj",)
    options = {spec.name: Option("delta", (1,)) for spec in layers.compressible}
    with pytest.raises(ConfigError) as error:
        found.require_adapter([options], ["model.layers.0.mlp.up_proj"])
    added, changed, settings = error.value.problems
    assert "a bias that the method adds, as of model.layers.0.mlp.up_proj;" in added
    assert "the changed bias of model.layers.1.self_attn.q_proj;" in changed
    assert "rope_parameters=" in settings
    assert "use_cache" not in settings
