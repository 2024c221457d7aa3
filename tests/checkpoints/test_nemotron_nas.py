"""Blocks that differ, in the layout of Nemotron-NAS: a plain reader gives the same outputs."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, dynamic_module_utils

from lrbo.checkpoints.nemotron_nas import NemotronNas, multiplier, unfit
from lrbo.errors import CheckpointError
from lrbo.layers.joint import ThinLinear
from lrbo.layers.low_rank import linear_of
from lrbo.models.tiny import byte_tokenizer
from tests.checkpoints.test_joint import CHOICES, logits, relative, stored
from tests.support.tiny import CASES, build, token_ids

TOLERANCE = 1e-5  # relative: sums in another order, with zeros between
HELD = ["llama_untied", "llama_tied", "llama_biased", "mistral"]


def neurons(mult: float, hidden: int) -> int:
    """Return the neurons of an MLP, as every reader of the layout has it."""
    own = int(2 * round(mult, 6) * hidden / 3)
    return own + (-own) % 256


def rotated(x: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    sides = [
        first * angles.cos() - second * angles.sin(),
        second * angles.cos() + first * angles.sin(),
    ]
    return torch.cat(sides, -1)


class Reader:
    """A model of what ``config.json`` and the tensors of a folder say, and of nothing else."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        self.tensors = load_file(folder / "model.safetensors")
        self.read = set[str]()

    def tensor(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name]

    def linear(self, x: Tensor, name: str, shape: tuple[int, int], *, bias: bool) -> Tensor:
        weight = self.tensor(f"{name}.weight")
        assert weight.shape == shape, name
        return functional.linear(x, weight, self.tensor(f"{name}.bias") if bias else None)

    def norm(self, x: Tensor, name: str) -> Tensor:
        size = (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        return x / size * self.tensor(f"{name}.weight")

    def attention(self, x: Tensor, path: str, group: int) -> Tensor:
        heads, hidden = self.config["num_attention_heads"], self.config["hidden_size"]
        size, bias = hidden // heads, self.config["attention_bias"]

        def of_heads(name: str, count: int) -> Tensor:
            rows = self.linear(x, f"{path}.{name}", (count * size, hidden), bias=bias)
            return rows.unflatten(-1, (count, size)).transpose(1, 2)

        theta = self.config["rope_theta"]
        queries = rotated(of_heads("q_proj", heads), theta)
        keys = rotated(of_heads("k_proj", heads // group), theta).repeat_interleave(group, 1)
        values = of_heads("v_proj", heads // group).repeat_interleave(group, 1)
        scores = queries @ keys.transpose(2, 3) / math.sqrt(size)
        ahead = torch.ones(scores.shape[2:]).triu(1).bool()
        mixed = scores.masked_fill(ahead, -torch.inf).softmax(-1) @ values
        flat = mixed.transpose(1, 2).flatten(2)
        return self.linear(flat, f"{path}.o_proj", (hidden, hidden), bias=bias)

    def mlp(self, x: Tensor, path: str, mult: float) -> Tensor:
        hidden, bias = self.config["hidden_size"], self.config["mlp_bias"]
        width = neurons(mult, hidden)
        gate = self.linear(x, f"{path}.gate_proj", (width, hidden), bias=bias)
        up = self.linear(x, f"{path}.up_proj", (width, hidden), bias=bias)
        inner = functional.silu(gate) * up
        return self.linear(inner, f"{path}.down_proj", (hidden, width), bias=bias)

    def logits(self, ids: Tensor) -> Tensor:
        embedding = self.tensor("model.embed_tokens.weight")
        x = embedding[ids]
        assert len(self.config["block_configs"]) == self.config["num_hidden_layers"]
        for index, block in enumerate(self.config["block_configs"]):
            path, (attention, ffn) = f"model.layers.{index}", (block["attention"], block["ffn"])
            assert not attention["replace_with_linear"]
            assert not ffn["replace_with_linear"]
            if not attention["no_op"]:
                normed = self.norm(x, f"{path}.input_layernorm")
                x = x + self.attention(normed, f"{path}.self_attn", attention["n_heads_in_group"])
            if not ffn["no_op"]:
                normed = self.norm(x, f"{path}.post_attention_layernorm")
                x = x + self.mlp(normed, f"{path}.mlp", ffn["ffn_mult"])
        x = self.norm(x, "model.norm")
        tied = self.config["tie_word_embeddings"]
        return x @ (embedding if tied else self.tensor("lm_head.weight")).T


@pytest.mark.parametrize("case", HELD)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_reader_of_the_layout_gives_the_same_outputs(
    case: str, choice: str, tmp_path: Path
) -> None:
    model, allocation = stored(case, choice)
    assert unfit(model.config) is None
    if case == "mistral" and "skip" in map(str, allocation.compressed.values()):
        with pytest.raises(CheckpointError, match=r"no parameter for the bias of \d layers"):
            NemotronNas.of(model)
        return
    before = logits(model)
    layout = NemotronNas.of(model)
    layout.save(tmp_path / "nas", model, byte_tokenizer())
    reader = Reader(tmp_path / "nas")
    assert relative(reader.logits(token_ids(2, 9)), before) <= TOLERANCE
    assert torch.equal(logits(model), before)
    assert reader.read == set(reader.tensors)  # nothing else is there
    assert layout.parameters == sum(tensor.numel() for tensor in reader.tensors.values())
    # The first block attends, without which vLLM cannot run it.
    blocks = reader.config["block_configs"]
    assert not blocks[0]["attention"]["no_op"]
    skips = [name for name, o in allocation.compressed.items() if str(o) == "skip"]
    attentions = sum(name.endswith("o_proj") for name in skips)
    kept = choice in ("first attention skipped", "all attention skipped")
    mlps = sum(name.endswith("down_proj") for name in skips)
    assert layout.no_ops == (attentions - kept, mlps)
    assert f"{attentions - kept} attentions and {mlps} MLPs are left out" in layout.summary
    if choice == "last block skipped, thin":
        assert len(blocks) == 1
        assert reader.config["num_hidden_layers"] == 1


@pytest.mark.parametrize("case", ["llama_untied", "llama_biased"])
def test_widths_of_several_multiples_stay_what_they_are(case: str, tmp_path: Path) -> None:
    """Each MLP has its own neurons, and those that fill up a multiple are zeros."""
    model = wide(case, 1024)
    widths = [512, 300]
    for block, width in zip(model.model.layers, widths, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            thin(block.mlp, name, width)
    before = logits(model)
    layout = NemotronNas.of(model)
    assert layout.widths == (512, 512)
    assert layout.zeros == 212
    assert "MLPs of 512 neurons, 212 of them zeros up to multiples of 256" in layout.summary
    layout.save(tmp_path / "nas", model, byte_tokenizer())
    reader = Reader(tmp_path / "nas")
    assert relative(reader.logits(token_ids(2, 9)), before) <= TOLERANCE
    up = reader.tensors["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(up[:300], model.model.layers[1].mlp.up_proj.weight)
    assert not up[300:].any()


def wide(case: str, width: int) -> PreTrainedModel:
    config = CASES[case].to_dict() | {"intermediate_size": width}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        kind = type(build(case))
        model: PreTrainedModel = kind(type(CASES[case]).from_dict(config)).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.1)
    return model.requires_grad_(False)


def thin(mlp: torch.nn.Module, name: str, width: int) -> None:
    layer = mlp.get_submodule(name)
    weight = layer.get_parameter("weight")
    own = weight[:, :width] if name == "down_proj" else weight[:width]
    bias = layer.bias
    if isinstance(bias, Tensor) and name != "down_proj":
        bias = bias[:width]
    mlp.set_submodule(name, linear_of(own.clone(), bias, ThinLinear))


@pytest.mark.parametrize("hidden", [24, 576, 2048, 4096, 5120, 8192, 16384])
def test_a_multiplier_stands_for_its_neurons(hidden: int) -> None:
    for width in range(256, 65536, 256):
        mult = multiplier(width, hidden)
        assert neurons(mult, hidden) == width
        assert neurons(json.loads(json.dumps(mult)), hidden) == width
        assert isinstance(mult, float)


def test_mlx_opens_it(tmp_path: Path) -> None:
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    for case, choice in (("llama_tied", "two widths"), ("llama_biased", "first MLP skipped")):
        model, _ = stored(case, choice)
        NemotronNas.of(model).save(tmp_path / case, model, byte_tokenizer())
        opened, _ = utils.load_model(tmp_path / case)
        said = torch.tensor(opened(mx.array(token_ids(2, 9).tolist())).tolist())
        assert relative(said, logits(model)) <= TOLERANCE


def test_transformers_reads_the_configuration_with_the_code_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model, _ = stored("llama_untied", "first MLP skipped")
    NemotronNas.of(model).save(tmp_path / "nas", model, byte_tokenizer())
    config = AutoConfig.from_pretrained(tmp_path / "nas", trust_remote_code=True)
    first, second = config.block_configs[:2]
    assert first.ffn.no_op
    assert first.ffn.ffn_mult is None
    assert not second.ffn.no_op
    assert second.attention.n_heads_in_group == 2
    assert not hasattr(second.ffn, "intermediate_size")
    assert config.model_type == "nemotron-nas"
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text("utf-8"))
    own = json.loads((tmp_path / "nas" / "config.json").read_text("utf-8"))
    assert again["block_configs"] == own["block_configs"]


@pytest.mark.parametrize(
    ("case", "changes", "reason"),
    [
        ("qwen3", {}, "it holds models of llama and mistral, not of qwen3"),
        ("llama_tied", {"hidden_act": "gelu"}, "its MLPs have silu, not gelu"),
        ("mistral", {"sliding_window": 64}, "not sliding_window=64"),
        ("llama_tied", {"head_dim": 8}, "its heads are"),
    ],
)
def test_what_the_layout_cannot_hold_is_said(
    case: str, changes: dict[str, Any], reason: str
) -> None:
    config: PretrainedConfig = type(CASES[case]).from_dict(CASES[case].to_dict() | changes)
    assert reason in str(unfit(config))
