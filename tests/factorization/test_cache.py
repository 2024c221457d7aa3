"""Factors come back from disk as they were, and only for what they were made of."""

import dataclasses
import errno
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrbo.calibration.statistics import Statistic
from lrbo.errors import CacheError, PathError, StatisticsError
from lrbo.factorization import prepare_unit
from lrbo.factorization.base import factor_layer
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.cache import (
    factor_model,
    factors_fingerprint,
    load_factors,
    save_factors,
)
from lrbo.factorization.factors import PARTS, LowRankFactors
from lrbo.factorization.methods import Asvd, Bolaco, LossAware, Svd, SvdLlm
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prediction import predicted_loss
from lrbo.factorization.registry import METHODS, method_named
from lrbo.files.caches import ABOUT, ATTEMPTS, cached
from lrbo.layers.modules import PRODUCTS
from lrbo.layers.options import Menu
from lrbo.linalg import JitterWarning
from lrbo.models.model_map import linear_bias, linear_weight, map_model
from lrbo.models.parameters import fingerprint
from lrbo.models.specs import LayerSpec
from tests.support.methods import RandomStatistics
from tests.support.tiny import CASES, build

TOLERANCE = {
    "rounded": 1e-6,  # relative to the largest entry: float64 rounded to float32 once
    "loss": 1e-12,  # relative to that of rank 0: sums of float64 in another order
}


def parts(case: str, method: str) -> Iterator[dict[str, LowRankFactors]]:
    model = build(case)
    return factor_model(model, map_model(model), method_named(method), RandomStatistics())


@functools.cache  # every test reads them only
def make(case: str, method: str) -> dict[str, LowRankFactors]:
    return merged(parts(case, method))


def merged(actual: Iterable[Mapping[str, LowRankFactors]]) -> dict[str, LowRankFactors]:
    return {name: factors for part in actual for name, factors in part.items()}


def assert_same(actual: LowRankFactors, expected: LowRankFactors) -> None:
    for part in PARTS:
        one, other = getattr(actual, part), getattr(expected, part)
        assert (one is None) == (other is None), part
        if one is not None:
            assert one.dtype == other.dtype, part
            assert torch.equal(one, other), part


every_case = pytest.mark.parametrize("case", ["llama_tied", "gpt2", "llama_biased"])
every_method = pytest.mark.parametrize("method", METHODS)


def test_every_part_of_the_factors_is_stored() -> None:
    assert {field.name for field in dataclasses.fields(LowRankFactors)} == set(PARTS)


# --- factoring a model -------------------------------------------------------------------------


@every_case
@every_method
def test_every_layer_is_factored_as_the_method_says(case: str, method: str) -> None:
    model = build(case)
    layers, statistics = map_model(model), RandomStatistics()
    factors = make(case, method)
    assert list(factors) == [spec.name for spec in layers.compressible]
    for spec in layers.compressible:
        module = model.get_submodule(spec.name)
        exact = factor_layer(
            method_named(method), linear_weight(module), linear_bias(module), statistics.of(spec)
        )
        actual = factors[spec.name]
        assert {actual.left.dtype, actual.right.dtype} == {torch.float32}
        predicted = predicted_loss(exact, statistics.of(spec))
        assert actual.loss is not None
        difference = actual.loss - predicted[: actual.max_rank + 1]
        assert float(difference.abs().max()) <= TOLERANCE["loss"] * float(predicted[0])
        for rank in range(actual.max_rank + 1):
            assert actual.tail[rank] == exact.tail[rank]
            product = exact.left[:, :rank] @ exact.right[:rank]
            difference = (actual.left[:, :rank] @ actual.right[:rank]).double() - product
            unit = float(linear_weight(module).abs().max()) * 10
            assert float(difference.abs().max()) <= TOLERANCE["rounded"] * unit, rank


