"""The loss curves of a study: as predicted, and checked against the model once."""

from pathlib import Path

import numpy as np
import pytest

from lrbo import preparation
from lrbo.errors import StudyError
from lrbo.loss_calibration import LossCalibration, sensitivity_file
from lrbo.model import map_model
from lrbo.nested import LowRankFactors
from lrbo.preparation import loss_curves
from lrbo.progress import Reporter
from lrbo.sensitivity import SensitivitySettings
from tests.test_sensitivity import plain_factors
from tests.tiny import build, token_ids


@pytest.fixture
def arguments(tmp_path: Path) -> dict:
    model = build("llama_untied")
    layers = map_model(model)
    return {
        "model": model,
        "layers": layers,
        "factors": plain_factors(layers, model),
        "windows": token_ids(3, 12),
        "settings": SensitivitySettings(layers_per_kind=1, ranks=2, windows=2),
        "file": sensitivity_file(tmp_path),
        "reporter": Reporter(),
    }


def test_measurements_in_the_study_are_read_not_made_again(
    arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments["apply"] = True
    first = loss_curves(**arguments)
    written = arguments["file"].read_bytes()
    calibration = LossCalibration.load(arguments["file"])
    for name, found in arguments["factors"].items():
        kind = arguments["layers"].by_name[name].kind
        expected = calibration.apply(kind, found.loss.numpy())
        assert np.array_equal(first[name], expected)
        assert (np.diff(first[name]) <= 0).all()
    assert {m.kind for m in calibration.measurements} == set(calibration.fits)
    monkeypatch.setattr(
        preparation, "measure_losses", lambda *_, **__: pytest.fail("measured again")
    )
    again = loss_curves(**arguments)
    assert all(np.array_equal(again[name], curve) for name, curve in first.items())
    assert arguments["file"].read_bytes() == written


def test_measurements_are_kept_and_change_no_curve_unasked(arguments: dict) -> None:
    found = loss_curves(**arguments)
    for name, factors in arguments["factors"].items():
        assert np.array_equal(found[name], factors.loss.numpy())
    assert LossCalibration.load(arguments["file"]).measurements


def test_a_folder_where_measurements_are_kept_is_refused_before_they_are_made(
    arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments["file"].mkdir()
    monkeypatch.setattr(preparation, "measure_losses", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(StudyError, match=r"sensitivity\.json is no file, .*; move it away"):
        loss_curves(**arguments)


def test_damaged_measurements_are_made_again_and_said(arguments: dict) -> None:
    arguments["file"].write_text("{", encoding="utf-8")
    said: list[str] = []
    arguments["reporter"].say = said.append
    loss_curves(**arguments)
    assert said[0].startswith(f"{arguments['file']}: it is not JSON")
    assert said[0].endswith("; it is measured again")
    assert LossCalibration.load(arguments["file"]).measurements


def test_without_points_predictions_are_taken_as_they_are(arguments: dict) -> None:
    arguments["settings"] = SensitivitySettings(layers_per_kind=0)
    found = loss_curves(**arguments)
    for name, factors in arguments["factors"].items():
        assert np.array_equal(found[name], factors.loss.numpy())
    assert not arguments["file"].exists()


def test_without_gradients_there_are_no_curves(arguments: dict) -> None:
    arguments["factors"] = {
        name: LowRankFactors(f.left, f.right, f.tail, f.offset)
        for name, f in arguments["factors"].items()
    }
    assert loss_curves(**arguments) == {}
    assert not arguments["file"].exists()
