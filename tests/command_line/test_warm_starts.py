"""What a search begins with: other studies, the paper, restricted variables; `lrbo transfer`."""

import shutil
from pathlib import Path

import pytest

from lrbo.layers.options import DENSE
from lrbo.study.journal import Study
from tests.support.commands import Ran, lrbo_command, project, searched
from tests.support.journal import Journal

__all__ = ["project", "searched"]  # fixtures

TINY = ["experiment=tiny", "search.initial=2", "output=json"]


def origins(study: str) -> list[str]:
    return [record.request.origin for record in Study(Path("studies") / study).state.records]


def test_a_search_begins_with_the_best_of_another_study(project: Path) -> None:
    lent = Study(Path("studies/tiny")).state.trials[3]
    starts = "warm_start=[uniform,paper,study:tiny:3]"
    line = ["search", *TINY, "study=after", "search.trials=4", starts]
    ran = lrbo_command(*line)
    assert ran.status == 0, ran.err
    assert origins("after") == ["uniform", "transfer", "transfer", "model"]
    records = Study(Path("studies/after")).state.records
    assert records[2].request.allocation == lent.request.allocation
    assert records[2].request.variables == lent.request.variables
    assert records[2].metrics["nll"] == lent.metrics["nll"]
    assert "transfer: an allocation of another study" in ran.out
    assert lrbo_command("search", *line[1:]).status == 0  # nothing left to do


def test_a_donor_is_kept_as_it_was_when_the_study_was_begun(project: Path) -> None:
    shutil.copytree("studies/tiny", "studies/lender")
    line = [*TINY, "study=heir", "warm_start=[study:lender,uniform]"]
    assert lrbo_command("search", *line, "search.trials=1").status == 0
    shutil.rmtree("studies/lender")
    ran = lrbo_command("search", "study=heir", "search.trials=3")
    assert ran.status == 0, ran.err
    assert origins("heir")[0] == "transfer"
    ran = lrbo_command("search", *line, "study=other")
    assert ran.status == 2
    assert "donor lender: there is no study at studies/lender" in ran.err


def test_a_donor_with_other_layers_is_refused_with_all_that_is_wrong(project: Path) -> None:
    other = Journal(Path("studies/gpt"), "space=weights", "method=loss_aware", case="gpt2")
    other.complete(0, 3.0)
    starts = "warm_start=[uniform,study:nowhere,study:gpt:99]"
    ran = lrbo_command("search", *TINY, "study=heirless", starts, "seed=-1")
    assert ran.status == 2
    output = " ".join(ran.err.split())
    assert "error: 3 problems:" in output  # which no model is needed for
    assert "donor nowhere: there is no study at studies/nowhere" in output
    assert "donor gpt:99: study gpt has no completed trial 99; it has the trials [0]" in output
    assert "seed=-1" in output
    more = ["seed=-1", "model.device=cuda:99"]  # which only what loads models can look for
    output = " ".join(lrbo_command("search", *TINY, "study=heirless", starts, *more).err.split())
    assert "error: 4 problems:" in output
    assert "donor nowhere: there is no study at studies/nowhere" in output
    assert "model.device='cuda:99' cannot be used here" in output
    starts = "warm_start=[uniform,study:gpt]"
    ran = lrbo_command("search", *TINY, "study=heirless", starts, "budget.keep_ratio=0.05")
    assert ran.status == 2
    output = " ".join(ran.err.split())
    assert "error: 2 problems:" in output
    assert "study:gpt has no layers of kind down_proj (model.layers.0.mlp.down_proj)" in output
    assert "its kinds are attn_c_proj, c_attn, c_fc, mlp_c_proj" in output
    assert "The smallest feasible budget.keep_ratio is" in output
    assert not Path("studies/heirless").exists()


def transfer(*arguments: str) -> Ran:
    return lrbo_command("transfer", *arguments, "experiment=tiny", "output=json")


