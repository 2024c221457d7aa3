"""The learning rate is a share of the best first step, whatever the scale of the model."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrbo.errors import NonFiniteError
from lrbo.progress import Reporter
from lrbo.recovery import distill
from lrbo.recovery.learning_rate import RUNG, SHARE, best_step, rate_factor
from lrbo.recovery.optimizer import optimizer_of
from tests.support.distillations import FAST, held_back_kl, interrupted, parameters, recovery_of

FINDS = replace(FAST, lr=None)


def parabola(vertex: float, gain: float = 1.0) -> Callable[[float], float]:
    """A loss that a step of ``vertex`` lowers most, by ``gain``."""
    return lambda size: gain * ((size / vertex - 1) ** 2 - 1)


def test_the_rate_rises_and_falls_to_a_tenth() -> None:
    assert rate_factor(0.05, 0.1) == pytest.approx(0.5)
    assert rate_factor(0.1, 0.1) == rate_factor(0.0, 0.0) == 1.0
    assert rate_factor(1.0, 0.1) == pytest.approx(0.1)
    rates = [rate_factor(step / 100, 0.1) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))


@pytest.mark.parametrize("vertex", [2e-7, 3e-5, 4e-4, 0.9e-3, 1.1e-3, 1.7e-3, 0.02, 3.0])
def test_the_vertex_of_a_parabola_is_met(vertex: float) -> None:
    assert best_step(parabola(vertex, gain=1e-3)) == pytest.approx(vertex)


def test_a_loss_that_is_not_finite_is_of_too_large_a_step() -> None:
    def loss(size: float) -> float:
        return math.nan if size > 5e-5 else parabola(4e-5)(size)

    assert 1e-5 < (best_step(loss) or 0) <= 5e-5


def test_where_no_step_helps_there_is_none() -> None:
    tried: list[float] = []
    assert best_step(lambda size: tried.append(size) or size) is None  # type: ignore[func-returns-value]
    assert min(tried) < 1e-6


def test_where_every_step_helps_it_ends() -> None:
    assert 1.0 < (best_step(lambda size: -size) or 0) < 1e3


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_distill_takes_a_share_of_the_best_first_step(optimizer: str, tmp_path: Path) -> None:
    """Against a fine grid of first steps, each on a copy of the whole model."""
    logged: dict[str, float] = {}
    recovery = recovery_of(
        tmp_path,
        replace(FINDS, optimizer=optimizer, ce=0.0),
        log=lambda name, value, _: logged.setdefault(name, value),
    )
    before = held_back_kl(recovery)
    ids = recovery.training[[len(recovery.training) // 4, 3 * len(recovery.training) // 4]]
    log_p, log_q = (
        model(ids).logits[:, :-1].log_softmax(-1) for model in (recovery.dense, recovery.model)
    )
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
    own = dict(recovery.trainables.named_parameters())
    torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
    gradients = {name: copy.deepcopy(each.grad) for name, each in own.items()}
    start = parameters(recovery)

    def change(size: float) -> float:
        for name, each in own.items():
            each.grad = copy.deepcopy(gradients[name])
        matrices = recovery.trainables.matrices if optimizer == "muon" else ()
        optimizer_of(
            own, matrices, lr=size, weight_decay=FAST.weight_decay, dtype=torch.float32
        ).step()
        loss = held_back_kl(recovery)
        recovery.trainables.load_state(start)
        return loss - before

    grid = [1e-4 * 1.1**index for index in range(80)]
    changes = [change(size) for size in grid]
    best = grid[changes.index(min(changes))]
    for each in own.values():
        each.grad = None
    report = distill.run(recovery)
    assert min(changes) < 0
    assert change(logged["distill/lr"] / SHARE) < 0.9 * min(changes)
    assert logged["distill/lr"] / SHARE == pytest.approx(best, rel=0.6)
    assert report.after < report.before


def test_it_costs_no_tokens_and_is_the_same_rate_when_it_goes_on(tmp_path: Path) -> None:
    whole = recovery_of(tmp_path / "whole", FINDS)
    report = distill.run(whole)
    parts = replace(FINDS, save_minutes=1e-9)
    rates: list[float] = []

    def log(name: str, value: float, _: int) -> None:
        if name == "distill/lr":
            rates.append(value)

    interrupted(distill.run, recovery_of(tmp_path / "parts", parts), 5)
    recovery = recovery_of(tmp_path / "parts", parts, log=log)
    again = distill.run(recovery)
    assert (again.tokens, again.after) == (report.tokens, report.after)
    assert rates == []  # none is looked for again
    assert report.tokens == report.steps * FAST.batch_windows * whole.training.shape[1]
    for name, values in parameters(whole).items():
        torch.testing.assert_close(parameters(recovery)[name], values, rtol=0, atol=0)


def test_a_model_that_no_step_makes_better_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "learning_rate", lambda *_: None)
    recovery = recovery_of(tmp_path, FINDS)
    before = parameters(recovery)
    report = distill.run(recovery)
    assert report.steps == 0
    assert report.stopped is not None
    assert "no step along the first gradient is better" in report.stopped
    for name, values in parameters(recovery).items():
        torch.testing.assert_close(values, before[name], rtol=0, atol=0)


def test_looks_without_improvement_lower_the_rate_before_they_end_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    made: list[torch.optim.Optimizer] = []

    def optimizer(*given: Any, **named: Any) -> torch.optim.Optimizer:
        made.append(optimizer_of(*given, **named))
        return made[-1]

    def log(name: str, *_: float) -> None:
        if name == "distill/kl":
            rates.append(made[-1].param_groups[0]["lr"])

    monkeypatch.setattr(distill, "optimizer_of", optimizer)
    settings = replace(FAST, lr=1e3, weight_decay=0.0, warmup=0.0, patience=1, epochs=100)
    report = distill.run(recovery_of(tmp_path, settings, log=log))
    assert report.steps == 4 * FAST.evaluate_every
    looks = rates[1 :: FAST.evaluate_every]  # of 800 steps, over which it falls by itself
    assert looks == pytest.approx([1e3 / RUNG**cuts for cuts in range(4)], rel=0.01)


def test_a_gradient_that_is_not_finite_is_refused_before_a_step(tmp_path: Path) -> None:
    recovery = recovery_of(tmp_path, FINDS)
    before = parameters(recovery)
    first = next(iter(recovery.trainables.named_parameters()))[1]
    first.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), math.nan))
    reason = rf"step 1: {first[0].numel()} elements of the gradient are not finite"
    with pytest.raises(NonFiniteError, match=reason):
        distill.run(recovery)
    for name, values in parameters(recovery).items():
        torch.testing.assert_close(values, before[name], rtol=0, atol=0)


def test_the_rate_is_said(tmp_path: Path) -> None:
    said: list[str] = []

    class Heard(Reporter):
        def say(self, text: str) -> None:
            said.append(text)

    distill.run(recovery_of(tmp_path, FINDS, reporter=Heard()))
    assert any("learning rate" in line for line in said)
