"""The map of a model equals what the running model does: inputs, shapes, biases, counts."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, OPTConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lrbo.checkpoints.modeling_low_rank import POINTWISE
from lrbo.errors import ModelError
from lrbo.models.families import FAMILIES, family_of, is_pointwise, writers_of
from lrbo.models.model_map import body_and_head, linear_bias, linear_weight, map_model
from lrbo.models.specs import LayerSpec
from tests.support import reference
from tests.support.tiny import (
    BLOCKS,
    CASES,
    HIDDEN,
    INNER,
    VOCABULARY,
    build,
    build_on_meta,
    token_ids,
)

SHIFT = 0.25
# Logits are compared to the bit: body and head run the same kernels on the same numbers.

LLAMA_KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    **dict.fromkeys(
        [
            "llama_untied",
            "llama_tied",
            "llama_biased",
            "mistral",
            "qwen2",
            "qwen3",
            "smollm3",
        ],
        LLAMA_KINDS,
    ),
    "gpt2": ["c_attn", "attn_c_proj", "c_fc", "mlp_c_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi": ["q_proj", "k_proj", "v_proj", "fc1", "dense", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
BIASED = {
    **{case: set() for case in KINDS},
    "llama_biased": set(LLAMA_KINDS),
    "qwen2": {"q_proj", "k_proj", "v_proj"},
    **{case: set(KINDS[case]) for case in ("gpt2", "opt", "gpt_neox", "phi")},
}
TIED = dict.fromkeys(["llama_tied", "qwen2", "smollm3", "gpt2", "opt"], "lm_head")

every_case = pytest.mark.parametrize("case", CASES)


def test_every_family_has_a_case() -> None:
    listed = {name for family in FAMILIES for name in family.model_types}
    assert {config.model_type for config in CASES.values()} == listed
    assert set(KINDS) == set(BIASED) == set(CASES)


def calls_of_layers(model: PreTrainedModel, names: list[str]) -> list[tuple[str, Tensor, Tensor]]:
    """Return (name, input, output) of each call, in the order of the calls."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    hooks = []
    for name in names:

        def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor, name=name) -> None:
            calls.append((name, inputs[0], output))

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        model(token_ids(2, 5))
    for hook in hooks:
        hook.remove()
    return calls


