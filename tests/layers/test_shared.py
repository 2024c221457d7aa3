"""Layers that have one right factor: it is run once, and never on another input than their own."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lrbo.layers.modules import replace_modules
from lrbo.layers.shared import SharedLinear

IN, RANK, OUTS = 6, 3, {"q": 5, "k": 4, "v": 2}


class Reader(nn.Module):
    """Layers that read one input, in some order."""

    def __init__(self) -> None:
        super().__init__()
        for name, out in OUTS.items():
            self.add_module(name, nn.Linear(IN, out))

    def forward(self, x: Tensor, order: str = "qkv") -> list[Tensor]:
        return [self.get_submodule(name)(x) for name in order]


def shared() -> dict[str, SharedLinear]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    right = draw(RANK, IN)
    return {
        name: SharedLinear(draw(out, RANK), right if name == "q" else None, draw(out), IN, "q")
        for name, out in OUTS.items()
    }


def reader() -> Reader:
    model = Reader().double()
    replace_modules(model, shared())
    return model


def inputs(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, IN, generator=generator, dtype=torch.float64)


def expected(model: nn.Module, x: Tensor, order: str = "qkv") -> list[Tensor]:
    """Multiply by the dense weights, which is another order of sums."""
    layers = [model.get_submodule(name) for name in order]
    return [x @ layer.dense_weight().T + layer.bias for layer in layers]


@pytest.mark.parametrize("order", ["qkv", "vkq", "kqv", "qqkkvv", "vvkqkv", "k"])
def test_in_any_order_the_layers_are_what_their_weights_say(order: str) -> None:
    model = reader()
    for seed in (1, 2):
        x = inputs(seed)
        for actual, dense in zip(model(x, order), expected(model, x, order), strict=True):
            torch.testing.assert_close(actual, dense, rtol=1e-12, atol=1e-12)


def test_the_right_factor_is_run_once_and_nothing_is_kept_after() -> None:
    model, x = reader(), inputs()
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() // 2 == len(x) * RANK * (IN + sum(OUTS.values()))
    assert all(layer._handed is None for layer in model.children())
    parameters = RANK * (IN + sum(OUTS.values())) + sum(OUTS.values())
    assert sum(each.numel() for each in model.parameters()) == parameters
    assert sum(each.numel() for each in model.state_dict().values()) == parameters


def test_what_was_handed_over_for_another_tensor_is_not_taken() -> None:
    model, x, other = reader(), inputs(), inputs(2)
    model.q(x)
    torch.testing.assert_close(model.k(other), expected(model, other, "k")[0])
    model.q(x)
    model.k(x)
    x.add_(1.0)  # of which no layer was told
    torch.testing.assert_close(model.k(x), expected(model, x, "k")[0])
    torch.testing.assert_close(model.q(x), expected(model, x, "q")[0])


def test_copies_have_a_factor_of_their_own() -> None:
    model = reader()
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert other.k.peers == (other.q,)
        assert other.q.peers == (other.k, other.v)
        before = model(inputs())
        with torch.no_grad():
            other.q.right.weight.mul_(2.0)
        for unchanged, actual in zip(before, model(inputs()), strict=True):
            assert torch.equal(unchanged, actual)
        torch.testing.assert_close(other(inputs()), expected(other, inputs()))


def test_an_adapter_on_the_factor_is_seen_by_all() -> None:
    model = reader()

    class Twice(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    before, bias = model(inputs()), [layer.bias for layer in model.children()]
    model.q.right = Twice(model.q.right)
    for order in ("qkv", "vkq"):
        after = dict(zip(order, model(inputs(), order), strict=True))
        for name, old, own in zip("qkv", before, bias, strict=True):
            torch.testing.assert_close(after[name], 2 * (old - own) + own)


def test_gradients_of_all_layers_reach_the_factor() -> None:
    model = reader().requires_grad_()
    sum(each.sum() for each in model(inputs())).backward()
    (at_once,) = [model.q.right.weight.grad.clone()]
    model.zero_grad()
    sum(each.sum() for each in model(inputs(), "vkq")).backward()
    torch.testing.assert_close(model.q.right.weight.grad, at_once)


def test_layers_that_were_put_back_stay_as_they_were() -> None:
    model = reader()
    dense = {"k": nn.Linear(IN, OUTS["k"]).double()}
    before = replace_modules(model, dense)
    replace_modules(model, before)
    assert model.q.peers == (model.k, model.v)
    torch.testing.assert_close(model(inputs()), expected(model, inputs()))
