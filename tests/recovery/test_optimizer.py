"""Steps of matrices are those of torch's Muon, and all others those of its AdamW."""

import copy

import torch
from torch import Tensor, nn

from lrbo.recovery.optimizer import COEFFICIENTS, MOMENTUM, Muon, evened, optimizer_of


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def parameters() -> dict[str, nn.Parameter]:
    shapes = {"tall": (12, 5), "wide": (4, 9), "scale": (6, 3), "bias": (7,)}
    return {
        name: nn.Parameter(draw(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())
    }


def made(own: dict[str, nn.Parameter]) -> Muon:
    return optimizer_of(own, {"tall", "wide"}, lr=0.02, weight_decay=0.1, dtype=torch.float32)


def step(optimizers: list[torch.optim.Optimizer], own: dict[str, nn.Parameter], at: int) -> None:
    for index, parameter in enumerate(own.values()):
        parameter.grad = draw(*parameter.shape, seed=100 * at + index)
    for optimizer in optimizers:
        optimizer.step()


def test_steps_are_those_of_torch() -> None:
    own, other = parameters(), parameters()
    mine = made(own)
    reference = [
        torch.optim.Muon(
            [other["tall"], other["wide"]],
            lr=0.02,
            weight_decay=0.1,
            momentum=MOMENTUM,
            ns_steps=1,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW([other["scale"]], lr=0.02, weight_decay=0.1),
        torch.optim.AdamW([other["bias"]], lr=0.02, weight_decay=0.0),
    ]
    start = {name: parameter.detach().clone() for name, parameter in own.items()}
    for at in range(4):
        step([mine], own, at)
        step(reference, other, at)
    for name in ("scale", "bias"):
        assert torch.equal(own[name], other[name])
    for name in ("tall", "wide"):  # torch multiplies in bfloat16
        mine_at, reference_at = own[name].detach(), other[name].detach()
        moved = float((mine_at - start[name]).norm())
        assert float((mine_at - reference_at).norm()) < 0.03 * moved


def test_large_singular_values_of_a_step_are_about_one_and_small_ones_stay_below() -> None:
    a, b, c = COEFFICIENTS
    u, _, vh = torch.linalg.svd(draw(20, 8, seed=0), full_matrices=False)
    s = torch.tensor([4.0, 2.0, 2.0, 1.0, 0.3, 0.1, 0.03, 0.01])
    shares = s / s.norm()
    expected = a * shares + b * shares**3 + c * shares**5
    for matrix in (u * s @ vh, (u * s @ vh).T):
        result = evened(matrix)
        wide = result if matrix.shape == (20, 8) else result.T
        torch.testing.assert_close(wide, u * expected @ vh, rtol=0, atol=1e-5)
    assert 0.9 < float(expected[:3].min()) <= float(expected.max()) < 1.25
    assert float(expected[-1]) < 0.01
    assert torch.equal(evened(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_it_goes_on_from_its_state() -> None:
    whole, parts = parameters(), parameters()
    one, two = made(whole), made(parts)
    for at in range(3):
        step([one], whole, at)
    for at in range(2):
        step([two], parts, at)
    resumed = made(parts)
    resumed.load_state_dict(copy.deepcopy(two.state_dict()))
    step([resumed], parts, 2)
    for name, parameter in whole.items():
        assert torch.equal(parameter, parts[name])


def test_without_gradients_nothing_moves() -> None:
    own = parameters()
    before = copy.deepcopy(own)
    made(own).step()
    for name, parameter in own.items():
        assert torch.equal(parameter, before[name])
