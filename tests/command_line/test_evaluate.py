"""`lrbo evaluate` with protocols and tasks, in process, on the tiny model."""

import json
import math
from pathlib import Path

import pytest

from lrbo.commands import evaluate
from lrbo.models.tiny import tiny_config
from tests.evaluation.test_zero_shot import write_task
from tests.support.commands import lrbo_command

MODEL = ["model=tiny", "model.dtype=float32", "model.device=cpu"]
ROWS = ["the cat sat on the mat , and the dog lay there . "] * 40


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with the files that two protocols look for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ptb.test.txt").write_text("\n".join(ROWS), encoding="utf-8")
    (tmp_path / "ptb.valid.txt").write_text("\n".join(reversed(ROWS)), encoding="utf-8")
    return tmp_path


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it an error of its own if a model is loaded."""

    def load(*arguments: object, **options: object) -> object:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(evaluate, "load_model", load)


def test_protocols_and_tasks_are_scored_in_one_go_and_recorded(texts: Path) -> None:
    line = [
        *MODEL, "protocols=[ptb_bolaco,ptb]", "protocols.ptb.window=128", "text_folder=.",
        f"task_folder={write_task(texts)}", "tasks=[sums]", "output=json",
    ]  # fmt: skip
    ran = lrbo_command("evaluate", *line)
    assert ran.status == 0, ran.err
    answer = ran.json
    assert (answer["dtype"], answer["device"]) == ("float32", "cpu")
    as_stated = answer["protocols"]["ptb_bolaco"]
    assert (as_stated["window"], as_stated["stride"], as_stated["changed"]) == (256, 256, [])
    assert as_stated["text"] == "files:ptb.valid.txt"
    length = len("\n\n".join(row.strip() for row in ROWS))  # a token is a byte
    assert as_stated["windows"] == length // 256
    assert as_stated["tokens"] == length // 256 * 255
    assert as_stated["perplexity"] == math.exp(as_stated["nll"])
    assert answer["protocols"]["ptb"]["changed"] == ["window=128, not 2048"]
    assert "* ptb is not the literature's: window=128, not 2048" in ran.out
    task = answer["tasks"]["sums"]
    assert [one["name"] for one in task["metrics"]] == ["acc", "acc_norm"]
    (row,) = [line for line in ran.out.splitlines() if "acc_norm" in line and "{" not in line]
    value, error = task["metrics"][1]["value"], task["metrics"][1]["error"]
    assert row.split() == ["sums", "acc_norm", f"{value:.4f}", f"{error:.4f}", "12", "0", "2.5"]
    repeat = lrbo_command("evaluate", *line, "record=null")
    assert repeat.json == answer
    assert lrbo_command("evaluate", *line, "tasks=[]", "task_folder=null").status == 0
    records = [
        json.loads(line)
        for line in Path("studies/evaluations.jsonl").read_text("utf-8").splitlines()
    ]
    assert len(records) == 2
    assert {**records[0], **answer} == records[0]
    assert "tasks" not in records[1]
    assert records[0]["versions"]["torch"]


@pytest.mark.usefixtures("unloadable")
def test_every_problem_is_named_before_a_model_is_loaded(texts: Path) -> None:
    (texts / "wiki.test.raw").write_text("short\n", encoding="utf-8")
    folder = write_task(texts)
    (folder / "sums.jsonl").unlink()
    ran = lrbo_command(
        "evaluate", *MODEL, "protocols=[ptb_bolaco,ptb,wikitext2_2048]", "text_folder=.",
        f"task_folder={folder}", "tasks=[sums]", "model.device=none",
    )  # fmt: skip
    assert ran.status == 2
    problems = [line for line in ran.err.splitlines() if line.startswith("  - ")]
    assert [problem.split(":")[0] for problem in problems] == [
        "  - model.device='none' cannot be used here",
        "  - protocols.ptb",
        "  - protocols.wikitext2_2048",
        "  - tasks",
    ]


@pytest.mark.usefixtures("unloadable")
def test_windows_that_are_longer_than_the_model_s_positions_are_refused(texts: Path) -> None:
    ran = lrbo_command(
        "evaluate", *MODEL, "protocols=[ptb]", "protocols.ptb.window=600", "text_folder=."
    )
    assert ran.status == 2
    assert "ptb: windows of 600 tokens, but tiny has 512 positions; choose shorter" in ran.err


@pytest.mark.usefixtures("unloadable")
def test_a_tokenizer_of_another_model_is_refused(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that the model does not have end in an IndexError, or bring a GPU down."""
    small = tiny_config()
    small.vocab_size = 100
    monkeypatch.setattr(evaluate, "load_config", lambda source: small)
    ran = lrbo_command("evaluate", *MODEL, "protocols=[ptb_bolaco]", "text_folder=.")
    assert ran.status == 2
    assert "ptb_bolaco: the id 220 is beyond the vocabulary of tiny, 0..99; restore" in ran.err


@pytest.mark.usefixtures("unloadable")
def test_tasks_without_the_harness_say_how_to_install_it(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "missing_harness", lambda: "install it")
    ran = lrbo_command("evaluate", *MODEL, "tasks=[sums]", "task_folder=.", "limit=0")
    assert ran.status == 2
    assert "limit=0: expected at least 1, or null" in ran.err
    assert "install it" in ran.err
