"""Write the study and the checkpoints that later versions must keep opening, and what they say.

    python -m tests.stored.make

Only after a change of format, which is then told in the changelog; else the stored files are the
test. Nothing of it is trained: the model is the tiny one, its losses are made up.
"""

import json
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lrbo.reports.results import summary
from lrbo.study import journal
from lrbo.study.journal import Study
from tests.checkpoints.test_export import BOTH, Compressed
from tests.support.fakes import fixed_clock
from tests.support.journal import Journal
from tests.support.tiny import token_ids

HERE = Path(__file__).parent
STUDY, PLAIN, WITH_CODE = HERE / "study", HERE / "checkpoint", HERE / "checkpoint_with_code"
EXPECTED = HERE / "expected.json"
OVERRIDES = (
    "space=weights",
    "space.rank_multiple=1",
    "space.forms=[factored,pivoted]",
    "budget.measure=bytes",
    "budget.keep_ratio=0.7",
)
WINDOWS = [2.25, 2.5, 2.125, 2.625]
IDS = token_ids(1, 4)


def make_study(folder: Path) -> None:
    """Write a study: baselines, trials with and without a value, and scores on the test text."""
    study = Journal(folder, *OVERRIDES)
    study.score_dense(2.0)
    analytic = study.space.allocate(dict.fromkeys(study.space.names, 0.0))
    losses = [0.5, 0.25, 0.3125, 0.1875, 0.375]
    for index, loss in enumerate(losses):
        origin = {0: "uniform", 1: "analytic"}.get(index, "sobol")
        allocation = analytic if index == 1 else None
        windows = [each + loss * (1 + position / 8) for position, each in enumerate(WINDOWS)]
        study.complete(index, sum(windows) / len(windows), origin, allocation, windows)
    study.fail(5, "NonFiniteError: the loss of 960 tokens is not finite")
    study.suggest(6, "sobol")  # the search was interrupted
    study.tested("dense", None, 2.5)
    study.tested("uniform", 0, 3.125, [each + 0.75 for each in WINDOWS])
    study.tested("best", 3, 2.875, [each + 0.5 for each in WINDOWS])
    study.compressed(3, "elsewhere/mine")


def options_in(study: Study) -> dict[str, dict[str, str]]:
    """Return the options of each trial, by unit."""
    return {
        str(index): {name: str(o) for name, o in record.request.allocation.options.items()}
        for index, record in study.state.trials.items()
    }


def logits_of(model: PreTrainedModel) -> list[list[float]]:
    """Return the logits after a few tokens, a row each."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        rows: list[list[float]] = model(IDS).logits.flatten(0, 1).tolist()
    return rows


def main() -> None:
    """Write everything anew."""
    for folder in (STUDY, PLAIN, WITH_CODE):
        shutil.rmtree(folder, ignore_errors=True)
    journal.time.time = fixed_clock()  # type: ignore[assignment]
    make_study(STUDY)
    compressed = Compressed("llama_tied", forms=BOTH)
    compressed.save(PLAIN)
    compressed.save(WITH_CODE, with_code=True)
    study = Study(STUDY)
    expected = {
        "report": summary(study),
        "trials": options_in(study),
        "units": {name: str(option) for name, option in compressed.options.items()},
        "parameters": compressed.parameters,
        "logits": [[round(each, 6) for each in row] for row in logits_of(compressed.model)],
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(each)}" for key, each in expected.items())
    EXPECTED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