def linear_names(model: PreTrainedModel) -> list[str]:
    """Name every linear map inside a numbered block, whatever the family table says."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"\.\d+\.", name)
    ]


@every_case
def test_every_linear_layer_of_the_blocks_is_mapped_once(case: str) -> None:
    model = build(case)
    actual = map_model(model)
    names = [spec.name for spec in actual.compressible]
    assert sorted(names) == sorted(linear_names(model))
    assert len(names) == len(set(names)) == BLOCKS * len(KINDS[case])
    assert actual.blocks == BLOCKS
    assert actual.by_name == {spec.name: spec for spec in actual.layers}


@every_case
def test_kind_block_and_order(case: str) -> None:
    actual = map_model(build(case))
    expected = [(block, kind) for block in range(BLOCKS) for kind in KINDS[case]]
    assert [(spec.block, spec.kind) for spec in actual.compressible] == expected
    for spec in actual.compressible:
        assert f".{spec.block}." in spec.name


@every_case
def test_layers_of_a_site_read_the_identical_tensor_and_others_do_not(case: str) -> None:
    model = build(case)
    actual = map_model(model)
    calls = calls_of_layers(model, [spec.name for spec in actual.compressible])
    assert len(calls) == len(actual.compressible)
    inputs = {name: x for name, x, _ in calls}
    site_of = {spec.name: spec.site for spec in actual.compressible}
    for first in inputs:
        for second in inputs:
            # Every input is still referenced, so one address means one tensor.
            same = inputs[first].data_ptr() == inputs[second].data_ptr()
            assert same == (site_of[first] == site_of[second]), (first, second)
            if same:
                assert torch.equal(inputs[first], inputs[second])
    # A site is named after one of its layers, and sites come in the order of the forward pass.
    assert all(site_of[site] == site for site in site_of.values())
    assert list(actual.sites) == list(dict.fromkeys(site_of[name] for name, _, _ in calls))


@every_case
def test_shapes_and_biases_are_those_of_the_running_layers(case: str) -> None:
    model = build(case)
    actual = map_model(model)
    multiplying = [spec.name for spec in actual.layers if not spec.is_lookup]
    for name, x, y in calls_of_layers(model, multiplying):
        spec = actual.by_name[name]
        assert (spec.in_features, spec.out_features) == (x.shape[-1], y.shape[-1]), name
        module = model.get_submodule(name)
        at_zero = module(torch.zeros(spec.in_features))
        assert spec.has_bias == bool(at_zero.any()), name
        if spec.block is not None:
            assert spec.has_bias == (spec.kind in BIASED[case])
        assert spec.parameters == reference.count_parameters(module)
        # Weight and bias as the map hands them out are those of the layer, in (out, in).
        weight, bias = linear_weight(module), linear_bias(module)
        assert weight.shape == (spec.out_features, spec.in_features)
        by_hand = x @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(by_hand, y, rtol=1e-5, atol=1e-5)


@every_case
def test_parameters_count_tied_tensors_once(case: str) -> None:
    model = build(case)
    assert map_model(model).parameters == reference.count_parameters(model)


def test_a_tie_saves_exactly_the_head() -> None:
    tied, untied = map_model(build("llama_tied")), map_model(build("llama_untied"))
    assert untied.parameters - tied.parameters == VOCABULARY * HIDDEN


@every_case
def test_head_and_tie(case: str) -> None:
    model = build(case)
    ends = [spec for spec in map_model(model).layers if spec.block is None]
    embedding, head = ends[0], ends[-1]
    assert model.get_submodule(embedding.name) is model.get_input_embeddings()
    assert embedding.is_lookup
    assert embedding.multiplies == (case in TIED)
    for spec in ends:
        assert (spec.out_features, spec.in_features) == (VOCABULARY, HIDDEN)
    assert head.has_bias == (case == "phi")
    shared = model.get_submodule(embedding.name).weight
    if case in TIED:
        assert ends == [embedding]
        assert embedding.tied_to == TIED[case]
        name = embedding.tied_to
    else:
        assert ends == [embedding, head]
        assert embedding.tied_to is head.tied_to is None
        assert not head.is_lookup
        name = head.name
    assert model.get_submodule(name) is model.get_output_embeddings()
    assert (model.get_submodule(name).weight is shared) == (case in TIED)


@every_case
def test_head_of_body_gives_the_logits(case: str) -> None:
    model = build(case)
    body, head = body_and_head(model)
    ids = token_ids(2, 6)
    with torch.no_grad():
        logits = model(ids).logits
        head_logits = head(body(ids, use_cache=False).last_hidden_state)
    assert logits.shape == (2, 6, VOCABULARY)
    assert torch.equal(head_logits, logits)
    assert not torch.equal(logits[0, 0], logits[0, 1])  # so equality says something


@every_case
def test_the_map_needs_no_weights(case: str) -> None:
    model = build_on_meta(case)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert map_model(model) == map_model(build(case))


def test_grouped_queries_have_narrow_keys() -> None:
    actual = map_model(build("llama_untied")).by_name
    widths = {
        kind: actual[f"model.layers.1.self_attn.{kind}"].out_features for kind in LLAMA_KINDS[:3]
    }
    assert widths == {"q_proj": HIDDEN, "k_proj": HIDDEN // 2, "v_proj": HIDDEN // 2}
    assert actual["model.layers.0.mlp.down_proj"].in_features == INNER


def test_parameters_of_a_spec_are_weight_and_bias() -> None:
    plain = LayerSpec("a", "a", 0, 5, 3, False, "a")
    biased = LayerSpec("a", "a", 0, 5, 3, True, "a")
    assert (plain.parameters, biased.parameters) == (15, 20)


@every_case
def test_writers_add_to_the_residual_stream_as_they_are(case: str) -> None:
    """A shift of an answer is the shift of what the MLP's answer, or nothing, is added to."""
    model = build(case).double()
    family = family_of(model.config.model_type)
    block = f"{family.blocks}.0"
    attention, mlp = (f"{block}.{path}" for path in writers_of(model.config))

    def run(shifted: str | None = None) -> tuple[Tensor, Tensor]:
        outputs: dict[str, Tensor] = {}

        def shift(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            return output + SHIFT

        def keep(name: str) -> Callable[[nn.Module, object, object], None]:
            return lambda _, inputs, out: outputs.update(
                {name: out[0] if type(out) is tuple else out}
            )

        hooks = [] if shifted is None else [model.get_submodule(shifted)]
        handles = [module.register_forward_hook(shift) for module in hooks]
        handles += [model.get_submodule(n).register_forward_hook(keep(n)) for n in (block, mlp)]
        with torch.no_grad():
            model(token_ids(2, 5))
        for handle in handles:
            handle.remove()
        return outputs[block], outputs[block] - outputs[mlp].view_as(outputs[block])

    leaving, before = run()
    close = partial(torch.testing.assert_close, rtol=0.0, atol=1e-9)
    close(run(attention)[1] - before, torch.full_like(before, SHIFT))
    close(run(mlp)[0] - leaving, torch.full_like(leaving, SHIFT))
    for path in family.writers:
        assert (path,) in family.sites


@every_case
def test_pointwise_outputs_are_used_elementwise(case: str) -> None:
    """What the MLP's last layer reads depends, in each number, on one number of the answer."""
    model = build(case).double()
    family = family_of(model.config.model_type)
    block = f"{family.blocks}.0"
    last = model.get_submodule(f"{block}.{family.writers[1]}")
    read: list[Tensor] = []
    last.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach().clone()))

    def shift(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., 3] += 1.0
        return output

    with torch.no_grad():
        model(token_ids(2, 5))
        for path in family.pointwise:
            with model.get_submodule(f"{block}.{path}").register_forward_hook(shift):
                model(token_ids(2, 5))
            changed = (read[-1] != read[0]).view(10, INNER)
            assert changed[:, 3].all()
            assert int(changed.sum()) == 10
    assert {path for path in family.kinds if is_pointwise(f"{block}.{path}")} == set(
        family.pointwise
    )
    assert {path.rpartition(".")[2] for path in family.pointwise} <= POINTWISE


