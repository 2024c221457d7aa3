"""A trial's numbers equal slow computations, and the model is as it was when it ends."""

import math
from collections.abc import Callable
from functools import cached_property, partial

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.accounting import Storage
from lrbo.allocation import Allocation, Budget
from lrbo.compression import compress_
from lrbo.evaluation.divergence import measure_dense
from lrbo.evaluation.perplexity import score
from lrbo.factorization.registry import method_named
from lrbo.factorization.weighted import Svd
from lrbo.model import linear_bias, linear_weight, map_model
from lrbo.nested import PivotedFactors
from lrbo.trial import TrialRequest, TrialResult
from lrbo.worker import Worker, allocation_parameters, peak_memory_gib
from tests import reference
from tests.tiny import build, token_ids

TOLERANCE = {
    "nll": 1e-5,  # relative: logits are compared in float32
    "kl": 1e-5,  # nats per token: log-probabilities are kept in float32
}

WINDOWS = token_ids(3, 7)
SCORED = 3 * 6
TOP = 16
FAMILIES = ("llama_tied", "gpt2", "llama_biased")

every_family = pytest.mark.parametrize("case", FAMILIES)


def make_worker(case: str = "llama_tied", *, storage: Storage = "factored", **sizes: int) -> Worker:
    model = build(case).double()
    layers = map_model(model)
    svd = method_named("svd")
    factors = {}
    for spec in layers.compressible:
        module = model.get_submodule(spec.name)
        factors[spec.name] = svd.factor(linear_weight(module), linear_bias(module), {}).to()
    dense = measure_dense(model, WINDOWS, top=TOP)
    cost = partial(svd.parameters, storage=storage)
    return Worker(model, layers, factors, cost, storage, WINDOWS, dense, **sizes)


def request_for(worker: Worker, rank: int | None = None, index: int = 4) -> TrialRequest:
    """Ask for one rank everywhere, or for another one in each layer with some left dense."""
    names = list(worker.factors)
    mixed = {name: None if i % 4 == 3 else 1 + i % 5 for i, name in enumerate(names)}
    ranks = mixed if rank is None else dict.fromkeys(names, rank)
    parameters = allocation_parameters(worker.layers, Allocation(ranks, 0, Budget(0)), worker.cost)
    total = sum(parameters.values())
    return TrialRequest(index, "sobol", {}, Allocation(ranks, total, Budget(total)), seed=0)


class Slow:
    """The same trial on a model of its own, with dense matrices and loops."""

    def __init__(self, case: str, worker: Worker, request: TrialRequest) -> None:
        self.dense, self.model = build(case).double(), build(case).double()
        compress_(self.model, request.allocation, worker.factors)

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
    """Return what a trial must leave alone: modules, places in memory, and values."""
    parameters = {**dict(worker.model.named_parameters())}
    for name, factors in worker.factors.items():
        parameters |= {f"{name}|left": factors.left, f"{name}|right": factors.right}
    return {
        "modules": dict(worker.model.named_modules()),
        "places": {name: tensor.data_ptr() for name, tensor in parameters.items()},
        "values": {name: tensor.tolist() for name, tensor in parameters.items()},
    }


def numbers(result: TrialResult) -> dict[str, float]:
    """Return the metrics that must repeat; the peak of the process only ever rises."""
    return {name: value for name, value in result.metrics.items() if name != "peak_memory_gib"}


# --- metrics -----------------------------------------------------------------------------------


@every_family
def test_metrics_equal_a_slow_computation(case: str) -> None:
    worker = make_worker(case)
    request = request_for(worker)
    result = worker(request)
    slow = Slow(case, worker, request)
    assert (result.outcome, result.error, result.trial_index) == ("completed", None, 4)
    found = result.metrics
    assert found["tokens"] == SCORED
    assert found["nll"] == pytest.approx(slow.nll, rel=TOLERANCE["nll"])
    assert found["perplexity"] == pytest.approx(math.exp(slow.nll), rel=TOLERANCE["nll"])
    assert found["kl_dense_to_compressed"] == pytest.approx(slow.divergence, abs=TOLERANCE["kl"])
    assert found["kl_dense_to_compressed"] > 100 * TOLERANCE["kl"]
    assert found["peak_memory_gib"] > 0
    assert result.seconds > 0


