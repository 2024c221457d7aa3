"""The predicted losses of a study are checked against the model once, and never changed."""

from pathlib import Path

import pytest
import torch

from lrbo.allocation.loss_calibration import LossCalibration, sensitivity_file
from lrbo.config.schema import SearchConfig, SensitivityConfig
from lrbo.data.windows import TokenWindows
from lrbo.errors import StudyError
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.methods import LossAware
from lrbo.layers.options import Option
from lrbo.models.model_map import map_model
from lrbo.models.sources import ModelSource
from lrbo.pipeline import build_worker
from lrbo.pipeline.build_worker import check_predictions
from lrbo.pipeline.planning import Plan
from lrbo.progress import Reporter
from lrbo.tasks.causal_lm import CausalLM
from tests.allocation.test_loss_curves import plain_factors
from tests.support.fakes import make_space
from tests.support.tiny import build, token_ids


@pytest.fixture
def arguments(tmp_path: Path) -> dict:
    model = build("llama_untied")
    layers = map_model(model)
    settings = SensitivityConfig(layers_per_kind=1, ranks=2, windows=2)
    return {
        "plan": Plan(
            SearchConfig(sensitivity=settings),
            ModelSource("tiny", "0"),
            layers,
            LossAware(),
            CausalLM(),
            torch.float32,
            torch.float32,
            make_space(layers=layers.compressible, groups={"all": ["*"]}, dense=[], start={}),
            {"validation": TokenWindows(token_ids(3, 12), "text")},
        ),
        "file": sensitivity_file(tmp_path),
        "model": model,
        "factors": plain_factors(layers, model),
        "reporter": Reporter(),
    }


def test_measurements_in_the_study_are_read_not_made_again(
    arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_predictions(**arguments)
    written = arguments["file"].read_bytes()
    calibration = LossCalibration.load(arguments["file"])
    kinds = {spec.kind for spec in arguments["plan"].layers.compressible}
    assert {m.kind for m in calibration.measurements} == kinds
    monkeypatch.setattr(
        build_worker, "measure_losses", lambda *_, **__: pytest.fail("measured again")
    )
    check_predictions(**arguments)
    assert arguments["file"].read_bytes() == written


def test_predictions_are_measured_as_they_are_and_not_changed(arguments: dict) -> None:
    before = {name: factors.loss.clone() for name, factors in arguments["factors"].items()}
    check_predictions(**arguments)
    for measured in LossCalibration.load(arguments["file"]).measurements:
        (rank,) = Option.parse(measured.option).level
        assert measured.predicted == float(before[measured.layer][rank])
    for name, factors in arguments["factors"].items():
        assert torch.equal(factors.loss, before[name])


def test_a_folder_where_measurements_are_kept_is_refused_before_they_are_made(
    arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments["file"].mkdir()
    monkeypatch.setattr(build_worker, "measure_losses", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(StudyError, match=r"sensitivity\.json is no file, .*; move it away"):
        check_predictions(**arguments)


def test_damaged_measurements_are_made_again_and_said(arguments: dict) -> None:
    arguments["file"].write_text("{", encoding="utf-8")
    messages: list[str] = []
    arguments["reporter"].say = messages.append
    check_predictions(**arguments)
    assert messages[0].startswith(f"{arguments['file']}: it is not JSON")
    assert messages[0].endswith("; it is measured again")
    assert LossCalibration.load(arguments["file"]).measurements


def test_without_points_nothing_is_measured(arguments: dict) -> None:
    arguments["plan"].config.sensitivity.layers_per_kind = 0
    check_predictions(**arguments)
    assert not arguments["file"].exists()


def test_without_gradients_nothing_is_predicted_that_could_be_measured(arguments: dict) -> None:
    arguments["factors"] = {
        name: LowRankFactors(f.left, f.right, f.tail, f.offset)
        for name, f in arguments["factors"].items()
    }
    check_predictions(**arguments)
    assert not arguments["file"].exists()
