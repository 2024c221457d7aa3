"""Small updates of factors: nothing at first, all that is trained, and merged at last."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrbo.config.distillation import FORMS, AdapterConfig, training_problems
from lrbo.errors import ModelError, NonFiniteError
from lrbo.recovery import adapter
from lrbo.recovery.adapter import Adaptation, adapter_problems, count_numbers
from lrbo.recovery.stage import Recovery
from lrbo.recovery.updates import (
    Diagonal,
    LowRank,
    LowRankSparse,
    TensorTrain,
    largest_bonds,
    make_update,
    modes_of,
)
from tests.support.distillations import QUIET, held_back_kl, interrupted, parameters, recovery_of
from tests.support.recoveries import FORMS as FORMS_OF_LAYERS
from tests.support.recoveries import Pair, compressed_pair

FAST = AdapterConfig(rank=2, lr=2e-2, epochs=1, batch_windows=2, evaluate_every=4, patience=100)
every_form = pytest.mark.parametrize("form", FORMS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=seeded(seed), dtype=torch.float64)


def change_(parts: torch.nn.Module, scale: float = 0.1) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(parts.parameters()):
            parameter += scale * draw(*parameter.shape, seed=index).to(parameter)


def logits(recovery: Recovery) -> Tensor:
    with torch.no_grad():
        result: Tensor = recovery.model(recovery.held_back).logits
    return result


@pytest.fixture(scope="module")
def many() -> Pair:
    return compressed_pair(case="llama_untied", options=FORMS_OF_LAYERS)


@every_form
def test_it_begins_with_the_function_of_the_model_and_leaves_that_of_the_sums(
    form: str, many: Pair, tmp_path: Path
) -> None:
    recovery = many.recovery(tmp_path, replace(FAST, form=form))
    before, at_first = parameters(recovery), logits(recovery)
    stage = Adaptation(recovery)
    assert torch.equal(logits(recovery), at_first)
    for update in stage.updates.values():
        change_(update)
    adapted = logits(recovery)
    assert not torch.equal(adapted, at_first)
    stage.best_state = stage._state()
    stage._put_back()
    assert torch.equal(logits(recovery), adapted)
    after = parameters(recovery)
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape
        assert torch.equal(after[name], tensor) != (name in stage.updates), name
    sides = {name.rpartition(".")[2] for name in stage.updates}
    assert sides == {"left", "right", "matrix"}
    assert {*stage.updates} == {*recovery.trainables.matrices}
    recovery.trainables.store_()
    bound = 1e-4 * float(adapted.abs().max())
    torch.testing.assert_close(logits(recovery), adapted, rtol=0, atol=bound)


@every_form
def test_nothing_else_is_trained_and_it_comes_nearer_to_the_dense_model(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    monkeypatch.setattr(QUIET, "say", said.append)
    recovery = recovery_of(tmp_path, replace(FAST, form=form))
    before, kl = parameters(recovery), held_back_kl(recovery)
    report = adapter.run(recovery)
    assert report.after < report.before
    assert report.name == "adapter"
    assert held_back_kl(recovery) < kl
    matrices = recovery.trainables.matrices
    for name, tensor in parameters(recovery).items():
        assert torch.equal(tensor, before[name]) != (name in matrices), name
    shapes = {n: (len(before[n]), before[n].shape[1]) for n in matrices}
    whole = sum(math.prod(shape) for shape in shapes.values())
    assert report.trained == count_numbers(recovery.settings, shapes) < whole
    assert said[0] == (
        f"Stage adapter trains {report.trained:,} numbers in place of the {whole:,} of "
        f"{len(matrices)} matrices"
    )
    for _, parameter in recovery.trainables.named_parameters():
        assert parameter.requires_grad


@pytest.mark.parametrize("form", ["lora_sparse", "tensor_train"])
def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(
    form: str, tmp_path: Path
) -> None:
    settings = replace(FAST, form=form, evaluate_every=3, save_minutes=1e-9)
    whole = recovery_of(tmp_path / "whole", settings, form="pivoted")
    expected = adapter.run(whole)

    interrupted(adapter.run, recovery_of(tmp_path / "killed", settings, form="pivoted"), 6)
    steps: list[int] = []
    resumed = recovery_of(
        tmp_path / "killed", settings, form="pivoted", log=lambda *given: steps.append(given[2])
    )
    with torch.no_grad():  # as another machine would factor it: along other signs
        for name, parameter in resumed.trainables.named_parameters():
            if name.endswith((".left", ".right")):
                parameter.neg_()
    report = adapter.run(resumed)
    assert min(steps) == 6
    assert (report.before, report.after) == (expected.before, expected.after)
    for name, tensor in parameters(resumed).items():
        assert torch.equal(tensor, parameters(whole)[name]), name


def test_a_loss_that_is_not_finite_leaves_the_best_state_without_updates(tmp_path: Path) -> None:
    recovery = recovery_of(tmp_path)
    before = parameters(recovery)

    def spoil(name: str, _: float, step: int) -> None:
        if (name, step) == ("adapter/kl", 2):
            with torch.no_grad():
                layer = recovery.trainables.modules["model.layers.0.mlp.up_proj"]
                next(p for n, p in layer.named_parameters() if n.endswith("up")).fill_(torch.inf)

    with pytest.raises(NonFiniteError, match=r"stage adapter, step 3: .*adapter\.lr"):
        adapter.run(replace(recovery, settings=FAST, log=spoil))
    for name, tensor in parameters(recovery).items():
        assert torch.equal(tensor, before[name])
    names = {name for name, _ in recovery.trainables.model.named_parameters()}
    assert not any(".parametrizations.left" in name for name in names)


def test_one_side_alone_is_adapted_if_asked(tmp_path: Path) -> None:
    """SVD-LLM's sequential LoRA is one such training after the other."""
    for side in ("left", "right"):
        recovery = recovery_of(tmp_path / side, replace(FAST, sides=side))
        before = parameters(recovery)
        adapter.run(recovery)
        for name, tensor in parameters(recovery).items():
            assert torch.equal(tensor, before[name]) != name.endswith(f".{side}"), name