def test_everything_is_moved_to_the_device_that_decomposes(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = set[str]()

    def watched(
        method: object, weight: Tensor, bias: Tensor, statistics: Mapping[Statistic, Tensor]
    ) -> LowRankFactors:
        devices.update(given.device.type for given in (weight, bias, *statistics.values()))
        raise StatisticsError("seen")

    monkeypatch.setattr(prepare_unit, "factor_layer", watched)
    model = build("gpt2")
    on_meta = factor_model(
        model, map_model(model), LossAware(), RandomStatistics(), device=torch.device("meta")
    )
    with pytest.raises(StatisticsError, match="seen"):
        next(on_meta)
    assert devices == {"meta"}


def test_without_gradients_no_loss_is_predicted() -> None:
    model = build("gpt2")
    actual = merged(
        factor_model(model, map_model(model), Bolaco(), RandomStatistics(gradients=False))
    )
    assert all(factors.loss is None for factors in actual.values())
    with pytest.raises(StatisticsError, match=r"^transformer\.h\.0\.attn\.c_attn: .*output_grad"):
        next(factor_model(model, map_model(model), LossAware(), RandomStatistics(gradients=False)))


@every_method
def test_a_layer_that_calibration_did_not_see_is_refused_by_name_if_that_matters(
    method: str,
) -> None:
    class Nothing(RandomStatistics):
        def of(self, spec: LayerSpec) -> Mapping[Statistic, Tensor]:
            return {}

    model = build("gpt2")
    made = factor_model(model, map_model(model), method_named(method), Nothing())
    if not method_named(method).needs:
        assert merged(made).keys() == make("gpt2", method).keys()
        return
    message = r"^transformer\.h\.0\.attn\.c_attn: .*; got none"
    with pytest.raises(StatisticsError, match=message) as caught:
        next(made)
    assert all(need.value in str(caught.value) for need in method_named(method).needs)


def test_kinds_that_are_one_sided_are_factored_so() -> None:
    model = build("llama_tied")
    layers = map_model(model)
    both = merged(factor_model(model, layers, LossAware(one_sided=("v_proj",)), RandomStatistics()))
    one, two = (
        merged(factor_model(model, layers, LossAware(output_power=power), RandomStatistics()))
        for power in (0.0, LossAware().output_power)
    )
    for spec in layers.compressible:
        assert_same(both[spec.name], (one if spec.kind == "v_proj" else two)[spec.name])
    assert not torch.equal(
        one["model.layers.0.self_attn.v_proj"].left, two["model.layers.0.self_attn.v_proj"].left
    )


def test_blocks_come_one_by_one_and_only_their_weights_are_needed() -> None:
    model = build("llama_biased")
    layers = map_model(model)
    weights = {spec.name: linear_weight(model.get_submodule(spec.name)) for spec in layers.layers}
    there = {name: weight.clone() for name, weight in weights.items()}
    for spec in layers.compressible:
        weights[spec.name].fill_(torch.nan)
    opened: list[int] = []

    @contextmanager
    def open_block(index: int) -> Iterator[nn.Module]:
        opened.append(index)
        mine = [spec.name for spec in layers.compressible if spec.block == index]
        for name in mine:
            weights[name].copy_(there[name])
        yield model.get_submodule(f"model.layers.{index}")
        for name in mine:
            weights[name].fill_(torch.nan)

    actual = factor_model(model, layers, Svd(), RandomStatistics(), open_block=open_block)
    first = next(actual)
    assert opened == [0]
    assert {layers.by_name[name].block for name in first} == {0}
    second = next(actual)
    assert opened == [0, 1]
    assert list(actual) == []
    for name, factors in {**first, **second}.items():
        assert_same(factors, make("llama_biased", "svd")[name])


@every_case
@every_method
def test_exactly_the_ranks_below_dense_in_any_form_are_kept(case: str, method: str) -> None:
    """An added bias is not counted: it may be won back in another measure."""
    layers = map_model(build(case))
    for name, factors in make(case, method).items():
        unit, ranks = layers.by_name[name], set[int]()
        for form in PRODUCTS:
            menu = Menu.of(unit, [form], bias=unit.has_bias, itemsize=4)
            ladder = menu.ladder("parameters", None)
            ranks |= {menu.option(int(index)).level[0] for index in ladder.indices[:-1]}
        assert factors.max_rank == max(ranks)


def test_progress_names_each_layer_once_and_the_model_is_untouched() -> None:
    model = build("gpt2")
    layers, statistics = map_model(model), RandomStatistics()
    before, names = fingerprint(model), list[str]()
    merged(factor_model(model, layers, Svd(), statistics, on_layer=names.append))
    assert names == [spec.name for spec in layers.compressible] == statistics.names
    assert fingerprint(model) == before


def test_a_broken_layer_is_refused_by_name() -> None:
    model = build("llama_tied")
    name = "model.layers.1.mlp.up_proj"
    model.get_submodule(name).weight[0, :2] = torch.nan
    with pytest.raises(StatisticsError, match=rf"^{name}: weight holds 2 non-finite values"):
        merged(factor_model(model, map_model(model), Svd(), RandomStatistics()))


def test_what_is_announced_names_its_layer() -> None:
    class Singular(RandomStatistics):
        def of(self, spec: LayerSpec) -> Mapping[Statistic, Tensor]:
            actual = dict(super().of(spec))
            if spec.kind == "down_proj" and spec.block == 1:
                actual[Statistic.INPUT_MEAN] = torch.zeros(spec.in_features, dtype=torch.float64)
                actual[Statistic.INPUT_COVARIANCE][3] = 0.0
                actual[Statistic.INPUT_COVARIANCE][:, 3] = 0.0
            return actual

    model = build("llama_tied")
    with pytest.warns(JitterWarning, match=r"^model\.layers\.1\.mlp\.down_proj: ") as caught:
        merged(factor_model(model, map_model(model), SvdLlm(), Singular()))
    assert len(caught) == 1


# --- disk --------------------------------------------------------------------------------------


@every_case
@every_method
def test_factors_come_back_as_they_were(case: str, method: str, tmp_path: Path) -> None:
    save_factors(tmp_path / "factors", parts(case, method), "abc")
    actual, factors = load_factors(tmp_path / "factors", "abc"), make(case, method)
    assert actual.keys() == factors.keys()
    for name, expected in factors.items():
        assert_same(actual[name], expected)
        for rank in range(1, expected.max_rank + 1):
            assert actual[name].left[:, :rank].T.is_contiguous()
    assert [path.name for path in tmp_path.iterdir()] == ["factors"]
    assert len(list((tmp_path / "factors").iterdir())) == 3  # blocks, and what says so


def test_blocks_are_written_as_they_come(tmp_path: Path) -> None:
    written: list[int] = []

    def watched() -> Iterator[Mapping[str, LowRankFactors]]:
        for part in parts("gpt2", "svd"):
            assert not (tmp_path / "factors").exists()
            written.append(len(list(tmp_path.rglob("*.safetensors"))))
            yield part

    save_factors(tmp_path / "factors", watched(), "abc")
    assert written == [0, 1]


def test_what_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Mapping[str, LowRankFactors]]:
        yield next(parts("gpt2", "svd"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_factors(tmp_path / "factors", interrupted(), "abc")
    assert list(tmp_path.iterdir()) == []


def test_a_name_may_hold_the_separator_and_a_block_nothing(tmp_path: Path) -> None:
    one = next(iter(make("llama_tied", "svd").values()))
    save_factors(tmp_path / "factors", iter([{}, {"a|b": one}]), "abc")
    actual = load_factors(tmp_path / "factors", "abc")
    assert set(actual) == {"a|b"}
    assert_same(actual["a|b"], one)


def test_factors_of_something_else_are_refused(tmp_path: Path) -> None:
    save_factors(tmp_path / "factors", parts("llama_tied", "svd"), "abc")
    with pytest.raises(CacheError, match=r"factors/about.json has .* abc, expected 1 and xyz"):
        load_factors(tmp_path / "factors", "xyz")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def scrambled(path: Path) -> None:
    """Change the header, and nothing of the length."""
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"x" * 40 + content[48:])


def another_number(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def other_tensors(path: Path) -> None:
    """Change what the tensors are, and nothing of the length."""
    path.write_bytes(path.read_bytes().replace(b"|right", b"|wrong"))


def other_shapes(path: Path) -> None:
    """Let every matrix be its own transpose."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for actual in header.values():
        actual["shape"].reverse()
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    path.write_bytes(content[:8] + text + content[8 + size :])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a part missing": lambda folder: (folder / "part_00000.safetensors").unlink(),
    "a part cut off": lambda folder: cut(folder / "part_00001.safetensors"),
    "a part empty": lambda folder: (folder / "part_00001.safetensors").write_bytes(b""),
    "a part scrambled": lambda folder: scrambled(folder / "part_00000.safetensors"),
    "another number": lambda folder: another_number(folder / "part_00001.safetensors"),
    "other tensors": lambda folder: other_tensors(folder / "part_00000.safetensors"),
    "other shapes": lambda folder: other_shapes(folder / "part_00000.safetensors"),
    "no list of parts": lambda folder: (folder / ABOUT).unlink(),
    "half a list of parts": lambda folder: cut(folder / ABOUT),
    "another list of parts": lambda folder: (folder / ABOUT).write_text('{"files": 3}'),
    "a list too deep": lambda folder: (folder / ABOUT).write_text("[" * 100_000),
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_factors_that_are_not_whole_are_refused_and_made_again(damage: str, tmp_path: Path) -> None:
    folder, made = tmp_path / "factors", 0

    def make() -> None:
        nonlocal made
        made += 1
        save_factors(folder, parts("llama_tied", "svd"), "abc")

    def read() -> dict[str, LowRankFactors]:
        return load_factors(folder, "abc")

    make()
    DAMAGE[damage](folder)
    with pytest.raises(CacheError, match=r"factors/(about|part_)"):
        read()
    actual, factors = cached(folder, make, read), make_factors()
    assert actual.keys() == factors.keys()
    for name, expected in factors.items():
        assert_same(actual[name], expected)
    cached(folder, make, read)
    assert made == 2
    assert [path.name for path in tmp_path.iterdir()] == ["factors"]


def test_a_folder_that_is_never_whole_is_refused_with_the_last_reason(tmp_path: Path) -> None:
    folder, made = tmp_path / "factors", list[int]()

    def make() -> None:
        folder.mkdir()
        made.append(len(made))

    def read() -> None:
        raise CacheError(f"reason {len(made)}")

    with pytest.raises(
        PathError, match=rf"not whole {ATTEMPTS} times, .* because reason {ATTEMPTS}"
    ):
        cached(folder, make, read)
    assert len(made) == ATTEMPTS


def test_what_cannot_be_written_is_made_once_also_where_another_folder_needs_it(
    tmp_path: Path,
) -> None:
    """It loaded the model and went through the text three times."""
    calls = []

    def write() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "statistics"))

    def make() -> None:
        calls.append("model")
        cached(tmp_path / "statistics", write, dict)

    with pytest.raises(PathError, match=r"statistics cannot be written: Permission denied.*CACHE"):
        cached(tmp_path / "factors", make, dict)
    assert calls == ["model"]


def test_what_another_process_made_is_not_removed_where_making_it_failed(tmp_path: Path) -> None:
    folder = tmp_path / "factors"

    def make() -> None:
        (folder / "made").mkdir(parents=True)
        raise CacheError("statistics are gone")

    assert cached(folder, make, lambda: [path.name for path in folder.iterdir()]) == ["made"]


def make_factors() -> dict[str, LowRankFactors]:
    return make("llama_tied", "svd")


# --- fingerprint -------------------------------------------------------------------------------


def test_the_fingerprint_depends_on_model_calibration_and_method() -> None:
    base = factors_fingerprint("model", "calibration", Bolaco())
    others = {
        factors_fingerprint("model 2", "calibration", Bolaco()),
        factors_fingerprint("model", "calibration 2", Bolaco()),
        factors_fingerprint("model", "calibration", Svd()),
        factors_fingerprint("model", "calibration", Svd(name="svd2")),
        factors_fingerprint("model", None, Bolaco()),
        *(
            factors_fingerprint("model", "calibration", Bolaco(), BasePlan(forms, options))
            for forms, options in (
                (("int4",), BaseOptions()),
                (("int4", "int3"), BaseOptions()),
                (("int4",), BaseOptions(method="nearest")),
                (("int4",), BaseOptions(group_sizes=(64, 32))),
                (("int4",), BaseOptions(damping=0.1)),
                (("int4",), BaseOptions(sweeps=1)),
                (("int4",), BaseOptions(sweeps=2)),
            )
        ),
        *(factors_fingerprint("model", "calibration", Asvd(alpha=alpha)) for alpha in (0.4, 0.5)),
        *(
            factors_fingerprint("model", "calibration", replace(LossAware(), **changed))
            for changed in (
                {}, {"input_shrinkage": 0.1}, {"output_shrinkage": 0.1}, {"output_power": 0.1},
                {"centred": True}, {"one_sided": ("q_proj",)}, {"one_sided": ("q_proj", "o_proj")},
            )
        ),
    }  # fmt: skip
    assert len(others | {base}) == 22
    assert factors_fingerprint("model", "calibration", Bolaco()) == base


def test_caches_of_before_there_were_sweeps_are_those_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stated: list[dict[str, Any]] = []

    def record(given: dict[str, Any]) -> str:
        stated.append(given)
        return "digest"

    monkeypatch.setattr("lrbo.factorization.cache.fingerprint_of", record)
    for sweeps in (0, 2):
        plan = BasePlan(("int4",), BaseOptions(sweeps=sweeps))
        factors_fingerprint("model", "calibration", Bolaco(), plan)
    options = [each["bases"]["options"] for each in stated]
    assert options[0] | {"sweeps": 2} == options[1]
    assert "sweeps" not in options[0]


def test_the_fingerprint_is_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets are walked in the order of hashes, and those of strings differ between processes."""
    needs = sorted(Bolaco().needs)
    assert len(needs) == 2
    actual, orders = set(), set()
    for first in needs:  # small integers lie in a small set in their own order
        monkeypatch.setattr(Statistic, "__hash__", lambda self, first=first: int(self != first))
        method = Bolaco(needs=frozenset(needs))
        orders.add(repr(method))
        actual.add(factors_fingerprint("model", "calibration", method))
    assert len(orders) == 2, "both orders must have been seen"
    assert len(actual) == 1


@pytest.mark.parametrize("case", CASES)
def test_every_family_can_be_factored_and_stored(case: str, tmp_path: Path) -> None:
    assert len(make(case, "svd")) >= 8
    save_factors(tmp_path / case, parts(case, "svd"), case)
    for name, actual in load_factors(tmp_path / case, case).items():
        assert_same(actual, make(case, "svd")[name])
