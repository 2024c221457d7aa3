"""`lrbo compress` and `lrbo evaluate`, in process, on the tiny model."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

import lrbo
from lrbo.checkpoints import export
from lrbo.commands import compress
from lrbo.data.documents import documents
from lrbo.data.windows import load_windows
from lrbo.errors import ConfigError
from lrbo.models.tiny import byte_tokenizer, tiny_model
from lrbo.pipeline.planning import tokens_file
from lrbo.study.journal import Study
from tests.support.commands import TINY, Ran, lrbo_command, project, searched

__all__ = ["project", "searched"]  # fixtures

# The checkpoint holds the same numbers that the trial was scored with: float32, another order
# of the same sums.
TOLERANCE = {"nll": 1e-5}


def test_compress_writes_what_evaluate_scores_like_the_trial(project: Path, searched: Any) -> None:
    best = searched[1].json["best"]
    ran = lrbo_command("compress", "study=tiny", "out=best", "output=json")
    assert ran.status == 0, ran.err
    answer = ran.json
    keys = {"folder", "parameters", "parameters_in_file", "keep_ratio", "forms", "refit"}
    keys |= {"bases"}
    assert set(answer) == keys
    assert answer["parameters"] == answer["parameters_in_file"]
    assert answer["keep_ratio"] == best["keep_ratio"]
    assert answer["forms"] == ["pivoted"]
    assert "Largest coefficient of the pivoted layers: " in ran.err
    model = lrbo.load("best")
    assert sum(p.numel() for p in model.parameters()) == answer["parameters"]
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 258)
    scored = lrbo_command("evaluate", "checkpoint=best", *EVALUATE)
    assert scored.status == 0, scored.err
    expected = searched[1].json["test"]["best"]["nll"]
    assert scored.json["nll"] == pytest.approx(expected, abs=TOLERANCE["nll"])


def test_bases_cannot_be_made_again_where_there_are_none(project: Path, searched: Any) -> None:
    line = ["compress", "study=tiny", "out=none", "bases.sweeps=2", "bases.alternations=1"]
    ran = lrbo_command(*line)
    assert ran.status != 0
    output = " ".join(ran.err.split())
    trial = searched[1].json["best"]["trial"]
    assert "2 problems:" in output
    assert f"bases.sweeps=2: expected 0: in trial {trial} no layer has integers, such as" in output
    assert f"bases.alternations=1: expected 0: in trial {trial} no layer has a base with" in output
    assert not Path("none").exists()


def test_no_study_is_judged_but_the_one_that_was_named_and_that_may_be_read_only(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was called ``studies/tiny`` when it was begun, where something else is by now."""
    shutil.copytree("studies/tiny", tmp_path / "backup" / "tiny")
    (tmp_path / "studies" / "tiny").mkdir(parents=True)
    (tmp_path / "studies" / "tiny" / "thesis.txt").touch()
    monkeypatch.chdir(tmp_path)
    # The superuser may write anywhere, so the answer of the system is replaced.
    monkeypatch.setattr("os.access", lambda path, mode: "backup" not in str(path))

    def planned(_: object, study: Study, problems: list[str]) -> None:
        raise ConfigError([f"judged {study.folder}", *problems])

    monkeypatch.setattr("lrbo.pipeline.planning.plan_search", planned)
    ran = lrbo_command("compress", "study=backup/tiny", "out=new")
    assert ran.err.splitlines()[-1].split() == ["-", "judged", "backup/tiny"], ran.err


def provenance(folder: str) -> dict[str, Any]:
    """Return what a checkpoint says of its making."""
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    entries: dict[str, Any] = config["quantization_config"]["provenance"]
    return entries


EVALUATE = ["model=tiny", "data=generated", "output=json"]


def test_evaluate_scores_the_dense_model_and_states_text_and_windows(
    project: Path, searched: tuple[Path, Ran]
) -> None:
    ran = lrbo_command("evaluate", *EVALUATE)
    assert ran.status == 0, ran.err
    answer = ran.json
    numbers = {"text", "digest", "windows", "window", "stride", "tokens", "nll", "perplexity"}
    assert set(answer) == numbers | {"model", "dtype", "device"}
    assert (answer["window"], answer["stride"], answer["tokens"]) == (64, 64, 16 * 63)
    expected = searched[1].json["test"]["dense"]
    assert answer["text"] == expected["text"]
    assert answer["nll"] == pytest.approx(expected["nll"], abs=TOLERANCE["nll"])
    assert "16 windows of 64, stride 64" in ran.out