@every_family
def test_sizes_equal_a_count_of_the_compressed_model(case: str) -> None:
    worker = make_worker(case)
    request = request_for(worker)
    found = worker(request).metrics
    compressed = build(case).double()
    compress_(compressed, request.allocation, worker.factors)
    layers = [compressed.get_submodule(name) for name in worker.factors]
    dense = [worker.model.get_submodule(name) for name in worker.factors]
    kept = sum(reference.count_parameters(layer) for layer in layers)
    assert found["parameters"] == kept == request.allocation.parameters
    assert found["model_parameters"] == reference.count_parameters(compressed)
    assert found["model_bytes"] == 8 * found["model_parameters"]
    assert found["keep_ratio"] == kept / sum(reference.count_parameters(layer) for layer in dense)
    matrices = [p for m in layers for p in m.parameters() if p.dim() == 2]
    head = compressed.get_output_embeddings().weight
    assert found["macs_per_token"] == sum(p.numel() for p in [*matrices, head])


@every_family
def test_a_trial_of_pivoted_storage_counts_that_form_and_scores_the_same(case: str) -> None:
    worker, other = make_worker(case, storage="pivoted"), make_worker(case)
    # As high as a budget of pivoted storage asks for, so that prefixes are multiplied out.
    ranks = {name: found.max_rank - 1 for name, found in worker.factors.items()}
    request = TrialRequest(0, "sobol", {}, Allocation(ranks, 0, Budget(0)), seed=0)
    before = snapshot(worker)
    worker.windows = WINDOWS.repeat(20, 1)
    found = worker.size_metrics(request.allocation)
    compress_(other.model, request.allocation, {n: PivotedFactors(f, torch.float64)
        for n, f in other.factors.items()})  # fmt: skip
    layers = [other.model.get_submodule(name) for name in ranks]
    assert found["parameters"] == sum(reference.count_parameters(layer) for layer in layers)
    assert found["model_parameters"] == reference.count_parameters(other.model)
    integers = sum(layer.places.numel() for layer in layers)
    assert found["model_bytes"] == 8 * found["model_parameters"] + 4 * integers
    matrices = [p for m in layers for p in m.parameters() if p.dim() == 2]
    head = other.model.get_output_embeddings().weight
    assert found["macs_per_token"] == sum(p.numel() for p in [*matrices, head])
    worker.dense = measure_dense(worker.model, worker.windows, top=TOP)
    nll = [worker(request).metrics["nll"] for _ in range(2)]
    assert set(worker.buffers) == set(ranks), "the case must multiply prefixes out"
    assert nll[0] == nll[1]
    assert nll[0] == pytest.approx(score(other.model, WINDOWS).mean, rel=TOLERANCE["nll"])
    assert snapshot(worker) == before


def test_a_dense_allocation_scores_as_the_dense_model() -> None:
    worker = make_worker()
    dense = request_for(worker).allocation.ranks
    allocation = Allocation(dict.fromkeys(dense), 0, Budget(0))
    found = worker(TrialRequest(0, "uniform", {}, allocation, seed=0)).metrics
    assert found["nll"] == score(worker.model, WINDOWS).mean
    assert found["kl_dense_to_compressed"] == 0.0
    assert found["keep_ratio"] == 1.0


def test_metrics_do_not_depend_on_batch_or_chunk() -> None:
    one, other = make_worker(), make_worker(batch_windows=1, chunk_tokens=4)
    first, second = numbers(one(request_for(one))), numbers(other(request_for(other)))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=TOLERANCE["nll"]), name


def test_progress_is_told_every_token_once() -> None:
    told: list[int] = []
    worker = make_worker(batch_windows=2, chunk_tokens=4)
    worker.on_tokens = told.append
    worker(request_for(worker))
    assert sum(told) == SCORED


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
    next(iter(worker.factors.values())).left[0, 0] = math.nan
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
    allocation = Allocation({"model.layers.9.mlp.up_proj": 1}, 1, Budget(1))
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
