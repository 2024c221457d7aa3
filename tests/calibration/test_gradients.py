"""Gradient statistics equal autograd through the whole model, and their mean is the Fisher's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.calibration.collect import Calibration, CalibrationSettings, CalibrationWarning, calibrate
from lrbo.calibration.statistics import GRADIENT_STATISTICS, Statistic
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.prediction import predicted_loss
from lrbo.models.blockwise import BlockwiseBody
from lrbo.models.model_map import linear_weight, map_model
from lrbo.tasks.causal_lm import CausalLM, sample_labels
from tests.support import reference
from tests.support.tiny import build, token_ids

TOLERANCE = {
    # Relative to the largest entry. float64, but Llama's norms round to float32 inside, there
    # and back; where batches and order are the same, they round alike.
    "autograd": 1e-5,
    "same order": 1e-12,
    # A sample deviates from its mean by about the trace; their mean, by this over the root of
    # their number (1.5 was seen).
    "samples": 4.0,
    # Relative: second order of a step of 1e-3, 1 % shrinkage, 4,000 sampled gradients.
    "divergence": 0.15,
}

pytestmark = pytest.mark.filterwarnings("ignore::lrbo.calibration.collect.CalibrationWarning")
every_family = pytest.mark.parametrize(
    "case", ["llama_tied", "llama_biased", "gpt2", "opt", "phi", "gpt_neox", "phi3", "qwen3"]
)


def gathered(
    model: PreTrainedModel, windows: Tensor, task: CausalLM | None = None, **settings: Any
) -> dict[str, dict[Statistic, Tensor]]:
    """Calibrate for gradients only, on all windows by default."""
    with_defaults = CalibrationSettings(**{"gradient_share": 1.0, **settings})
    layers = map_model(model)
    parts = calibrate(
        BlockwiseBody(model), layers, windows, GRADIENT_STATISTICS, with_defaults, task=task
    )
    return Calibration.gather(parts).statistics


def plain_gradients(
    model: PreTrainedModel, windows: Tensor, loss: Callable[[Tensor], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return inputs and output gradients of all layers, from one graph of the whole model."""
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for spec in map_model(model).compressible:

        def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = spec.name) -> None:
            output.retain_grad()
            tensors[name] = (inputs[0].detach(), output)

        handles.append(model.get_submodule(spec.name).register_forward_hook(keep))
    handles.append(
        model.get_input_embeddings().register_forward_hook(lambda *a: a[-1].requires_grad_())
    )
    loss(model(windows).logits).backward()
    for handle in handles:
        handle.remove()
    actual = {}
    for name, (inputs, output) in tensors.items():
        assert output.grad is not None
        actual[name] = (inputs.flatten(0, -2), output.grad.flatten(0, -2))
    return actual


def largest_difference(
    actual: dict[str, dict[Statistic, Tensor]],
    plain: dict[str, tuple[Tensor, Tensor]],
    windows: int,
) -> float:
    """Compare all statistics with the printed formulas, relative to the largest entry."""
    assert actual.keys() == plain.keys()
    assert len(actual) >= 8
    differences = []
    for name, (inputs, gradient) in plain.items():
        rows, slopes = reference.numpy_of(inputs), reference.numpy_of(gradient)
        expected = {
            Statistic.OUTPUT_GRADIENT: reference.second_moment(slopes),
            Statistic.INPUT_IMPORTANCE: reference.importance(rows, slopes),
            Statistic.WEIGHT_GRADIENT: reference.weight_gradient(
                np.split(rows, windows), np.split(slopes, windows)
            ),
        }
        assert actual[name].keys() == expected.keys()
        for statistic, value in expected.items():
            tensor = actual[name][statistic]
            is_large = statistic is Statistic.WEIGHT_GRADIENT
            assert tensor.dtype == (torch.float32 if is_large else torch.float64)
            assert np.abs(value).max() > 0
            differences.append(np.abs(tensor.numpy() - value).max() / np.abs(value).max())
    return float(max(differences))


