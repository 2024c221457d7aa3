"""lrbo recover: the same size as before, resumable, and everything wrong said at once."""

import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

import lrbo
from lrbo.checkpoints.trained import OPENS, with_section
from lrbo.commands import recover
from lrbo.data.windows import ROLES, load_windows
from lrbo.files.rendering import render
from lrbo.files.tables import Table, columns
from lrbo.models.tiny import byte_tokenizer, tiny_model
from lrbo.pipeline.planning import tokens_file
from lrbo.recovery import blocks, memory, states
from lrbo.recovery.stage import StageReport
from lrbo.study.journal import Study
from tests.support.commands import Ran, in_folder, lrbo_command, project, searched

__all__ = ["project", "searched"]  # fixtures

QUICK = ["recover.blocks.epochs=1", "recover.stages=[blocks]", "output=json"]
EXACT = [*QUICK, "model.dtype=float32"]  # as the study, whatever this machine is faster in


@pytest.fixture(scope="module")
def compressed(searched: tuple[Path, Ran]) -> Path:
    """Write the best model of the tiny search once."""
    line = ("compress", "study=tiny", "out=made", "refit.enabled=false", "register=none")
    ran = in_folder(searched[0], lambda: lrbo_command(*line))
    assert ran.status == 0, ran.err
    return searched[0] / "made"


@pytest.fixture
def made(compressed: Path, project: Path) -> str:
    """Stand in the folder of the study; the name of the checkpoint there."""
    assert compressed.parent == project
    return compressed.name


@pytest.fixture(scope="module")
def recovered(compressed: Path) -> Ran:
    """Recover it once."""
    line = ("recover", "checkpoint=made", "out=better", *EXACT)
    return in_folder(compressed.parent, lambda: lrbo_command(*line))


def config_of(folder: str) -> dict[str, object]:
    content: dict[str, object] = json.loads(Path(folder, "config.json").read_text("utf-8"))
    return content


def test_what_is_recovered_has_the_same_options_and_bytes(made: str, recovered: Ran) -> None:
    assert recovered.status == 0, recovered.err
    before, after = (load_file(Path(name, "model.safetensors")) for name in (made, "better"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].shape, after[name].dtype) == (tensor.shape, tensor.dtype)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert any(name.endswith("norm.weight") for name in changed)
    assert any("proj" in name for name in changed)
    assert not any("embed_tokens" in name for name in changed)
    sizes = [Path(name, "model.safetensors").stat().st_size for name in (made, "better")]
    assert sizes[0] == sizes[1]
    old, new = config_of(made), config_of("better")
    provenance = new["quantization_config"].pop("provenance")  # type: ignore[attr-defined]
    old["quantization_config"].pop("provenance")  # type: ignore[attr-defined]
    assert old == new
    assert provenance["recovery"]["settings"]["recover.stages"] == ["blocks"]
    answer = recovered.json
    assert answer["folder"] == "better"
    assert set(answer["validation"]) == set(answer["test"]) == {"dense", "before", "after"}
    assert answer["stages"][0]["after"] <= answer["stages"][0]["before"]
    assert not Path("better.recovery").exists()


def test_what_is_stated_is_what_is_scored(made: str, recovered: Ran) -> None:
    ran = lrbo_command(
        "evaluate", "checkpoint=better", "data=generated", "record=null", "output=json"
    )
    assert ran.json["nll"] == pytest.approx(recovered.json["test"]["after"]["nll"], abs=1e-6)
    ran = lrbo_command(
        "evaluate", f"checkpoint={made}", "data=generated", "record=null", "output=json"
    )
    assert ran.json["nll"] == pytest.approx(recovered.json["test"]["before"]["nll"], abs=1e-6)
    card = Path("better", "README.md").read_text("utf-8")
    assert card.count("## Recovery") == 1
    assert "# better" in card
    assert f"lrbo recover checkpoint={made} out=better" in card
    assert OPENS.search(card)[0] == '"better"'  # type: ignore[index]
    assert "before recovery" in card
    assert "this model" not in card
    assert lrbo.load("better").config.quantization_config.units


