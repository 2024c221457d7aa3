"""Steps on a model that was just trained: the numbers of a model at rest, and no trace of them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import lrbo
from lrbo.calibration.collect import Calibration, CalibrationSettings
from lrbo.errors import ModelError
from lrbo.factorization.registry import METHODS
from lrbo.pipeline.in_memory import Factorization, calibrate, factorize
from tests.support.tiny import CASES, build, token_ids

# Newer transformers have another name for it, older ones this one alone.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is:FutureWarning")
IDS = token_ids(6, 10)
SETTINGS = CalibrationSettings(groups=2, gradient_share=1.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Leave the other cores to whoever runs tests beside these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(case: str) -> PreTrainedModel:
    """Train for a step, in every way that leaves something behind in a model."""
    model = build(case).requires_grad_(True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        elif "norm" in name or "ln" in name:
            module.requires_grad_(False)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    model.get_input_embeddings().eval()  # frozen parts are often kept in this mode
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    return model


def at_rest(model: PreTrainedModel, case: str) -> PreTrainedModel:
    """Build the same model as a loader gives it."""
    fresh = build(case)
    fresh.load_state_dict(model.state_dict())
    return fresh


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Return everything about a model that a program may rest on."""
    known: dict[str, Any] = {"config": model.config.to_dict(), "random": torch.get_rng_state()}
    for name, module in model.named_modules():
        known[name] = (
            module,
            module.training,
            {key: copy(value) for key, value in vars(module).items() if key.endswith("_hooks")},
            {
                key: id(value) if isinstance(value, torch.Tensor) else value
                for key, value in vars(module).items()
                if not key.startswith("_")
            },
        )
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        known[f"{name}|"] = (
            id(parameter),
            parameter.requires_grad,
            parameter._version,
            id(grad),
            None if grad is None else grad._version,
        )
    return known


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if name == "random" else value == other[name]
        assert same, name


def numbers(calibration: Calibration) -> dict[str, torch.Tensor]:
    return {
        f"{owner} {statistic}": tensor
        for owner, statistics in calibration.statistics.items()
        for statistic, tensor in statistics.items()
    }


def gathered(model: PreTrainedModel) -> Calibration:
    return calibrate(model, IDS, list(METHODS), settings=SETTINGS, progress=False)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_model_at_rest_and_nothing_else_changes(case: str) -> None:
    model = trained(case)
    before = state(model)
    statistics = numbers(gathered(model))
    assert_same(state(model), before)
    expected = numbers(gathered(at_rest(model, case)))
    assert statistics.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in statistics.items())


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_every_step_leaves_the_model_in_training(around: str) -> None:
    model = trained("gpt2")
    rest = at_rest(model, "gpt2")
    before = state(model)

    def steps(model: PreTrainedModel) -> tuple[Calibration, Factorization, list[float]]:
        calibration = gathered(model)
        made = factorize(model, calibration, progress=False)
        losses = [lrbo.score(model, IDS).mean]
        with made.compressed(model, made.least_loss(0.6)):
            losses.append(lrbo.score(model, IDS).mean)
        return calibration, made, losses

    with SURROUNDINGS[around]():
        calibration, factorization, losses = steps(model)
    assert_same(state(model), before)
    other, reference, expected = steps(rest)
    assert numbers(calibration).keys() == numbers(other).keys()
    assert all(torch.equal(v, numbers(other)[k]) for k, v in numbers(calibration).items())
    assert all(
        torch.equal(f.left, reference.factors[n].left) for n, f in factorization.factors.items()
    )
    assert losses == expected
    model(IDS, labels=IDS).loss.backward()  # training goes on


def test_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("llama_untied")
    block = model.model.layers[1]
    before = state(model)

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(block.mlp, "forward", failing)
        for step in (gathered, lambda model: lrbo.score(model, IDS)):
            with pytest.raises(RuntimeError, match="no memory"):
                step(model)
    assert_same(state(model), before)


def test_a_block_whose_forward_was_wrapped_stays_wrapped() -> None:
    """As accelerate does, to bring weights to the device and to cast."""
    model, calls = build("llama_untied"), 0
    plain = numbers(gathered(model))
    block = model.model.layers[1]
    forward = block.forward

    def wrapped(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    block.forward = wrapped
    statistics = numbers(gathered(model))
    assert all(torch.equal(value, plain[name]) for name, value in statistics.items())
    assert block.forward is wrapped
    assert calls > 0


def test_hooks_of_the_program_stay_and_are_told() -> None:
    model, told = trained("llama_untied"), []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda *_: told.append("forward"))
    layer.register_full_backward_hook(lambda *_: told.append("back"))
    before = state(model)
    statistics = numbers(gathered(model))
    assert_same(state(model), before)
    assert set(told) == {"forward", "back"}
    expected = numbers(gathered(at_rest(model, "llama_untied")))
    assert all(torch.equal(value, expected[name]) for name, value in statistics.items())


def test_parameters_that_let_no_gradient_through_are_refused() -> None:
    with torch.inference_mode():
        model = build("llama_untied")
    with pytest.raises(ModelError, match=r"made in torch.inference_mode\(\).*load it outside"):
        gathered(model)
    calibration = calibrate(model, IDS, "svd_llm", curves=False, progress=False)
    assert factorize(model, calibration, "svd_llm", progress=False).factors