def scored(
    plain: dict[str, tuple[Tensor, Tensor]], windows: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Leave out the last token of each window: it has no loss, and no other's depends on it."""
    actual = {}
    for name, pair in plain.items():
        inputs, gradient = (rows.unflatten(0, tuple(windows.shape)) for rows in pair)
        assert not gradient[:, -1].any()
        actual[name] = (inputs[:, :-1].flatten(0, 1), gradient[:, :-1].flatten(0, 1))
    return actual


def next_token_loss(windows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum"
    )


def label_loss(labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )


def sampled_by_hand(logits: Tensor, uniform: Tensor) -> Tensor:
    """Walk through the probabilities until their sum passes the draw."""
    labels = torch.empty(uniform.shape, dtype=torch.long)
    for index in np.ndindex(*uniform.shape):
        total, label = 0.0, -1
        while total <= float(uniform[index]):
            label += 1
            total += np.exp(reference.log_probabilities(logits[index])[label])
        labels[index] = label
    return labels


# --- against autograd ----------------------------------------------------------------------------


@every_family
def test_gradients_of_the_data_are_those_of_the_whole_model(case: str) -> None:
    model, windows = build(case).double(), token_ids(5, 9)
    actual = gathered(model, windows, labels="data", batch_windows=2)
    plain = scored(plain_gradients(model, windows, next_token_loss(windows)), windows)
    assert largest_difference(actual, plain, len(windows)) <= TOLERANCE["autograd"]


@every_family
def test_gradients_of_sampled_labels_are_those_of_labels_sampled_by_hand(case: str) -> None:
    model, windows = build(case).double(), token_ids(4, 7)
    actual = gathered(model, windows, labels="sampled", seed=3, batch_windows=3)
    uniform = torch.rand(windows.shape, generator=torch.Generator().manual_seed(3))
    labels = sampled_by_hand(model(windows).logits, uniform)
    plain = plain_gradients(model, windows, label_loss(labels))
    assert largest_difference(actual, plain, len(windows)) <= TOLERANCE["autograd"]


@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_batch_size_and_chunks_change_nothing(labels: str) -> None:
    model, windows = build("gpt2").double(), token_ids(5, 9)
    expected = gathered(model, windows, labels=labels)
    for batch_windows, chunk in ((1, 256), (3, 4), (100, 1)):
        task = CausalLM(chunk_tokens=chunk)
        actual = gathered(model, windows, task, labels=labels, batch_windows=batch_windows)
        for name, statistics in expected.items():
            for statistic, tensor in statistics.items():
                difference = (actual[name][statistic] - tensor).abs().max() / tensor.abs().max()
                assert float(difference) <= TOLERANCE["same order"], (name, batch_windows)


def same_bits(one: dict[str, dict[Statistic, Tensor]], other: Any) -> bool:
    return all(
        torch.equal(tensor, other[name][statistic])
        for name, statistics in one.items()
        for statistic, tensor in statistics.items()
    )


def test_a_seed_decides_the_bits_and_groups_that_nothing_pools_do_not(
    model: PreTrainedModel,
) -> None:
    windows = token_ids(6, 12)
    first = gathered(model, windows, seed=1)
    assert same_bits(first, gathered(model, windows, seed=1, groups=3))
    assert not same_bits(first, gathered(model, windows, seed=2))
    data = gathered(model, windows, seed=1, labels="data")
    assert same_bits(data, gathered(model, windows, seed=2, labels="data"))


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-24])
def test_a_label_without_probability_is_never_sampled(draw: float) -> None:
    """Neither by a draw of 0 in front of all others nor by the largest one behind them."""
    logits = torch.tensor([[-1e4, 0.0, -1e4, 0.0, -1e4]])
    assert sample_labels(logits, torch.tensor([draw])).tolist() == [1 if draw < 0.4 else 3]


# --- which windows -------------------------------------------------------------------------------


@given(st.floats(0.0, 1.0), st.integers(1, 300))
def test_a_share_of_windows_is_picked_evenly(share: float, windows: int) -> None:
    indices = CalibrationSettings(gradient_share=share).gradient_windows(windows)
    assert len(indices) == max(1, round(share * windows))
    assert indices == sorted(set(indices))
    assert indices[0] == 0
    assert indices[-1] < windows
    steps = np.diff([*indices, windows])
    assert steps.max() - steps.min() <= 1


def test_only_the_chosen_windows_enter() -> None:
    model, windows = build("gpt2").double(), token_ids(7, 9)
    indices = CalibrationSettings(gradient_share=0.4).gradient_windows(7)
    assert indices == [0, 2, 4]
    actual = gathered(model, windows, labels="data", gradient_share=0.4)
    windows = windows[indices]
    plain = scored(plain_gradients(model, windows, next_token_loss(windows)), windows)
    assert largest_difference(actual, plain, len(windows)) <= TOLERANCE["autograd"]


@pytest.mark.filterwarnings("error")
def test_too_few_tokens_for_a_gradient_moment_are_announced() -> None:
    model = build("gpt2").double()
    layers, windows = map_model(model), token_ids(4, 12)
    tallest = max(spec.out_features for spec in layers.compressible)
    assert tallest == 48
    with pytest.warns(CalibrationWarning, match=r"^48 tokens with gradients .* 48 features"):
        gathered(model, windows)
    with pytest.warns(CalibrationWarning, match=r"^24 tokens .*calibration\.gradient_share"):
        gathered(model, windows, gradient_share=0.5)
    gathered(model, token_ids(7, 7))  # 49: a warning would be an error