def test_a_recovery_is_a_run_below_the_study_with_curves(made: str, recovered: Ran) -> None:
    client = MlflowClient(f"sqlite:///{Path('studies/mlflow.db').absolute()}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "lrbo")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if run.data.tags.get("lrbo.role") == "study")
    (own,) = (run for run in runs if run.data.tags.get("lrbo.role") == "recovery")
    assert own.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert own.info.status == "FINISHED"
    curve = client.get_metric_history(own.info.run_id, "blocks/after")
    assert [point.step for point in curve] == [0, 1]
    assert own.data.metrics["test_after_nll"] == recovered.json["test"]["after"]["nll"]
    assert own.data.params["recover.blocks.epochs"] == "1"
    folders = [Path(each["folder"]).name for each in Study(Path("studies/tiny")).state.checkpoints]
    assert "better" in folders


def until_a_block_is_written(path: Path, *rest: Any) -> None:
    """Write, and end as a machine does that loses its power."""
    states.write_tensors(path, *rest)
    if path.name.startswith("block"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_recovery_that_is_killed_goes_on_and_ends_as_it_would_have(
    made: str, recovered: Ran
) -> None:
    line = ["recover", f"checkpoint={made}", "out=again", *EXACT]
    process = os.fork()  # a process of its own would take ten seconds to import
    if not process:
        blocks.write_tensors = until_a_block_is_written
        lrbo_command(*line)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    assert Path("again.recovery", "blocks", "block_000.safetensors").exists()
    assert not Path("again.recovery", "blocks", "block_001.safetensors").exists()
    ran = lrbo_command(*line, "recover.blocks.epochs=2")
    assert ran.status == 2
    assert "epochs: the recovery in again.recovery has 1, the command has 2" in ran.err
    ran = lrbo_command(*line)
    assert ran.status == 0, ran.err
    assert "Going on with what is finished in again.recovery" in ran.err
    names = ("better", "again")
    assert len({Path(name, "model.safetensors").read_bytes() for name in names}) == 1
    assert ran.json["validation"] == recovered.json["validation"]


def test_all_stages_in_any_order_and_their_numbers_in_the_card(made: str) -> None:
    names = ["mixed_rank", "adapter", "distill", "blocks"]
    line = [f"recover.stages=[{','.join(names)}]", "recover.tokens=512", "output=json"]
    line += ["recover.adapter.form=diagonal"]
    ran = lrbo_command("recover", f"checkpoint={made}", "out=four", *line)
    assert ran.status == 0, ran.err
    assert [stage["name"] for stage in ran.json["stages"]] == names
    counts = [stage["trained"] for stage in ran.json["stages"]]
    assert counts[0] == counts[2] > 10 * counts[1] > 0
    assert f"Stage adapter trains {counts[1]:,} numbers in place of the " in ran.err
    card = Path("four", "README.md").read_text("utf-8")
    assert f"{counts[1]:,} numbers trained" in card
    tensors = [load_file(Path(name, "model.safetensors")) for name in (made, "four")]
    assert {n: (t.shape, t.dtype) for n, t in tensors[0].items()} == {
        n: (t.shape, t.dtype) for n, t in tensors[1].items()
    }


def test_what_no_layer_can_have_is_said_before_a_model_is_loaded(made: str) -> None:
    ran = lrbo_command(
        "recover", f"checkpoint={made}", "out=new", "recover.stages=[adapter]",
        "recover.adapter.rank=1000",
    )  # fmt: skip
    assert ran.status == 2
    assert "recover.adapter.rank=1000: expected at most" in ran.err
    assert "the largest matrix can have, model.layers." in ran.err
    assert not Path("new.recovery").exists()
    ran = lrbo_command(
        "recover", f"checkpoint={made}", "out=new", "recover.stages=[adapter,adapter]",
        "recover.adapter.entries=0.5", "recover.mixed_rank.decay=0", "recover.adapter.kl=0",
        "recover.adapter.ce=0",
    )  # fmt: skip
    for part in (
        "recover.stages=['adapter', 'adapter']: expected some of blocks, distill, adapter",
        "recover.adapter.entries=0.5: expected null with form=lora",
        "recover.mixed_rank.decay=0",
        "recover.adapter.kl, ce and hidden are all 0",
    ):
        assert part in ran.err, part


def test_half_precision_sees_what_every_step_changes() -> None:
    """Autocast keeps rounded copies of parameters, unless told otherwise."""
    weight, x = torch.nn.Parameter(torch.ones(4, 4)), torch.ones(2, 4)
    with recover._computing(torch.device("cpu"), torch.bfloat16, torch.float32):
        before = torch.nn.functional.linear(x, weight)
        with torch.no_grad():
            weight.add_(1)
        after = torch.nn.functional.linear(x, weight)
    assert before.dtype == torch.bfloat16
    assert torch.equal(after, 2 * before)


def test_everything_that_is_wrong_is_said_at_once(made: str, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "moved")
    config = config_of(made)
    about = config["quantization_config"]["provenance"]  # type: ignore[index]
    about["base_model"] = {"source": "hf", "path": "/nowhere/dense", "revision": None}
    about["study"] = "gone"
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ran = lrbo_command("recover", f"checkpoint={tmp_path / 'moved'}", "out=new")
    assert ran.status == 2
    assert "2 problems" in ran.err
    assert "the record of" in ran.err
    assert "says '/nowhere/dense', and there is no such folder" in ran.err
    assert "if it is elsewhere, give model.path=FOLDER" in ran.err
    assert "is of the study gone, which is not in studies with the same model" in ran.err
    assert not Path("new.recovery").exists()
    ran = lrbo_command(
        "recover", "checkpoint=nowhere", f"out={made}", "recover.minutes=0", "data.window=9",
        "recover.stages=[blocks,blocks]", "recover.blocks.weighting=all",
    )  # fmt: skip
    for part in (
        "exists already; lrbo overwrites nothing",
        "checkpoint='nowhere'",
        "recover.minutes=0",
        "data.window=9: the text is that of the study, as it is",
        "recover.stages=['blocks', 'blocks']: expected some of",
        "recover.blocks.weighting='all': expected gradient or none",
    ):
        assert part in ran.err, part
    Path("dense-folder").mkdir(exist_ok=True)
    ran = lrbo_command("recover", "checkpoint=dense-folder", "out=new")
    assert "no config.json in it" in ran.err


def test_another_dense_model_is_refused_with_both_fingerprints(made: str, tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    model.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    ran = lrbo_command(
        "recover", f"checkpoint={made}", "out=new", f"model.path={tmp_path / 'other'}"
    )
    assert ran.status == 2
    assert "has the fingerprint" in ran.err
    assert "was made of one with" in ran.err
    shutil.rmtree("new.recovery")


def test_text_that_is_to_be_scored_is_not_trained_on(made: str, tmp_path: Path) -> None:
    """Text that the checkpoint was calibrated on is no test, and the study's test no training."""
    text = lrbo_command(
        "recover", f"checkpoint={made}", "out=new", "data=generated", "data.test.tokens=1024",
        "seed=0",
    )  # fmt: skip
    assert text.status == 0, text.err  # the same text, parted in the same way
    shutil.rmtree("new")
    windows = load_windows(tokens_file(Study(Path("studies/tiny"))))
    tokenizer = byte_tokenizer()
    for role, used in (("a", "test"), ("b", "calibration"), ("c", "validation")):
        ids = windows[used].ids.flatten()
        (tmp_path / f"{role}.txt").write_text(tokenizer.decode(ids), encoding="utf-8")
    paths = {"calibration": "a", "validation": "c", "test": "b"}
    line = [f"data.{role}.path={tmp_path / name}.txt" for role, name in paths.items()]
    line += [f"data.{role}.tokens=1024" for role in paths] + ["data.window=64", *QUICK]
    ran = lrbo_command("recover", f"checkpoint={made}", "out=new", "data=files", *line)
    assert ran.status == 2
    assert "data.test: " in ran.err
    assert "used for calibration" in ran.err
    assert "also occur in calibration" in ran.err
    assert "allow_seen=true" in ran.err
    assert "data.validation" not in ran.err  # which the search was judged on, as it is here
    with contextlib.redirect_stderr(io.StringIO()):
        result = lrbo.recover(
            f"checkpoint={made}", "out=seen", "data=files", *line, "allow_seen=true"
        )
    assert (result["folder"], len(result["stages"])) == ("seen", 1)


def test_what_does_not_fit_is_refused_with_numbers(
    made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**10)
    ran = lrbo_command("recover", f"checkpoint={made}", "out=new", *QUICK)
    assert ran.status == 2
    assert "recovery needs about 0.0 GiB of memory on cpu" in ran.err
    assert "the dense model 0.0" in ran.err
    assert not Path("new.recovery").exists()


def test_a_full_disk_loses_nothing_that_was_finished(
    made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = blocks.write_tensors, []

    def full(path: Path, *rest: object) -> None:
        calls.append(path)
        if path.name == "block_001.safetensors":
            raise OSError(28, "No space left on device")
        whole(path, *rest)  # type: ignore[arg-type]

    line = ("recover", f"checkpoint={made}", "out=later", *QUICK)
    with monkeypatch.context() as patched:
        patched.setattr(blocks, "write_tensors", full)
        ran = lrbo_command(*line)
    assert ran.status == 2
    assert "a disk is full" in ran.err
    assert Path("later.recovery", "blocks", "block_000.safetensors").is_file()


def test_a_section_is_put_into_a_card_and_a_command_to_the_others() -> None:
    card = '# a\n\n| this model | 1 |\n\n## Load\n\nfrom_pretrained("a")\n\n## Make it again\n\n'
    card += "```bash\nlrbo compress out=a\n```\n\nWith python.\n"
    new = with_section(card, "b", "## Recovery\n\nDone.\n", "lrbo recover out=b")
    assert new.startswith("# b\n")
    assert new.index("## Recovery") < new.index("## Load")
    assert 'from_pretrained("b")' in new
    assert "lrbo compress out=a\nlrbo recover out=b\n```\n\nWith python." in new
    assert "## Recovery" in with_section(None, "b", "## Recovery", "lrbo recover out=b")


@pytest.mark.parametrize("names", [["adapter"], ["adapter", "distill"]])
def test_the_card_says_what_was_trained(names: list[str]) -> None:
    stages = [StageReport(name, 60.0, 3, 96, 2.0, 1.5, trained=1234) for name in names]
    table = Table("Recovery", columns("model"), [["dense"]])
    text = {"calibration": "mine", "validation": "yours"}
    section = render("recovery.md", stages=stages, text=text, table=table, is_solved=False)
    own = "\nIts factors and thin layers were trained after compression by small updates alone, "
    every = "\nIts small numbers (factors, scales, norms, biases) were trained after compression, "
    assert (own in section, every in section) == (len(names) == 1, len(names) == 2)
    assert "towards the dense model:\n- `adapter`: 3 steps on 96 tokens" in section
    assert section.count("1,234 numbers trained\n") == len(names)


def test_a_recovery_goes_on_where_its_checkpoint_was_moved(tmp_path: Path) -> None:
    folder = tmp_path / "x.recovery"
    states.State(folder, {"checkpoint": "/old/x", "checkpoint.digest": "a"})
    assert not states.State(folder, {"checkpoint": "/new/x", "checkpoint.digest": "a"}).is_new
    with pytest.raises(
        lrbo.LrboError, match=r"checkpoint\.digest: .* has 'a', the command has 'b'"
    ):
        states.State(folder, {"checkpoint": "/old/x", "checkpoint.digest": "b"})


def test_a_state_that_is_damaged_is_named(tmp_path: Path) -> None:
    state = states.State(tmp_path / "x.recovery", {"a": 1})
    assert state.is_new
    again = states.State(tmp_path / "x.recovery", {"a": 1})
    assert not again.is_new
    with (
        state.locked(),
        pytest.raises(lrbo.LrboError, match="another process is working in"),
        again.locked(),
    ):
        pass
    (tmp_path / "x.recovery" / "settings.json").write_text("{", encoding="utf-8")
    with pytest.raises(lrbo.LrboError, match="cannot be read; move its folder away"):
        states.State(tmp_path / "x.recovery", {"a": 1})
    (tmp_path / "y.safetensors").write_bytes(b"no")
    with pytest.raises(lrbo.LrboError, match="damaged, remove it to do that part again"):
        states.read_tensors(tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    ("taken", "text", "expected"),
    [
        (False, [], False),
        (True, [], True),
        (True, ["data=generated", "data.calibration.tokens=4096"], True),
        (True, ["data=generated", *(f"data.{role}.path=others" for role in ROLES)], False),
    ],
    ids=["no_refit", "text_of_the_study", "more_of_it", "other_text"],
)
def test_where_a_refit_has_solved_on_the_text_the_validation_text_judges(
    made: str, taken: bool, text: list[str], expected: bool, tmp_path: Path
) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    shutil.copytree(made, start)
    config: Any = config_of(made)
    config["quantization_config"]["provenance"]["refit"] = {"trials": [{"taken": taken}]}
    (start / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ran = lrbo_command(
        "recover", f"checkpoint={start}", f"out={out}", "recover.stages=[distill]",
        "recover.tokens=64", "recover.distill.kl=0", "recover.distill.ce=1", "output=json",
        "model.dtype=float32", *text,
    )  # fmt: skip
    assert ran.status == 0, ran.err
    (stage,) = ran.json["stages"]
    judged = stage["before"] == pytest.approx(ran.json["validation"]["before"]["nll"], abs=1e-5)
    assert judged == expected
    assert ("The validation text judges" in ran.err) == expected
    assert ("judged the training" in (out / "README.md").read_text("utf-8")) == expected
