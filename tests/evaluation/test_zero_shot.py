"""The harness on a model in memory answers as a loop over choices does; names are checked first."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lrbo.errors import DataError
from lrbo.evaluation import zero_shot
from tests.support.reference import negative_log_likelihood

lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason="the extra eval is not installed")

TOLERANCE = {"error": 1e-12}  # relative: one formula in float64
ITEMS = [
    {"context": f"Question: is {n} more than {n - 3}?\nAnswer:", "gold": n % 3,
     "choices": [f" yes {n}", " no", f" {n} is a number"]}
    for n in range(12)
]  # fmt: skip
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: '{file}'}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 2.5}}
"""


def write_task(folder: Path, name: str = "sums") -> Path:
    """Write a task and its items, and return the folder."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in ITEMS), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file), encoding="utf-8")
    return folder


@pytest.fixture
def own_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the harness's own tasks out: their index takes ten seconds."""
    manager = lm_eval_tasks.TaskManager

    def own(include_path: Path | None = None, include_defaults: bool = True) -> Any:
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval_tasks, "TaskManager", own)


def likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: str, choice: str
) -> float:
    """Return the log-likelihood of a choice, each token from its own prefix."""
    before = tokenizer(context).input_ids
    ids = before + tokenizer(choice).input_ids
    total = 0.0
    for position in range(len(before), len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor(ids[:position])[None]).logits[0, -1]
        total -= negative_log_likelihood(logits, ids[position])
    return total


def answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, per_character: bool
) -> float:
    """Return the share of items answered right."""
    right = 0
    for item in ITEMS:
        choices: Any = item["choices"]
        scores = [
            likelihood(model, tokenizer, str(item["context"]), choice)
            / (len(choice) if per_character else 1)
            for choice in choices
        ]
        right += scores.index(max(scores)) == item["gold"]
    return right / len(ITEMS)


@pytest.mark.parametrize("batch_items", [1, 5])
def test_scores_are_those_of_a_loop_over_choices(
    batch_items: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    tasks = zero_shot.load_tasks(["sums"], write_task(tmp_path))
    (score,) = zero_shot.score_tasks(model, tokenizer, tasks, batch_items=batch_items)
    assert (score.task, score.items, score.shots, score.version) == ("sums", 12, 0, 2.5)
    plain = answered(model, tokenizer, per_character=False)
    normed = answered(model, tokenizer, per_character=True)
    assert [(one.name, one.value) for one in score.metrics] == [
        ("acc", plain),
        ("acc_norm", normed),
    ]
    assert plain != normed, "else one could stand for the other"
    for one in score.metrics:
        assert one.value is not None
        expected = math.sqrt(one.value * (1 - one.value) / (len(ITEMS) - 1))
        assert one.error == pytest.approx(expected, rel=TOLERANCE["error"])


def test_a_limit_takes_the_first_items(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tasks = zero_shot.load_tasks(["sums"], write_task(tmp_path))
    (score,) = zero_shot.score_tasks(model, tokenizer, tasks, limit=5)
    assert score.items == 5


@pytest.mark.usefixtures("own_only")
def test_unknown_names_are_named_all_at_once_with_what_is_near(tmp_path: Path) -> None:
    write_task(write_task(tmp_path, "sums"), "winogrande_mine")
    with pytest.raises(DataError) as caught:
        zero_shot.load_tasks(["sums", "winogrand_mine", "zzz"], tmp_path)
    first, second = caught.value.problems
    assert (
        "no task of the name winogrand_mine; near it or in task_folder: winogrande_mine, sums"
        in first
    )
    assert "no task of the name zzz; near it or in task_folder: sums, winogrande_mine" in second
    assert "lm-eval ls tasks" in first


def test_own_tasks_need_no_index_of_the_harness_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = []

    def watched(**options: Any) -> Any:
        defaults.append(options["include_defaults"])
        return manager(**options)

    manager = lm_eval_tasks.TaskManager
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", watched)
    zero_shot.load_tasks(["sums"], write_task(tmp_path))
    assert defaults == [False]


def test_data_that_cannot_be_read_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    write_task(tmp_path)
    (tmp_path / "sums.jsonl").unlink()
    with pytest.raises(DataError, match=r"tasks: cannot read sums: .*give task_folder=FOLDER"):
        zero_shot.load_tasks(["sums"], tmp_path)


def test_without_the_harness_the_command_to_install_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert zero_shot.missing_harness() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'lrbo[eval]'" in str(zero_shot.missing_harness())


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5, 0.5), (1, 1.0), ("N/A", None), (math.nan, None), (None, None)]
)
def test_numbers_that_are_none_are_left_out(value: object, expected: float | None) -> None:
    row = {"alias": "sums", "acc,none": 0.25, "acc_stderr,none": value, "em,strict": value}
    score = zero_shot._score("sums", {"results": {"sums": row}, "versions": {"sums": "Yaml"}})
    assert score.metrics[0] == zero_shot.Metric("acc", 0.25, expected)
    assert score.version is None
    names = [one.name for one in score.metrics]
    assert names == ["acc", "em,strict"] if isinstance(value, int | float) else ["acc"]
