"""Blocks trained one by one: nearer to the dense model, never worse, resumable, in time."""

import copy
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lrbo.errors import NonFiniteError
from lrbo.models.blockwise import Scratch
from lrbo.recovery import blocks
from lrbo.recovery.blocks import BlockLoss
from lrbo.recovery.gradients import output_metrics, scale_of
from lrbo.tasks.causal_lm import CausalLM
from tests.support.recoveries import FORMS, TRAINING, Pair, compressed_pair, divergence, settings


@pytest.fixture(scope="module")
def pair() -> Pair:
    return compressed_pair()


def test_blocks_come_nearer_to_the_dense_model_on_text_that_none_was_trained_on(
    pair: Pair, tmp_path: Path
) -> None:
    before = divergence(pair.dense, pair.model, pair.text[TRAINING:])
    after = {}
    for weighting in ("gradient", "none"):
        recovery = pair.recovery(tmp_path / weighting, settings(weighting=weighting))
        report = blocks.run(recovery)
        assert report.after < report.before
        assert all(row["after"] <= row["before"] for row in report.rows)
        assert [row["block"] for row in report.rows] == [0, 1]
        assert report.steps == 2 * 12 * TRAINING // 4
        inside = recovery.trainables.names_of("model.layers")
        every = dict(recovery.trainables.named_parameters())
        assert report.trained == sum(every[name].numel() for name in inside)
        assert [row[0] for row in pair.logged[-2:]] == ["blocks/before", "blocks/after"]
        recovery.trainables.store_()
        after[weighting] = divergence(pair.dense, recovery.model, recovery.held_back)
    # Errors of the stream are not alike: those that the loss depends on come first.
    assert after["gradient"] < 0.85 * before
    assert after["gradient"] < after["none"] < before


def test_what_was_interrupted_after_a_block_ends_as_if_it_had_not_been(
    pair: Pair, tmp_path: Path
) -> None:
    whole = pair.recovery(tmp_path / "whole", settings(epochs=3))
    report = blocks.run(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half" / "block_001.safetensors").unlink()
    half = pair.recovery(tmp_path / "half", settings(epochs=3))
    again = blocks.run(half)
    assert (again.before, again.after, again.steps) == (report.before, report.after, report.steps)
    for (name, own), (_, other) in zip(
        half.trainables.named_parameters(), whole.trainables.named_parameters(), strict=True
    ):
        assert torch.equal(own, other), name


def test_a_block_that_becomes_worse_keeps_what_it_had(pair: Pair, tmp_path: Path) -> None:
    recovery = pair.recovery(tmp_path, settings(lr=1.0, epochs=1))
    before = {name: p.detach().clone() for name, p in recovery.trainables.named_parameters()}
    report = blocks.run(recovery)
    assert report.after == report.before
    assert report.stopped is not None
    assert "2 of 2 blocks stay what they were" in report.stopped
    for name, parameter in recovery.trainables.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_model_that_is_the_dense_one_needs_nothing(pair: Pair, tmp_path: Path) -> None:
    model = copy.deepcopy(pair.model)
    for name, module in [*model.named_modules()]:
        if hasattr(module, "dense_weight"):
            dense = nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight = nn.Parameter(module.dense_weight(torch.float32), requires_grad=False)
            model.set_submodule(name, dense)
    recovery = pair.recovery(tmp_path, settings(), dense=model)
    report = blocks.run(recovery)
    assert report.before == pytest.approx(0, abs=1e-6)


def test_the_minutes_decide_how_many_steps_there_are(pair: Pair, tmp_path: Path) -> None:
    recovery = pair.recovery(tmp_path, settings(epochs=1000), deadline=lambda: 0.2)
    report = blocks.run(recovery)
    assert report.seconds < 5
    assert 2 <= report.steps < 1000
    assert report.stopped is not None
    assert "blocks had fewer steps than asked: minutes" in report.stopped


def test_tokens_decide_how_many_steps_there_are(pair: Pair, tmp_path: Path) -> None:
    recovery = pair.recovery(tmp_path, settings(lr=1e-3), tokens=1000)
    report = blocks.run(recovery)
    assert max(row["steps"] for row in report.rows) == math.ceil(1000 / (4 * 24))


def test_a_loss_that_is_no_number_names_block_and_step_and_keeps_what_was_finished(
    pair: Pair, tmp_path: Path
) -> None:
    recovery = pair.recovery(tmp_path, settings(epochs=1))
    last = recovery.model.model.layers[1].mlp.down_proj
    calls = []

    def spoil(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        calls.append(output)
        return output * math.nan if len(calls) > 6 else output

    last.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match="the loss of block 1 is nan at step"):
        blocks.run(recovery)
    assert (tmp_path / "block_000.safetensors").is_file()
    assert not (tmp_path / "block_001.safetensors").exists()


def test_the_moments_are_those_of_autograd_through_the_whole_model(pair: Pair) -> None:
    """Against hooks on the blocks of the whole model, in one pass."""
    windows = pair.text[:6]
    metrics = output_metrics(
        pair.dense, CausalLM(), windows, seed=3, batch_windows=4, scratch=Scratch()
    )
    outputs: dict[int, Tensor] = {}

    def keep(index: int, output: Tensor) -> Tensor:
        outputs[index] = output.requires_grad_()
        return outputs[index]

    for index, block in enumerate(pair.dense.model.layers):
        block.register_forward_hook(lambda _m, _i, out, index=index: keep(index, out))
    try:
        logits = pair.dense(windows).logits
    finally:
        for block in pair.dense.model.layers:
            block._forward_hooks.clear()
    uniform = torch.rand(windows.shape, generator=torch.Generator().manual_seed(3))
    total = logits.detach().softmax(-1).cumsum(-1)
    labels = torch.searchsorted(total, uniform[..., None] * total[..., -1:], right=True)[..., 0]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, [outputs[0], outputs[1]])
    for index, gradient in enumerate(gradients):
        scale = scale_of(outputs[index].detach())
        assert metrics[index].most == pytest.approx(8 * float(scale.median()))
        rows = (gradient * scale).flatten(0, 1).double()
        expected = rows.T @ rows / len(rows)
        mean = expected.diagonal().mean()
        expected = 0.99 * expected + 0.01 * mean * torch.eye(len(expected))
        torch.testing.assert_close(
            metrics[index].moment.double(), expected, rtol=1e-3, atol=1e-4 * float(mean)
        )


