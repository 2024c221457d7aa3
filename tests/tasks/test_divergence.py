"""The divergence from stored top tokens: exact over its partition, and never above the full one."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.errors import NonFiniteError
from lrbo.models.tiny import tiny_model
from lrbo.tasks.perplexity import (
    Chunk,
    DenseReference,
    Perplexity,
    measure_dense,
    predictions,
    score,
)
from tests.support import reference
from tests.support.tiny import token_ids

TOLERANCE = {
    "kl": 1e-5,  # nats per token: log-probabilities are stored in float32
    "confident": 1e-4,  # the same for logits of 60, whose float32 neighbours lie 4e-6 apart
}

VOCABULARY = 258
WINDOWS, TOKENS = 4, 7

every_top = pytest.mark.parametrize("top", [1, 5, 128, VOCABULARY - 1, VOCABULARY, 1000])


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return token_ids(WINDOWS, TOKENS, vocabulary=VOCABULARY)


@pytest.fixture
def other() -> PreTrainedModel:
    """Return a model of other weights."""
    return tiny_model(seed=1).double().eval().requires_grad_(False)


def rows_of(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Return the logits that predict each scored token."""
    with torch.no_grad():
        return model(windows).logits[:, :-1].flatten(0, 1)


def per_token(dense: DenseReference, model: PreTrainedModel, windows: Tensor, **sizes: int):
    chunks = predictions(model, windows, **sizes)
    return torch.cat([dense.kl_dense_to_compressed(chunk) for chunk in chunks]).double()


def chunk_of(logits: Tensor, first: int = 0) -> Chunk:
    """Make a chunk from logits alone; its tokens play no part in the divergence."""
    logits = logits.float()
    return Chunk(first, logits, logits.logsumexp(-1), torch.zeros(len(logits)))


def reference_of(logits: Tensor, top: int) -> DenseReference:
    """Store the top tokens of given logits, by the plain formula."""
    rows = [reference.log_probabilities(row) for row in logits]
    table = torch.tensor(rows, dtype=torch.float64)
    best = table.topk(top)
    outside = table.scatter(1, best.indices, -torch.inf).logsumexp(-1)
    return DenseReference(
        Perplexity(0.0, len(logits)), best.indices.int(), best.values.float(), outside.float()
    )


# --- what is measured --------------------------------------------------------------------------


@every_top
def test_divergence_is_that_of_the_top_and_one_bucket(
    model: PreTrainedModel, other: PreTrainedModel, windows: Tensor, top: int
) -> None:
    dense_rows, other_rows = rows_of(model, windows), rows_of(other, windows)
    expected = [
        reference.coarse_divergence(a, b, min(top, VOCABULARY))
        for a, b in zip(dense_rows, other_rows, strict=True)
    ]
    actual = per_token(measure_dense(model, windows, top=top), other, windows)
    assert actual.shape == (WINDOWS * (TOKENS - 1),)
    assert float((actual - torch.tensor(expected)).abs().max()) <= TOLERANCE["kl"]


@every_top
def test_divergence_is_a_lower_bound_and_exact_over_the_whole_vocabulary(
    model: PreTrainedModel, other: PreTrainedModel, windows: Tensor, top: int
) -> None:
    pairs = zip(rows_of(model, windows), rows_of(other, windows), strict=True)
    full = torch.tensor([reference.divergence(a, b) for a, b in pairs])
    actual = per_token(measure_dense(model, windows, top=top), other, windows)
    assert bool((actual >= 0).all())
    assert bool((actual <= full + TOLERANCE["kl"]).all())
    if top >= VOCABULARY:
        assert float((actual - full).abs().max()) <= TOLERANCE["kl"]
    else:
        assert float(actual.mean()) < float(full.mean())


def test_more_stored_tokens_never_lower_the_divergence(
    model: PreTrainedModel, other: PreTrainedModel, windows: Tensor
) -> None:
    actual = [
        per_token(measure_dense(model, windows, top=top), other, windows) for top in (1, 8, 64, 258)
    ]
    for coarse, fine in pairwise(actual):
        assert bool((fine >= coarse - TOLERANCE["kl"]).all())


@every_top
def test_the_model_does_not_diverge_from_itself(
    model: PreTrainedModel, windows: Tensor, top: int
) -> None:
    dense = measure_dense(model, windows, top=top)
    assert bool((per_token(dense, model, windows) == 0).all())
    divergences = per_token(dense, model, windows, batch_windows=1, chunk_tokens=5)
    assert float(divergences.max()) <= TOLERANCE["kl"]