def test_transfer_begins_a_study_that_a_search_continues(project: Path) -> None:
    ran = transfer("donor=tiny", "budget.keep_ratio=0.6", "space=weights", "method=loss_aware")
    assert ran.status == 0, ran.err
    name = ran.json["study"]
    assert name == "tiny_loss_aware_keep0.6_seed0_from_tiny"
    assert origins(name) == ["uniform", "analytic", "transfer"]
    keep_ratio = Study(Path("studies") / name).state.records[2].metrics["keep_ratio"]
    assert 0.58 < keep_ratio <= 0.6
    repeat = transfer("donor=tiny", "budget.keep_ratio=0.6", "space=weights", "method=loss_aware")
    assert repeat.json == ran.json | {"seconds": repeat.json["seconds"]}
    more = lrbo_command("search", f"study={name}", "search.trials=5", "output=json")
    assert more.status == 0, more.err
    assert origins(name)[3:] == ["sobol", "model"]


def test_a_donor_whose_best_is_the_baseline_lends_the_baseline(project: Path) -> None:
    ran = transfer("donor=tiny:0", "study=humble", "space=weights")
    assert ran.status == 0, ran.err
    assert origins("humble") == ["uniform", "analytic", "transfer"]
    records = Study(Path("studies/humble")).state.records
    assert records[2].request.allocation == records[0].request.allocation
    output = " ".join(ran.err.split())
    assert "Trial 2, what the donor lends, has the options of trial 0, uniform" in output


def test_a_trial_may_be_named(project: Path) -> None:
    ran = transfer("donor=tiny:2", "study=second")
    assert ran.status == 0, ran.err
    wanted = Study(Path("studies/tiny")).state.trials[2].request.allocation.options
    request = Study(Path("studies/second")).state.records[-1].request
    assert request.origin == "transfer"
    assert request.allocation.options == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected donor=NAME once"),
        (["donor=a", "donor=b"], "expected donor=NAME once"),
        (["donor=a", "warm_start=[paper]"], "no warm_start, which it sets"),
        (["donor=tiny:99"], "donor tiny:99: study tiny has no completed trial"),
        (["donor=nowhere", "budget.keep_ratio=0.01"], "there is no study at studies/nowhere"),
        (["donor=tiny", "budget.keep_ratio=0.01"], "smallest feasible budget.keep_ratio"),
        (["donor=tiny:x"], "study:NAME or study:NAME:TRIAL"),
    ],
)
def test_a_transfer_that_cannot_be_is_refused(
    arguments: list[str], message: str, project: Path
) -> None:
    ran = transfer(*arguments)
    assert ran.status == 2
    assert message in ran.err


def test_transfer_says_how_it_is_used() -> None:
    ran = lrbo_command("transfer", "--help")
    assert ran.status == 0
    assert "lrbo transfer donor=NAME" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 88


def test_variables_are_fixed_bounded_and_tied_from_the_command_line(project: Path) -> None:
    set_ = ["+space.variables={down:1.0,qk:[0.3,0.5]}", "space.tied=[[gate,up]]"]
    ran = lrbo_command("search", *TINY, "study=fixed", "search.trials=4", *set_)
    assert ran.status == 0, ran.err
    records = Study(Path("studies/fixed")).state.records
    assert [r.request.origin for r in records] == ["uniform", "analytic", "start", "model"]
    for record in records[2:]:
        assert set(record.request.variables) == {"qk", "o", "gate"}
        options = record.request.allocation.options
        assert [o for n, o in options.items() if n.endswith("down_proj")] == [DENSE, DENSE]
    ran = lrbo_command(
        "search", *TINY, "study=bad", "+space.variables={down:1.0,nope:1}", "space.tied=[[o,down]]"
    )
    assert ran.status == 2
    assert "space.variables.nope is no variable of the space: qk, o, gate, up, down" in ran.err
    assert "o and down are to have one value, but have bounds [0.2, 1.0] and [1.0, 1.0]" in ran.err
    assert not Path("studies/bad").exists()