# --- the Fisher information ----------------------------------------------------------------------


def exact_moment(model: PreTrainedModel, name: str, window: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``E[g g^T]`` and ``E[|g|^2 x^2]`` over all labels that the model may sample.

    Labels of different tokens are independent and gradients of the loss have mean zero, so each
    scored token adds ``J^T (diag(p) - p p^T) J``, with the Jacobian of its logits.
    """
    module = model.get_submodule(name)
    inputs: list[Tensor] = []

    def logits(moved: Tensor) -> Tensor:
        def move(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            inputs[:] = [given[0].detach()[0]]
            return output + moved

        handle = module.register_forward_hook(move)
        try:
            return model(window).logits[0]
        finally:
            handle.remove()

    outputs = linear_weight(module).shape[0]
    start = torch.zeros(1, window.shape[1], outputs, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(logits, start)[:, :, 0]
    probabilities = logits(start).softmax(-1)
    total = torch.zeros(outputs, outputs, dtype=torch.float64)
    importance = torch.zeros_like(inputs[0][0])
    for token in range(window.shape[1]):
        moment = torch.zeros_like(total)
        for scored, p in enumerate(probabilities):
            slope = jacobian[scored, :, token]
            moment += slope.T @ (torch.diag(p) - p.outer(p)) @ slope
        total += moment / window.shape[1]
        importance += moment.trace() * inputs[0][token].square() / window.shape[1]
    return total, importance


@pytest.mark.parametrize("case", ["llama_biased", "gpt2"])
def test_sampled_gradients_have_the_fisher_information_as_their_mean(case: str) -> None:
    """Many copies of one window, each with labels of its own."""
    model, window, copies = build(case).double(), token_ids(1, 4), 2000
    actual = gathered(model, window.expand(copies, -1), batch_windows=1000, seed=5)
    layers = map_model(model)
    assert len(actual) == len(layers.compressible)
    for spec in layers.compressible[::3]:
        moment, importance = exact_moment(model, spec.name, window)
        sampled = actual[spec.name]
        share = TOLERANCE["samples"] / copies**0.5
        difference = sampled[Statistic.OUTPUT_GRADIENT] - moment
        assert float(difference.norm()) <= share * float(moment.trace()), spec.name
        assert float(moment.norm()) > 3 * share * float(moment.trace())  # so the bound is not empty
        difference = sampled[Statistic.INPUT_IMPORTANCE] - importance
        assert float(difference.abs().max()) <= share * float(importance.max()), spec.name


@contextmanager
def moved_weight(model: PreTrainedModel, name: str, change: Tensor) -> Iterator[None]:
    """Add to a weight for the length of a ``with``."""
    weight = linear_weight(model.get_submodule(name))
    before = weight.clone()
    weight += change
    try:
        yield
    finally:
        weight.copy_(before)


@pytest.mark.parametrize("case", ["llama_biased", "gpt2"])
def test_predicted_loss_is_the_divergence_of_a_small_change_in_nats_per_token(case: str) -> None:
    """With one input only, it cannot depend on the gradient: the prediction holds exactly."""
    model = build(case).double()
    window, step = torch.tensor([[17]]), 1e-3
    layers = map_model(model)
    copies = window.expand(4000, -1)
    needs = GRADIENT_STATISTICS | {Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE}
    settings = CalibrationSettings(gradient_share=1.0, batch_windows=2000)
    actual = Calibration.gather(calibrate(BlockwiseBody(model), layers, copies, needs, settings))
    dense = model(window).logits[0, 0]
    layer_count = 0
    for spec in layers.compressible:
        weight = linear_weight(model.get_submodule(spec.name))
        generator = torch.Generator().manual_seed(len(spec.name))
        left, right = (
            torch.randn(size, 1, generator=generator, dtype=torch.float64) for size in weight.shape
        )
        with moved_weight(model, spec.name, step * left @ right.T):
            measured = reference.divergence(dense, model(window).logits[0, 0]) / step**2
        factors = LowRankFactors(left, right.T, torch.zeros(2, dtype=torch.float64))
        predicted = float(predicted_loss(factors, actual.of(spec))[0])
        if spec.kind in ("q_proj", "k_proj"):  # one token attends to itself, whatever they say
            assert measured == predicted == 0.0
            continue
        assert predicted == pytest.approx(measured, rel=TOLERANCE["divergence"]), spec.name
        layer_count += 1
    assert layer_count >= 8
