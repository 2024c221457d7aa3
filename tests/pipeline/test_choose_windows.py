"""Windows are chosen once, out of text that no other role has, whatever happens meanwhile."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lrbo.allocation.apply import compressed
from lrbo.config import compose, saved
from lrbo.config.schema import SearchConfig
from lrbo.data import documents
from lrbo.data.windows import load_windows
from lrbo.errors import ConfigError, NonFiniteError, StudyError
from lrbo.optimization.space import sobol_point
from lrbo.pipeline import build_worker, choose_windows, planning
from lrbo.pipeline.choose_windows import pool_allocations, select_windows
from lrbo.study.journal import Study
from lrbo.tasks.causal_lm import CausalLM
from lrbo.tasks.perplexity import score
from tests.support.commands import lrbo_command
from tests.support.fakes import Killed, make_front_space, make_space, make_weight_space
from tests.support.small_search import RecordingReporter

WINDOW, WANTED, POOL, ALLOCATIONS = 64, 4, 12, 3
TINY = ["experiment=tiny", "search.trials=5", "search.initial=4", "tracking.enabled=false"]
TINY += [f"data.{role}.tokens=512" for role in ("calibration", "test")]
TINY += [f"data.validation.tokens={WANTED * WINDOW}"]
CHOOSE = [f"evaluation.pool_tokens={POOL * WINDOW}", f"evaluation.pool_allocations={ALLOCATIONS}"]
# Of float32 sums in other batches.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests here share: they are about one model."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _place(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRBO_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)


def values(*overrides: str) -> SearchConfig:
    config = compose.composed("search", [*TINY, *overrides])
    assert isinstance(config, SearchConfig)
    return config


def build(name: str, *overrides: str) -> tuple[Any, planning.Plan, Study, RecordingReporter]:
    """Build the worker of a study, which is begun if it is new."""
    study, reporter = Study(Path("studies") / name), RecordingReporter()
    with study.locked():
        plan = planning.plan_search(values(f"study={name}", *overrides), study, [])
        return build_worker.build_worker(plan, study, reporter), plan, study, reporter


def events(name: str, *kinds: str) -> list[dict[str, Any]]:
    """Return the events of a journal, without their times."""
    journal = Path("studies") / name / "journal.jsonl"
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    records = [json.loads(line) for line in lines]
    times = ("time", "seconds")
    return [
        {key: value for key, value in event.items() if key not in times}
        for event in records
        if not kinds or event["event"] in kinds
    ]


def run(name: str, *overrides: str) -> dict[str, Any]:
    """Run a search to its end and return what it answers."""
    ran = lrbo_command("search", *TINY, f"study={name}", "output=json", *overrides)
    assert ran.status == 0, ran.err
    return ran.json


# --- the choice --------------------------------------------------------------------------------


def test_the_windows_are_those_that_the_losses_of_the_allocations_choose() -> None:
    worker, plan, study, reporter = build("one", *CHOOSE)
    windows = plan.windows["validation"].ids
    assert windows.shape == (POOL, WINDOW)
    space = build_worker.informed_space(
        plan, study, worker.model, worker.prepared, RecordingReporter()
    )
    losses = []
    for allocation in pool_allocations(space, ALLOCATIONS, plan.config.seed):
        with compressed(worker.model, allocation, worker.prepared, tokens=WINDOW):
            losses.append([score(worker.model, windows[i : i + 1]).mean for i in range(POOL)])
    measured = [event["losses"] for event in events("one", "pooled")]
    torch.testing.assert_close(torch.tensor(measured), torch.tensor(losses), rtol=CLOSE, atol=CLOSE)
    places = select_windows(torch.tensor(measured), WANTED)
    (choice,) = events("one", "chosen")
    assert (choice["windows"], choice["pool"]) == (places, POOL)
    assert torch.equal(worker.windows, windows[places])
    assert worker.dense.perplexity.tokens == WANTED * (WINDOW - 1)
    assert study.state.dense["nll"] == pytest.approx(
        score(worker.model, windows[places]).mean, abs=CLOSE
    )
    cost = f"Choosing {WANTED} of {POOL} validation windows by what {ALLOCATIONS} allocations lose"
    (line,) = [line for line in reporter.lines if line.startswith(cost)]
    assert f"as many tokens as {ALLOCATIONS * POOL / WANTED:.0f} trials" in line


def test_what_was_chosen_is_not_chosen_again_not_even_in_another_process(cache: Path) -> None:
    first, plan, study, _ = build("one", *CHOOSE)
    before = study.journal.read_bytes()
    second, _, _, reporter = build("one", *CHOOSE)
    assert not any("Choosing" in line or "Pool" in line for line in reporter.lines)
    actor = build_worker.study_worker(
        study.folder.absolute(), saved.to_yaml(plan.config), Path.cwd(), cache
    )
    for worker in (second, actor):
        assert torch.equal(worker.windows, first.windows)
        assert torch.equal(worker.dense.log_probs, first.dense.log_probs)
    assert study.journal.read_bytes() == before


def test_without_a_pool_nothing_is_chosen() -> None:
    worker, plan, study, _ = build("plain")
    assert torch.equal(worker.windows, plan.windows["validation"].ids)
    assert worker.windows.shape == (WANTED, WINDOW)
    assert events("plain", "pooled", "chosen") == []
    assert study.data == study.about.data


def test_the_pool_has_what_was_drawn_without_it_and_other_roles_stay_as_they_are() -> None:
    _, with_pool, study, _ = build("one", *CHOOSE)
    _, plain, _, _ = build("plain")
    rows = {tuple(row) for row in with_pool.windows["validation"].ids.tolist()}
    assert {tuple(row) for row in plain.windows["validation"].ids.tolist()} < rows
    for role in ("calibration", "test"):
        assert with_pool.windows[role].digest == plain.windows[role].digest
        assert study.data[role]["digest"] == plain.windows[role].digest
    validation = study.data["validation"]
    assert validation["windows"] == WANTED
    assert validation["pool"] == study.about.data["validation"]
    assert validation["pool"]["windows"] == POOL
    windows = with_pool.windows["validation"].only(study.state.selection["windows"])
    assert validation["digest"] == windows.digest != validation["pool"]["digest"]


@pytest.mark.parametrize("spaces", [make_space, make_weight_space, make_front_space])
def test_allocations_are_the_least_predicted_loss_and_points_that_no_search_begins_with(
    spaces: Any,
) -> None:
    space = spaces()
    allocations = pool_allocations(space, 6, 3)
    assert len(allocations) == 6
    assert allocations[:4] == pool_allocations(space, 4, 3)
    assert allocations != pool_allocations(space, 6, 4)
    is_predicted = space.problem.is_predicted
    if is_predicted:
        assert allocations[0] == space.problem.by_loss()
    # Small layers round many points to the same options: some may be equal, but never all.
    others = allocations[is_predicted:]
    begins = [space.allocate(sobol_point(space, index, 3)) for index in range(len(others))]
    assert [one.options for one in others] != [one.options for one in begins]
    for allocation in allocations:
        assert allocation.cost.of(allocation.budget.measure) <= allocation.budget.limit


# --- interruptions -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the events of a study that was set up in one go."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LRBO_CACHE", str(cache))
        patched.chdir(tmp_path_factory.mktemp("whole"))
        build("whole", *CHOOSE)
        return events("whole")


@pytest.mark.parametrize("at", range(ALLOCATIONS + 1))
def test_a_choice_that_was_killed_goes_on_where_it_was(
    at: int, uninterrupted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = CausalLM.losses

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise Killed
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(CausalLM, "losses", counted)
        if at == ALLOCATIONS:  # all are scored, and the choice is not written down

            def burns(*arguments: Any) -> None:
                raise Killed

            patched.setattr(choose_windows, "select_windows", burns)
        with pytest.raises(Killed):
            build("killed", *CHOOSE)
    assert len(events("killed")) == at
    calls = -ALLOCATIONS  # which no call reaches
    with monkeypatch.context() as patched:
        patched.setattr(CausalLM, "losses", counted)
        build("killed", *CHOOSE)
    assert calls == -at  # nothing was scored twice
    assert events("killed") == uninterrupted


def test_settings_that_were_given_up_before_the_study_began_leave_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens are written before ``study.json``; killed in between there is no study yet."""

    def burns(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Study, "begin", burns)
        with pytest.raises(Killed):
            build("one", *CHOOSE)
    assert Path("studies/one/tokens.safetensors").is_file()
    worker, _, study, _ = build("one")
    assert len(worker.windows) == WANTED
    assert load_windows(study.folder / "tokens.safetensors")["validation"].ids.shape == (
        WANTED,
        WINDOW,
    )


