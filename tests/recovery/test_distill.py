"""A whole model is trained towards the dense one, resumes exactly, and is never left worse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrbo.config.distillation import DistillConfig, training_problems
from lrbo.errors import ModelError, NonFiniteError
from lrbo.recovery import distill
from lrbo.recovery.self_text import sampled_windows
from lrbo.recovery.student import Student
from lrbo.tasks.causal_lm import CausalLM
from tests.support.distillations import (
    FAST,
    QUIET,
    held_back_kl,
    interrupted,
    parameters,
    recovery_of,
    sharpened,
)
from tests.support.tiny import build, token_ids


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ce": 0.0, "teacher": "cached", "top_k": 60},
        {"hidden": 1.0, "accumulation": 2, "epochs": 2},
        {"temperature": 2.0},
    ],
    ids=str,
)
def test_it_comes_nearer_to_the_dense_model_on_windows_held_back(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    logged: list[str] = []
    settings = replace(FAST, **changes)
    recovery = recovery_of(tmp_path, settings, log=lambda name, *_: logged.append(name))
    before = held_back_kl(recovery)
    report = distill.run(recovery)
    after = held_back_kl(recovery)
    assert after < 0.9 * before
    assert report.after < report.before
    assert report.stopped is None
    if settings.ce == 0:
        assert report.before == pytest.approx(before, rel=0.02)
        assert report.after == pytest.approx(after, rel=0.02)
    assert report.steps == 8
    assert report.tokens == settings.epochs * 16 * 12
    assert {"distill/kl", "distill/nll", "distill/held_back_kl"} <= {*logged}
    recovery.trainables.store_()
    assert held_back_kl(recovery) == pytest.approx(after, rel=1e-4)


def test_without_divergence_it_is_training_on_the_text_alone(tmp_path: Path) -> None:
    """Just CHOP's continued pretraining: the dense model's distributions do not matter."""
    states = []
    rising = (torch.arange(12) + torch.arange(20)[:, None]) % 60 + 3
    for case in ("llama_untied", "qwen3"):
        recovery = recovery_of(tmp_path / case, replace(FAST, kl=0.0, ce=1.0))
        text = {"training": rising[:16], "held_back": rising[16:]}
        report = distill.run(replace(recovery, dense=build(case), **text))
        assert report.after < report.before
        states.append(parameters(recovery))
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])


def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    settings = replace(FAST, evaluate_every=3, save_minutes=1e-9)
    whole = recovery_of(tmp_path / "whole", settings)
    expected = distill.run(whole)

    interrupted(distill.run, recovery_of(tmp_path / "killed", settings), 6)
    steps: list[int] = []
    resumed = recovery_of(
        tmp_path / "killed", settings, log=lambda name, _, step: steps.append(step)
    )
    report = distill.run(resumed)
    assert min(steps) == 6
    assert (report.before, report.after) == (expected.before, expected.after)
    assert (report.steps, report.tokens) == (expected.steps, expected.tokens)
    for name, tensor in parameters(resumed).items():
        assert torch.equal(tensor, parameters(whole)[name]), name


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    settings = replace(FAST, save_minutes=1e-9)
    distill.run(recovery_of(tmp_path, settings))
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    (last / "progress.json").unlink()
    steps: list[int] = []
    distill.run(recovery_of(tmp_path, settings, log=lambda name, _, step: steps.append(step)))
    assert min(steps) == int(last.name[11:])


def test_the_best_state_is_left_and_without_improvement_that_before(tmp_path: Path) -> None:
    recovery = recovery_of(tmp_path, replace(FAST, lr=1e3, weight_decay=0.0, patience=1, epochs=9))
    before = parameters(recovery)
    stored = {name: tensor.clone() for name, tensor in recovery.dense.state_dict().items()}
    report = distill.run(recovery)
    assert report.before == report.after
    assert "no better" in str(report.stopped)
    assert report.steps == 4 * FAST.evaluate_every  # at four rates
    for name, tensor in parameters(recovery).items():
        assert torch.equal(tensor, before[name])
    for name, tensor in recovery.dense.state_dict().items():
        assert torch.equal(tensor, stored[name])


def test_it_ends_at_its_deadline_and_at_its_tokens(tmp_path: Path) -> None:
    left = iter([100.0] * 10)
    report = distill.run(recovery_of(tmp_path / "time", deadline=lambda: next(left, 0.0)))
    assert report.stopped is not None
    assert report.stopped.startswith("minutes")
    assert 0 < report.steps < 8
    report = distill.run(recovery_of(tmp_path / "none", deadline=lambda: 0.0))
    assert (report.steps, report.before) == (0, report.after)
    report = distill.run(recovery_of(tmp_path / "tokens", tokens=70))
    assert (report.steps, report.tokens, report.stopped) == (3, 72, None)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_leaves_the_best_state(
    tmp_path: Path,
) -> None:
    recovery = recovery_of(tmp_path)
    left = parameters(recovery)

    def spoil(name: str, _: float, step: int) -> None:
        nonlocal left
        if (name, step) == ("distill/held_back", 4):
            left = parameters(recovery)
        if (name, step) == ("distill/kl", 6):
            with torch.no_grad():
                recovery.trainables.modules["model.layers.0.mlp.up_proj"].left[0, 0] = torch.inf

    with pytest.raises(NonFiniteError, match=r"stage distill, step 7: .* of step 4\."):
        distill.run(replace(recovery, log=spoil))
    for name, tensor in parameters(recovery).items():
        assert torch.equal(tensor, left[name])


def test_factors_alone_are_trained_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = recovery_of(tmp_path, replace(FAST, train="factors"))
    before = parameters(recovery)
    report = distill.run(recovery)
    assert report.after < report.before
    for name, tensor in parameters(recovery).items():
        is_factor = name.endswith((".left", ".right"))
        assert torch.equal(tensor, before[name]) != is_factor, name
    assert all(p.requires_grad for _, p in recovery.trainables.named_parameters())
    norms = [each for each in recovery.trainables.named_parameters() if "norm" in each[0]]
    monkeypatch.setattr(recovery.trainables, "named_parameters", lambda: iter(norms))
    with pytest.raises(ModelError, match="nothing to train"):
        distill.run(recovery)


def test_what_is_reported_of_factors_in_integers_is_what_is_stored(tmp_path: Path) -> None:
    recovery = recovery_of(tmp_path, form="factored_int4", keep=0.2)
    report = distill.run(recovery)
    assert report.after < report.before
    recovery.trainables.store_()
    nll, divergence = CausalLM().compared(
        recovery.model,
        recovery.held_back,
        CausalLM().measure_dense(recovery.dense, recovery.held_back),
        0,
    )
    assert report.after == pytest.approx(float((divergence + 0.1 * nll).mean()), rel=1e-4)


def test_the_gradient_of_a_step_is_that_of_the_mean_loss_written_out(tmp_path: Path) -> None:
    recovery = recovery_of(tmp_path, replace(FAST, hidden=0.5), case="gpt2")
    student, ids = Student(recovery, {}), recovery.training[:3]
    student(ids, torch.arange(3))["loss"].backward()
    named = dict(recovery.trainables.named_parameters())
    actual = {name: p.grad.clone() for name, p in named.items()}
    for parameter in named.values():
        parameter.grad = None
    own, wanted = (
        model(ids, output_hidden_states=True) for model in (recovery.model, recovery.dense)
    )
    log_p, log_q = (each.logits[:, :-1].log_softmax(-1) for each in (wanted, own))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    nll = -log_q.gather(-1, ids[:, 1:, None]).mean()
    distances = [
        ((a - b).square().mean(-1) / b.square().mean(-1)).mean()
        for a, b in zip(own.hidden_states[1:], wanted.hidden_states[1:], strict=True)
    ]
    (kl + 0.1 * nll + 0.5 * sum(distances) / len(distances)).backward()
    for name, parameter in named.items():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_text_of_the_dense_model_itself(tmp_path: Path) -> None:
    dense, windows = sharpened(build("llama_tied")), token_ids(5, 9)
    own = [
        sampled_windows(dense, windows, seed=seed, batch_windows=2, reporter=QUIET)
        for seed in (0, 0, 1)
    ]
    assert own[0].shape == windows.shape
    assert own[0].dtype == windows.dtype
    assert torch.equal(own[0][:, 0], windows[:, 0])
    assert torch.equal(own[0], own[1])
    assert not torch.equal(own[0], own[2])
    with torch.no_grad():
        nll = [
            float(torch.nn.functional.cross_entropy(dense(x).logits[:, :-1].mT, x[:, 1:]))
            for x in (own[0], windows)
        ]
    assert nll[0] < nll[1]
    report = distill.run(recovery_of(tmp_path, replace(FAST, data="self")))
    assert report.tokens == 16 * 12
    assert (tmp_path / "text.safetensors").is_file()


def test_half_precision_trains_in_single(tmp_path: Path) -> None:
    recovery = recovery_of(tmp_path, form="pivoted", dtype=torch.bfloat16, case="llama_tied")
    report = distill.run(recovery)
    assert report.after < report.before
    recovery.trainables.store_()
    assert {p.dtype for p in recovery.model.parameters()} == {torch.bfloat16}


def test_values_that_cannot_be_together_are_named() -> None:
    config = DistillConfig(kl=0, ce=0, teacher="cached", temperature=2.0)
    first, second = training_problems(config, "recover.distill.")
    assert "kl, ce and hidden are all 0" in first
    assert "temperature=2.0: expected 1" in second
    assert training_problems(DistillConfig(), "") == []
