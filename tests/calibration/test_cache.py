"""Statistics come back from disk bit by bit, for what they were made of, or not at all."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lrbo.calibration import cache
from lrbo.calibration.cache import CalibrationFolder, calibration_fingerprint, save_calibration
from lrbo.calibration.collect import Calibration, CalibrationSettings, StatisticsByOwner, calibrate
from lrbo.calibration.statistics import GRADIENT_STATISTICS, MATRICES, TABLE_STATISTICS, Statistic
from lrbo.errors import CacheError
from lrbo.files.caches import ABOUT
from lrbo.models.blockwise import BlockwiseBody
from lrbo.models.specs import LayerSpec, ModelMap
from tests.support.tiny import token_ids

ALL = frozenset(Statistic) - TABLE_STATISTICS  # of layers in blocks


def parts_of(model: PreTrainedModel, layers: ModelMap) -> Iterator[StatisticsByOwner]:
    settings = CalibrationSettings(gradient_share=1.0, groups=3)
    return calibrate(BlockwiseBody(model), layers, token_ids(7, 12), ALL, settings)


# --- disk ----------------------------------------------------------------------------------------


def test_statistics_come_back_bit_by_bit(
    model: PreTrainedModel, layers: ModelMap, tmp_path: Path
) -> None:
    in_memory = Calibration.gather(parts_of(model, layers))
    folder = tmp_path / "made" / "here"
    save_calibration(folder, parts_of(model, layers), "fingerprint")
    stored = CalibrationFolder(folder, "fingerprint")
    assert len(layers.compressible) == 14
    for spec in layers.compressible:
        expected, actual = in_memory.of(spec), stored.of(spec)
        assert actual.keys() == expected.keys() == ALL
        for statistic, tensor in expected.items():
            assert actual[statistic].dtype == tensor.dtype
            assert torch.equal(actual[statistic], tensor), (spec.name, statistic)


def test_blocks_are_written_as_they_come(
    model: PreTrainedModel, layers: ModelMap, tmp_path: Path
) -> None:
    """One file per part, each written before the next is made, and no folder before the last."""
    folder = tmp_path / "statistics"
    written: list[int] = []

    def watched() -> Iterator[StatisticsByOwner]:
        for part in parts_of(model, layers):
            assert not folder.exists()
            written.append(len(list(tmp_path.rglob("*.safetensors"))))
            yield part

    save_calibration(folder, watched(), "f")
    assert written == [0, 1, 2, 3]  # two blocks, there and back
    assert [path.name for path in tmp_path.iterdir()] == ["statistics"]
    assert len(list(folder.glob("*.safetensors"))) == 4


def test_what_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[StatisticsByOwner]:
        yield {"site": {Statistic.INPUT_MEAN: torch.zeros(3, dtype=torch.float64)}}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_calibration(tmp_path / "statistics", interrupted(), "f")
    assert list(tmp_path.iterdir()) == []


def test_a_part_without_statistics_is_no_problem(tmp_path: Path) -> None:
    """A block in which nothing is compressed."""
    mean = {Statistic.INPUT_MEAN: torch.arange(3, dtype=torch.float64)}
    save_calibration(tmp_path / "statistics", iter([{}, {"layer": mean}]), "f")
    actual = CalibrationFolder(tmp_path / "statistics", "f").of(layer("layer"))
    assert torch.equal(actual[Statistic.INPUT_MEAN], mean[Statistic.INPUT_MEAN])


@pytest.mark.parametrize("statistic", sorted(MATRICES))
def test_matrices_are_stored_as_half(tmp_path: Path, statistic: Statistic) -> None:
    matrix = torch.ones(60, 60, dtype=torch.float64)
    save_calibration(tmp_path / "folder", iter([{"site": {statistic: matrix}}]), "f")
    (file,) = (tmp_path / "folder").glob("*.safetensors")
    assert file.stat().st_size < 0.6 * matrix.numel() * 8


@given(st.integers(1, 40), st.integers(0, 1000))
def test_packing_gives_back_every_symmetric_matrix(features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    packed = cache._pack(matrix)
    assert packed.numel() == features * (features + 1) // 2
    assert torch.equal(cache._unpack(packed), matrix)


# --- whose ---------------------------------------------------------------------------------------


def layer(name: str, site: str | None = None) -> LayerSpec:
    return LayerSpec(name, "kind", 0, 3, 3, False, site=site or name)


def test_a_layer_has_the_inputs_of_its_site_and_gradients_of_its_own(tmp_path: Path) -> None:
    """Also where a name holds the separator, and where a site has the name of a layer."""

    def filled(statistic: Statistic, value: float) -> dict[Statistic, torch.Tensor]:
        shape = (3, 3) if statistic in MATRICES else (3,)
        return {statistic: torch.full(shape, value, dtype=torch.float64)}

    parts: list[StatisticsByOwner] = [
        {"q|x": filled(Statistic.INPUT_COVARIANCE, 1.0)},
        {
            "q|x": filled(Statistic.OUTPUT_GRADIENT, 2.0),
            "k": filled(Statistic.OUTPUT_GRADIENT, 3.0),
        },
    ]
    save_calibration(tmp_path / "statistics", iter(parts), "f")
    in_memory = Calibration.gather(iter(parts))
    stored = CalibrationFolder(tmp_path / "statistics", "f")
    for source in (in_memory, stored):
        for spec, gradient in ((layer("q|x"), 2.0), (layer("k", site="q|x"), 3.0)):
            actual = source.of(spec)
            assert set(actual) == {Statistic.INPUT_COVARIANCE, Statistic.OUTPUT_GRADIENT}
            assert bool((actual[Statistic.INPUT_COVARIANCE] == 1.0).all())
            assert bool((actual[Statistic.OUTPUT_GRADIENT] == gradient).all())
        assert set(source.of(layer("v", site="q|x"))) == {Statistic.INPUT_COVARIANCE}
        assert source.of(layer("lm_head")) == {}


# --- fingerprint ---------------------------------------------------------------------------------


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    save_calibration(folder, iter([]), "made-with-this")
    with pytest.raises(CacheError, match="made-with-this, expected 1 and wanted-that"):
        CalibrationFolder(folder, "wanted-that")
    (folder / ABOUT).write_text(json.dumps({}))
    with pytest.raises(CacheError, match="the field fingerprint is missing"):
        CalibrationFolder(folder, "made-with-this")


def test_statistics_that_are_deleted_while_they_are_read_are_named(tmp_path: Path) -> None:
    mean = {Statistic.INPUT_MEAN: torch.arange(3, dtype=torch.float64)}
    folder = tmp_path / "statistics"
    save_calibration(folder, iter([{"layer": mean}]), "f")
    actual = CalibrationFolder(folder, "f")
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:8] + b"?" * (len(content) - 8))
    with pytest.raises(CacheError, match=rf"{file.name} is damaged"):
        actual.of(layer("layer"))
    shutil.rmtree(folder)
    with pytest.raises(CacheError, match=rf"{file.name} is damaged: .*No such file"):
        actual.of(layer("layer"))


def test_fingerprint_knows_everything_that_decides_the_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    windows = token_ids(4, 6)
    other = windows.clone()
    other[3, 5] += 1
    settings = CalibrationSettings(groups=2)

    def of(model="model", ids=windows, needs=ALL, given=settings, dtype=torch.float32) -> str:
        return calibration_fingerprint(model, ids, needs, given, dtype=dtype)

    everything = [
        of(),
        of(model="other model"),
        of(ids=other),
        of(ids=windows.reshape(6, 4)),
        of(needs={Statistic.INPUT_MEAN}),
        of(needs=ALL - {Statistic.INPUT_MEAN}),
        of(dtype=torch.bfloat16),
        of(given=replace(settings, groups=3)),
        of(given=replace(settings, labels="data")),
        of(given=replace(settings, gradient_share=0.25)),
        of(given=replace(settings, seed=1)),
    ]
    assert len(set(everything)) == len(everything)
    for needs in (sorted(ALL), sorted(ALL, reverse=True)):
        assert of(needs=needs) == everything[0]
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert of() not in everything


def test_what_decides_nothing_is_not_in_the_fingerprint() -> None:
    settings = CalibrationSettings()
    windows = token_ids(4, 6)
    pooled = {Statistic.POOLED_INPUT_COVARIANCE}
    changes: dict[str, object] = {
        "groups": 3, "batch_windows": 1, "labels": "data", "gradient_share": 0.1, "seed": 5,
        "memory_gib": 0.5,
    }  # fmt: skip
    assert set(changes) == {field.name for field in fields(settings)}
    for needs, ignored in (
        (ALL, {"batch_windows", "memory_gib"}),
        (ALL - pooled, {"batch_windows", "memory_gib", "groups"}),
        (ALL - GRADIENT_STATISTICS, set(changes) - {"groups"}),
        (ALL - GRADIENT_STATISTICS - pooled, set(changes)),
    ):

        def of(given: CalibrationSettings, needs: frozenset[Statistic] = needs) -> str:
            return calibration_fingerprint("model", windows, needs, given, dtype=torch.float32)

        same = {
            name
            for name, value in changes.items()
            if of(replace(settings, **{name: value})) == of(settings)
        }
        assert same == ignored
