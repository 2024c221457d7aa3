"""What was composed can be typed again."""

import shlex
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lrbo import cli
from lrbo.config import compose, refusals, schema, shell
from lrbo.config.saved import overrides_for
from lrbo.config.shell import command, keys_of
from lrbo.errors import ConfigError, StudyError
from lrbo.pipeline import overrides
from lrbo.pipeline.overrides import spelled, values_of
from lrbo.study.journal import Study


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["experiment=tiny", "seed=3"],
        ["experiment=paper"],
        ["model=hf", "model.path=Qwen/Qwen3-0.6B", "data=wikitext2", "budget.keep_ratio=0.7"],
        ["budget=front", "+search.thresholds.loss=4.5", "study=null_or_true"],
        ["warm_start=[uniform,analytic,'study:smaller']", "study='true'"],
        ["method=asvd", "method.alpha=1e-3"],
        ["method=svd", "method.name=mine", "+method.power=2"],
        ["space=per_kind", "+space.variables.qk=0.4", "space.tied=[[a,b]]", "~space.start.o"],
        [
            *("model=hf", "model.path=/models/mine", "data=files"),
            *("data.calibration.path='my train.txt'", 'data.validation.path=[a,"it\'s"]'),
            "data.test.path=test.txt",
        ],
    ],
)
def test_what_was_composed_can_be_typed_again(given: list[str]) -> None:
    wanted = schema.flat(compose.composed("search", given))
    line = overrides_for("search", wanted)
    assert schema.flat(compose.composed("search", line)) == wanted
    assert refusals.find_problems("search", line) == {}


def test_only_what_differs_is_typed() -> None:
    wanted = schema.flat(compose.composed("search", ["experiment=tiny", "search.trials=5"]))
    line = overrides_for("search", wanted)
    assert {"model=tiny", "data=generated", "search.trials=5", "space.rank_multiple=1"} <= set(line)
    assert not [text for text in line if text.startswith(("data.", "model.", "evaluation."))]


def test_values_that_no_command_line_gives_are_named() -> None:
    wanted = schema.flat(compose.composed("search", [])) | {"space.bound": 3}
    with pytest.raises(ConfigError, match=r"space\.bound"):
        overrides_for("search", wanted)


# --- what is printed can be pasted --------------------------------------------------------------

TEXTS = ["1e3", "2026_11_28", "null", "true", "0x10", "1_000", "007", "nan", "-1", "1.0", "plain"]
ODD = [
    "it's",
    "a\\",
    "a\\'b",
    "${x}",
    "\\${x}",
    "ä ö",
    "a,b",
    "[x]",
    "x=y",
    "{a}",
    "$HOME",
    "`id`",
    "#",
]


def read(override: str) -> object:
    """Read the value of an override as Hydra does, which has its grammar and OmegaConf's."""
    value = compose.read_value(override.partition("=")[2])
    return OmegaConf.create({"x": value})["x"]


@pytest.mark.parametrize("text", [*TEXTS, *ODD, "keep=0.75"])
def test_a_printed_command_gives_its_values_again(text: str) -> None:
    program, name, override = shlex.split(command("search", study=text))
    assert (program, name) == ("lrbo", "search")
    assert read(spelled("search", override)) == text


@settings(deadline=None)
@drawn(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])))
def test_any_text_comes_back_from_shell_and_grammar(text: str) -> None:
    *_, override = shlex.split(command("search", study=text))
    assert read(spelled("search", override)) == text


# Of these numbers and the words of YAML are made.
@pytest.mark.parametrize("first", ".5e_-/")
def test_texts_like_numbers_come_back_from_the_grammar(first: str) -> None:
    """The folder .5 was written bare, and became 0.5."""
    for rest in map("".join, [(), *product(".5e_-/", repeat=1), *product(".5e_-/", repeat=2)]):
        assert read(f"x={shell.text(first + rest)}") == first + rest
        assert read(f"x={shell.grammar([first + rest, 'b'])}") == [first + rest, "b"]


@settings(deadline=None)
@drawn(st.text(st.sampled_from("0123456789.+-_/eEnaNif trulsTFLRSU~%"), min_size=1))
def test_texts_like_words_of_the_grammar_come_back_from_it(text: str) -> None:
    assert read(f"x={shell.text(text)}") == text


