"""A model so bad that exp of its loss overflows is searched and shown like any other."""

import json
import math
from pathlib import Path

import matplotlib.image
import pytest
import torch

import lrbo
from lrbo.models.tiny import byte_tokenizer, tiny_model
from tests.support.commands import Ran, in_folder, lrbo_command


def refuse(constant: str) -> None:
    """Stand for a reader of JSON that knows no constants of JavaScript."""
    raise AssertionError(constant)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Search with a model whose logits are a thousand times too large."""
    folder = tmp_path_factory.mktemp("project")
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000.0)
    model.save_pretrained(folder / "huge")
    byte_tokenizer().save_pretrained(folder / "huge")
    line = [
        "experiment=tiny", "model=hf", "model.path=huge", "study=huge", "search.trials=4",
        "search.initial=4", "model.dtype=float32", "output=json",
    ]  # fmt: skip
    return folder, in_folder(folder, lambda: lrbo_command("search", *line))


@pytest.fixture
def project(searched: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in the folder of the search."""
    monkeypatch.chdir(searched[0])
    return searched[0]


def test_trials_are_completed_and_files_are_strict_json(
    project: Path, searched: tuple[Path, Ran]
) -> None:
    ran = searched[1]
    assert ran.status == 0, ran.err
    answer = json.loads(ran.out.splitlines()[-1], parse_constant=refuse)
    assert (answer["trials_completed"], answer["trials_failed"]) == (4, 0)
    for scores in (answer["dense"], answer["best"], answer["test"]["dense"]):
        assert scores["nll"] > 710
        assert scores["perplexity"] is None
    for line in Path("studies/huge/journal.jsonl").read_text("utf-8").splitlines():
        json.loads(line, parse_constant=refuse)
    assert "MLflow" not in ran.err


def test_the_study_reads_back_and_its_pictures_are_pictures(project: Path) -> None:
    study = lrbo.open_study("huge")
    assert (study.trials["perplexity"] == math.inf).all()
    for name in ("convergence", "ranks"):
        assert matplotlib.image.imread(f"studies/huge/figures/{name}.png").std() > 0.01
    ran = lrbo_command("report", "study=huge", "format=html", "sync=true", "output=json")
    assert ran.status == 0, ran.err
    json.loads(ran.out.splitlines()[-1], parse_constant=refuse)
    assert "Infinity" not in Path("studies/huge/report.html").read_text("utf-8").split("<body>")[1]
    assert "inf" in ran.out


def test_it_is_compressed_and_evaluated(project: Path) -> None:
    ran = lrbo_command("compress", "study=huge", "out=written", "refit.enabled=false")
    assert ran.status == 0, ran.err
    config = json.loads(Path("written/config.json").read_text("utf-8"), parse_constant=refuse)
    provenance = config["quantization_config"]["provenance"]["validation"]
    assert provenance["perplexity"] is None
    assert provenance["nll"] > 710
    assert "| inf |" in Path("written/README.md").read_text("utf-8")
    ran = lrbo_command(
        "evaluate", "checkpoint=written", "data=generated", "allow_seen=true", "output=json"
    )
    assert ran.status == 0, ran.err
    assert "perplexity inf" in ran.out
    assert json.loads(ran.out.splitlines()[-1], parse_constant=refuse)["perplexity"] is None
    (line,) = Path("studies/evaluations.jsonl").read_text("utf-8").splitlines()
    json.loads(line, parse_constant=refuse)
