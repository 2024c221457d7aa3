"""conf/ composes, values are checked before anything is loaded, problems come all at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lrbo.config import compose, refusals, saved, schema
from lrbo.config.choices import FLOATS, FORM_PRESETS, REPAIRED
from lrbo.config.compose import composed
from lrbo.config.recovery import RecoverySection
from lrbo.config.saved import from_yaml, to_yaml
from lrbo.config.schema import SCHEMAS, EvaluateConfig, RecoverConfig, ReportConfig, SearchConfig
from lrbo.errors import ConfigError
from lrbo.factorization.registry import METHODS
from lrbo.layers.forms import FORMS, Based
from lrbo.layers.options import Option
from lrbo.pipeline.checks import check

CONF = compose.conf_folder()
COMMANDS = sorted(SCHEMAS)
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in CONF.iterdir()
    if folder.is_dir()
}
OPTIONS = [(group, option) for group, options in GROUPS.items() for option in options]
# What an option leaves to the user.
REQUIRED = {
    ("model", "hf"): ["model.path=organisation/name"],
    ("experiment", "delta"): ["model.path=organisation/tuned", "model.base=organisation/base"],
    ("data", "files"): [f"data.{r}.path=a.txt" for r in ("calibration", "validation", "test")],
    ("data", "hf"): [f"data.{r}.path=name" for r in ("calibration", "validation", "test")],
}


def search(*overrides: str) -> SearchConfig:
    config = compose.composed("search", overrides)
    assert isinstance(config, SearchConfig)
    return config


# --- files -------------------------------------------------------------------------------------


def test_conf_holds_what_the_tests_look_at() -> None:
    assert len(list(CONF.rglob("*.yaml"))) == len(COMMANDS) + len(OPTIONS)
    assert COMMANDS == [
        "benchmark", "compress", "dashboard", "evaluate", "recover", "report", "search",
    ]  # fmt: skip
    assert len(OPTIONS) >= 22
    assert set(GROUPS) == {
        "model", "data", "method", "space", "budget", "executor", "experiment", "protocols",
    }  # fmt: skip


@pytest.mark.parametrize(("group", "option"), [one for one in OPTIONS if one[0] != "protocols"])
def test_every_option_composes_into_valid_values(
    group: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [f"{group}={option}", *REQUIRED.get((group, option), [])]
    assert refusals.find_problems("search", overrides) == {}
    assert check(search(*overrides)) == []


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_begins_with_the_command_that_uses_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines[:4] if line.startswith("# lrbo ")]
    assert comments, path
    command, *overrides = comments[0].split("   ")[0].removeprefix("# lrbo ").split()
    assert command in COMMANDS
    assert path.parent.name != "protocols" or overrides == [f"protocols=[{path.stem}]"]
    typed = [o.replace("...", "x") for o in overrides]
    problems = refusals.find_problems(command, typed)
    assert problems == {}, path


def test_values_of_every_command_have_the_schema_s_keys() -> None:
    required = {
        "report": ["study=x"],
        "compress": ["study=x", "out=y"],
        "recover": ["checkpoint=x", "out=y"],
        "evaluate": [],
        "benchmark": ["checkpoint=x"],
        "dashboard": [],
        "search": [],
    }
    for command, overrides in required.items():
        assert type(compose.composed(command, overrides)) is SCHEMAS[command]


def test_the_default_search_is_around_the_least_predicted_loss() -> None:
    config = search()
    assert (config.method["name"], config.space.type) == ("loss_aware", "weights")
    assert (config.budget.keep_ratio, config.budget.measure) == (0.8, "parameters")
    assert config.space.forms == ["pivoted"]
    assert config.sensitivity.enabled


def test_the_paper_s_search_is_at_hand() -> None:
    config = search("experiment=paper")
    assert (config.method["name"], config.space.type) == ("bolaco", "ratios")
    assert (config.budget.keep_ratio, config.budget.measure) == (0.8, "parameters")
    assert config.space.forms == ["factored"]
    assert config.space.dense == ["v_proj"]
    assert config.space.start == {"qk": 0.363, "o": 0.789, "gate": 0.841, "up": 0.807, "down": 1.0}


def test_the_quickstart_is_a_study_of_at_least_12_trials_on_a_real_model() -> None:
    config = search("experiment=quickstart")
    assert (config.study, config.studies) == ("quickstart", "studies")
    assert (config.method["name"], config.space.type) == ("loss_aware", "weights")
    assert config.search.trials >= 12
    assert config.model.source == config.data.source == "packaged"


def test_the_name_of_a_hub_model_is_the_last_part_of_its_path() -> None:
    assert search("model=hf", "model.path=Qwen/Qwen3-0.6B").model.name == "Qwen3-0.6B"
    assert search("model=hf", "model.path=/a/b/c/").model.name == "c"


def test_the_name_of_a_study_tells_different_settings_apart() -> None:
    names = {
        search(*overrides).study
        for overrides in ([], ["budget=keep_60"], ["method=svd"], ["seed=1"], ["space=per_layer"])
    }
    assert len(names) == 5


def test_conf_is_composed_within_a_command_that_hydra_runs_too() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        assert search("seed=3").seed == 3
        assert refusals.find_problems("search", ["seed=much"]) != {}
        assert GlobalHydra.instance().hydra is hydra
    assert search("seed=4").seed == 4


def test_threads_compose_side_by_side() -> None:
    with ThreadPoolExecutor(4) as pool:
        seeds = list(pool.map(lambda seed: search(f"seed={seed}").seed, range(8)))
    assert seeds == list(range(8))


def test_a_program_keeps_its_own_resolvers() -> None:
    OmegaConf.register_new_resolver("range", lambda low, high: f"{low} up to {high}")
    try:
        assert search().study.endswith("keep0.8_seed0")
        assert OmegaConf.create({"x": "${range:1,2}"}).x == "1 up to 2"
    finally:
        OmegaConf.clear_resolver("range")


# --- what the command line cannot mean ---------------------------------------------------------


def test_unknown_keys_are_named_all_at_once_with_the_nearest_one() -> None:
    problems = refusals.find_problems(
        "search", ["trials=5", "+bar=1", "++model.z=2", "search.trials=5", "data.windw=3"]
    )
    assert list(problems) == ["trials=5", "+bar=1", "++model.z=2", "data.windw=3"]
    assert "did you mean search.trials?" in problems["trials=5"]
    assert "did you mean data.window?" in problems["data.windw=3"]
    assert "bar is no key" in problems["+bar=1"]


def test_a_value_of_the_wrong_type_and_an_option_that_is_not_there_are_named() -> None:
    problems = refusals.find_problems(
        "search", ["budget.keep_ratio=much", "method=magic", "seed=1"]
    )
    assert list(problems) == ["budget.keep_ratio=much", "method=magic"]
    assert (
        "'much' of type 'str' could not be converted to Float" in problems["budget.keep_ratio=much"]
    )
    for method in METHODS:
        assert method in problems["method=magic"]


@pytest.mark.parametrize(
    "override",
    ["space.start.qk=0.5", "+space.groups.mine=[q_proj]", "space.start={qk: 0.5}", "~experiment"],
)
def test_free_mappings_and_hydra_s_grammar_are_taken(override: str) -> None:
    assert refusals.find_problems("search", ["space=per_kind", override]) == {}


@pytest.mark.parametrize("value", ["a (1)", "a[1]", "keep=0.7/a", "modèle", "a{b"])
def test_a_value_that_hydra_cannot_read_is_named_as_it_must_be_quoted(value: str) -> None:
    typed = f"model.path={value}"
    quoted = f"model.path='{value}'"
    (problem,) = refusals.find_problems("search", ["model=hf", typed]).values()
    assert problem == f'{typed}: Hydra cannot read it; if that is one value, quote it: "{quoted}"'
    assert search("model=hf", quoted).model.path == value
    (both,) = refusals.find_problems("search", ["model=tiny seed=1"]).values()
    assert "if it is several, give each by itself" in both


def test_a_new_entry_of_a_free_mapping_is_added_with_a_plus() -> None:
    (problem,) = refusals.find_problems("search", ["space.groups.mine=[q_proj]"]).values()
    assert "type +space.groups.mine=[q_proj]" in problem


def test_an_option_that_the_method_does_not_have_is_refused_with_those_that_it_has() -> None:
    line = ["method=asvd", "method.beta=1", "method.alpha=0.3"]
    assert refusals.find_problems("search", line) == {
        "method.beta=1": "method.beta=1: asvd has no such option; it has alpha"
    }
    assert search("method=asvd", "method.alpha=0.3").method == {"name": "asvd", "alpha": 0.3}
    (problem,) = refusals.find_problems("search", ["method=svd", "method.alpha=0.3"]).values()
    assert problem == "method.alpha=0.3: svd has no such option; it has none"
    (problem,) = check(search("method=svd", "+method.alpha=0.3"))
    assert problem == "method.alpha=0.3: svd has no such option; it has none"


def test_required_values_that_are_missing_are_named_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose.composed("compress", [])
    assert [p.split()[0] for p in caught.value.problems] == ["out", "study"]


def test_a_key_that_hydra_let_through_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.z is no key"):
        compose.composed("search", ["+model.z=2"])


@pytest.mark.parametrize("name", GROUPS["protocols"])
def test_every_protocol_composes_under_its_name_with_every_value_stated(name: str) -> None:
    config = compose.composed("evaluate", [f"protocols=[{name}]"])
    assert isinstance(config, EvaluateConfig)
    assert list(config.protocols) == [name]
    assert check(config) == []
    assert saved.protocol_changes(config) == {name: []}
    text = (CONF / "protocols" / f"{name}.yaml").read_text(encoding="utf-8")
    for key in vars(config.protocols[name]):
        assert (f"\n{key}: " in text) == (key not in ("path", "format", "column")), (
            key
        )  # of a file of one's own


def test_unknown_protocols_are_named_with_the_known_ones_nearest_first() -> None:
    (problem,) = refusals.find_problems("evaluate", ["protocols=[wikitext2,c4,nope]"]).values()
    assert (
        "no protocols of the name wikitext2, nope; known, the nearest first: wikitext2_" in problem
    )
    assert all(name in problem for name in GROUPS["protocols"])


def test_a_protocol_that_is_not_chosen_has_no_values() -> None:
    override = "protocols.c4.window=64"
    (problem,) = refusals.find_problems("evaluate", [override]).values()
    assert problem == f"{override}: c4 is not selected; type protocols=[c4]"
    assert refusals.find_problems("evaluate", ["protocols=[c4]", override]) == {}
    wrong = ["protocols=[c4]", "protocols.c4.widow=64"]
    (problem,) = refusals.find_problems("evaluate", wrong).values()
    assert "widow" in problem
    assert "not chosen" not in problem


def test_what_was_changed_of_a_protocol_is_stated_and_where_its_text_lies_is_not() -> None:
    config = compose.composed(
        "evaluate",
        ["protocols=[c4,ptb]", "protocols.c4.window=64", "protocols.ptb.path=ptb.txt"],
    )
    assert isinstance(config, EvaluateConfig)
    assert saved.protocol_changes(config) == {"c4": ["window=64, not 2048"], "ptb": []}


def test_flat_has_every_value_under_its_dotted_key() -> None:
    flat = schema.flat(ReportConfig(study="s"))
    assert flat == {
        "study": "s",
        "studies": "studies",
        "sync": False,
        "figures": True,
        "format": "text",
        "output": "text",
    }
    assert schema.flat(search())["data.calibration.tokens"] == 65536


@pytest.mark.parametrize(
    "override",
    [
        "data.bos=2", "data.bos=1", "data.bos=yes", "data.bos='true'", "data.bos=1.0",
        "search.other_versions=null", "tracking.enabled=on", "data={bos:1}", "data.bos=[true]",
        "++sensitivity.enabled=0",
    ],
)  # fmt: skip
def test_only_true_and_false_are_booleans(override: str) -> None:
    (problem,) = refusals.find_problems("search", ["experiment=tiny", override]).values()
    assert problem.startswith(f"{override}: ")
    assert "expected true" in problem
    assert " or " in problem


def test_booleans_are_taken_as_they_are_typed() -> None:
    taken = [
        "data.bos=True", "tracking.enabled=false", "sensitivity.enabled=${tracking.enabled}",
        "executor.oversubscribe=FALSE",
    ]  # fmt: skip
    assert refusals.find_problems("search", ["experiment=tiny", *taken]) == {}
    assert refusals.find_problems("search", ["experiment=tiny", "data.bos=null"]) == {}


def test_a_preset_stands_for_its_forms() -> None:
    config = composed("search", ["space.forms=[bytes]"])
    assert isinstance(config, SearchConfig)
    assert config.space.forms == list(FORM_PRESETS["bytes"])
    config = composed("search", ["space.forms=[factored,parameters]"])
    assert isinstance(config, SearchConfig)
    assert config.space.forms == ["factored", "pivoted"]
    assert {form for forms in FORM_PRESETS.values() for form in forms} <= {*FORMS}
    assert not {*FORM_PRESETS} & {*FORMS}


def test_factors_of_16_bits_are_forms_of_their_own() -> None:
    forms = "space.forms=[pivoted,stock,int3,sparse_rows_float]"
    config = composed("search", [forms, "bases.factor_bits=16"])
    assert isinstance(config, SearchConfig)
    expected = ["pivoted", "int4_sym_float", "int8_sym", "int3_float", "sparse_rows_float"]
    assert config.space.forms == expected
    again = from_yaml(to_yaml(config), "it")  # as a study keeps it
    assert again.space.forms == expected
    repaired = [
        form
        for name, form in FORMS.items()
        if isinstance(form, Based) and not Option(name).is_low_rank and form.largest_rank(99, 99)
    ]
    assert {form.base_name for form in repaired} == {*REPAIRED}
    assert len(repaired) == 2 * len(REPAIRED)
    assert all(form.name.endswith(FLOATS) == form.has_floats for form in repaired)


def test_a_recovery_has_the_same_defaults_in_its_file_and_in_a_program() -> None:
    config = compose.composed("recover", ["checkpoint=x", "out=y"])
    assert isinstance(config, RecoverConfig)
    assert config.recover == RecoverySection()


def test_options_of_stages_that_are_not_run_decide_nothing_of_a_recovery() -> None:
    own = RecoverySection(stages=["blocks"])
    own.distill.lr = 1.0
    assert own.effective == RecoverySection(stages=["blocks"]).effective
    assert "recover.distill.lr" not in own.effective
    own.blocks.lr = 1.0
    assert own.effective["recover.blocks.lr"] == 1.0
    assert own.effective != RecoverySection(stages=["blocks"]).effective
