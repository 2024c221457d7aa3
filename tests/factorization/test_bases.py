"""Bases: by their definition where entries are alone, better where inputs go together."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.rounding import (
    BLOCK,
    GptqOrder,
    cluster,
    round_gptq,
    round_nearest,
    round_to_codebook,
    scales,
)
from lrbo.layers.forms import BITS, Codebook, Quantized
from lrbo.layers.options import Option
from lrbo.layers.packing import pack, unpack
from tests.support import reference

both_signs = pytest.mark.parametrize("symmetric", [False, True])
every_width = pytest.mark.parametrize("bits", BITS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(width: int, seed: int = 1) -> Tensor:
    root = drawn(width, width, seed=seed) * torch.linspace(2.0, 0.1, width, dtype=torch.float64)
    return root @ root.T / width + 0.5 * torch.ones(width, width, dtype=torch.float64)


def output_error(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    rest = weight - rounded
    return float(torch.einsum("oi,ij,oj->", rest, moment, rest))


@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_integers_are_read_bit_by_bit(bits: int, rows: int, eights: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 8 * eights), dtype=np.uint8)
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.shape == (rows, bits * eights)
    assert packed.dtype == torch.uint8
    assert np.array_equal(reference.unpacked(packed.numpy(), bits), codes)
    assert np.array_equal(unpack(packed, bits).numpy(), codes)


@every_width
@both_signs
@pytest.mark.parametrize("size", [16, 32])
def test_nearest_is_at_most_half_a_step_away_from_what_is_not_clipped(
    bits: int, symmetric: bool, size: int
) -> None:
    weight, form = drawn(6, 64), Quantized(bits, symmetric)
    (rounded,) = round_nearest(weight, [(form, size)], dtype=torch.float64)
    assert rounded.level[0] == size
    codes = reference.unpacked(rounded.tensors["packed"].numpy(), bits).reshape(6, -1, size)
    steps = rounded.tensors["scale"][:, :, None].numpy()
    away = np.abs(rounded.weight(torch.float64).numpy() - weight.numpy()).reshape(6, -1, size)
    inner = (codes > 0) & (codes < 2**bits - 1)
    assert inner.any()
    assert (away <= steps * 0.5 * (1 + 1e-9))[inner].all()


@every_width
@both_signs
def test_what_lies_on_the_grid_stays(bits: int, symmetric: bool) -> None:
    form, most = Quantized(bits, symmetric), 2**bits - 1
    codes = torch.linspace(0, most, 32, dtype=torch.float64).round().repeat(3, 1)
    middle = 2 ** (bits - 1) if symmetric else 1
    weight = 0.25 * (codes - middle)
    if symmetric:  # whose range has a middle between two integers
        weight[weight == -0.25 * middle] = 0.0
    (rounded,) = round_nearest(weight, [(form, 32)], dtype=torch.float64)
    limit = 0.25 if symmetric else 1e-12
    assert float((rounded.weight(torch.float64) - weight).abs().max()) <= limit


@every_width
@both_signs
def test_with_uncorrelated_inputs_every_entry_is_rounded_alone(bits: int, symmetric: bool) -> None:
    weight, grid = drawn(5, 64), [(Quantized(bits, symmetric), 16)]
    moment = torch.eye(64, dtype=torch.float64) * 3.0
    (alone,) = round_nearest(weight, grid, dtype=torch.float64)
    (together,) = round_gptq(weight, moment, grid, dtype=torch.float64)
    assert torch.equal(alone.tensors["scale"], together.tensors["scale"])
    differing = (
        (unpack(alone.tensors["packed"], bits) != unpack(together.tensors["packed"], bits))
        .double()
        .mean()
    )
    assert float(differing) < 0.01  # halves, in float32


@every_width
@both_signs
def test_with_correlated_inputs_gptq_leaves_far_less(bits: int, symmetric: bool) -> None:
    weight, moment = drawn(24, 256), correlated(256)
    grid = [(Quantized(bits, symmetric), 64)]
    (alone,) = round_nearest(weight, grid, dtype=torch.float64)
    (together,) = round_gptq(weight, moment, grid, dtype=torch.float64)
    errors = [
        output_error(weight, each.weight(torch.float64), moment) for each in (alone, together)
    ]
    assert errors[1] < 0.7 * errors[0]


def test_gptq_is_the_textbook_algorithm() -> None:
    """Column by column with the whole inverse, against panels and a triangular root."""
    weight, moment = drawn(4, 160, seed=3), correlated(160, seed=4)
    form, size, damping = Quantized(4), 32, 0.01
    (actual,) = round_gptq(weight, moment, [(form, size)], dtype=torch.float64, damping=damping)
    scale, zero = scales(weight, form, size, moment.diagonal(), torch.float64)
    order = moment.diagonal().argsort(descending=True, stable=True).tolist()
    damped = moment + damping * moment.diagonal().mean() * torch.eye(160, dtype=torch.float64)
    rest, left = weight.clone(), list(order)
    codes = torch.zeros(4, 160, dtype=torch.int64)
    for column in order:
        inverse = torch.linalg.inv(damped[left][:, left])
        group = column // size
        code = (rest[:, column] / scale[:, group] + zero[:, group]).round().clamp(0, 15)
        codes[:, column] = code.long()
        error = rest[:, column] - (code - zero[:, group]) * scale[:, group]
        rest[:, left] -= torch.outer(error / inverse[0, 0], inverse[0])
        left = left[1:]
    differing = (unpack(actual.tensors["packed"], 4).long() != codes).double().mean()
    assert float(differing) < 0.02  # ties, in float32


@pytest.mark.parametrize("width", [BLOCK - 40, BLOCK, 2 * BLOCK + 40])
def test_what_columns_leave_reaches_those_of_later_panels_and_blocks(width: int) -> None:
    """Column by column in float64, where every one shrinks by a tenth: there are no ties."""
    moment, columns = correlated(width), drawn(width, 3)
    order = GptqOrder.of(moment, 0.01, "moment")

    def snap(at: int, column: Tensor, value: Tensor) -> None:
        torch.mul(column, 0.9, out=value)

    left = columns.float()
    rounded = order.round(left, snap)
    moves, due, exact = order.moves.double(), columns.clone(), torch.empty_like(columns)
    for at in range(width):
        exact[at] = 0.9 * due[at]
        due[at + 1 :] += moves[at, at + 1 :, None] * (columns[at] - exact[at])
    assert float((rounded - exact).abs().max()) < 1e-4 * float(exact.abs().max())
    assert torch.allclose(left + rounded, columns.float(), atol=1e-5)


def test_several_grids_at_once_are_those_one_by_one() -> None:
    weight, moment = drawn(7, 128), correlated(128)
    grids = [(Quantized(bits, symmetric), size)
             for bits in BITS for symmetric in (False, True) for size in (32, 64)]  # fmt: skip
    for grid, own in zip(
        grids, round_gptq(weight, moment, grids, dtype=torch.bfloat16), strict=True
    ):
        (alone,) = round_gptq(weight, moment, [grid], dtype=torch.bfloat16)
        assert own.form == grid[0]
        assert own.level[0] == grid[1]
        assert torch.equal(own.tensors["packed"], alone.tensors["packed"])
        assert torch.equal(own.tensors["scale"], alone.tensors["scale"])
        assert own.tensors["scale"].dtype == torch.bfloat16
        assert ("zero" not in own.tensors) == grid[0].symmetric
        assert grid[0].symmetric or torch.equal(own.tensors["zero"], alone.tensors["zero"])


def test_scales_are_those_of_the_least_error_and_of_the_stored_dtype() -> None:
    weight = torch.zeros(1, 16, dtype=torch.float64)
    weight[0, :15] = torch.linspace(-1.0, 1.0, 15)
    weight[0, 15] = 8.0  # one that is dear to keep, and costs little where its input is rare
    importance = torch.ones(16, dtype=torch.float64)
    whole, _ = scales(weight, Quantized(3), 16, importance, torch.bfloat16)
    importance[15] = 1e-6
    clipped, _ = scales(weight, Quantized(3), 16, importance, torch.bfloat16)
    assert float(clipped) < float(whole)
    assert float(clipped.to(torch.bfloat16)) == float(clipped)


@both_signs
def test_a_row_of_zeros_stays_zero(symmetric: bool) -> None:
    weight = drawn(3, 32)
    weight[1] = 0.0
    for made in (
        round_nearest(weight, [(Quantized(2, symmetric), 16)], dtype=torch.float32),
        round_gptq(weight, correlated(32), [(Quantized(2, symmetric), 16)], dtype=torch.float32),
    ):
        assert not made[0].weight(torch.float64)[1].any()


def test_a_moment_that_is_not_positive_definite_is_an_error_with_the_damping_that_works() -> None:
    moment = torch.eye(32, dtype=torch.float64)
    moment[0, 1] = moment[1, 0] = 1.005
    swap = torch.eye(32, dtype=torch.float64).flip(0)
    grid = [(Quantized(4), 16)]
    with pytest.raises(StatisticsError, match=r"damping of 0\.001; raise bases\.damping to 0\.01"):
        round_gptq(drawn(2, 32), moment, grid, dtype=torch.float32, damping=0.001)
    assert round_gptq(drawn(2, 32), moment, grid, dtype=torch.float32, damping=0.01)
    with pytest.raises(StatisticsError, match="not positive definite even with a damping of 1;"):
        round_gptq(drawn(2, 32), moment - 5 * swap, grid, dtype=torch.float32)
    with pytest.raises(StatisticsError, match=r"a mean diagonal of 0\.000e"):
        round_gptq(drawn(2, 32), 0 * moment, grid, dtype=torch.float32)
    moment[3, 3] = torch.nan
    with pytest.raises(StatisticsError, match="1 non-finite values"):
        round_gptq(drawn(2, 32), moment, grid, dtype=torch.float32)


def test_gptq_reads_the_second_moment() -> None:
    """Mean and covariance together: inputs that hardly vary matter by their size."""
    weight, mean = drawn(3, 32), drawn(32, seed=5)
    covariance = correlated(32)
    plan = BasePlan(("int4", "int3"), BaseOptions(group_sizes=(16,)))
    given_ = {Statistic.INPUT_MEAN: mean, Statistic.INPUT_COVARIANCE: covariance}
    made = plan.make(weight, given_, torch.float32)
    moment = covariance + mean.outer(mean)
    grids = [(Quantized(4), 16), (Quantized(3), 16)]
    expected = round_gptq(weight, moment, grids, dtype=torch.float32)
    assert [base.family for base in made] == [Option("int4", (16,)), Option("int3", (16,))]
    for one, other in zip(made, expected, strict=True):
        assert torch.equal(one.tensors["packed"], other.tensors["packed"])
    plain = BasePlan(("int4",), BaseOptions(method="nearest", group_sizes=(16,)))
    (one,) = plain.make(weight, {}, torch.float32)
    (other,) = round_nearest(weight, grids[:1], dtype=torch.float32)
    assert torch.equal(one.tensors["packed"], other.tensors["packed"])
    assert not plain.needs
    assert plan.needs == given_.keys()
    with pytest.raises(StatisticsError, match="bases by gptq need the statistics covariance"):
        plan.make(weight, {Statistic.INPUT_MEAN: mean}, torch.float32)


# --- codebooks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4])
def test_every_entry_is_the_nearest_number_of_its_row(bits: int) -> None:
    weight, form = drawn(5, 64), Codebook(bits)
    base = round_to_codebook(weight, form, dtype=torch.float64)
    table = base.tensors["table"]
    assert table.shape == (5, 2**bits)
    away = (weight[:, :, None] - table[:, None, :]).abs().amin(2)
    assert torch.allclose((base.weight(torch.float64) - weight).abs(), away, atol=1e-6)


def test_numbers_are_the_weighed_means_of_their_entries() -> None:
    """The fixed point of Lloyd's algorithm, on rows that are clusters already."""
    centres = torch.tensor([-4.0, -1.0, 2.0, 5.0, 9.0, 20.0, 30.0, 50.0], dtype=torch.float64)
    near = 0.01 * drawn(1, 64)
    weight = centres.repeat_interleave(8)[None] + near
    importance = drawn(64, seed=9).square() + 0.1
    table = cluster(weight, 3, importance)[0]
    expected = (weight[0] * importance).view(8, 8).sum(1) / importance.view(8, 8).sum(1)
    assert torch.allclose(table, expected, atol=1e-4)


