"""One block after the other is the body of the model."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lrbo.errors import ModelError
from lrbo.models.blockwise import BlockwiseBody
from lrbo.models.model_map import body_and_head
from tests.support.tiny import CASES, build, token_ids

every_family = pytest.mark.parametrize("case", CASES)


def run_all(body: BlockwiseBody, ids: Tensor) -> Tensor:
    """Embed, run every block, finish."""
    hidden = body.embed(ids)
    for index in range(len(body)):
        with body.open_block(index) as block:
            hidden = body.run(block, index, hidden)
    return body.finish(hidden)


@every_family
def test_block_by_block_is_the_body_bit_for_bit(case: str) -> None:
    model = build(case)
    body = BlockwiseBody(model)
    for windows, tokens in ((3, 12), (1, 12), (2, 5)):  # each shape has its own masks
        ids = token_ids(windows, tokens)
        with torch.no_grad():
            expected = body_and_head(model)[0](ids, use_cache=False).last_hidden_state
            assert torch.equal(run_all(body, ids), expected)


@every_family
def test_gradients_pass_through_blocks_and_end(case: str) -> None:
    """The chain rule by hand, block by block, equals one backward pass through the model."""
    model = build(case)
    body = BlockwiseBody(model)
    ids = token_ids(2, 7)
    inputs = body.embed(ids).requires_grad_()
    with torch.enable_grad():
        hidden = inputs
        for index in range(len(body)):
            with body.open_block(index) as block:
                hidden = body.run(block, index, hidden)
        finished = body.finish(hidden)
        (expected,) = torch.autograd.grad(finished.square().sum(), inputs)

    entering = [body.embed(ids)]
    with torch.no_grad():
        for index in range(len(body)):
            with body.open_block(index) as block:
                entering.append(body.run(block, index, entering[-1]))
    with torch.enable_grad():
        last = entering.pop().requires_grad_()
        (gradient,) = torch.autograd.grad(body.finish(last).square().sum(), last)
        for index in reversed(range(len(body))):
            hidden = entering[index].requires_grad_()
            with body.open_block(index) as block:
                out = body.run(block, index, hidden)
            (gradient,) = torch.autograd.grad(out, hidden, gradient)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graph", [False, True])
def test_finishing_follows_the_gradient_mode_of_its_caller(graph: bool) -> None:
    model = build("llama_untied").requires_grad_(True)
    body = BlockwiseBody(model)
    hidden = body.embed(token_ids(2, 5)).requires_grad_()
    with torch.set_grad_enabled(graph):
        assert body.finish(hidden).requires_grad is graph


def test_the_model_is_as_before_afterwards() -> None:
    model = build("llama_tied")
    ids = token_ids(2, 6)
    with torch.no_grad():
        before = model(ids).logits
        run_all(BlockwiseBody(model), ids)
        assert torch.equal(model(ids).logits, before)
    assert all("forward" not in vars(module) for module in model.modules())


def test_one_block_at_a_time_is_enough() -> None:
    """Only the block that is open has weights; the others are not even touched."""
    whole, model = build("qwen3"), build("qwen3")
    blocks = model.model.layers
    opened: list[int] = []

    @contextmanager
    def open_block(index: int):
        opened.append(index)
        blocks[index].load_state_dict(whole.model.layers[index].state_dict(), assign=True)
        yield blocks[index]
        blocks[index].to("meta")

    blocks.to("meta")
    ids = token_ids(2, 6)
    with torch.no_grad():
        actual = run_all(BlockwiseBody(model, open_block), ids)
        expected = body_and_head(whole)[0](ids, use_cache=False).last_hidden_state
    assert torch.equal(actual, expected)
    assert opened == [0, 1]


def test_a_block_that_returns_more_is_refused() -> None:
    class Chatty(nn.Module):
        def forward(self, hidden: Tensor, **kwargs: object) -> tuple[Tensor]:
            return (hidden,)

    body = BlockwiseBody(build("opt"))
    hidden = body.embed(token_ids(1, 4))
    with pytest.raises(ModelError, match=r"block 1 of OPT.* returns a tuple"):
        body.run(Chatty(), 1, hidden)