def test_evaluate_reads_local_text(project: Path) -> None:
    Path("mine.txt").write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    ran = lrbo_command(
        "evaluate", "model=tiny", "data=files", "data.test.path=mine.txt", "data.window=32",
        "output=json",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert ran.json["text"].startswith("files:mine.txt")
    assert ran.json["tokens"] == 24 * 40 // 32 * 31


def test_a_text_that_was_calibrated_on_is_refused_unless_it_is_allowed(project: Path) -> None:
    if not Path("best").exists():
        assert lrbo_command("compress", "study=tiny", "out=best").status == 0
    text = "".join(documents("generated", "words"))
    Path("words.txt").write_text(text, encoding="utf-8")
    line = ["evaluate", "checkpoint=best", "data=files", "data.test.path=words.txt",
            "data.window=100", "model.dtype=float32", "output=json"]  # fmt: skip
    ran = lrbo_command(*line)
    assert ran.status == 2
    assert "of files:words.txt[test] is in what best used for calibration (gen" in ran.err
    assert "allow_seen=true" in ran.err
    allowed = lrbo_command(*line, "data.max_windows=400", "allow_seen=true")
    assert allowed.status == 0, allowed.err
    share = allowed.json["seen"]
    assert 0.01 < share < 0.5  # of the text, a part of which was read
    assert f"the text: {share:.2%} of it is in what the model has seen" in allowed.out
    own = lrbo_command("evaluate", "checkpoint=best", *EVALUATE)
    assert own.json["seen"] < 0.01
    (Path("best") / "lrbo_text.safetensors").rename("taken.safetensors")
    unknown = lrbo_command(*line)
    Path("taken.safetensors").rename("best/lrbo_text.safetensors")
    assert unknown.status == 0, unknown.err
    assert unknown.json["seen"] is None
    assert "best does not say which text it has seen" in unknown.err


def test_the_best_after_refits_is_written(project: Path) -> None:
    ran = lrbo_command("compress", "study=tiny", "refit.candidates=2", "out=two", "output=json")
    assert ran.status == 0, ran.err
    tried = ran.json["refit"]["trials"]
    assert len({row["trial"] for row in tried}) == 2
    for row in tried:
        better = row["validation_loss_after"] < row["validation_loss_before"]
        assert row["taken"] is better
    best = min(
        tried, key=lambda row: min(row["validation_loss_after"], row["validation_loss_before"])
    )
    about = provenance("two")
    assert about["trial"] == best["trial"]
    assert about["refit"] == ran.json["refit"]
    assert about["validation"]["nll"] == min(
        best["validation_loss_after"], best["validation_loss_before"]
    )
    assert f"Trial {best['trial']} is the best after refits" in " ".join(ran.err.split())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["register=yes"], "register='yes': expected link or copy or none"),
        (["format=onnx"], "format='onnx': expected lrbo or remote_code or merged"),
        (["refit.candidates=0"], "refit.candidates=0: expected at least 1"),
        (["refit.held_back=1"], "refit.held_back=1.0: expected a number from 0 on and below 1"),
        (["refit.output_power=2"], "refit.output_power=2.0: expected a number from 0 to 1"),
        (["refit.feedback=-1"], "refit.feedback=-1.0: expected a number from 0 on"),
        (["refit.candidates=2", "point=1"], "expected 1 with point=1, which names one trial"),
        (["refit.candidates=2", "refit.enabled=false"], "expected 1 with no refit"),
    ],
)
def test_a_refit_that_makes_no_sense_is_refused(
    project: Path, given: list[str], message: str
) -> None:
    ran = lrbo_command("compress", "study=tiny", "out=none", *given)
    assert ran.status == 2
    assert message in " ".join(ran.err.split())


def test_a_trial_and_a_ratio_can_be_compressed(project: Path) -> None:
    one = lrbo_command("compress", "study=tiny", "point=1", "out=one", "output=json")
    assert one.status == 0, one.err
    assert provenance("one")["trial"] == 1
    small = lrbo_command("compress", "study=tiny", "point=keep=0.8", "out=small", "output=json")
    assert small.status == 0, small.err
    assert small.json["keep_ratio"] <= 0.8


