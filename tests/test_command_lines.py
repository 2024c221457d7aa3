"""What was composed can be typed again."""

import pytest

from lrbo import config
from lrbo.command_lines import typed
from lrbo.errors import ConfigError


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["experiment=tiny", "seed=3"],
        ["experiment=paper"],
        ["model=hf", "model.path=Qwen/Qwen3-0.6B", "data=wikitext2", "budget.keep_ratio=0.7"],
        ["budget=front", "+search.thresholds.loss=4.5", "study=null_or_true"],
        ["warm_start=[uniform,analytic,'study:smaller']", "method.alpha=1e-3", "study='true'"],
        ["space=per_kind", "+space.variables.qk=0.4", "space.tied=[[a,b]]", "~space.start.o"],
        [
            *("model=hf", "model.path=/models/mine", "data=files"),
            *("data.calibration.path='my train.txt'", 'data.validation.path=[a,"it\'s"]'),
            "data.test.path=test.txt",
        ],
    ],
)
def test_what_was_composed_can_be_typed_again(given: list[str]) -> None:
    wanted = config.flat(config.composed("search", given))
    line = typed("search", wanted)
    assert config.flat(config.composed("search", line)) == wanted
    assert config.find_problems("search", line) == {}


def test_only_what_differs_is_typed() -> None:
    wanted = config.flat(config.composed("search", ["experiment=tiny", "search.trials=5"]))
    line = typed("search", wanted)
    assert {"model=tiny", "data=generated", "search.trials=5", "space.rank_multiple=1"} <= set(line)
    assert not [text for text in line if text.startswith(("data.", "model.", "evaluation."))]


def test_values_that_no_command_line_gives_are_named() -> None:
    wanted = config.flat(config.composed("search", [])) | {"space.bound": 3}
    with pytest.raises(ConfigError, match=r"space\.bound"):
        typed("search", wanted)
