"""A trial's numbers equal slow computations, and the model is as it was when it ends."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.allocation.apply import store_
from lrbo.evaluation.memory import peak_memory_gib
from lrbo.factorization.base import factor_layer
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.methods import Svd
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prepared import BasedWeight, Prepared, UnitFactors
from lrbo.factorization.registry import method_named
from lrbo.layers.options import MEASURES, Measure, Option
from lrbo.layers.pivoted import PivotedLinear
from lrbo.models.model_map import linear_bias, linear_weight, map_model
from lrbo.tasks.causal_lm import CausalLM
from lrbo.tasks.perplexity import measure_dense, score
from lrbo.trials.records import TrialRequest, TrialResult
from lrbo.trials.worker import Worker
from tests.support import reference
from tests.support.allocations import decided, mixed_options
from tests.support.tiny import build, token_ids

TOLERANCE = {
    "nll": 1e-5,  # relative: logits are compared in float32
    "kl": 1e-5,  # nats per token: log-probabilities are kept in float32
}

WINDOWS = token_ids(3, 7)
SCORED = 3 * 6
TOP = 16
FAMILIES = ("llama_tied", "gpt2", "llama_biased")

every_family = pytest.mark.parametrize("case", FAMILIES)


BOTH = ("factored", "pivoted")
Forms = tuple[str, ...]

MIXED = ("int2", "int3_sym", "int4", "pivoted", "int8")

every_forms = pytest.mark.parametrize("forms", [("factored",), ("pivoted",), BOTH], ids="+".join)


def make_worker(case: str = "llama_tied", **sizes: int) -> Worker:
    model = build(case).double()
    layers = map_model(model)
    svd = method_named("svd")
    prepared = {}
    for spec in layers.compressible:
        module = model.get_submodule(spec.name)
        factors = factor_layer(svd, linear_weight(module), linear_bias(module), {})
        prepared[spec.name] = factors.to(dtype=torch.float64, device=torch.device("cpu"))
    dense = measure_dense(model, WINDOWS, top=TOP)
    return Worker(model, layers, model.dtype.itemsize, prepared, WINDOWS, dense, **sizes)


def with_integers(worker: Worker) -> Worker:
    """Prepare integers of every width too, of units whose inputs make groups of 16."""
    rounding = BasePlan(MIXED, BaseOptions(method="nearest", group_sizes=(16,)))
    prepared: dict[str, Prepared] = {}
    for name, low_rank in worker.prepared.items():
        weight = linear_weight(worker.model.get_submodule(name))
        quantized = {}
        for rounded in rounding.make(weight, {}, weight.dtype):
            rest = factor_layer(
                method_named("svd"), weight - rounded.weight(weight.dtype), low_rank.offset, {}
            )
            own = BasedWeight(rounded, rest)
            quantized[own.base.family] = own
        prepared[name] = UnitFactors(low_rank, quantized)
    worker.prepared = prepared
    return worker


def request_for(
    worker: Worker,
    rank: int | None = None,
    index: int = 4,
    forms: Forms = ("factored",),
    measure: Measure = "parameters",
) -> TrialRequest:
    """Ask for one rank everywhere, or for another one in each layer with some left dense."""
    units = worker.layers.compressible
    options = mixed_options(units, forms)
    if rank is not None:
        options = {name: Option(forms[0], (rank,)) for name in options}
    allocation = decided(units, options, itemsize=worker.model.dtype.itemsize, measure=measure)
    return TrialRequest(index, "sobol", {}, allocation, seed=0)


class Slow:
    """The same trial on a model of its own, with dense matrices and loops."""

    def __init__(self, case: str, worker: Worker, request: TrialRequest) -> None:
        self.dense, self.model = build(case).double(), build(case).double()
        store_(self.model, request.allocation, worker.prepared)

    def rows(self, model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            return model(WINDOWS).logits[:, :-1].flatten(0, 1)

    @cached_property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.rows(self.dense), self.rows(self.model), strict=True))

    @property
    def nll(self) -> float:
        truth = WINDOWS[:, 1:].flatten().tolist()
        losses = (
            reference.negative_log_likelihood(row, token)
            for (_, row), token in zip(self.pairs, truth, strict=True)
        )
        return math.fsum(losses) / SCORED

    @property
    def divergence(self) -> float:
        return math.fsum(reference.coarse_divergence(*pair, TOP) for pair in self.pairs) / SCORED


def snapshot(worker: Worker) -> dict[str, object]:
    """Return what a trial must leave alone: modules, addresses in memory, and values."""
    parameters = {**dict(worker.model.named_parameters())}
    for name, factors in worker.prepared.items():
        parameters |= {f"{name}|left": factors.left, f"{name}|right": factors.right}
    return {
        "modules": dict(worker.model.named_modules()),
        "addresses": {name: tensor.data_ptr() for name, tensor in parameters.items()},
        "values": {name: tensor.tolist() for name, tensor in parameters.items()},
    }


def numbers(result: TrialResult) -> dict[str, float]:
    """Return the metrics that must repeat; the peak of the process only ever rises."""
    return {name: value for name, value in result.metrics.items() if name != "peak_memory_gib"}


# --- metrics -----------------------------------------------------------------------------------


@every_forms
@every_family
def test_metrics_equal_a_slow_computation(case: str, forms: Forms) -> None:
    worker = make_worker(case)
    request = request_for(worker, forms=forms)
    result = worker(request)
    slow = Slow(case, worker, request)
    assert (result.outcome, result.error, result.trial_index) == ("completed", None, 4)
    metrics = result.metrics
    assert metrics["tokens"] == SCORED
    assert metrics["nll"] == pytest.approx(slow.nll, rel=TOLERANCE["nll"])
    assert metrics["perplexity"] == pytest.approx(math.exp(slow.nll), rel=TOLERANCE["nll"])
    assert metrics["kl_dense_to_compressed"] == pytest.approx(slow.divergence, abs=TOLERANCE["kl"])
    assert metrics["kl_dense_to_compressed"] > 100 * TOLERANCE["kl"]
    assert metrics["peak_memory_gib"] > 0
    assert result.seconds > 0


@every_family
def test_metrics_of_integers_equal_a_slow_computation(case: str) -> None:
    worker = with_integers(make_worker(case))
    request = request_for(worker, forms=MIXED)
    forms = {option.form for option in request.allocation.compressed.values()}
    assert forms >= {*MIXED} - {"pivoted"}
    metrics, slow = worker(request).metrics, Slow(case, worker, request)
    assert metrics["nll"] == pytest.approx(slow.nll, rel=TOLERANCE["nll"])
    assert metrics["kl_dense_to_compressed"] == pytest.approx(slow.divergence, abs=TOLERANCE["kl"])
    assert metrics["kl_dense_to_compressed"] > 10 * TOLERANCE["kl"]


@every_family
def test_bytes_are_those_of_the_files_and_not_of_the_model_that_runs(case: str) -> None:
    worker = with_integers(make_worker(case))
    worker.itemsize = 2
    units = worker.layers.compressible
    options = mixed_options(units, MIXED)
    allocation = decided(units, options, itemsize=2, measure="bytes")
    metrics = worker.size_metrics(allocation)
    dense, compressed = build(case).bfloat16(), build(case).bfloat16()
    store_(compressed, allocation, worker.prepared)
    assert metrics["model_bytes"] == held_bytes(compressed)
    sizes = [
        sum(held_bytes(model.get_submodule(unit.name)) for unit in units)
        for model in (compressed, dense)
    ]
    assert metrics["keep_ratio"] == sizes[0] / sizes[1]
    assert metrics["parameters"] == allocation.cost.parameters


def held_bytes(module: torch.nn.Module) -> int:
    """Count the bytes of what is stored, a tensor of two names once."""
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in module.state_dict().values()}
    return sum(stored.values())


@pytest.mark.parametrize("measure", MEASURES)
@every_forms
@every_family
def test_sizes_equal_a_count_of_the_compressed_model(
    case: str, forms: Forms, measure: Measure
) -> None:
    worker = make_worker(case)
    request = request_for(worker, forms=forms, measure=measure)
    metrics = worker.size_metrics(request.allocation)
    compressed = build(case).double()
    store_(compressed, request.allocation, worker.prepared)
    layers = [compressed.get_submodule(name) for name in worker.prepared]
    dense = [worker.model.get_submodule(name) for name in worker.prepared]
    counts, whole = counted(layers), counted(dense)
    assert metrics["parameters"] == counts["parameters"] == request.allocation.cost.parameters
    assert metrics["model_parameters"] == reference.count_parameters(compressed)
    integers = sum(m.index.numel() for m in layers if isinstance(m, PivotedLinear))
    assert (integers > 0) == ("pivoted" in forms)
    assert metrics["model_bytes"] == 8 * metrics["model_parameters"] + 4 * integers
    assert metrics["keep_ratio"] == counts[measure] / whole[measure]
    head = compressed.get_output_embeddings().weight
    assert metrics["macs_per_token"] == counts["macs"] + head.numel()


def counted(layers: list[torch.nn.Module]) -> dict[str, int]:
    """Count what modules hold and multiply by, tensor by tensor."""
    tensors = [t for m in layers for t in [*m.parameters(), *m.buffers()]]
    return {
        "parameters": sum(reference.count_parameters(layer) for layer in layers),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "macs": sum(t.numel() for t in tensors if t.dim() == 2),
    }


@pytest.mark.parametrize("forms", [("pivoted",), BOTH], ids="+".join)
@every_family
def test_prefixes_that_are_multiplied_out_score_as_the_stored_forms(
    case: str, forms: Forms
) -> None:
    worker, other = make_worker(case), make_worker(case)
    # As high as a budget of the pivoted form asks for, so that prefixes are multiplied out.
    options = {
        name: Option(forms[i % len(forms)], (factors.max_rank - 1,))
        for i, (name, factors) in enumerate(worker.prepared.items())
    }
    allocation = decided(worker.layers.compressible, options, itemsize=8)
    request = TrialRequest(0, "sobol", {}, allocation, seed=0)
    before = snapshot(worker)
    worker.windows = WINDOWS.repeat(20, 1)
    store_(other.model, allocation, other.prepared)
    worker.dense = measure_dense(worker.model, worker.windows, top=TOP)
    nll = [worker(request).metrics["nll"] for _ in range(2)]
    assert set(worker.buffers) == set(options), "the case must multiply prefixes out"
    assert nll[0] == nll[1]
    assert nll[0] == pytest.approx(score(other.model, WINDOWS).mean, rel=TOLERANCE["nll"])
    assert snapshot(worker) == before


def test_a_dense_allocation_scores_as_the_dense_model() -> None:
    worker = make_worker()
    allocation = decided(worker.layers.compressible, {}, itemsize=8)
    metrics = worker(TrialRequest(0, "uniform", {}, allocation, seed=0)).metrics
    assert metrics["nll"] == score(worker.model, WINDOWS).mean
    assert metrics["kl_dense_to_compressed"] == 0.0
    assert metrics["keep_ratio"] == 1.0


def test_metrics_do_not_depend_on_batch_or_chunk() -> None:
    one, other = make_worker(), make_worker(batch_windows=1)
    other.task = CausalLM(chunk_tokens=4)
    first, second = numbers(one(request_for(one))), numbers(other(request_for(other)))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=TOLERANCE["nll"]), name


def test_progress_is_told_every_token_once() -> None:
    counts: list[int] = []
    worker = make_worker(batch_windows=2)
    worker.task = CausalLM(chunk_tokens=4)
    worker.on_tokens = counts.append
    worker(request_for(worker))
    assert sum(counts) == SCORED


# --- nothing is left behind --------------------------------------------------------------------


def test_the_same_request_gives_the_same_bits_whatever_came_between() -> None:
    worker = make_worker()
    first = worker(request_for(worker))
    between = worker(request_for(worker, rank=1))
    second = worker(request_for(worker))
    assert numbers(first) == numbers(second)
    assert numbers(between) != numbers(first)


@every_family
def test_a_trial_leaves_model_and_factors_as_they_were(case: str) -> None:
    worker = make_worker(case)
    before = snapshot(worker)
    worker(request_for(worker))
    assert snapshot(worker) == before


def test_a_trial_factors_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker()

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a trial must not factor")

    monkeypatch.setattr(Svd, "factor", refuse)
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    assert worker(request_for(worker)).outcome == "completed"


# --- trials without a value --------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


def test_a_loss_that_is_not_finite_is_abandoned_with_its_reason() -> None:
    worker = make_worker()
    next(iter(worker.prepared.values())).left[0, 0] = math.nan
    before = snapshot(worker)["modules"]
    result = worker(request_for(worker))
    assert result.outcome == "abandoned"
    assert result.metrics == {}
    assert result.error is not None
    assert result.error.startswith(f"NonFiniteError: the loss of {SCORED} tokens is not finite")
    assert result.trial_index == 4
    assert snapshot(worker)["modules"] == before


def test_a_divergence_that_is_not_finite_is_abandoned_with_its_reason() -> None:
    """Overflow in tokens that are never the truth does not show in the loss."""
    worker = make_worker()
    unused = next(i for i in range(64) if not (WINDOWS[:, 1:] == i).any())

    def overflow(module: torch.nn.Module, inputs: object, logits: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor([unused]), -math.inf)

    with pytest.MonkeyPatch.context() as patch:  # as heads would be with the whole vocabulary
        patch.setattr(worker, "dense", measure_dense(worker.model, WINDOWS, top=64))
        worker.model.lm_head.register_forward_hook(overflow)
        result = worker(request_for(worker))
    assert result.outcome == "abandoned"
    assert result.error is not None
    assert f"divergence of {SCORED} tokens is not finite" in result.error


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("host"), OSError(28, "No space")],
    ids=["device", "host", "disk"],
)
def test_what_the_machine_did_is_a_failed_result(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    before = snapshot(worker)
    with monkeypatch.context() as patch:
        patch.setattr(worker.model.lm_head, "forward", raising(error))
        result = worker(request_for(worker))
    assert result.outcome == "failed"
    assert result.metrics == {}
    assert result.error == f"{type(error).__name__}: {error}"
    assert snapshot(worker) == before
    assert worker(request_for(worker)).outcome == "completed"  # the next trial is unharmed


@pytest.mark.parametrize("error", [TypeError("a defect"), KeyboardInterrupt("by hand")])
def test_a_defect_is_raised_and_the_model_is_as_it_was(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    before = snapshot(worker)
    with monkeypatch.context() as patch:
        patch.setattr(worker.model.lm_head, "forward", raising(error))
        with pytest.raises(type(error)) as caught:
            worker(request_for(worker))
    assert caught.value is error
    assert snapshot(worker) == before


def test_an_allocation_for_another_model_is_a_defect() -> None:
    worker = make_worker()
    unit = replace(worker.layers.compressible[0], name="model.layers.9.mlp.up_proj")
    allocation = decided([unit], {unit.name: Option("factored", (1,))})
    with pytest.raises(KeyError, match=r"layers\.9"):
        worker(TrialRequest(0, "sobol", {}, allocation, seed=0))


def test_a_loss_beyond_what_exp_can_say_is_completed_with_an_infinite_perplexity() -> None:
    worker = make_worker("llama_biased")
    worker.model.lm_head.weight.mul_(1e4)
    result = worker(request_for(worker))
    assert result.outcome == "completed"
    assert 700 < result.metrics["nll"] < math.inf
    assert result.metrics["perplexity"] == math.inf


def test_peak_memory_is_in_gib() -> None:
    """A Python process with torch takes more than 50 MiB, and this one not a TiB."""
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 1024