@pytest.mark.slow
def test_between_two_points_of_a_front_one_more_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = lrbo_command(
        "search", *TINY, "budget=front", "search.trials=12", "study=front", "sensitivity.windows=1"
    )
    assert ran.status == 0, ran.err
    assert ran.json["hypervolume"]["size"] == "keep_ratio"
    study = Study(Path("studies/front"))
    # The loss of a random model does not rise as it shrinks: take the ends for its front.
    ends = [study.state.trials[index] for index in (11, 8)]
    monkeypatch.setattr("lrbo.pipeline.trial_loop.pareto_front", lambda trials, size: ends)
    with monkeypatch.context() as patch:  # which scores otherwise
        patch.setattr("lrbo.study.versions.versions", lambda: {"torch": "1.13.0"})
        ran = lrbo_command("compress", "study=front", "point=keep=0.72", "out=x")
    assert ran.status == 2
    assert "search.other_versions=true" in ran.err
    assert 12 not in Study(Path("studies/front")).state.trials
    ran = lrbo_command("compress", "study=front", "point=keep=0.72", "out=x", "refit.enabled=false")
    assert ran.status == 0, ran.err
    record = Study(Path("studies/front")).state.trials[12]
    assert record.request.origin == "between"
    assert record.request.variables["keep_ratio"] == pytest.approx(0.72, abs=0.01)
    assert record.metrics["keep_ratio"] <= 0.72
    assert "Trial 12, between two points of the front: keep ratio 0.7" in " ".join(ran.err.split())


@pytest.mark.slow
def test_a_front_of_baselines_uses_the_budget_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["budget=front", "space=weights", "method=loss_aware", "warm_start=[uniform]"]
    ran = lrbo_command(
        "search", *TINY, *line, "search.trials=4", "study=bare", "sensitivity.layers_per_kind=0"
    )
    assert ran.status == 0, ran.err
    study = Study(Path("studies/bare"))
    # The loss of a random model does not rise as it shrinks: take two neighbours for its front.
    ends = sorted(study.state.completed, key=lambda record: record.metrics["keep_ratio"])[1:3]
    monkeypatch.setattr("lrbo.pipeline.trial_loop.pareto_front", lambda trials, size: ends)
    ran = lrbo_command("compress", "study=bare", "point=keep=0.72", "out=x", "refit.enabled=false")
    assert ran.status == 0, ran.err
    record = Study(Path("studies/bare")).state.trials[4]
    assert record.request.origin == "between"
    assert record.request.variables == {}
    assert 0.71 < record.metrics["keep_ratio"] <= 0.72
    assert "point=keep=0.72: trial" in " ".join(ran.err.split())
    ran = lrbo_command("compress", "study=bare", "point=keep=0.95", "out=y", "refit.enabled=false")
    assert "keep=0.95 is beyond the end of the front, trial" in " ".join(ran.err.split())


@pytest.mark.slow
def test_a_front_of_latency_is_searched_reported_and_compressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    timed = ["latency.enabled=true", "latency.repeats=3", "search.size=decode_latency_ratio"]
    line = [*TINY, "budget=front", "search.trials=10", "study=timed", "sensitivity.windows=1"]
    ran = lrbo_command("search", *line, *timed)
    assert ran.status == 0, ran.err
    front = ran.json["front"]
    assert ran.json["hypervolume"]["size"] == "decode_latency_ratio"
    assert "compress study=timed point=decode_latency_ratio=RATIO" in ran.err
    ratios = [point["decode_latency_ratio"] for point in front]
    assert ratios == sorted(ratios)
    records = Study(Path("studies/timed")).state.completed
    assert len(records) == 10
    assert all(record.metrics["prefill_s"] > 0 for record in records)
    assert lrbo_command("report", "study=timed", "output=json").json["front"] == front
    fastest = f"point=decode_latency_ratio={ratios[0]!r}"
    ran = lrbo_command("compress", "study=timed", fastest, "out=fast", "refit.enabled=false")
    assert ran.status == 0, ran.err
    written = json.loads(Path("fast/config.json").read_text(encoding="utf-8"))
    assert written["quantization_config"]["provenance"]["trial"] == front[0]["trial"]
    ran = lrbo_command("compress", "study=timed", "point=prefill_latency_ratio=0.001", "out=none")
    assert ran.status == 2
    assert "with prefill_latency_ratio from" in ran.err