def test_the_weighed_error_predicts_the_divergence_of_a_small_change(pair: Pair) -> None:
    """A change of the last block's output costs about the loss in nats, by its Taylor series."""
    task, windows = CausalLM(), pair.text
    metrics = output_metrics(pair.dense, task, windows, seed=0, batch_windows=8, scratch=Scratch())
    body = task.segments(pair.dense)
    with torch.no_grad():
        states = body.embed(windows)
        for index in range(len(body)):
            with body.open_block(index) as block:
                states = body.run(block, index, states)
        noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
        other = states + 0.02 * noise * scale_of(states)
        predicted = float(BlockLoss(metrics[-1], torch.device("cpu"))(other, states))
        divergence = task.distance(body, body.finish(states), body.finish(other))
    assert predicted == pytest.approx(divergence, rel=0.3)


def test_a_model_of_many_forms_comes_nearer_and_is_stored_as_it_was(tmp_path: Path) -> None:
    many = compressed_pair(case="llama_untied", options=FORMS)
    layout = {n: (t.shape, t.dtype) for n, t in many.model.state_dict().items()}
    recovery = many.recovery(tmp_path, settings(epochs=4))
    report = blocks.run(recovery)
    assert all(row["after"] < row["before"] for row in report.rows)
    recovery.trainables.store_()
    after = recovery.model.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == layout
    before = divergence(many.dense, many.model, recovery.held_back)
    assert divergence(many.dense, recovery.model, recovery.held_back) < before


def test_what_is_judged_is_what_is_stored_of_factors_in_integers(tmp_path: Path) -> None:
    options = dict.fromkeys(FORMS, ("factored_int4 4", "factored_int4 4"))
    coarse = compressed_pair(options=options)
    recovery = coarse.recovery(tmp_path, settings(epochs=2, weighting="none"))
    report = blocks.run(recovery)
    recovery.trainables.store_()
    bodies = [CausalLM().segments(each) for each in (coarse.dense, recovery.model)]
    with torch.no_grad():
        states = [body.embed(recovery.held_back) for body in bodies]
        for row in report.rows:
            for at, body in enumerate(bodies):
                with body.open_block(row["block"]) as block:
                    states[at] = body.run(block, row["block"], states[at])
            error = float((states[0] - states[1]).square().mean())
            assert row["after"] == pytest.approx(error, rel=1e-3)
