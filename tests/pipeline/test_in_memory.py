"""Steps on a model in memory: what the commands do, and refusals that say how to mend it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import utils
from torch.nn.utils import prune
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

import lrbo
from lrbo.allocation.allocate import Allocation
from lrbo.calibration.collect import Calibration, CalibrationSettings
from lrbo.calibration.statistics import Statistic
from lrbo.checkpoints.merged import save_merged
from lrbo.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    StatisticsError,
)
from lrbo.factorization.registry import METHODS
from lrbo.layers.options import DENSE, MEASURES, Budget, Measure
from lrbo.models.loading import load_model
from lrbo.models.model_map import map_model
from lrbo.models.parameters import first_other, weight_samples
from lrbo.models.sources import ModelSource
from lrbo.models.tiny import byte_tokenizer
from lrbo.pipeline import in_memory, memory_checks
from lrbo.pipeline.in_memory import Factorization, calibrate, factorize
from tests.pipeline.test_prepare import StepReporter, prepared
from tests.support.tiny import CASES, build, token_ids

CPU, FLOAT32 = torch.device("cpu"), torch.float32
IDS = token_ids(7, 12)
SETTINGS = CalibrationSettings(gradient_share=1.0, groups=3)


def tiny() -> PreTrainedModel:
    return load_model(ModelSource("tiny", "0"), dtype=FLOAT32, device=CPU)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(tiny(), IDS, list(METHODS), settings=SETTINGS, progress=False)


@pytest.fixture(scope="module")
def factorization(calibration: Calibration) -> Factorization:
    return factorize(tiny(), calibration, progress=False)


def same(one: Factorization, other: dict) -> bool:
    assert one.factors.keys() == other.keys()
    return all(
        torch.equal(factors.left, other[name].left)
        and torch.equal(factors.right, other[name].right)
        for name, factors in one.factors.items()
    )


@pytest.mark.parametrize("method", ["loss_aware", "bolaco", "svd"])
def test_the_factors_are_those_of_the_commands(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path))
    method_calibration = calibrate(tiny(), IDS, method, settings=SETTINGS, progress=False)
    mine = factorize(tiny(), method_calibration, method, progress=False)
    how = METHODS[method]
    preparation = prepared(method=how, needs=in_memory.curve_needs(how), windows=IDS)
    assert same(mine, preparation.factors("digest", FLOAT32, CPU, StepReporter(), tiny()))


def test_one_calibration_serves_all_methods_and_each_gives_the_same_alone(
    calibration: Calibration,
) -> None:
    alone = calibrate(tiny(), IDS, "asvd", curves=False, settings=SETTINGS, progress=False)
    assert set(next(iter(alone.statistics.values()))) == {Statistic.INPUT_MAGNITUDE}
    shared = factorize(tiny(), calibration, "asvd", progress=False)
    assert same(shared, dict(factorize(tiny(), alone, "asvd", progress=False).factors))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("forms", ["pivoted", "factored", ("factored", "pivoted")])
def test_from_a_dense_model_to_a_checkpoint(
    forms: str | tuple[str, ...], measure: Measure, calibration: Calibration, tmp_path: Path
) -> None:
    model, dense = tiny(), tiny()
    factors = factorize(model, calibration, forms=forms, progress=False)
    allocation = factors.least_loss(0.8, measure=measure)
    layers = factors.layers.compressible
    units = {
        "parameters": sum(s.parameters for s in layers),
        "bytes": sum(s.parameters * 4 for s in layers),
        "macs": sum(s.out_features * s.in_features for s in layers),
    }
    assert allocation.budget == Budget(measure, units[measure] * 8 // 10)
    assert allocation.cost.of(measure) <= allocation.budget.limit
    assert {option.form for option in allocation.compressed.values()} <= set(factors.forms)
    before = lrbo.score(model, IDS).value
    with factors.compressed(model, allocation) as small:
        within = lrbo.score(small, IDS).value
    assert lrbo.score(model, IDS).value == before
    assert within != before
    factors.compress_(model, allocation)
    assert lrbo.score(model, IDS).value == pytest.approx(within, rel=1e-4)
    held = factors.save(tmp_path / "out", model, byte_tokenizer(), allocation)
    counted = factors.account(allocation)
    assert held == counted.model.parameters == sum(p.numel() for p in model.parameters())
    assert counted.model.of(measure) < counted.model_dense.of(measure)
    assert counted.model_dense.parameters == map_model(dense).parameters
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}.values()
    assert counted.model.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert lrbo.load(str(tmp_path / "out"))(IDS).logits == pytest.approx(model(IDS).logits)


def test_the_least_loss_is_predicted_to_be_below_the_uniform_one(
    factorization: Factorization,
) -> None:
    def predicted(allocation: Allocation) -> float:
        return sum(
            float(factorization.factors[name].loss[option.level[0]])
            for name, option in allocation.compressed.items()
        )

    least, uniform = factorization.least_loss(0.6), factorization.uniform(0.6)
    assert predicted(least) < predicted(uniform)
    pinned = factorization.layers.compressible[0].name
    assert factorization.least_loss(0.6, dense=[pinned]).options[pinned] == DENSE
    multiples = factorization.uniform(0.6, rank_multiple=4).compressed.values()
    assert {option.level[0] % 4 for option in multiples} == {0}
    with pytest.raises(BudgetError, match="raise keep_ratio"):
        factorization.uniform(0.01)


def test_gradients_of_parameters_and_other_integers_change_nothing(
    calibration: Calibration,
) -> None:
    model = tiny().requires_grad_(True)
    second = calibrate(model, IDS.int(), list(METHODS), settings=SETTINGS, progress=False)
    for owner, statistics in calibration.statistics.items():
        for statistic, value in statistics.items():
            assert torch.equal(value, second.statistics[owner][statistic])


def test_a_model_in_half_precision_runs_factors_in_its_own(calibration: Calibration) -> None:
    model = load_model(ModelSource("tiny", "0"), dtype=torch.bfloat16, device=CPU)
    factors = factorize(model, calibration, progress=False)
    allocation = factors.uniform(0.5)
    factors.compress_(model, allocation)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert lrbo.score(model, IDS).value > 1


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS.flatten(), r"shape \(84,\).*expected whole numbers \(windows, tokens\)"),
        (IDS[:0], r"shape \(0, 12\)"),
        (IDS.float(), "torch.float32"),
        (IDS + 250, r"ids: the id 313 is beyond the vocabulary of the model, 0\.\.257; give what"),
        (IDS - 10, "the id -7 is below 0, expected tokens; give .* without padding"),
        (token_ids(1, 600), "ids: windows of 600 tokens, but the model has 512 positions"),
    ],
)
def test_ids_that_are_no_windows_of_the_model_are_refused(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        calibrate(tiny(), ids, progress=False)
    with pytest.raises(DataError, match=message):
        lrbo.score(tiny(), ids)


@pytest.mark.parametrize("put", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_a_layer_are_not_lost_in_silence(put: str) -> None:
    model = tiny()
    factors = factorize(model, method="svd", progress=False)
    allocation = factors.uniform(0.8)
    name = next(iter(allocation.compressed))
    hook = getattr(model.get_submodule(name), put)(lambda *_: None)
    for step in (factors.compress_, factors.compressed):
        with pytest.raises(ModelError, match=rf"^{name} of .* has forward hooks"):
            step(model, allocation)
    hook.remove()
    factors.compress_(model, allocation)


def test_what_cannot_be_written_beside_the_weights_is_said_before_them(tmp_path: Path) -> None:
    """It was raised by transformers, after the weights were written."""
    with pytest.raises(CheckpointError, match="tokenizer of type NoneType: expected that of the"):
        save_merged(tmp_path / "out", tiny(), None)
    model = tiny()
    factors = factorize(model, method="svd", progress=False)
    model.generation_config.temperature = 0.5  # of sampling, which it does not do
    for write in (
        lambda: factors.save(tmp_path / "out", model, byte_tokenizer(), factors.uniform(0.8)),
        lambda: save_merged(tmp_path / "out", model, byte_tokenizer()),
    ):
        with pytest.raises(CheckpointError, match=r"(?s)correct model\.gener.*temperature"):
            write()


def test_what_is_no_tensor_and_no_model_is_named() -> None:
    for ids in (IDS.tolist(), {"input_ids": IDS}, "a text"):
        with pytest.raises(DataError, match=f"ids of type {type(ids).__name__}: .*input_ids"):
            memory_checks.check_ids(ids, tiny())
    with pytest.raises(ModelError, match="model of type str: expected a model"):
        memory_checks.check_model("my-model")


def test_a_window_of_one_token_predicts_nothing() -> None:
    with pytest.raises(DataError, match=r"shape \(7, 1\)"):
        lrbo.score(tiny(), IDS[:, :1])


def test_shares_multiples_and_names_that_mean_nothing_are_refused(
    factorization: Factorization,
) -> None:
    for budget in (factorization.uniform, factorization.least_loss):
        for ratio in (80, 0, -0.5, float("nan")):
            with pytest.raises(BudgetError, match=r"up to 1; 0\.8 keeps"):
                budget(ratio)
        with pytest.raises(BudgetError, match="rank_multiple=0: expected at least 1"):
            budget(0.8, rank_multiple=0)
    for dense in (["q_proj"], "q_proj"):
        with pytest.raises(ModelError, match=r"dense=\['q_proj'\].*model.layers.0.self_attn"):
            factorization.least_loss(0.8, dense=dense)


def test_only_the_dense_model_that_was_factored_is_compressed(
    factorization: Factorization,
) -> None:
    allocation, other = factorization.uniform(0.5), build("llama_tied")
    before = [type(module) for module in other.modules()]
    for step in (factorization.compressed, factorization.compress_):
        with pytest.raises(ModelError, match=r"self_attn.q_proj is no dense layer of shape"):
            step(other, allocation)
    assert [type(module) for module in other.modules()] == before
    model = tiny()
    factorization.compress_(model, allocation)
    with pytest.raises(ModelError, match="give the dense model that was factored"):
        factorization.compress_(model, allocation)
    for call in (lambda: calibrate(model, IDS), lambda: factorize(model, None, "svd")):
        with pytest.raises(ModelError, match="is compressed already"):
            call()


def changed(model: PreTrainedModel, name: str) -> PreTrainedModel:
    with torch.no_grad():
        model.get_parameter(name).mul_(1.01)
    return model


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_the_calibration_of_other_weights_is_refused(name: str, calibration: Calibration) -> None:
    with pytest.raises(ModelError, match=rf"^{name} of .*that was calibrated.*lrbo\.calibrate\("):
        factorize(changed(tiny(), name), calibration, progress=False)


def test_the_factors_of_other_weights_are_refused(factorization: Factorization) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    model, allocation = changed(tiny(), name), factorization.uniform(0.5)
    before = lrbo.score(model, IDS)
    for step in (factorization.compressed, factorization.compress_):
        with pytest.raises(ModelError, match=rf"^{name} of .*that was factored"):
            step(model, allocation)
    assert lrbo.score(model, IDS) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_the_same_in_another_dtype(dtype: torch.dtype) -> None:
    """Also numbers below the least normal one, in either direction."""
    model, rounded = tiny(), tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-5)
        rounded.lm_head.weight.mul_(1e-5)
    rounded.to(dtype)
    assert first_other(weight_samples(model), rounded) is None
    assert first_other(weight_samples(rounded), model) is None
    changed(rounded, "model.norm.weight")
    assert first_other(weight_samples(model), rounded) == "model.norm.weight"


def test_what_a_notebook_shows_of_a_step_are_words(
    calibration: Calibration, factorization: Factorization
) -> None:
    assert repr(factorization) == "<14 layers factored by loss_aware, pivoted>"
    assert "output_gradient" in repr(calibration)
    assert len(repr(calibration)) < 200


def test_gradients_are_there_where_a_program_switched_them_off(calibration: Calibration) -> None:
    model = tiny()
    with torch.inference_mode():
        second = calibrate(model, IDS.clone(), list(METHODS), settings=SETTINGS, progress=False)
    assert calibration.statistics.keys() == second.statistics.keys()
    assert same(
        factorize(tiny(), second, progress=False), dict(factorize(tiny(), calibration).factors)
    )


def test_models_that_cannot_be_mapped_are_refused() -> None:
    bloom = build("gpt2")
    bloom.config.model_type = "bloom"
    for step in (lambda: calibrate(bloom, IDS), lambda: factorize(bloom)):
        with pytest.raises(ModelError, match=r"'bloom'.*gpt2"):
            step()


def test_an_unknown_method_names_those_there_are() -> None:
    for step in (lambda: calibrate(tiny(), IDS, "swd"), lambda: factorize(tiny(), None, "swd")):
        with pytest.raises(ConfigError, match="'swd' is unknown; known: svd, fwsvd"):
            step()


def test_forms_that_mean_nothing_are_refused() -> None:
    for forms, message in (
        ("banded", "form 'banded' is unknown; known: dense, factored, pivoted"),
        (["pivoted", "banded"], "form 'banded' is unknown"),
        ("dense", "forms='dense': expected one beside dense"),
        ([], r"forms=\[\]: expected one beside dense"),
        (["pivoted", "pivoted"], r"forms=\['pivoted', 'pivoted'\]: expected each once"),
    ):
        with pytest.raises(ConfigError, match=message):
            factorize(tiny(), None, "svd", forms=forms, progress=False)


def test_what_calibration_lacks_is_named_with_the_call_that_gathers_it() -> None:
    asvd_calibration = calibrate(tiny(), IDS, "asvd", curves=False, progress=False)
    with pytest.raises(StatisticsError) as caught:
        factorize(tiny(), asvd_calibration, "svd_llm", progress=False)
    assert "'svd_llm' needs the statistics covariance, mean" in str(caught.value)
    assert "the calibration has magnitude" in str(caught.value)
    assert "lrbo.calibrate(model, ids, 'svd_llm')" in str(caught.value)
    with pytest.raises(StatisticsError, match="has none; gather"):
        factorize(tiny(), None, progress=False)
    plain = factorize(tiny(), None, "svd", progress=False)
    assert plain.uniform(0.5).cost.parameters > 0
    with pytest.raises(StatisticsError, match="curves=True"):
        plain.least_loss(0.5)


def test_the_calibration_of_another_model_is_refused_whichever_layer_it_lacks() -> None:
    """Before any layer is factored, and although the first one may fit."""
    calibration = calibrate(build("llama_untied"), IDS, curves=False, progress=False)
    deeper = LlamaForCausalLM(
        LlamaConfig(**{**CASES["llama_untied"].to_dict(), "num_hidden_layers": 3})
    )
    with pytest.raises(
        StatisticsError, match=r"^model.layers.2.self_attn.q_proj: .* has none; gat"
    ):
        factorize(deeper, calibration, progress=False)
    wider = LlamaForCausalLM(
        LlamaConfig(**{**CASES["llama_untied"].to_dict(), "intermediate_size": 28})
    )
    message = (
        r"^model.layers.0.mlp.gate_proj: .*output_gradient of shape \(24, 24\), expected "
        r"\(28, 28\): it is of another model.*lrbo.calibrate\(model, ids, 'loss_aware'\)"
    )
    with pytest.raises(StatisticsError, match=message):
        factorize(wider, calibration, progress=False)


def test_progress_is_shown_unless_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    factorize(tiny(), calibrate(tiny(), IDS, "asvd", curves=False), "asvd")
    output = capsys.readouterr()
    assert "Calibration: 2 blocks" in output.err
    assert "Factorization: 14 layers" in output.err
    factorize(
        tiny(), calibrate(tiny(), IDS, "asvd", curves=False, progress=False), "asvd", progress=False
    )
    assert capsys.readouterr() == ("", "")


# --- models in memory that are not what their configuration says --------------------------------


def adapted(model: LlamaForCausalLM, peft: Any) -> PreTrainedModel:
    wanted = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(model, wanted)
    return model


def with_table(model: LlamaForCausalLM, peft: Any) -> PreTrainedModel:
    wanted = peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    peft.get_peft_model(model, wanted)
    return model


def shorter(model: LlamaForCausalLM, _: Any) -> PreTrainedModel:
    del model.model.layers[1]
    return model


def shared(model: LlamaForCausalLM, _: Any) -> PreTrainedModel:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def headless(model: LlamaForCausalLM, _: Any) -> Any:
    return LlamaForSequenceClassification(model.config)


def damaged(model: LlamaForCausalLM, _: Any) -> PreTrainedModel:
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    return model


def offloaded(model: LlamaForCausalLM, _: Any) -> PreTrainedModel:
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.to("meta"))
    return model


def in_sequence(model: LlamaForCausalLM, _: Any) -> PreTrainedModel:
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    return model


def of_another_activation(model: LlamaForCausalLM, _: Any) -> PreTrainedModel:
    model.config.hidden_act = "nope"
    return model


def of_another_class(model: LlamaForCausalLM, _: Any) -> PreTrainedModel:
    class Own(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig, extra: int) -> None:
            super().__init__(config)

    return Own(model.config, 3)


def quantized(model: LlamaForCausalLM, _: Any) -> PreTrainedModel:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    return model


def without_weight(model: LlamaForCausalLM, _: Any) -> PreTrainedModel:
    model.model.layers[0].mlp.up_proj.weight = None
    return model


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks it
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adapted, "head of type Linear, expected a linear one.*without adapters"),
        (with_table, r"added model\.embed_tokens\..* Merge adapters with merge_and_unload"),
        (shorter, r"missing or shared model\.layers\.1\..* and 8 more, added nothing"),
        (shared, r"missing or shared model\.layers\.1\.mlp\.up_proj\.weight, added nothing"),
        (headless, "LlamaForSequenceClassification has no head"),
        (damaged, r"1 of 32 numbers of model\.norm\.weight are not finite"),
        (offloaded, r"1 parameters of .* are not in memory \(model\.norm\.weight first\)"),
        (in_sequence, r"has no ModuleList of blocks at 'model\.layers'"),
        (of_another_activation, r"configuration, .*correct model\.config.*KeyError: 'nope'"),
        (of_another_class, r"Own cannot be made of its configuration.*argument: 'extra'"),
        (quantized, r"layers\.0\.mlp\.up_proj\.weight of .* is torch\.float8_e4m3fn, expected"),
        (without_weight, r"missing \['mlp\.up_proj'\]"),
    ],
)
def test_a_model_that_could_not_be_written_is_refused_before_any_work(
    change: Any, message: str
) -> None:
    peft = pytest.importorskip("peft")
    model = change(tiny(), peft).eval()
    for step in (lambda: calibrate(model, token_ids(2, 8)), lambda: factorize(model, method="svd")):
        with pytest.raises(ModelError, match=f"(?s){message}"):
            step()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks it
def test_a_model_of_peft_is_told_from_others() -> None:
    peft = pytest.importorskip("peft")
    wanted = peft.LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(ModelError, match=r"PeftModel.*of transformers.*merge_and_unload\(\)"):
        memory_checks.check_model(peft.get_peft_model(tiny(), wanted))
    with pytest.raises(ModelError, match=r"of type Linear.*lrbo\.load give$"):
        memory_checks.check_model(torch.nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("layer", ["model.layers.1.mlp.up_proj", "lm_head", "model.embed_tokens"])
@pytest.mark.parametrize(
    ("compute", "mend"),
    [
        (lambda module: prune.l1_unstructured(module, "weight", amount=0.3), "prune.remove"),
        (utils.weight_norm, "remove_weight_norm"),
        (utils.spectral_norm, "remove_spectral_norm"),
        (utils.parametrizations.weight_norm, "parametrize.remove_parametrizations"),
        (utils.parametrizations.orthogonal, "parametrize.remove_parametrizations"),
    ],
)
def test_weights_that_are_computed_are_refused_with_what_makes_them_plain(
    compute: Any, mend: str, layer: str
) -> None:
    """The call that the message names is made, and the model is then taken."""
    model = tiny()
    compute(model.get_submodule(layer))
    for step in (lambda: calibrate(model, IDS), lambda: factorize(model, method="svd")):
        with pytest.raises(
            ModelError, match=rf"^{layer}\.weight of .* is computed before"
        ) as caught:
            step()
    call = str(caught.value).rpartition("make it one with ")[2].removesuffix(".")
    assert f"torch.nn.utils.{mend}(" in call
    exec(call, {"torch": torch, "model": model})
    assert factorize(model, method="svd", progress=False).factors


def test_what_is_no_causal_language_model_in_memory_is_not_scored() -> None:
    model = tiny()
    for other in (model.model, LlamaForSequenceClassification(model.config)):
        with pytest.raises(ModelError, match=rf"{type(other).__name__} has no head, expected"):
            lrbo.score(other, IDS)
    with pytest.raises(ModelError, match=r"are not in memory \(model\.norm\.weight first\)"):
        lrbo.score(offloaded(tiny(), None), IDS)
    other = build("gpt2")
    other.config.model_type = "gemma2"  # whose logits are not what its head gives
    with pytest.raises(ModelError, match="'gemma2' is not mapped"):
        lrbo.score(other, IDS)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_written_as_it_is_in_memory(tied: bool, tmp_path: Path) -> None:
    model = tiny()
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = not tied
    factors = factorize(model, method="svd", progress=False)
    assert factors.layers.parameters == (26_848 if tied else 35_104)
    allocation = factors.uniform(0.7)
    factors.compress_(model, allocation)
    factors.save(tmp_path / "out", model, byte_tokenizer(), allocation)
    opened = lrbo.load(tmp_path / "out")
    ids = token_ids(2, 8)
    torch.testing.assert_close(opened(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert opened.config.tie_word_embeddings is tied


def test_parameters_that_share_their_numbers_are_written_apart(tmp_path: Path) -> None:
    model = tiny()
    model.lm_head.weight.data = model.model.embed_tokens.weight.data
    factors = factorize(model, method="svd", progress=False)
    assert factors.layers.parameters == 35_104  # two parameters, whatever lies below them
    allocation = factors.uniform(0.7)
    factors.compress_(model, allocation)
    factors.save(tmp_path / "out", model, byte_tokenizer(), allocation)
    assert torch.equal(lrbo.load(tmp_path / "out").lm_head.weight, model.lm_head.weight)
