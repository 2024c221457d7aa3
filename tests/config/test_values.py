"""Numbers that no library takes are refused by key, wherever they stand in a configuration."""

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from lrbo.config.choices import RANGES
from lrbo.config.compose import composed
from lrbo.config.conflicts import SPACES, check_numbers
from lrbo.config.options import COUNT, rules_of
from lrbo.config.schema import SCHEMAS, SpaceConfig
from lrbo.files.parsing import ContentError, checked, to_json
from lrbo.optimization.proposals import SearchClient
from lrbo.pipeline import checks
from lrbo.study.events import Metrics
from lrbo.tasks.metrics import perplexity_of
from lrbo.tasks.perplexity import Perplexity
from tests.optimization.test_proposals import observe, space_of
from tests.support.commands import lrbo_command

REQUIRED = {
    "search": ["experiment=tiny"],
    "report": ["study=tiny"],
    "compress": ["study=tiny", "out=new"],
    "evaluate": ["protocols=[ptb]"],
    "benchmark": ["checkpoint=folder"],
    "recover": ["checkpoint=folder", "out=other"],
    "dashboard": [],
}


def numeric_fields(node: Any, kind: str, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """List the fields of a schema that hold a kind of number: key -> (its owner, its name)."""
    numbers: dict[str, tuple[Any, str]] = {}
    for field in fields(node):
        value, key = getattr(node, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            numbers |= numeric_fields(value, kind, f"{key}.")
        elif isinstance(value, dict):
            for name, child in value.items():
                if is_dataclass(child):
                    numbers |= numeric_fields(child, kind, f"{key}.{name}.")
        elif kind in str(field.type):
            numbers[key] = (node, field.name)
    return numbers


@pytest.mark.parametrize(
    ("command", "key"),
    [
        *(
            ("search", key)
            for key in (
                "evaluation.pool_allocations", "space.knots", "latency.repeats", "latency.warmup",
            )
        ),
        *(("benchmark", key) for key in ("repeats", "warmup", "steps")),
    ],
)  # fmt: skip
def test_what_is_done_over_and_over_has_an_end(command: str, key: str) -> None:
    line = [*REQUIRED[command], *(["space=weights"] if key == "space.knots" else [])]
    assert check_numbers(composed(command, [*line, f"{key}=10000"])) == {}
    (problem,) = check_numbers(composed(command, [*line, f"{key}=10001"])).values()
    assert problem == f"{key}=10001: expected a whole number up to 10,000"


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_whole_number_of_every_command_has_a_range(command: str) -> None:
    config = composed(command, REQUIRED[command])
    assert check_numbers(config) == {}
    whole = numeric_fields(config, "int")
    assert len(whole) >= {"search": 20, "evaluate": 8, "benchmark": 5}.get(command, 0)
    for key, (owner, name) in whole.items():
        before = getattr(owner, name)
        for bad in (10**22, -(10**22), 2**64, 10**400):
            setattr(owner, name, [1, bad] if isinstance(before, list) else bad)
            (problem,) = [one for one in checks.check(config) if one.startswith(f"{key}=")]
            assert "expected a whole number up to" in problem
            assert len(problem) < 150
        setattr(owner, name, before)


@pytest.mark.parametrize("command", SCHEMAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_may_be_infinite_or_none_at_all(command: str, bad: float) -> None:
    config = composed(command, REQUIRED[command])
    for key, (owner, name) in numeric_fields(config, "float").items():
        before = getattr(owner, name)
        setattr(owner, name, [1.0, bad] if isinstance(before, list) else bad)
        if isinstance(before, dict):
            setattr(owner, name, {"loss": bad})
            key = f"{key}.loss"
        problems = [one for one in checks.check(config) if one.startswith(f"{key}=")]
        assert problems == [f"{key}={getattr(owner, name)!r}: expected a finite number"] or (
            isinstance(before, dict) and problems == [f"{key}={bad!r}: expected a finite number"]
        )
        setattr(owner, name, before)


def test_entries_without_a_type_are_looked_at_too() -> None:
    config = composed("search", ["experiment=tiny", "+space.start.q_proj=[0.5,nan]"])
    assert list(check_numbers(config)) == ["space.start.q_proj"]
    huge = composed("search", ["experiment=tiny", f"+space.variables.q_proj={10**20}"])
    assert list(check_numbers(huge)) == ["space.variables.q_proj"]


@pytest.mark.parametrize("number", ["9" * 30, "9" * 400, "9" * 5000, "1e999", "nan"])
@pytest.mark.parametrize("key", ["seed", "evaluation.batch_windows", "budget.keep_ratio"])
def test_no_number_that_is_typed_ends_in_a_traceback(key: str, number: str) -> None:
    ran = lrbo_command("search", "experiment=tiny", f"{key}={number}")
    assert ran.status == 2
    assert f"  - {key}" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("seed", [50_000, 2**32 - 1])
def test_every_seed_that_is_taken_proposes(seed: int) -> None:
    """Seeds of trials are made from that of the study, and numpy takes none above 2^32."""
    assert checks.check(composed("search", ["experiment=tiny", f"seed={seed}"])) == []
    space = space_of(5)
    assert set(SearchClient(space, seed=seed).ask(6, observe(space, 6))) == set(space.names)


def test_a_seed_that_is_too_large_is_refused_once() -> None:
    for seed, rest in ((2**32, "up to 4,294,967,295"), (-1, "from 0 on")):
        problems = checks.check(composed("search", ["experiment=tiny", f"seed={seed}"]))
        assert problems == [f"seed={seed}: expected a whole number {rest}"]
    config = composed("search", ["experiment=tiny", f"search.trials={COUNT}"])
    assert checks.check(config) == []


def test_every_rule_of_a_type_of_space_is_of_a_key_without_another_rule() -> None:
    for rules in SPACES.values():
        assert set(rules) <= {field.name for field in fields(SpaceConfig)} - set(
            rules_of(SpaceConfig)
        )
    assert set(SPACES) == set(RANGES)


# --- perplexities beyond exp ---------------------------------------------------------------------


def test_a_perplexity_is_infinite_where_exp_overflows() -> None:
    assert perplexity_of(709.78) == math.exp(709.78) < math.inf
    assert perplexity_of(709.79) == perplexity_of(1e300) == math.inf
    assert Perplexity(8000.0, 10).value == math.inf
    assert Perplexity(8000.0, 10).mean == 800.0


def test_json_has_null_for_an_infinite_perplexity_and_nothing_else() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    value = {"nll": 800.0, "perplexity": math.inf, "rows": [{"test_perplexity": math.inf}, (1,)]}
    document = json.loads(to_json(value), parse_constant=refuse)
    assert document == {"nll": 800.0, "perplexity": None, "rows": [{"test_perplexity": None}, [1]]}
    read = checked({"nll": 800.0, "perplexity": None}, Metrics, "it")
    assert read == {"nll": 800.0, "perplexity": math.inf}
    with pytest.raises(ContentError, match="nll is null, expected a number"):
        checked({"nll": None, "perplexity": 2.0}, Metrics, "it")
    for bad in ({"nll": math.inf}, {"perplexity": math.nan}, {"perplexity": -math.inf}, [math.inf]):
        with pytest.raises(ValueError, match="JSON"):
            to_json(bad)