def broken(monkeypatch: pytest.MonkeyPatch, places: set[int]) -> None:
    """Let the losses of some allocations be no numbers."""
    real, calls = CausalLM.losses, iter(range(100))

    def score_windows(*arguments: Any, **options: Any) -> Any:
        if next(calls) in places:
            raise NonFiniteError("the loss of 3 tokens is not finite")
        return real(*arguments, **options)

    monkeypatch.setattr(CausalLM, "losses", score_windows)


def test_an_allocation_without_a_finite_loss_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, {1})
    worker, *_ = build("one", *CHOOSE)
    first, second, third = events("one", "pooled")
    assert (second["losses"], second["error"]) == (None, "the loss of 3 tokens is not finite")
    (choice,) = events("one", "chosen")
    both = torch.tensor([first["losses"], third["losses"]], dtype=torch.float64)
    assert choice["windows"] == select_windows(both, WANTED)
    assert len(worker.windows) == WANTED


def test_too_few_finite_losses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, {0, 2})
    with pytest.raises(
        StudyError, match=r"1 of 3 allocations have a finite loss.*pool_tokens=null"
    ):
        build("one", *CHOOSE)
    assert events("one", "chosen", "dense") == []


# --- whole searches ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides", [["search.racing=0.9"], ["budget.lowest=0.6"]], ids=["race", "front"]
)
def test_a_search_scores_its_trials_on_the_chosen_windows(overrides: list[str]) -> None:
    summary = run("one", *CHOOSE, *overrides)
    assert summary["validation_windows"] == {"chosen": WANTED, "pool": POOL}
    assert summary["trials_completed"] + summary["trials_stopped"] >= 5
    for event in events("one", "ended"):
        whole = WANTED * (WINDOW - 1)
        tokens = event["metrics"]["tokens"]
        assert tokens == whole if event["outcome"] == "completed" else tokens < whole
    assert run("one", *CHOOSE, *overrides) == summary
    assert len(events("one", "pooled")) == ALLOCATIONS


