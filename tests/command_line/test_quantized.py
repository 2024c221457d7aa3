"""Bits and ranks in one search: what it writes holds what was counted and scores as its trial."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lrbo
from lrbo.layers.based import BasedLinear
from lrbo.layers.forms import Quantized, form_named
from lrbo.models.loading import tiny_model
from lrbo.models.model_map import map_model
from lrbo.models.tiny import byte_tokenizer
from lrbo.study.journal import Study
from tests.support.commands import SMALL_SEARCH, Ran, lrbo_command, searched_in

SMALL = [*SMALL_SEARCH, "space=weights", "search.trials=4", "search.initial=3"]
SMALL += ["space.rank_multiple=1", "budget.measure=bytes"]
SMALL += ["bases.group_sizes=[16,32]"]
BITS = ["study=bits", "budget.bits_per_parameter=8", "space.forms=[pivoted,int4,int3]"]
NAMES = ("uniform", "analytic", "best")
SAME = 1e-5  # nats: sums of float32 in another order


@pytest.fixture(scope="module")
def bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Run one search over integers and ranks; tests may add to its folder."""
    return searched_in(tmp_path_factory.mktemp("bits"), *SMALL, *BITS)


@pytest.fixture
def written(bits: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch) -> tuple[Study, Path]:
    """Stand in the folder, which has the analytic trial as a checkpoint."""
    monkeypatch.chdir(bits[0])
    folder = Path("analytic")
    if not folder.exists():
        ran = lrbo_command(
            "compress",
            "study=bits",
            "point=1",
            f"out={folder}",
            "refit.enabled=false",
            "output=json",
        )
        assert ran.status == 0, ran.err
    return Study(Path("studies/bits")), folder


def test_every_trial_is_within_the_bits_and_ranks_are_used(bits: tuple[Path, Ran]) -> None:
    state = Study(bits[0] / "studies/bits").state
    dense = 4 * sum(spec.parameters for spec in map_model(tiny_model()).compressible)
    assert len(state.completed) == 4
    for record in state.completed:
        assert record.request.allocation.cost.bytes <= dense // 4  # 8 of the 32 bits of float32
        assert record.metrics["keep_ratio"] == record.request.allocation.cost.bytes / dense
    analytic = state.trials[1].request.allocation.options
    assert any(option.level[-1] for option in analytic.values() if option.form.startswith("int"))


def test_uniform_is_the_widest_integers_that_fit(bits: tuple[Path, Ran]) -> None:
    options = Study(bits[0] / "studies/bits").state.trials[0].request.allocation.options
    # 4 + 32/16 + 8/16 bits
    assert {str(option) for option in options.values()} == {"int4 16 0"}


def test_the_point_has_a_variable_for_every_family(bits: tuple[Path, Ran]) -> None:
    variables = Study(bits[0] / "studies/bits").state.trials[2].request.variables
    own = {name for name in variables if name.startswith("form.")}
    names = ("low_rank", "int4", "int3", "repair")
    assert own == {f"form.{name}" for name in names}


