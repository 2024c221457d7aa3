"""Changes of a shared weight: what is stored, and that curves are those of the stored module."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lrbo.calibration.statistics import Statistic
from lrbo.errors import ModelError
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prediction import squared_errors
from lrbo.factorization.prepare_unit import prepared_unit
from lrbo.factorization.prepared import UnitFactors, prepared_of
from lrbo.factorization.registry import method_named
from lrbo.layers.delta_form import Bands
from lrbo.layers.options import Option
from tests.factorization.test_quantized_factors import (
    INPUTS,
    OUTPUTS,
    drawn,
    inputs_and_slopes,
    layer,
    statistics_of,
)
from tests.support import reference

FORMS = ("delta", "delta_int8", "delta_bands")
BANDS = ((2, 3), (0, 1))
TOLERANCE = 1e-4  # relative: modules and stored factors are in float32


def shared() -> Tensor:
    """Return a base that differs from the layer by a change of falling energy."""
    axes = torch.linalg.qr(drawn(OUTPUTS, INPUTS, seed=8)).Q
    change = (axes * torch.arange(1, INPUTS + 1) ** -1.0) @ drawn(INPUTS, INPUTS, seed=9)
    return (layer(bias=False).weight.double() - change / 4).float()


def prepared(method: str, *, rounding: str = "gptq", bias: bool = True) -> UnitFactors:
    plan = BasePlan(FORMS, BaseOptions(rounding, bands=BANDS))
    given = statistics_of(*inputs_and_slopes())
    how = method_named(method)
    unit = prepared_unit(
        layer(bias=bias), how, given, None, bases=plan, errors=True, shared=shared()
    )
    assert isinstance(unit, UnitFactors)
    return replace(unit, shared=shared())


@pytest.mark.parametrize("method", ["svd", "bolaco", "loss_aware"])
def test_losses_and_errors_are_those_of_the_stored_layer(method: str) -> None:
    """The error is over the norm of the outputs of the layer, not of the change."""
    unit, dense = prepared(method), layer(bias=True).double()
    rows, slopes = inputs_and_slopes()
    given = statistics_of(rows, slopes)
    gradient = torch.from_numpy(reference.shrunk(given[Statistic.OUTPUT_GRADIENT].numpy(), 0.01))
    mean, moment = given[Statistic.INPUT_MEAN], given[Statistic.INPUT_COVARIANCE]
    names = ["delta", "delta_int8", "delta_bands 2 3", "delta_bands 0 1"]
    assert [str(family) for family in unit.based] == names
    for family in unit.based:
        own, least = unit.part(family), [np.inf, np.inf]
        metric = moment + (mean.outer(mean) if own.center is None else 0)
        assert own.loss is not None
        assert own.error is not None
        for rank in range(own.max_rank + 1):
            stored = unit.stored("unit", family.at(rank), torch.float32)
            change = dense.weight - stored.dense_weight()
            loss = float((gradient @ change @ metric * change).sum() / 2)
            weight, added = (torch.from_numpy(each) for each in reference.affine_of(stored, INPUTS))
            off = rows @ weight.T + added - dense(rows)
            error = float(off.norm() / dense(rows).norm())
            least = [min(least[0], loss), min(least[1], error)]
            expected = (
                pytest.approx(least[0], rel=TOLERANCE, abs=1e-9),
                pytest.approx(least[1], rel=TOLERANCE, abs=1e-6),
            )
            assert (float(own.loss[rank]), float(own.error[rank])) == expected, (family, rank)
        assert torch.equal(
            unit.stored("unit", family.at(0), torch.float32).dense_weight(torch.float32), shared()
        )


def test_directions_lie_in_bands_that_every_rank_is_a_prefix_of() -> None:
    unit = prepared("loss_aware")
    family = Option("delta_bands", BANDS[0])
    whole = unit.based[family].codes
    assert whole is not None
    runs = Bands(*BANDS[0]).runs(whole.rank)
    assert runs == [(2, 8), (3, 3), (whole.rank - 5, 2)]
    assert Bands(0, 0).runs(3) == [(3, 2)]
    assert Bands(4, 9).runs(2) == [(2, 8)]
    directions, start = [], [0, 0]
    for count, bits in runs:
        sides = []
        for index, (side, width) in enumerate(((whole.left, OUTPUTS), (whole.right, INPUTS))):
            size = count * width * bits // 8
            part = side[start[index] : start[index] + size].view(count, -1)
            codes = reference.unpacked(part.numpy(), bits).astype(float)
            sides.append(codes - (128 if bits == 8 else (2**bits - 1) / 2))
            start[index] += size
        directions.append(sides)
    assert start == [len(whole.left), len(whole.right)]
    left, right = (np.concatenate(side) for side in zip(*directions, strict=True))
    for rank in (1, 2, 4, 7, whole.rank):
        module = unit.stored("unit", family.at(rank), torch.float32)
        scaled = left[:rank].T * whole.scale[:rank].double().numpy()
        expected = shared().double().numpy() + scaled @ right[:rank]
        assert np.abs(module.dense_weight().numpy() - expected).max() < 1e-12
        held = module.state_dict()
        assert "shared" not in held
        assert len(held["left"]) == OUTPUTS * Bands(*BANDS[0]).bits(rank) // 8


def test_rounding_in_both_metrics_loses_less_than_rounding_to_the_nearest() -> None:
    rows, slopes = inputs_and_slopes()
    given = statistics_of(rows, slopes)
    mean = given[Statistic.INPUT_MEAN]
    moment = given[Statistic.INPUT_COVARIANCE] + mean.outer(mean)
    change = layer(bias=False).weight.double() - shared().double()
    losses = []
    for rounding in ("gptq", "nearest"):
        codes = prepared("loss_aware", rounding=rounding).based[Option("delta_bands", (0, 1))].codes
        assert codes is not None
        wide = codes.wide(torch.float64)
        losses.append(squared_errors(change, *wide, moment, given[Statistic.OUTPUT_GRADIENT])[-1])
    assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deltas_are_read_back_moved_and_cut_without_the_base(dtype: torch.dtype) -> None:
    unit = prepared("bolaco")
    tensors = {name: tensor.clone() for name, tensor in unit.tensors().items()}
    assert not any("shared" in name for name in tensors)
    again = replace(prepared_of(tensors), shared=shared())
    for family in unit.based:
        part = again.only({family: 3}, dtype, torch.device("cpu"))
        assert isinstance(part, UnitFactors)
        assert part.shared is not None
        assert part.shared.dtype == dtype
        held = [
            each.state_dict()
            for each in (
                unit.stored("unit", family.at(3), dtype),
                part.trial_module("unit", family.at(3), 10**6, {}),
                part.stand_in("unit", family.at(3)),
            )
        ]
        for other in held[1:]:
            assert other.keys() == held[0].keys()
            assert all(torch.equal(other[name], held[0][name]) for name in held[0])


@pytest.mark.parametrize("part", ["codes_left", "codes_scale", "codes_right"])
def test_bands_that_are_damaged_are_refused(part: str) -> None:
    tensors = dict(prepared("svd").tensors())
    name = f"delta_bands 2 3.{part}"
    tensors[name] = tensors[name][:2]
    with pytest.raises(ValueError, match=rf"{name} is missing or not of shape"):
        prepared_of(tensors)


def test_a_change_without_its_base_or_on_another_shape_is_refused() -> None:
    unit = replace(prepared("svd"), shared=None)
    module = unit.stored("unit", Option("delta", (2,)), torch.float32)
    with pytest.raises(ModelError, match="a layer that adds to a base model has none"):
        module(torch.ones(1, INPUTS))
    with pytest.raises(ModelError, match=r"a base of shape \(16, 24\), expected \(24, 16\)"):
        module.share_(shared().T)