@pytest.mark.parametrize("value", ["my model (v2)", "my model (v2), it's", "é's $HOME\\"])
def test_what_hydra_cannot_read_is_written_as_it_can(value: str) -> None:
    (problem,) = refusals.find_problems("search", [f"model.path={value}", "model=hf"]).values()
    assert "Hydra cannot read it" in problem
    (override,) = shlex.split(problem.rpartition("quote it: ")[2])
    assert read(override) == value


def test_what_follows_from_a_refused_override_is_not_said() -> None:
    (problem,) = overrides.find_problems("evaluate", ["data=files", "data.test.path=a,b"])
    assert problem.startswith("data.test.path=a,b: Ambiguous value")


def test_a_printed_command_is_composed_to_its_values() -> None:
    text = "it's ${x} 1e3\\"
    _, _, *line = shlex.split(command("search", study=text, **{"model.revision": "1e3"}))
    _, values = values_of("search", line)
    flat_values = schema.flat(values)
    assert (flat_values["study"], flat_values["model.revision"]) == (text, "1e3")


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_stays_as_it_was_typed(text: str) -> None:
    for name, key in (
        ("search", "study"),
        ("search", "tracking.experiment"),
        ("search", "model.path"),
        ("search", "data.test.path"),
        ("search", "+space.groups.x"),
        ("compress", "out"),
        ("compress", "point"),
        ("evaluate", "checkpoint"),
        ("evaluate", "protocols.c4.path"),
        ("report", "study"),
    ):
        may_be_null = key in ("checkpoint", "data.test.path", "protocols.c4.path")
        expected = None if text == "null" and may_be_null else text
        assert read(spelled(name, f"{key}={text}")) == expected


def test_what_stays_as_it_was_typed_is_composed_so() -> None:
    line = ["study=1e3", "tracking.experiment=007", "model=hf", "model.path=null"]
    line = [spelled("search", each) for each in line]
    flat_values = schema.flat(compose.composed("search", line))
    assert flat_values["study"] == "1e3"
    assert (flat_values["tracking.experiment"], flat_values["model.path"]) == ("007", "null")


def test_texts_of_lists_and_sweeps_stay_too_and_other_values_are_what_they_are() -> None:
    assert spelled("search", "data.test.path=[1e3,b]") == "data.test.path=['1e3',b]"
    assert spelled("search", "study=1e3,x") == "study='1e3',x"
    assert spelled("search", "space.tied=[[1,a],['1',b]]") == "space.tied=[['1',a],['1',b]]"
    for line in ("search.trials=7", "seed=0,1", "model.revision=null", "study=${seed}", "-m"):
        assert spelled("search", line) == line


@pytest.mark.parametrize("donor", ["1e3", "it's", "x'", "007", "a b", "/abs/path"])
def test_a_transfer_names_its_donor_as_it_was_typed(donor: str) -> None:
    _, *line = cli.transfer_arguments([f"donor={donor}", "experiment=tiny"])
    flat_values = schema.flat(compose.composed("search", line))
    assert flat_values["warm_start"][-1] == f"study:{donor}"
    assert flat_values["study"].endswith(f"_from_{Path(donor).name}")


def test_a_study_is_named_so_that_it_is_found_from_here() -> None:
    for folder, expected in (
        ("studies/mine", "mine"),
        ("other/mine", "other/mine"),
        ("/abs/mine", "/abs/mine"),
        ("mine", str(Path.cwd() / "mine")),
    ):
        assert keys_of(Path(folder)) == {"study": expected}


def test_a_study_named_in_another_folder_is_typed_with_it() -> None:
    """A path alone would mean the MLflow store of the usual folder."""
    assert keys_of(Path("sw/mine"), "sw") == {"study": "mine", "studies": "sw"}
    assert keys_of(Path("sw/mine"), "studies") == {"study": "sw/mine"}
    assert keys_of(Path("studies/mine"), "studies") == {"study": "mine"}
    assert keys_of(Path("sw/mine")) == {"study": "sw/mine"}
    with pytest.raises(StudyError, match="lrbo search study=mine studies=sw"):
        Study(Path("sw/mine"), "sw").require()
