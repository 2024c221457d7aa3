"""The whole chain on a GPU says what it says on the CPU."""

import pytest
import torch
from torch import Tensor

from lrbo.allocation.allocate import Allocation
from lrbo.allocation.apply import compressed
from lrbo.calibration.collect import Calibration, CalibrationSettings, calibrate
from lrbo.calibration.statistics import Statistic
from lrbo.evaluation.timing import TimingSettings
from lrbo.factorization.cache import factor_model
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.registry import METHODS, method_named
from lrbo.layers.modules import PRODUCTS
from lrbo.layers.options import Option
from lrbo.models.blockwise import BlockwiseBody
from lrbo.models.model_map import map_model
from lrbo.models.specs import ModelMap
from lrbo.refit.sequential import refit
from lrbo.tasks.perplexity import measure_dense
from lrbo.trials.records import TrialRequest
from lrbo.trials.worker import Worker
from tests.support.allocations import decided
from tests.support.tiny import build, token_ids

pytestmark = [
    pytest.mark.gpu,
    # torch, when a backward pass is the first in its thread to multiply.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CASE, RANK = "llama_biased", 4
# Float32 products in another order, two blocks deep, in what they are relative to.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
EVERYTHING = frozenset(Statistic)


def calibrated(device: torch.device) -> Calibration:
    model = build(CASE).to(device)
    # Labels of the data: samples drawn on another device are other labels.
    settings = CalibrationSettings(groups=2, labels="data")
    ids = token_ids(16, 12)
    parts = calibrate(BlockwiseBody(model), map_model(model), ids, EVERYTHING, settings)
    return Calibration.gather(parts)


def factored(device: torch.device, method: str) -> dict[str, LowRankFactors]:
    model = build(CASE)
    parts = factor_model(
        model, map_model(model), method_named(method), calibrated(CPU), device=device
    )
    return {name: factors for part in parts for name, factors in part.items()}


def allocated(layers: ModelMap) -> Allocation:
    """Decide one rank everywhere, in all forms by turns."""
    units, forms = layers.compressible, list(PRODUCTS)
    options = {u.name: Option(forms[i % len(forms)], (RANK,)) for i, u in enumerate(units)}
    return decided(units, options, measure="bytes")


def products(factors: dict[str, LowRankFactors]) -> dict[str, Tensor]:
    return {n: f.left[:, :RANK] @ f.right[:RANK] for n, f in factors.items()}


def test_statistics_are_those_of_the_cpu() -> None:
    one, two = calibrated(CPU).statistics, calibrated(GPU).statistics
    assert one.keys() == two.keys()
    for name, statistics in one.items():
        for key, expected in statistics.items():
            statistic = two[name][key]
            assert statistic.device.type == "cpu", key
            scale = float(expected.abs().max())
            torch.testing.assert_close(statistic, expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_those_of_the_cpu(method: str) -> None:
    one, two = products(factored(CPU, method)), products(factored(GPU, method))
    for name, expected in one.items():  # as maps: directions may turn
        torch.testing.assert_close(two[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trial_scores_as_on_the_cpu(dtype: torch.dtype) -> None:
    metrics = {}
    for device in (CPU, GPU):
        model = build(CASE).to(device, dtype)
        layers, ids = map_model(model), token_ids(4, 12)
        factors = {
            name: f.to(dtype=dtype, device=device)
            for name, f in factored(CPU, "loss_aware").items()
        }
        worker = Worker(
            model,
            layers,
            dtype.itemsize,
            factors,
            ids,
            measure_dense(model, ids),
            latency=TimingSettings((12,), steps=4, repeats=3),
        )
        result = worker(TrialRequest(0, "uniform", {}, allocated(layers), seed=0))
        assert result.outcome == "completed", result.error
        metrics[device.type] = result.metrics
        assert {parameter.device.type for parameter in model.parameters()} == {device.type}
        assert result.metrics["prefill_latency_ratio"] > 0
        assert result.metrics["decode_latency_ratio"] > 0
    near = 1e-4 if dtype is torch.float32 else 2e-2
    for key in ("nll", "kl_dense_to_compressed"):
        assert metrics["cuda"][key] == pytest.approx(metrics["cpu"][key], rel=near, abs=near)


def test_a_refit_is_that_of_the_cpu() -> None:
    old = factored(CPU, "loss_aware")
    solved = []
    for device in (CPU, GPU):
        model = build(CASE).to(device)
        layers = map_model(model)
        solved.append(refit(model, layers, allocated(layers), old, token_ids(16, 12)))
    one, two = solved
    for before, after in zip(one.report, two.report, strict=True):
        assert (before.name, before.rank) == (after.name, after.rank)
        assert after.fitted_after == pytest.approx(before.fitted_after, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("form", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_layers_say_what_factors_do(dtype: torch.dtype, form: str) -> None:
    factors, model = factored(CPU, "loss_aware"), build(CASE).to(GPU)
    layers, ids = map_model(model), token_ids(2, 12).to(GPU)
    gpu_factors = {n: f.to(dtype=torch.float32, device=GPU) for n, f in factors.items()}
    for name, layer_factors in gpu_factors.items():
        x = torch.randn(3, layer_factors.right.shape[1], device=GPU)
        stored = layer_factors.stored(name, Option(form, (RANK,)), dtype)
        assert {p.device.type for p in stored.parameters()} == {"cuda"}
        expected = layer_factors.at_rank(RANK)(x)
        error = (stored(x.to(dtype)).float() - expected).norm() / expected.norm()
        assert float(error) <= (1e-4 if dtype is torch.float32 else 0.1)
    with compressed(model, allocated(layers), gpu_factors), torch.inference_mode():
        assert bool(model(ids).logits.isfinite().all())