def test_a_latency_that_was_not_measured_is_said(project: Path) -> None:
    ran = lrbo_command("compress", "study=tiny", "point=prefill_latency_ratio=0.9", "out=none")
    assert ran.status == 2
    assert "prefill_latency_ratio was not measured" in ran.err


def test_merged_biases_without_a_place_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {
        k: v for k, v in tiny_model().config.to_dict().items() if k in MistralConfig().to_dict()
    }
    del values["model_type"], values["architectures"]
    MistralForCausalLM(MistralConfig(**values)).save_pretrained("dense")
    byte_tokenizer().save_pretrained("dense")
    line = (
        "search", "experiment=tiny", "model=hf", "model.path=dense", "method=bolaco", "study=dense",
        "search.trials=3", "search.initial=3", "model.dtype=float32",
    )  # fmt: skip
    ran = lrbo_command(*line)
    assert ran.status == 0, ran.err
    monkeypatch.setattr(compress, "evaluate_between", lambda *_: pytest.fail("a trial was run"))
    line = ("compress", "study=dense", "format=merged", "out=merged", "point=keep=0.9")
    ran = lrbo_command(*line)
    assert ran.status == 2
    assert "MistralForCausalLM has no parameter for the bias of" in ran.err
    assert "Layers as stored" not in ran.err
    assert "Largest coefficient" not in ran.err
    assert not Path("merged").exists()


def test_forms_that_a_format_cannot_hold_are_refused_before_any_work(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress, "finalist", lambda *_: pytest.fail("factors were read"))
    ran = lrbo_command("compress", "study=tiny", "format=adapter", "point=1", "out=stock")
    assert ran.status == 2
    output = " ".join(ran.err.split())
    assert "format='adapter' cannot hold trial 1: it holds int4, int3, int2, int8_sym," in output
    assert "but not pivoted (model.layers.0." in output
    assert "or a search with space.forms=[stock]" in output
    monkeypatch.setattr(compress, "missing_packages", lambda: "peft lacks")
    ran = lrbo_command("compress", "study=tiny", "format=adapter", "out=stock")
    assert (ran.status, "peft lacks" in ran.err) == (2, True)
    assert not Path("stock").exists()
    monkeypatch.setattr(compress.nas, "unfit", lambda config: f"not of {config.model_type}")
    ran = lrbo_command("compress", "study=tiny", "format=nemotron_nas", "out=nas")
    assert ran.status == 2
    assert "format='nemotron_nas': not of llama; expected format=lrbo or merged" in ran.err


def test_merged_weights_open_with_any_loader(project: Path) -> None:
    from transformers import AutoModelForCausalLM

    ran = lrbo_command("compress", "study=tiny", "format=merged", "out=merged", "output=json")
    assert ran.status == 0, ran.err
    assert "saves nothing" in ran.err
    assert ran.json["forms"] == []
    merged = AutoModelForCausalLM.from_pretrained("merged")
    if not Path("best").exists():
        assert lrbo_command("compress", "study=tiny", "out=best").status == 0
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            merged(ids).logits, lrbo.load("best")(ids).logits, rtol=1e-4, atol=1e-4
        )
    scored = lrbo_command("evaluate", "checkpoint=merged", *EVALUATE)
    assert scored.status == 0, scored.err
    assert 0 <= scored.json["seen"] < 0.01


