"""Layers that do nothing, as blocks that were added to a model and not trained yet have them."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import lrbo
from lrbo.allocation.allocate import Allocation
from lrbo.allocation.apply import on_device
from lrbo.calibration.collect import CalibrationSettings
from lrbo.factorization.registry import METHODS
from lrbo.layers.options import DENSE, Budget, Option
from lrbo.models.model_map import map_model
from lrbo.models.tiny import byte_tokenizer, tiny_model
from lrbo.pipeline.in_memory import NoEffectWarning, calibrate, factorize
from lrbo.refit.sequential import RefitSettings, output_metric, refit
from tests.support.commands import TINY, lrbo_command
from tests.support.tiny import build, token_ids

IDS = token_ids(8, 24)
SETTINGS = CalibrationSettings(groups=3, gradient_share=1.0)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def zero_outputs(block: torch.nn.Module) -> None:
    block.self_attn.o_proj.weight.zero_()
    block.mlp.down_proj.weight.zero_()


def zero_values(block: torch.nn.Module) -> None:
    block.self_attn.v_proj.weight.zero_()
    block.mlp.up_proj.weight.zero_()


def dead_attention(block: torch.nn.Module) -> None:
    block.input_layernorm.weight.zero_()


def dead_mlp(block: torch.nn.Module) -> None:
    block.post_attention_layernorm.weight.zero_()


def zero_queries(block: torch.nn.Module) -> None:
    block.self_attn.q_proj.weight.zero_()


def faint(block: torch.nn.Module) -> None:
    """So small that squares of gradients are lost in float32."""
    block.self_attn.o_proj.weight.mul_(1e-30)
    block.mlp.down_proj.weight.mul_(1e-30)


# What is done to the second block, and which of its layers do nothing then.
IDLE: dict[Callable[[torch.nn.Module], None], tuple[str, ...]] = {
    zero_outputs: (*ATTENTION, *MLP),
    zero_values: (*ATTENTION, *MLP),
    dead_attention: ATTENTION,
    dead_mlp: MLP,
    zero_queries: ("q_proj", "k_proj"),
    faint: ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
}


def changed(change: Callable[[torch.nn.Module], None]) -> PreTrainedModel:
    model = build("llama_untied")
    with torch.no_grad():
        change(model.model.layers[1])
    return model


def deciding(options: dict[str, Option]) -> Allocation:
    """Return an allocation of which nobody asks what it costs."""
    return Allocation(options, {}, Budget("parameters", 0))


@pytest.mark.parametrize("change", IDLE, ids=lambda change: change.__name__)
def test_every_method_takes_them_says_so_and_any_rank_costs_nothing(
    change: Callable[[torch.nn.Module], None],
) -> None:
    model, kinds = changed(change), IDLE[change]
    calibration = calibrate(model, IDS, list(METHODS), settings=SETTINGS, progress=False)
    dense = lrbo.score(model, IDS).mean
    for method in METHODS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            factorization = factorize(model, calibration, method, progress=False)
        (message,) = [str(w.message) for w in caught if w.category is NoEffectWarning]
        assert message.startswith(f"{len(kinds)} of 14 layers cost nothing at any rank")
        assert message.endswith(": " + ", ".join(f"{kind} of 1" for kind in kinds))
        idle = {
            s.name for s in factorization.layers.compressible if s.block == 1 and s.kind in kinds
        }
        for name, factors in factorization.factors.items():
            assert (float(factors.loss.max()) == 0.0) == (name in idle), (method, name)
        options = {
            s.name: Option("factored", (1,)) if s.name in idle else DENSE
            for s in factorization.layers.compressible
        }
        with factorization.compressed(model, deciding(options)):
            assert lrbo.score(model, IDS).mean == pytest.approx(dense, abs=1e-6), method
        for allocation in (factorization.uniform(0.6), factorization.least_loss(0.6)):
            assert allocation.cost.parameters <= allocation.budget.limit


def test_all_layers_may_do_nothing() -> None:
    model = build("llama_untied")
    with torch.no_grad():
        for block in model.model.layers:
            zero_outputs(block)
    calibration = calibrate(model, IDS, settings=SETTINGS, progress=False)
    with pytest.warns(NoEffectWarning, match=r"^14 of 14 layers .*: q_proj of 0, 1, k_proj of 0"):
        factorization = factorize(model, calibration, progress=False)
    with factorization.compressed(model, factorization.least_loss(0.3)):
        small = lrbo.score(model, IDS).mean
    assert small == pytest.approx(lrbo.score(model, IDS).mean, abs=1e-6)


def test_a_model_without_such_layers_is_not_warned_of() -> None:
    model = build("llama_untied")
    calibration = calibrate(model, IDS, settings=SETTINGS, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factorize(model, calibration, progress=False)


@pytest.mark.parametrize("held_back", [0.125, 0.0])
@pytest.mark.parametrize("change", [zero_outputs, dead_mlp], ids=lambda change: change.__name__)
def test_a_refit_does_not_make_them_worse(
    change: Callable[[torch.nn.Module], None], held_back: float
) -> None:
    """Errors that their gradients weigh are all 0: then plain squares are solved for."""
    model = changed(change)
    layers = map_model(model)
    calibration = calibrate(model, IDS, settings=SETTINGS, progress=False)
    with pytest.warns(NoEffectWarning):
        factorization = factorize(model, calibration, progress=False)
    allocation = deciding({s.name: Option("factored", (4,)) for s in layers.compressible})
    metric = output_metric(layers, calibration, 0.75)
    settings = RefitSettings(held_back=held_back)
    result = refit(model, layers, allocation, factorization.factors, IDS, settings, metric=metric)
    for spec in layers.compressible:
        new = result.factors[spec.name]
        assert torch.isfinite(new.left).all()
        assert torch.isfinite(new.right).all()
        product = new.left @ new.right
        assert bool(product.any()) or not bool(model.get_submodule(spec.name).weight.any())
    prefixes = on_device(model, result.factors, allocation.ranks)
    with factorization.compressed(model, allocation):
        before = lrbo.score(model, IDS).mean
    with lrbo.allocation.apply.compressed(model, allocation, prefixes):
        assert lrbo.score(model, IDS).mean <= before + 0.05


def test_a_whole_search_takes_a_model_with_an_idle_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    with torch.no_grad():
        zero_outputs(model.model.layers[1])
    model.save_pretrained("grown")
    byte_tokenizer().save_pretrained("grown")
    own_model = ["model=hf", "model.path=grown", "model.dtype=float32", "model.device=cpu"]
    fewer = ["search.trials=3", "search.initial=2", "study=grown"]
    default = ["method=loss_aware", "space=weights"]
    ran = lrbo_command("search", *TINY, *own_model, *fewer, *default)
    assert ran.status == 0, ran.err
    assert " ".join(ran.err.split()).count("7 of 14 layers cost nothing at any rank") == 1
    ran = lrbo_command("compress", "study=grown", "out=out")
    assert ran.status == 0, ran.err
    assert torch.isfinite(lrbo.load("out")(IDS).logits).all()
