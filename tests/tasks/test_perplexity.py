"""The score equals a loop over prefixes, whatever the batch; what is not finite is an error."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.errors import NonFiniteError
from lrbo.tasks.perplexity import Perplexity, predictions, score
from tests.support import reference
from tests.support.tiny import CASES, build, token_ids

TOLERANCE = {
    "nll": 1e-5,  # relative: logits are compared in float32
    "batch": 1e-6,  # relative: the same float64 forward pass, rounded to float32 per token
}

WINDOWS, TOKENS = 5, 8


@pytest.fixture
def windows() -> Tensor:
    return token_ids(WINDOWS, TOKENS, vocabulary=258)


def loop(model: PreTrainedModel, windows: Tensor) -> list[float]:
    """Return the loss of each predicted token, each from its own prefix alone."""
    losses = []
    for window in windows:
        for position in range(1, len(window)):
            with torch.no_grad():
                logits = model(window[None, :position]).logits[0, -1]
            losses.append(reference.negative_log_likelihood(logits, int(window[position])))
    return losses


def test_score_is_the_loop_over_prefixes(model: PreTrainedModel, windows: Tensor) -> None:
    expected = loop(model, windows)
    actual = score(model, windows)
    assert actual.tokens == len(expected) == WINDOWS * (TOKENS - 1)
    assert actual.nll == pytest.approx(math.fsum(expected), rel=TOLERANCE["nll"])
    assert actual.value == pytest.approx(
        math.exp(math.fsum(expected) / len(expected)), rel=TOLERANCE["nll"]
    )


@pytest.mark.parametrize("case", CASES)
def test_every_family_is_scored_as_its_own_logits_say(case: str) -> None:
    model = build(case).double()
    ids = token_ids(3, 6)
    with torch.no_grad():
        logits = model(ids).logits
    expected = [
        reference.negative_log_likelihood(logits[i, t], int(ids[i, t + 1]))
        for i in range(3)
        for t in range(5)
    ]
    assert score(model, ids).nll == pytest.approx(math.fsum(expected), rel=TOLERANCE["nll"])


@pytest.mark.parametrize("batch_windows", [1, 2, 64])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_score_does_not_depend_on_batch_or_chunk(
    model: PreTrainedModel, windows: Tensor, batch_windows: int, chunk_tokens: int
) -> None:
    whole = score(model, windows, batch_windows=WINDOWS, chunk_tokens=10_000)
    actual = score(model, windows, batch_windows=batch_windows, chunk_tokens=chunk_tokens)
    assert actual.tokens == whole.tokens
    assert actual.nll == pytest.approx(whole.nll, rel=TOLERANCE["batch"])


def test_scores_of_parts_add_up(model: PreTrainedModel, windows: Tensor) -> None:
    parts = score(model, windows[:2]) + score(model, windows[2:])
    whole = score(model, windows)
    assert parts.tokens == whole.tokens
    assert parts.nll == pytest.approx(whole.nll, rel=TOLERANCE["batch"])


def test_the_first_token_is_context_only(model: PreTrainedModel, windows: Tensor) -> None:
    """No loss is asked of it, but what follows depends on it."""
    body = windows.clone()
    body[:, 0] = (body[:, 0] + 1) % 258
    assert score(model, body).tokens == WINDOWS * (TOKENS - 1)
    assert score(model, body).nll != score(model, windows).nll
    pair = windows[:1, :2]
    with torch.no_grad():
        logits = model(pair[:, :1]).logits[0, -1]
    expected = reference.negative_log_likelihood(logits, int(pair[0, 1]))
    assert score(model, pair).nll == pytest.approx(expected, rel=TOLERANCE["nll"])


@pytest.mark.parametrize(("batch_windows", "chunk_tokens"), [(1, 3), (2, 5), (5, 1000)])
def test_chunks_cover_the_tokens_in_order(
    model: PreTrainedModel, windows: Tensor, batch_windows: int, chunk_tokens: int
) -> None:
    expected = loop(model, windows)
    position = 0
    sizes = {"batch_windows": batch_windows, "chunk_tokens": chunk_tokens}
    for chunk in predictions(model, windows, **sizes):
        assert chunk.first == position
        assert 0 < len(chunk.nll) <= chunk_tokens
        assert chunk.logits.shape == (len(chunk.nll), 258)
        assert chunk.logits.dtype == chunk.nll.dtype == torch.float32
        normal = torch.tensor([row.double().exp().sum().log() for row in chunk.logits])
        assert torch.allclose(chunk.log_normalizer, normal.float(), rtol=TOLERANCE["nll"])
        here = torch.tensor(expected[position : position + len(chunk.nll)])
        assert torch.allclose(chunk.nll, here, rtol=TOLERANCE["nll"], atol=TOLERANCE["nll"])
        position += len(chunk.nll)
    assert position == len(expected)


def test_between_chunks_the_caller_is_not_in_inference_mode(
    model: PreTrainedModel, windows: Tensor
) -> None:
    """Otherwise a caller that stops in the middle could not train afterwards."""
    chunks = predictions(model, windows, chunk_tokens=3)
    next(chunks)
    assert not torch.is_inference_mode_enabled()
    next(chunks)
    assert not torch.ones(1).is_inference()


def test_progress_counts_every_token_once(model: PreTrainedModel, windows: Tensor) -> None:
    counts: list[int] = []
    actual = score(model, windows, batch_windows=2, chunk_tokens=4, on_tokens=counts.append)
    assert len(counts) > 2
    assert sum(counts) == actual.tokens


def test_a_zero_head_has_the_perplexity_of_its_vocabulary(
    model: PreTrainedModel, windows: Tensor
) -> None:
    model.lm_head.weight.zero_()
    assert score(model, windows).value == pytest.approx(258, rel=TOLERANCE["nll"])


def test_half_precision_logits_are_scored_in_float32(
    model: PreTrainedModel, windows: Tensor
) -> None:
    model.bfloat16()
    for chunk in predictions(model, windows):
        assert chunk.nll.dtype == torch.float32
        normal = chunk.logits.double().logsumexp(-1)
        assert torch.allclose(chunk.log_normalizer.double(), normal, rtol=TOLERANCE["nll"])


# --- not finite --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_weight_is_an_error_with_a_count(
    model: PreTrainedModel, windows: Tensor, bad: float
) -> None:
    model.lm_head.weight[7, 3] = bad
    counted = r"loss of \d+ tokens is not finite among the 6 tokens from number 0 on; .*float64"
    with pytest.raises(NonFiniteError, match=counted):
        score(model, windows, chunk_tokens=6)


def test_the_count_is_that_of_the_tokens_which_are_not_finite(
    model: PreTrainedModel, windows: Tensor
) -> None:
    """An impossible token: only where it is the truth is the loss infinite."""
    impossible = int(windows[3, 4])
    windows[4, 2] = impossible

    def forbid(module: torch.nn.Module, inputs: object, logits: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor([impossible]), -math.inf)

    model.lm_head.register_forward_hook(forbid)
    count = int((windows[:, 1:] == impossible).sum())
    assert count >= 2
    with pytest.raises(NonFiniteError, match=rf"loss of {count} tokens .* {WINDOWS * 7} tokens"):
        score(model, windows, batch_windows=WINDOWS)
    assert not (windows[:3, 1:] == impossible).any(), "the seed must keep it out of these"
    assert math.isfinite(score(model, windows[:3]).nll)


# --- the number --------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10_000)), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_perplexity_weighs_by_tokens_in_any_order(parts: list[tuple[float, int]], random) -> None:
    shuffled = parts.copy()
    random.shuffle(shuffled)
    totals = []
    for order in (parts, shuffled):
        total = Perplexity(0.0, 0)
        for nll, tokens in order:
            total += Perplexity(nll, tokens)
        totals.append(total)
    tokens = sum(count for _, count in parts)
    assert totals[0].tokens == totals[1].tokens == tokens
    mean = math.fsum(nll for nll, _ in parts) / tokens
    for total in totals:
        assert total.mean == pytest.approx(mean, rel=1e-12)  # a few float64 additions
        if mean < 700:
            assert total.value == math.exp(total.mean)