def test_a_folder_with_a_modelling_file_is_scored_like_the_other(project: Path) -> None:
    given = ["study=tiny", "format=remote_code", "out=coded", "output=json"]
    ran = lrbo_command("compress", *given)
    assert ran.status == 0, ran.err
    assert ran.json["parameters"] == ran.json["parameters_in_file"]
    text = Path("coded/modeling_low_rank.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    assert "import lrbo" not in text
    if not Path("best").exists():
        assert lrbo_command("compress", "study=tiny", "out=best").status == 0
    scored = [
        lrbo_command("evaluate", f"checkpoint={name}", *EVALUATE) for name in ("coded", "best")
    ]
    assert [ran.status for ran in scored] == [0, 0]
    assert scored[0].json["nll"] == scored[1].json["nll"]


@pytest.mark.slow
def test_the_card_s_commands_write_the_same_checkpoint(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = lrbo_command("compress", "study=tiny", "point=1", "refit.blend=0.25", "out=carded")
    assert ran.status == 0, ran.err
    assert "carded/README.md" in " ".join(ran.err.split())
    card = ModelCard.load("carded/README.md")
    assert card.data.library_name == "transformers"
    state = Study(Path("studies/tiny")).state
    for key in ("dense", "uniform", "analytic"):
        value = state.tests[key]["metrics"]["perplexity"]
        (row,) = [line for line in card.text.splitlines() if line.startswith(f"| {key} |")]
        assert row.endswith(f"| {value:.2f} |")
    lines = re.findall(r"^lrbo (?:search|compress) .*", card.text, re.MULTILINE)
    assert len(lines) == 2
    before = Path("carded/model.safetensors").read_bytes()
    (measuring,) = re.findall(r"`(lrbo evaluate [^`]*)` measures it", card.text.replace("\n", " "))
    ran = lrbo_command(*shlex.split(measuring)[1:], "record=null", "output=json")
    assert ran.status == 0, ran.err
    test = state.tests["dense"]
    assert (ran.json["text"], ran.json["tokens"]) == (test["text"], test["metrics"]["tokens"])
    (row,) = [line for line in card.text.splitlines() if line.startswith("| this model |")]
    assert row.endswith(f"| {ran.json['perplexity']:.2f} |")
    monkeypatch.chdir(tmp_path)  # where there is no study
    for line in lines:
        repeat = lrbo_command(*shlex.split(line)[1:])
        assert repeat.status == 0, repeat.err
    assert Path("carded/model.safetensors").read_bytes() == before


def test_a_checkpoint_is_scored_in_the_dtype_of_its_own_numbers(project: Path) -> None:
    if not Path("best").exists():
        assert lrbo_command("compress", "study=tiny", "out=best").status == 0
    line = ["checkpoint=best", "data=generated", "record=null", "output=json"]
    ran = lrbo_command("evaluate", *line)  # where bfloat16 is faster, auto would take it
    assert ran.status == 0, ran.err
    assert ran.json["dtype"] == "float32"
    assert "is scored in" not in ran.err
    ran = lrbo_command("evaluate", *line, "model.dtype=bfloat16")
    assert ran.json["dtype"] == "bfloat16"
    output = " ".join(ran.err.split())
    assert "best is scored in bfloat16 and stored in float32; model.dtype=auto takes" in output


def test_a_folder_that_exists_is_left_alone(project: Path) -> None:
    mine = project / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work", encoding="utf-8")
    ran = lrbo_command("compress", "study=tiny", "out=mine")
    assert ran.status == 2
    assert "exists already" in ran.err
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_a_trial_that_is_not_there_is_named_with_those_that_are(project: Path) -> None:
    for point in ("99", "keep=0.5"):
        ran = lrbo_command("compress", "study=tiny", f"point={point}", "out=none")
        assert ran.status == 2
        assert "it has the trials [0, 1, 2, 3, 4]" in ran.err
    assert not (project / "none").exists()


def versions_of(study: str) -> dict[str, str]:
    """Return the folders of a study's registered model, by version."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{Path('studies/mlflow.db').absolute()}")
    versions = client.search_model_versions(f"name = '{study}'")
    return {str(each.version): Path(each.tags["folder"]).name for each in versions}


def test_checkpoints_are_registered_and_come_back_with_a_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, searched: tuple[Path, Ran]
) -> None:
    shutil.copytree(searched[0] / "studies", tmp_path / "studies")
    monkeypatch.chdir(tmp_path)
    for each in ("mlflow.db", "mlflow.db.lock"):  # its experiment keeps artifacts elsewhere
        Path("studies", each).unlink()
    before = len(Study(Path("studies/tiny")).state.checkpoints)
    options = ["study=tiny", "refit.enabled=false"]
    ran = lrbo_command("compress", *options, "out=early")  # MLflow has no run of the trial
    assert ran.status == 0, ran.err
    assert "lrbo report study=tiny sync=true" in ran.err
    assert lrbo_command("compress", *options, "register=none", "out=hidden").status == 0
    with Study(Path("studies/tiny")).locked():
        ran = lrbo_command("compress", *options, "out=unnoted")
        assert ran.status == 0, ran.err
        assert "does not say that unnoted was written" in ran.err
    for out in ("late", "gone"):
        assert lrbo_command("compress", *options, f"out={out}").status == 0
    shutil.rmtree("gone")
    entries = Study(Path("studies/tiny")).state.checkpoints[before:]
    assert [Path(each["folder"]).name for each in entries] == ["early", "hidden", "late", "gone"]
    for _ in range(2):
        ran = lrbo_command("report", "study=tiny", "sync=true")
        assert ran.status == 0, ran.err
        assert set(versions_of("tiny").values()) >= {"early", "late"}
        assert set(versions_of("tiny").values()).isdisjoint({"hidden", "unnoted", "gone"})


# Half the distance of neighbours at 1, and at 0: to the nearest number of the dtype.
ROUNDED = {"bfloat16": (2.0**-8, 0.0), "float16": (2.0**-11, 2.0**-25)}


@pytest.mark.parametrize("dtype", ROUNDED)
def test_a_checkpoint_of_another_dtype_is_rounded_and_scored_as_it_is(
    dtype: str, project: Path
) -> None:
    if not Path("exact").exists():
        line = ("compress", "study=tiny", "out=exact", "refit.enabled=false")
        assert lrbo_command(*line).status == 0
    line = ("compress", "study=tiny", f"out={dtype}", "refit.enabled=false", f"dtype={dtype}")
    ran = lrbo_command(*line)
    assert ran.status == 0, ran.err
    exact, rounded = (load_file(Path(name, "model.safetensors")) for name in ("exact", dtype))
    assert exact.keys() == rounded.keys()
    relative, absolute = ROUNDED[dtype]
    for name, tensor in exact.items():
        if tensor.is_floating_point():
            assert rounded[name].dtype == getattr(torch, dtype)
            if name.endswith(".bias"):  # made to fit the rounded weights
                continue
            error = (rounded[name].double() - tensor.double()).abs()
            # Twice rounded: to float32 and from there, which adds a part in 10,000.
            assert bool((error <= 1.0001 * relative * tensor.abs() + absolute).all()), name
        else:
            assert torch.equal(rounded[name], tensor)
    config = json.loads(Path(dtype, "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == dtype
    stated = provenance(dtype)
    assert stated["validation"]["dtype"] == "float32"
    assert stated["validation_as_written"]["dtype"] == dtype
    windows = load_windows(tokens_file(Study(Path("studies/tiny"))))["validation"].ids
    scored = lrbo.score(lrbo.load(dtype), windows)
    assert stated["validation_as_written"]["nll"] == pytest.approx(scored.mean, abs=1e-9)
    assert stated["validation_as_written"]["nll"] != stated["validation"]["nll"]
    card = Path(dtype, "README.md").read_text(encoding="utf-8")
    assert f"this model in {dtype}, as written" in card
    assert f"Validation nll in {dtype}: {scored.mean:.4f}" in ran.err
    ran = lrbo_command(
        "evaluate", f"checkpoint={dtype}", "data=generated", "record=null", "output=json"
    )
    assert ran.json["dtype"] == dtype  # in which the card states the model as written


def test_a_refit_checkpoint_of_another_dtype_can_be_merged(project: Path) -> None:
    line = ("compress", "study=tiny", "out=flat", "dtype=bfloat16", "format=merged")
    ran = lrbo_command(*line)
    assert ran.status == 0, ran.err
    assert {t.dtype for t in load_file("flat/model.safetensors").values()} == {torch.bfloat16}
    assert export.stored_dtype("flat") == "bfloat16"


def test_an_adapter_is_refused_by_every_command_before_any_work(project: Path) -> None:
    for name in ("dense", "written"):
        shutil.rmtree(name, ignore_errors=True)
    lrbo_command("compress", "study=tiny", "out=written", "refit.enabled=false")
    tiny_model().save_pretrained("dense")
    for name in ("dense", "written"):
        Path(name, "adapter_config.json").write_text("{}", encoding="utf-8")
    dense = ("model=hf", "model.path=dense", "data=generated")
    for line in (
        ("search", "experiment=tiny", *dense, "study=adapted"),
        ("evaluate", *dense),
        ("evaluate", "checkpoint=written", "data=generated"),
        ("benchmark", "checkpoint=written"),
    ):
        ran = lrbo_command(*line)
        assert ran.status == 2, line
        assert "comes with an adapter (adapter_config.json), expected plain weights" in ran.err
        assert "merge_and_unload" in ran.err
    assert not Path("studies/adapted/journal.jsonl").exists()