def test_muon_trains_low_ranks_as_well(tmp_path: Path) -> None:
    report = adapter.run(recovery_of(tmp_path, replace(FAST, optimizer="muon", lr=5e-3)))
    assert report.after < report.before


def test_updates_are_what_their_formulas_say() -> None:
    matrix = draw(24, 10)
    low = LowRank(matrix, 3, 6.0, seeded())
    change_(low)
    expected = matrix + 6.0 / 3 * low.up @ low.down
    torch.testing.assert_close(low(matrix), expected)
    sparse = LowRankSparse(matrix, 3, 6.0, 0.1, seeded())
    change_(sparse)
    largest = matrix.abs() >= matrix.abs().flatten().sort(descending=True).values[23]
    rest = sparse(matrix) - matrix - 2 * sparse.up @ sparse.down
    assert torch.equal(rest.abs() > 1e-9, largest)
    assert sparse.entries.numel() == 24
    train = TensorTrain(matrix, 4, 0.5, seeded())
    change_(train)
    assert modes_of(matrix.shape) == [8, 3, 2, 5]
    tensor = torch.einsum("aib,bjc,ckd,dle->ijkl", *train.cores).reshape(24, 10)
    torch.testing.assert_close(train(matrix), matrix + 0.5 * tensor)


def test_diagonals_are_those_of_some_directions_of_the_product() -> None:
    """Bolaco: ``B A + diag(b) B' diag(d) A'``, which the left factor can hold."""
    left, right = draw(12, 6), draw(6, 9, seed=1)
    update = Diagonal(left, 4, seeded(), rows=False)
    change_(update)
    some = update.directions
    assert len({*some.tolist()}) == 4
    expected = left @ right + update.b.diag() @ left[:, some] @ update.d.diag() @ right[some]
    torch.testing.assert_close(update(left) @ right, expected)
    mirrored = Diagonal(left.T.contiguous(), 4, seeded(), rows=True)
    change_(mirrored)
    torch.testing.assert_close(mirrored(left.T), update(left).T)
    assert len(Diagonal(left, 256, seeded(), rows=False).directions) == 6


@pytest.mark.parametrize("size", [1, 2, 7, 8, 64, 96, 576, 1536, 37, 74])
def test_modes_are_factors_of_both_sizes(size: int) -> None:
    modes = modes_of((size, 6))
    assert math.prod(modes) == size * 6
    assert math.prod(modes[:-1]) == size
    primes = [p for p in range(2, size + 1) if size % p == 0 and all(p % q for q in range(2, p))]
    assert all(mode <= 8 or mode in primes for mode in modes)
    assert largest_bonds((size, 6))[-1] == min(size, 6)


@every_form
def test_updates_are_added_in_the_dtype_of_the_matrix_whatever_is_multiplied_in(form: str) -> None:
    matrix = draw(16, 8).float()
    update = make_update(replace(FAST, form=form), "x.left", matrix, seeded())
    assert torch.equal(update(matrix), matrix)
    change_(update)
    expected = update(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(update(matrix), expected)
    assert expected.dtype == torch.float32
    again = make_update(replace(FAST, form=form), "x.left", matrix, seeded())
    change_(again)
    assert torch.equal(again(matrix), expected)


def test_what_cannot_be_is_said_with_the_layer_and_its_size(tmp_path: Path) -> None:
    shapes = {"a.left": (24, 6), "a.right": (6, 16), "b.matrix": (12, 16)}
    for form in ("lora", "lora_sparse", "tensor_train"):
        (problem,) = adapter_problems(AdapterConfig(form=form, rank=40), shapes)
        assert "recover.adapter.rank=40: expected at most " in problem
        assert problem.endswith(" by 6") or problem.endswith(" by 16")
        assert adapter_problems(AdapterConfig(form=form, rank=3), shapes) == []
    (problem,) = adapter_problems(AdapterConfig(rank=13), shapes)
    assert (
        "at most 12, which is all that the largest matrix can have, b.matrix of 12 by 16" in problem
    )
    assert adapter_problems(AdapterConfig(form="diagonal", rank=10**6), shapes) == []
    for sides, own in (("all", {}), ("left", {"b.matrix": (12, 16)})):
        (problem,) = adapter_problems(AdapterConfig(sides=sides), own)
        assert "no matrix to add an update to" in problem
    bases = compressed_pair(options=dict.fromkeys(FORMS_OF_LAYERS, ("lut4 0", "lut4 0")))
    with pytest.raises(ModelError, match="no matrix to add an update to"):
        adapter.run(bases.recovery(tmp_path, FAST))


def test_options_of_other_forms_are_refused() -> None:
    config = AdapterConfig(form="diagonal", alpha=2.0, entries=0.1, kl=0, ce=0)
    first, *others = training_problems(config, "recover.adapter.")
    assert "kl, ce and hidden are all 0" in first
    assert others[0].startswith("recover.adapter.alpha=2.0: expected null with form=diagonal")
    assert others[1].endswith("leave it out, or take form=lora_sparse")
    assert training_problems(AdapterConfig(form="lora_sparse", entries=0.1), "") == []