def test_a_stream_that_is_normalized_has_no_writers() -> None:
    assert writers_of(OPTConfig(do_layer_norm_before=False)) == ()


# --- what is refused ---------------------------------------------------------------------------


def test_unknown_family_lists_the_known_types() -> None:
    config = BertConfig(
        vocab_size=8,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=4,
        is_decoder=True,
    )
    with pytest.raises(ModelError) as caught:
        map_model(BertLMHeadModel(config))
    message = str(caught.value)
    assert "'bert'" in message
    assert "lrbo/models/families.py" in message
    listed = {name for family in FAMILIES for name in family.model_types}
    assert all(name in message for name in listed)


class QuantizedLinear(nn.Linear):
    """Looks like a linear layer, but its weight need not be what it multiplies with."""


class PackedLinear(nn.Module):
    """Holds its weight as an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.zeros(4, 4, dtype=torch.int8))


class Adapted(nn.Module):
    """Wraps a linear layer, as adapters do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("replace", "named"),
    [
        (lambda old: QuantizedLinear(old.in_features, old.out_features), ["mlp.up_proj"]),
        (lambda old: PackedLinear(), ["mlp.up_proj"]),
        (Adapted, ["'mlp.up_proj'", "mlp.up_proj.base_layer", "mlp.up_proj.lora"]),
    ],
    ids=["subclass", "packed", "adapted"],
)
def test_a_layer_that_is_not_plain_is_refused_by_name(
    replace: Callable[[nn.Linear], nn.Module], named: list[str]
) -> None:
    model = build("llama_untied")
    mlp = model.model.layers[1].mlp
    mlp.up_proj = replace(mlp.up_proj)
    with pytest.raises(ModelError) as caught:
        map_model(model)
    assert "model.layers.1 of LlamaForCausalLM" in str(caught.value)
    assert all(name in str(caught.value) for name in named)


@pytest.mark.parametrize(
    "extra",
    [nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv1d(2, 2, 3)],
    ids=lambda module: type(module).__name__,
)
def test_a_matrix_that_is_not_mapped_is_refused_by_name(extra: nn.Module) -> None:
    model = build("llama_untied")
    model.model.layers[1].self_attn.router = extra
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.router"):
        map_model(model)


def test_norms_and_other_vectors_are_no_matrices() -> None:
    model = build("llama_untied")
    model.model.layers[1].extra_norm = nn.LayerNorm(4)
    assert len(map_model(model).compressible) == BLOCKS * len(LLAMA_KINDS)
