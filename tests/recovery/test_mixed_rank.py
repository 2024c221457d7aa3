"""Layers of the dense model in turns: drawn by seed and step, fewer and fewer, none at last."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrbo.config.distillation import DistillConfig, MixedRankConfig
from lrbo.recovery import distill, mixed_rank
from lrbo.recovery.mixed_rank import MixedStudent, dense_instead, mixed_rank_problems, units_of
from tests.support.distillations import held_back_kl, interrupted, parameters, recovery_of
from tests.support.recoveries import FORMS, compressed_pair

SHARED = {
    "self_attn.q_proj": ("shared_factored 3", "shared_factored 3"),
    "self_attn.k_proj": ("shared_factored 3", "shared_factored 3"),
    "self_attn.v_proj": ("shared_factored 3", "shared_factored 3"),
    "self_attn.o_proj": ("factored 3", "pivoted 3"),
}
FAST = MixedRankConfig(lr=5e-3, epochs=1, batch_windows=2, evaluate_every=4, patience=100)


@pytest.mark.parametrize("consistency", [0.0, 1.0])
def test_it_comes_nearer_to_the_dense_model_which_stays(consistency: float, tmp_path: Path) -> None:
    logged: dict[str, list[float]] = {}
    recovery = recovery_of(
        tmp_path,
        replace(FAST, consistency=consistency, epochs=2),
        log=lambda name, value, _: logged.setdefault(name, []).append(value),
    )
    dense = {name: tensor.clone() for name, tensor in recovery.dense.state_dict().items()}
    layers = dict(recovery.model.named_modules())
    before = held_back_kl(recovery)
    report = mixed_rank.run(recovery)
    assert (report.name, report.steps) == ("mixed_rank", 16)
    assert report.after < report.before
    assert held_back_kl(recovery) < before
    assert dict(recovery.model.named_modules()) == layers
    for name, tensor in recovery.dense.state_dict().items():
        assert torch.equal(tensor, dense[name])
    chances = logged["mixed_rank/probability"]
    assert chances == sorted(chances, reverse=True)
    assert chances[0] == pytest.approx(FAST.probability, rel=0.1)  # time counts too
    assert chances[8:] == [0.0] * 8
    assert ("mixed_rank/consistency" in logged) == (consistency > 0)


@pytest.mark.parametrize("consistency", [0.0, 1.0])
def test_at_probability_0_it_is_distillation(consistency: float, tmp_path: Path) -> None:
    shared = asdict(FAST)
    settings = replace(FAST, probability=0.0, consistency=consistency)
    for name in ("probability", "decay", "consistency"):
        del shared[name]
    ran = recovery_of(tmp_path / "mixed", settings)
    expected = recovery_of(tmp_path / "distill", DistillConfig(**shared))
    reports = mixed_rank.run(ran), distill.run(expected)
    assert reports[0].after == reports[1].after
    for name, tensor in parameters(ran).items():
        assert torch.equal(tensor, parameters(expected)[name]), name


def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    settings = replace(FAST, evaluate_every=3, save_minutes=1e-9, decay=1.0)
    whole = recovery_of(tmp_path / "whole", settings)
    expected = mixed_rank.run(whole)

    interrupted(mixed_rank.run, recovery_of(tmp_path / "killed", settings), 4)
    steps: list[int] = []
    resumed = recovery_of(tmp_path / "killed", settings, log=lambda *given: steps.append(given[2]))
    report = mixed_rank.run(resumed)
    assert min(steps) == 4
    assert (report.before, report.after) == (expected.before, expected.after)
    for name, tensor in parameters(resumed).items():
        assert torch.equal(tensor, parameters(whole)[name]), name


@pytest.mark.parametrize("case", ["llama_biased", "gpt2"])
def test_with_all_layers_of_the_dense_model_it_predicts_as_that_does(
    case: str, tmp_path: Path
) -> None:
    recovery = recovery_of(tmp_path, FAST, case=case)
    names = [name for unit in student_of(recovery).units for name in unit]
    assert {*names} == {*recovery.trainables.modules}
    with torch.no_grad():
        own = recovery.model(recovery.held_back).logits
        with dense_instead(recovery.model, recovery.dense, names):
            mixed = recovery.model(recovery.held_back).logits
        again = recovery.model(recovery.held_back).logits
        assert torch.equal(mixed, recovery.dense(recovery.held_back).logits)
    assert torch.equal(own, again)
    assert not torch.equal(own, mixed)


def student_of(recovery: Any) -> MixedStudent:
    return MixedStudent(recovery, dict(recovery.trainables.named_parameters()))


def test_draws_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    recovery = recovery_of(tmp_path, FAST)
    students = [student_of(replace(recovery, seed=seed)) for seed in (0, 0, 1)]
    drawn: list[list[Any]] = [[], [], []]
    for student, each in zip(students, drawn, strict=True):
        for step in range(200):
            student.draw(step, 0.3)
            each.append(student.drawn)
    students[0].draw(7, 0.3)
    assert students[0].drawn == drawn[0][7]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(passes) == 2 for passes in drawn[0])
    assert sum(first != second for first, second in drawn[0]) > 100
    layers = sum(len(unit) for unit in students[0].units)
    share = sum(len(names) for passes in drawn[0] for names in passes) / (400 * layers)
    assert share == pytest.approx(0.3, abs=0.03)
    students[0].draw(7, 0.0)
    assert students[0].drawn == []


def test_layers_that_share_a_factor_are_drawn_together(tmp_path: Path) -> None:
    pair = compressed_pair(options=SHARED)
    recovery = pair.recovery(tmp_path, FAST)
    student = student_of(recovery)
    assert max(map(len, student.units)) == 3
    student.draw(0, 0.5)
    for unit in student.units:
        for names in student.drawn:
            assert len({*unit} & {*names}) in (0, len(unit))
    report = mixed_rank.run(recovery)
    assert report.after < report.before


@pytest.mark.parametrize("count", [1, 2])
def test_each_pass_has_a_layer_to_train(count: int, tmp_path: Path) -> None:
    """Without one there would be no gradient: of factors alone, in a model of few that are low."""
    names = [*SHARED][::3][:count]
    options = dict.fromkeys(names, ("factored 3", "dense"))
    settings = replace(FAST, train="factors", probability=0.95, decay=1.0, consistency=0.0)
    recovery = compressed_pair(options=options).recovery(tmp_path, settings)
    student = student_of(recovery)
    assert len(student.units) == count
    for step in range(50):
        student.draw(step, 0.95)
        assert all(len(names) < count for names in student.drawn)
    assert mixed_rank.run(recovery).steps > 0


def test_thin_and_skipped_layers_have_no_counterpart(tmp_path: Path) -> None:
    for option in ("neurons 12", "skip"):
        options = {name: (option, option) for name in FORMS if "mlp" in name}
        options["self_attn.q_proj"] = ("factored 3", "pivoted 3")
        recovery = compressed_pair(options=options).recovery(tmp_path / option, FAST)
        stored = {name: each.stored for name, each in recovery.trainables.modules.items()}
        assert len(stored) == 8
        units = units_of(recovery.model, stored)
        assert units == [(f"model.layers.{index}.self_attn.q_proj",) for index in range(2)]
        assert mixed_rank_problems(units) == []
        assert "no compressed layer has a counterpart" in mixed_rank_problems([])[0]