@pytest.mark.parametrize("bits", [3, 4])
def test_with_correlated_inputs_a_codebook_by_gptq_leaves_less(bits: int) -> None:
    weight, moment, form = drawn(24, 256), correlated(256), Codebook(bits)
    errors = [
        output_error(
            weight,
            round_to_codebook(weight, form, dtype=torch.float64, moment=each).weight(torch.float64),
            moment,
        )
        for each in (None, moment)
    ]
    assert errors[1] < 0.7 * errors[0]


def test_where_no_input_was_ever_other_than_zero_entries_are_rounded_alone() -> None:
    weight, plan = drawn(3, 32), BasePlan(("int4", "lut3"), BaseOptions(group_sizes=(16,)))
    zero = {
        Statistic.INPUT_MEAN: torch.zeros(32, dtype=torch.float64),
        Statistic.INPUT_COVARIANCE: torch.zeros(32, 32, dtype=torch.float64),
    }
    made = plan.make(weight, zero, torch.float64)
    alone = BasePlan(plan.forms, BaseOptions("nearest", (16,))).make(weight, {}, torch.float64)
    assert [base.family for base in made] == [base.family for base in alone]
    for one, other in zip(made, alone, strict=True):
        assert torch.allclose(one.weight(torch.float64), other.weight(torch.float64))