@pytest.mark.parametrize("batch_windows", [1, 3])
@pytest.mark.parametrize("chunk_tokens", [4, 1000])
def test_divergence_does_not_depend_on_batch_or_chunk(
    model: PreTrainedModel,
    other: PreTrainedModel,
    windows: Tensor,
    batch_windows: int,
    chunk_tokens: int,
) -> None:
    sizes = {"batch_windows": batch_windows, "chunk_tokens": chunk_tokens}
    whole = per_token(measure_dense(model, windows, top=16), other, windows)
    dense = measure_dense(model, windows, top=16, **sizes)
    assert float((per_token(dense, other, windows) - whole).abs().max()) <= TOLERANCE["kl"]
    chunked = per_token(measure_dense(model, windows, top=16), other, windows, **sizes)
    assert float((chunked - whole).abs().max()) <= TOLERANCE["kl"]


def test_the_dense_score_is_the_perplexity(model: PreTrainedModel, windows: Tensor) -> None:
    assert measure_dense(model, windows, top=4).perplexity == score(model, windows)


# --- far apart ---------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [5.0, 15.0, 25.0, 60.0])
@pytest.mark.parametrize("top", [1, 4, 63])
def test_a_confident_compressed_model_is_measured_exactly(confidence: float, top: int) -> None:
    """What it leaves for the rest is far below the rounding of 1 minus the top."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(12, 64, generator=generator)
    sure = torch.randn(12, 64, generator=generator)
    best = dense.topk(2).indices
    sure.scatter_(1, best[:, :1], confidence)  # on a token that is always stored
    expected = [reference.coarse_divergence(a, b, top) for a, b in zip(dense, sure, strict=True)]
    actual = reference_of(dense, top).kl_dense_to_compressed(chunk_of(sure)).double()
    assert float((actual - torch.tensor(expected)).abs().max()) <= TOLERANCE["confident"]


@pytest.mark.parametrize("confidence", [5.0, 15.0, 25.0, 60.0])
@pytest.mark.parametrize("top", [1, 4, 63, 64])
def test_a_confident_dense_model_is_measured_exactly(
    model: PreTrainedModel, windows: Tensor, confidence: float, top: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = WINDOWS * (TOKENS - 1)
    sure, other = (torch.randn(rows, 64, generator=generator) for _ in "12")
    sure[:, 7] = confidence
    model.lm_head.register_forward_hook(lambda module, inputs, logits: sure.clone())
    dense = measure_dense(model, windows % 64, top=top)
    expected = [reference.coarse_divergence(a, b, top) for a, b in zip(sure, other, strict=True)]
    actual = dense.kl_dense_to_compressed(chunk_of(other)).double()
    assert float((actual - torch.tensor(expected)).abs().max()) <= TOLERANCE["confident"]


# --- what is stored ----------------------------------------------------------------------------


@every_top
def test_stored_probabilities_and_rest_sum_to_one(
    model: PreTrainedModel, windows: Tensor, top: int
) -> None:
    dense = measure_dense(model, windows, top=top)
    total = dense.log_probs.double().exp().sum(-1) + dense.log_rest.double().exp()
    assert float((total - 1).abs().max()) <= TOLERANCE["kl"]
    assert dense.ids.shape == (WINDOWS * (TOKENS - 1), min(top, VOCABULARY))


def test_what_was_saved_is_loaded(
    model: PreTrainedModel, other: PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    dense = measure_dense(model, windows, top=16)
    dense.save(tmp_path / "dense.safetensors")
    loaded = DenseReference.load(tmp_path / "dense.safetensors")
    assert loaded.perplexity == dense.perplexity  # to the bit, also through text
    for name in ("ids", "log_probs", "log_rest"):
        assert torch.equal(getattr(loaded, name), getattr(dense, name)), name
    assert torch.equal(per_token(loaded, other, windows), per_token(dense, other, windows))


def test_progress_counts_every_token_once(model: PreTrainedModel, windows: Tensor) -> None:
    counts: list[int] = []
    measure_dense(model, windows, top=2, batch_windows=2, chunk_tokens=5, on_tokens=counts.append)
    assert sum(counts) == WINDOWS * (TOKENS - 1)


def test_a_broken_dense_model_is_refused(model: PreTrainedModel, windows: Tensor) -> None:
    model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"loss of 24 tokens is not finite"):
        measure_dense(model, windows)


def test_an_impossible_token_is_an_error_with_a_count() -> None:
    """A compressed model that overflows to minus infinity where the truth never is."""
    generator = torch.Generator().manual_seed(0)
    dense, other = (torch.randn(12, 64, generator=generator) for _ in "12")
    other[:5] = other[:5].scatter(1, dense.topk(1).indices[:5], -torch.inf)
    with pytest.raises(NonFiniteError, match=r"divergence of 5 tokens is not finite among the 12"):
        reference_of(dense, 4).kl_dense_to_compressed(chunk_of(other))