@pytest.mark.slow
def test_a_search_that_is_continued_by_its_name_and_its_model_have_the_chosen_windows() -> None:
    first = run("one", *CHOOSE)
    assert first["test"]["dense"] == run("plain")["test"]["dense"]
    ran = lrbo_command("search", "study=one", "search.trials=6", "output=json")
    assert ran.status == 0, ran.err
    assert ran.json["trials_completed"] == 6
    assert len(events("one", "chosen")) == 1
    report = lrbo_command("report", "study=one", "figures=false")
    assert f"validation text: {WANTED} of {POOL} windows, chosen" in " ".join(report.out.split())
    compressed_ = lrbo_command("compress", "study=one", "out=mine", "output=json")
    assert compressed_.status == 0, compressed_.err
    best = ran.json["best"]
    rows = {row["trial"]: row for row in compressed_.json["refit"]["trials"]}
    assert rows[best["trial"]]["validation_loss_before"] == best["nll"]
    written = json.loads(Path("mine/config.json").read_text(encoding="utf-8"))
    about = written["quantization_config"]["provenance"]
    assert about["data"]["validation"]["windows"] == WANTED
    refused = lrbo_command("search", *TINY, "study=one")
    assert refused.status == 2
    assert "evaluation.pool_tokens: the study has 768, the command has None" in refused.err


# --- bad input ---------------------------------------------------------------------------------


def test_a_pool_that_the_text_cannot_fill_is_named_by_its_key() -> None:
    with pytest.raises(
        ConfigError, match=r"lower evaluation\.pool_tokens or data\.window"
    ) as caught:
        build("one", "evaluation.pool_tokens=1000000")
    assert "data.validation" in str(caught.value)
    assert not Path("studies/one").exists()


def test_test_text_that_only_the_pool_reads_is_refused() -> None:
    """Without the pool, the windows that are drawn happen to be others."""
    sentences = list(documents.documents("generated", "words"))
    texts = {
        "calibration": sentences[:60],
        "validation": sentences[60:120],
        "test": sentences[110:170],
    }
    files = ["data=files", "data.window=96"]  # long enough to find them at any alignment
    for role, text in texts.items():
        Path(f"{role}.txt").write_text(" ".join(text), encoding="utf-8")
        files.append(f"data.{role}.path={role}.txt")
    study = Study(Path("studies/one"))
    planning.plan_search(values("study=one", *files), study, [])
    with pytest.raises(ConfigError, match=r"windows of test .* also occur in validation"):
        planning.plan_search(values("study=one", *files, "evaluation.pool_tokens=16384"), study, [])