def test_the_file_holds_the_bytes_of_the_journal(written: tuple[Study, Path]) -> None:
    study, folder = written
    record = study.state.trials[1]
    tensors = load_file(folder / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == record.metrics["model_bytes"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["parameters"] == record.metrics["model_parameters"]
    for name, option in record.request.allocation.compressed.items():
        form = form_named(option.form)
        if isinstance(form, Quantized):
            assert tensors[f"{name}.packed"].dtype == torch.uint8
            spec = map_model(tiny_model()).by_name[name]
            size = spec.out_features * spec.in_features * form.bits
            assert tensors[f"{name}.packed"].numel() * 8 == size


def test_the_checkpoint_scores_as_its_trial(written: tuple[Study, Path]) -> None:
    study, folder = written
    scored = lrbo_command(
        "evaluate", f"checkpoint={folder}", "data=generated", "data.window=64",
        "data.test.tokens=512", "output=json",
    )  # fmt: skip
    assert scored.status == 0, scored.err
    losses = {name: test["metrics"]["nll"] for name, test in study.state.tests.items()}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "of the bytes that its budget covers" in card
    assert scored.json["nll"] == pytest.approx(losses["analytic"], abs=SAME)


def test_transformers_opens_it_after_import_lrbo_alone(written: tuple[Study, Path]) -> None:
    folder = written[1]
    ids = torch.arange(12).view(1, -1)
    code = (
        "import lrbo, torch; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(folder)!r});"
        "print(float(m(torch.arange(12).view(1, -1)).logits.double().sum()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with torch.inference_mode():
        expected = float(lrbo.load(folder)(ids).logits.double().sum())
    assert float(ran.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-4)


def test_it_is_saved_again_moved_pickled_and_generates(
    written: tuple[Study, Path], tmp_path: Path
) -> None:
    folder = written[1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(12).view(1, -1)
    with torch.inference_mode():
        expected = model(ids).logits
        model.save_pretrained(tmp_path / "again")
        again = lrbo.load(tmp_path / "again")
        assert torch.equal(again(ids).logits, expected)
        half = lrbo.load(folder, dtype=torch.bfloat16)
        quantized = [m for m in half.modules() if isinstance(m, BasedLinear)]
        assert quantized
        assert all(m.packed.dtype == torch.uint8 for m in quantized)
        assert all(m.scale.dtype == torch.bfloat16 for m in quantized)
        error = (half(ids).logits.float() - expected).abs().max()
        assert float(error) < 0.1 * float(expected.abs().max())
        assert torch.equal(pickle.loads(pickle.dumps(again))(ids).logits, expected)
        assert again.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 16)


def test_bases_and_low_ranks_are_made_again_in_turns_at_the_same_size(
    written: tuple[Study, Path],
) -> None:
    study, folder = written
    line = ["compress", "study=bits", "point=1", "refit.enabled=false", "output=json"]
    ran = lrbo_command(*line, "out=turns", "bases.alternations=2")
    assert ran.status == 0, ran.err
    (row,) = ran.json["bases"]["trials"]
    options = study.state.trials[1].request.allocation.compressed
    own = {n: str(o) for n, o in options.items() if o.form in ("int4", "int3") and o.rank}
    assert {each["layer"]: each["option"] for each in row["rows"]} == own
    assert all(each["predicted_after"] <= each["predicted_before"] for each in row["rows"])
    assert row["predicted_after"] < row["predicted_before"]
    assert row["predicted_after"] == sum(each["predicted_after"] for each in row["rows"])
    assert row["layers"] == sum(each["turn"] > 0 for each in row["rows"])
    assert f"Bases made again in {row['layers']} of {len(own)} layers: predicted loss" in ran.err
    before = study.state.trials[1].metrics["nll"]
    assert row["validation_loss_before"] == before
    card = Path("turns/README.md").read_text(encoding="utf-8")
    tensors = [load_file(each / "model.safetensors") for each in (folder, Path("turns"))]
    shapes = [{name: (t.shape, t.dtype) for name, t in each.items()} for each in tensors]
    assert shapes[0] == shapes[1]
    same = {name for name in tensors[0] if torch.equal(tensors[0][name], tensors[1][name])}
    if not row["taken"]:
        assert len(same) == len(tensors[0])
        assert "made again" not in card
        return
    others = {name for name in tensors[0] if name.rpartition(".")[0] not in own}
    assert others <= same < tensors[0].keys()
    assert row["validation_loss_after"] < before
    assert "bases made again for these options" in card
    assert "bases were made again, in turns with the low ranks over them (CALDERA)" in card
    assert "bases.alternations=2" in card


def test_integers_are_swept_at_the_same_size(written: tuple[Study, Path]) -> None:
    study = written[0]
    line = ["compress", "study=bits", "refit.enabled=false", "output=json", "bases.sweeps=2"]
    for trial in (0, 1):  # of integers alone, and with low ranks over some
        ran = lrbo_command(*line, f"point={trial}", f"out=swept-{trial}")
        assert ran.status == 0, ran.err
        assert (ran.json["bases"]["alternations"], ran.json["bases"]["sweeps"]) == (0, 2)
        (row,) = ran.json["bases"]["trials"]
        record = study.state.trials[trial]
        options = record.request.allocation.compressed
        own = {n: str(o) for n, o in options.items() if o.form in ("int4", "int3")}
        assert {each["layer"]: each["option"] for each in row["rows"]} == own
        assert all(each["predicted_after"] <= each["predicted_before"] for each in row["rows"])
        assert row["layers"] > len(own) / 2
        assert row["predicted_after"] < 0.99 * row["predicted_before"]
        tensors = load_file(Path(f"swept-{trial}/model.safetensors"))
        assert sum(each.nbytes for each in tensors.values()) == record.metrics["model_bytes"]
        card = Path(f"swept-{trial}/README.md").read_text(encoding="utf-8")
        assert ("integers by sweeps of coordinate descent" in card) == row["taken"]
        if row["taken"]:
            assert row["validation_loss_after"] < record.metrics["nll"]


def test_alternations_come_before_a_refit(written: tuple[Study, Path]) -> None:
    line = ["compress", "study=bits", "point=1", "out=both", "output=json"]
    ran = lrbo_command(*line, "bases.alternations=1")
    assert ran.status == 0, ran.err
    (turn,), (refit,) = (ran.json[key]["trials"] for key in ("bases", "refit"))
    start = "validation_loss_after" if turn["taken"] else "validation_loss_before"
    assert refit["validation_loss_before"] == turn[start]
    assert ran.err.index("Bases made again in") < ran.err.index("Refit of")


def test_a_refit_of_integers_alone_says_that_it_has_nothing_to_solve(
    written: tuple[Study, Path],
) -> None:
    ran = lrbo_command("compress", "study=bits", "point=0", "out=integers", "output=json")
    assert ran.status == 0, ran.err
    assert "no layer of trial 0 is a product of two factors" in " ".join(ran.err.split())
    (row,) = ran.json["refit"]["trials"]
    assert (row["layers"], row["taken"]) == (0, False)


def test_alternations_without_anything_to_alternate_are_refused_at_once(
    written: tuple[Study, Path],
) -> None:
    ran = lrbo_command("compress", "study=bits", "point=0", "out=none", "bases.alternations=2")
    assert ran.status != 0
    output = " ".join(ran.err.split())
    assert "bases.alternations=2: expected 0: in trial 0 no layer has a base with" in output
    assert "Bases" not in ran.err
    assert not Path("none").exists()


def test_merged_it_opens_everywhere(written: tuple[Study, Path]) -> None:
    _, folder = written
    ran = lrbo_command(
        "compress", "study=bits", "point=1", "out=merged", "format=merged", "output=json"
    )
    assert ran.status == 0, ran.err
    ids = torch.arange(12).view(1, -1)
    with torch.inference_mode():
        merged = AutoModelForCausalLM.from_pretrained("merged")(ids).logits
        difference = (merged - lrbo.load(folder)(ids).logits).abs().max()
    assert float(difference) < 1e-4 * float(merged.abs().max())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks it
def test_what_stock_forms_become_opens_as_its_card_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["study=stock", "space.forms=[stock]", "budget.bits_per_parameter=7"]
    typed += ["bases.group_sizes=[32]", "search.trials=2", "search.initial=2"]
    assert lrbo_command("search", *SMALL, *typed).status == 0
    line = ["compress", "study=stock", "point=1", "refit.enabled=false", "output=json"]
    assert lrbo_command(*line, "out=own").status == 0
    ran = lrbo_command(*line, "out=apart", "format=adapter")
    assert "they are not packed alike; vllm=true packs it so that it does" in ran.err
    ran = lrbo_command(*line, "out=a", "format=adapter", "vllm=true")
    assert ran.status == 0, ran.err
    assert "vLLM reads it too" in ran.err
    assert ran.json["parameters_in_file"] == ran.json["parameters"]
    assert ran.json["forms"] == ["int4_sym", "int8_sym"]
    assert ran.json["base_bytes"] > ran.json["adapter_bytes"] > 0
    card = Path("a/README.md").read_text(encoding="utf-8")
    assert f"{ran.json['base_bytes']:,} bytes" in card
    assert "vllm serve a/base --enable-lora --max-lora-rank 8 --lora-modules a=a/adapter" in card
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    ids = torch.arange(12).view(1, -1)
    with torch.inference_mode():
        said = names["model"].eval()(ids).logits
        difference = (said - lrbo.load("own")(ids).logits).abs().max()
    assert float(difference) < 1e-5 * float(said.abs().max())
    line = ["data=generated", "data.window=64", "data.test.tokens=512", "output=json"]
    scored = lrbo_command("evaluate", "checkpoint=a", *line)
    assert scored.status == 0, scored.err
    tests = Study(Path("studies/stock")).state.tests
    assert scored.json["nll"] == pytest.approx(tests["analytic"]["metrics"]["nll"], abs=SAME)
    assert "is in what the model has seen" in scored.out + scored.err
    assert "gone" not in lrbo_command("report", "study=stock").out


def test_what_vllm_would_not_read_is_refused_at_once(written: tuple[Study, Path]) -> None:
    line = ["compress", "study=bits", "point=1", "out=served", "vllm=true"]
    ran = lrbo_command(*line, "format=adapter")
    assert ran.status != 0
    output = " ".join(ran.err.split())
    assert "vllm=True: vLLM cannot read trial 1: its kernels do not take" in output
    assert "in groups of 16 (model.layers." in output
    assert "Layers as stored" not in ran.err
    assert "vllm=True: expected false with format=lrbo" in lrbo_command(*line).err
    assert not Path("served").exists()


def test_a_modelling_file_that_does_not_know_integers_is_refused_at_once(
    written: tuple[Study, Path],
) -> None:
    ran = lrbo_command("compress", "study=bits", "point=0", "out=code", "format=remote_code")
    assert ran.status != 0
    assert "its modelling file has no int4, which model.layers.0.self_attn.q_proj is" in ran.err
    assert not Path("code").exists()


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            ["bases.group_sizes=[64]", "space.forms=[int4,int3]"],
            [
                "error: 1 problem:",
                "int4, int3 of model.layers.0.self_attn.q_proj: expected groups of 16 or 32 of",
                "got [64]",
            ],
        ),
        (
            ["bases.group_sizes=[24]", "bases.method=best", "bases.damping=0"],
            [
                "bases.group_sizes=[24]: expected one or several of 16, 32, 64, 128, 256",
                "bases.method='best': expected gptq or nearest",
                "bases.damping=0",
            ],
        ),
        (
            ["bases.sweeps=2", "bases.method=nearest"],
            ["bases.sweeps=2: expected 0 with bases.method=nearest: sweeps go on where gptq ends"],
        ),
        (["space.forms=[int5]"], ["space.forms=['int5']: ", "int4", "int3_sym"]),
        (
            ["budget.bits_per_parameter=33"],
            ["budget.bits_per_parameter=33: expected at most 32, those of the model"],
        ),
        (
            ["budget.bits_per_parameter=8", "budget.measure=parameters"],
            ["budget.bits_per_parameter=8.0: expected null, or budget.measure=bytes"],
        ),
        (
            ["budget.bits_per_parameter=8", "budget.lowest=0.1"],
            ["budget.bits_per_parameter=8.0: expected null where budget.lowest"],
        ),
        (["budget.bits_per_parameter=0.5"], ["cannot be met", "smallest feasible"]),
    ],
)
def test_what_cannot_be_rounded_is_refused_before_a_model_is_loaded(
    overrides: list[str], messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = lrbo_command("search", *SMALL, *overrides)
    assert ran.status != 0
    output = " ".join(ran.err.split())
    assert all(message in output for message in messages), ran.err
    assert not list(Path().glob("studies/*/study.json"))


@pytest.mark.parametrize(
    ("measure", "keep_ratio"), [("parameters", 0.8), ("parameters", 1.0), ("macs", 1.0)]
)
def test_integers_that_save_nothing_in_a_measure_are_not_offered(
    measure: str, keep_ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = [f"budget.measure={measure}", f"budget.keep_ratio={keep_ratio}", "study=other"]
    ran = lrbo_command("search", *SMALL, *typed, "space.forms=[pivoted,int4]")
    assert ran.status == 0, ran.err
    state = Study(Path("studies/other")).state
    forms = {o.form for t in state.completed for o in t.request.allocation.options.values()}
    assert forms <= {"pivoted", "dense"}
    assert not any(name.startswith("form.") for name in state.trials[2].request.variables)


def test_a_model_in_float64_is_counted_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model().double().save_pretrained("wide")
    byte_tokenizer().save_pretrained("wide")
    typed = ["model=hf", "model.path=wide", "model.dtype=float32", "study=wide"]
    ran = lrbo_command("search", *SMALL, *typed, "space.forms=[int8]", "budget.keep_ratio=0.5")
    assert ran.status == 0, ran.err
    study = Study(Path("studies/wide"))
    dense = sum(spec.parameters for spec in map_model(tiny_model()).compressible)
    assert study.about.budget.limit == 8 * dense // 2
