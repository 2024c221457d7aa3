"""Windows follow from text and seed alone; roles never share text; problems come all at once."""

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from lrbo.config.schema import DataConfig, RoleConfig
from lrbo.data.windows import (
    ROLES,
    SHARES,
    Role,
    TokenWindows,
    make_windows,
    overlaps,
)
from lrbo.errors import DataError
from lrbo.models.tiny import byte_tokenizer

# Tokens are integers: nothing here has a tolerance.

WINDOW = 48  # longer than the run of 32 tokens that the overlap check hashes
LONG = WINDOW * 80  # characters, which are tokens of the byte tokenizer


def letters(count: int, seed: int) -> str:
    """Draw text without any repetition to speak of."""
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=count))


def write(path: Path, text: str) -> str:
    path = path.with_suffix(".txt")
    path.write_text(text, encoding="utf-8")
    return str(path)


def spec_of(roles: dict[Role, tuple[Sequence[str], int | None]], **changes: object) -> DataConfig:
    """Describe text files: role -> (paths, windows)."""
    texts = {
        role: RoleConfig(list(paths), None if count is None else count * WINDOW)
        for role, (paths, count) in roles.items()
    }
    return replace(DataConfig(source="files", window=WINDOW, bos=False, **texts), **changes)


def decoded(windows: TokenWindows, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(row) for row in windows.ids]


@pytest.fixture
def shared(tmp_path: Path) -> str:
    """Return the path of one long text."""
    return write(tmp_path / "shared.txt", letters(LONG, seed=1))


@pytest.fixture
def three(tmp_path: Path) -> dict[Role, str]:
    """Return the paths of one text per role."""
    return {role: write(tmp_path / role, letters(LONG, i)) for i, role in enumerate(ROLES)}


# --- where windows come from -------------------------------------------------------------------


def test_windows_are_consecutive_cuts_of_the_text(
    three: dict[Role, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = spec_of({role: ([path], 7) for role, path in three.items()})
    windows = make_windows(spec, tokenizer)
    for role, path in three.items():
        text = Path(path).read_text(encoding="utf-8")
        cuts = [text[start : start + WINDOW] for start in range(0, LONG, WINDOW)]
        places = [cuts.index(window) for window in decoded(windows[role], tokenizer)]
        assert places == sorted(set(places))
        assert len(places) == 7
        if role == "test":
            assert places == list(range(7))  # the first ones, as the literature reports
        else:
            assert places != list(range(7))  # drawn, so they come from all over the text
        assert windows[role].ids.dtype == torch.int64
        assert windows[role].scored == 7 * (WINDOW - 1)


def test_the_seed_decides_what_is_drawn_and_nothing_else_does(
    three: dict[Role, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = spec_of({role: ([path], 7) for role, path in three.items()})
    digests = {}
    for seed in (0, 0, 1):
        torch.manual_seed(random.randrange(1000))  # the global state must not matter
        windows = make_windows(spec, tokenizer, seed=seed)
        actual = {role: windows[role].digest for role in ROLES}
        assert digests.setdefault(seed, actual) == actual
    assert digests[0]["test"] == digests[1]["test"]
    assert digests[0]["validation"] != digests[1]["validation"]
    assert digests[0]["calibration"] != digests[1]["calibration"]


def test_drawing_leaves_the_global_random_state_as_it_was(
    three: dict[Role, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    before = torch.get_rng_state()
    make_windows(spec_of({role: ([path], 3) for role, path in three.items()}), tokenizer)
    assert torch.equal(torch.get_rng_state(), before)


def test_some_windows_are_a_text_of_their_own() -> None:
    ids = torch.arange(12).reshape(3, 4)
    actual = TokenWindows(ids, "text").only([2, 0])
    assert actual.ids.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert actual.text == "text, 2 of 3 windows"
    assert actual.scored == 6


def test_the_digest_depends_on_every_token() -> None:
    ids = torch.arange(12).reshape(3, 4)
    digest = TokenWindows(ids, "text").digest
    assert TokenWindows(ids.clone(), "another name").digest == digest
    for index in range(12):
        other = ids.clone()
        other.view(-1)[index] += 1
        assert TokenWindows(other, "text").digest != digest


# --- sharing a text ----------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [c for n in (1, 2, 3) for c in combinations(ROLES, n)])
def test_roles_divide_a_shared_text_and_never_overlap(
    shared: str, tokenizer: PreTrainedTokenizerFast, roles: tuple[Role, ...]
) -> None:
    spec = spec_of({role: ([shared], None) for role in roles})
    windows = make_windows(spec, tokenizer)
    text = Path(shared).read_text(encoding="utf-8")
    actual = [decoded(windows[role], tokenizer) for role in ROLES if role in roles]
    # Together they are the whole text, in the order of the roles: nothing twice, nothing lost.
    assert "".join(window for part in actual for window in part) == text
    total = sum(SHARES[role] for role in roles)
    for role in roles:
        assert abs(len(windows[role].ids) - 80 * SHARES[role] / total) < 1


def test_the_size_of_one_role_does_not_change_another(
    shared: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    def digests(calibration: int) -> dict[Role, str]:
        sizes: dict[Role, int] = {"test": 5, "validation": 6, "calibration": calibration}
        spec = spec_of({role: ([shared], count) for role, count in sizes.items()})
        return {role: actual.digest for role, actual in make_windows(spec, tokenizer).items()}

    few, many = digests(4), digests(20)
    assert few["test"] == many["test"]
    assert few["validation"] == many["validation"]
    assert few["calibration"] != many["calibration"]


def test_only_some_roles_are_made_but_the_others_keep_their_part(
    shared: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = spec_of({role: ([shared], 4) for role in ROLES})
    whole = make_windows(spec, tokenizer)
    for role in ROLES:
        alone = make_windows(spec, tokenizer, only={role})
        assert set(alone) == {role}
        assert torch.equal(alone[role].ids, whole[role].ids)


def test_a_text_of_a_role_that_is_not_made_is_not_read(
    shared: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = spec_of({"test": (["/no/such/file"], 1), "validation": ([shared], 1)})
    assert set(make_windows(spec, tokenizer, only=["validation"])) == {"validation"}


def test_tokens_are_taken_from_all_paths_in_equal_parts(
    three: dict[Role, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    paths = list(three.values())
    windows = make_windows(spec_of({"calibration": (paths, 8)}), tokenizer)["calibration"]
    texts = [Path(path).read_text(encoding="utf-8") for path in paths]
    owners = [
        next(i for i, text in enumerate(texts) if window in text)
        for window in decoded(windows, tokenizer)
    ]
    assert owners == [0, 0, 0, 1, 1, 1, 2, 2]  # the first ones take the remainder
    assert all(path in windows.text for path in paths)


# --- limits and bos ----------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "wanted", "actual"), [(3, 7, 3), (9, 7, 7), (None, 7, 7)])
def test_at_most_max_windows_are_made(
    shared: str,
    tokenizer: PreTrainedTokenizerFast,
    limit: int | None,
    wanted: int,
    actual: int,
) -> None:
    spec = spec_of({"validation": ([shared], wanted)}, max_windows=limit)
    assert len(make_windows(spec, tokenizer)["validation"].ids) == actual


def test_max_windows_bounds_a_role_that_takes_everything(
    three: dict[Role, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = spec_of({"test": (list(three.values()), None)}, max_windows=5)
    assert len(make_windows(spec, tokenizer)["test"].ids) == 5


def test_bos_begins_each_window_and_the_text_goes_on_behind_it(
    shared: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = spec_of({"test": ([shared], 5)}, bos=True)
    ids = make_windows(spec, tokenizer)["test"].ids
    assert ids.shape == (5, WINDOW)
    assert ids[:, 0].tolist() == [tokenizer.bos_token_id] * 5
    text = Path(shared).read_text(encoding="utf-8")
    assert tokenizer.decode(ids[:, 1:].flatten()) == text[: 5 * (WINDOW - 1)]


def adding_bos() -> PreTrainedTokenizerFast:
    """Return a tokenizer that begins whatever it reads with bos, as Llama's does."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    return tokenizer


def test_bos_follows_the_tokenizer_unless_it_is_stated(
    shared: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = spec_of({"test": ([shared], 2)}, bos=None)
    adds = adding_bos()
    assert make_windows(spec, tokenizer)["test"].ids[0, 0] != 256
    assert make_windows(spec, adds)["test"].ids[:, 0].tolist() == [256, 256]
    stated = make_windows(replace(spec, bos=False), adds)["test"].ids
    assert not (stated == 256).any()
    without = byte_tokenizer()
    without.bos_token = None
    with pytest.raises(DataError, match=r"data\.bos=true, but this tokenizer has no bos"):
        make_windows(replace(spec, bos=True), without)


# --- refusals ----------------------------------------------------------------------------------


def test_every_role_that_is_too_short_is_listed_at_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    short = write(tmp_path / "short", letters(WINDOW * 8, 0))
    long = write(tmp_path / "long", letters(LONG, 1))
    roles = {"test": ([short], 5), "validation": ([long], 3), "calibration": ([short], 9)}
    with pytest.raises(DataError) as caught:
        make_windows(spec_of(roles), tokenizer)
    test, calibration = caught.value.problems
    # 8 windows, divided 1 : 2.
    assert re.search(
        rf"data\.test: .*short.* has 2 windows of {WINDOW} tokens .*calibration.*5 are needed",
        test,
    )
    assert re.search(r"data\.calibration: .* has 6 windows .*\(shared with test\), 9 ", calibration)
    assert "data.calibration.tokens or data.window" in calibration


def test_a_text_that_is_too_short_for_a_pool_is_named_by_the_key_of_the_pool(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "short", letters(WINDOW * 8, 0))
    spec = spec_of({"validation": ([path], 1)})
    with pytest.raises(
        DataError, match=r"9 are needed; .* lower evaluation\.pool_tokens or data\.w"
    ):
        make_windows(spec, tokenizer, pool_tokens=9 * WINDOW)


def test_a_text_without_one_window_is_too_short_even_for_everything(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "short", letters(WINDOW - 1, 0))
    with pytest.raises(DataError, match=r"has 0 windows of 48 tokens .*, 1 are needed"):
        make_windows(spec_of({"test": ([path], None)}), tokenizer)


def test_a_document_that_two_roles_read_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    document = letters(WINDOW * 4, seed=5)
    one = write(tmp_path / "one", letters(WINDOW * 6, 1) + document)
    two = write(tmp_path / "two", letters(WINDOW * 9, 2) + document + letters(WINDOW, 3))
    roles = {"test": ([one], None), "calibration": ([two], None)}
    with pytest.raises(DataError) as caught:
        make_windows(spec_of(roles), tokenizer)
    (problem,) = caught.value.problems
    assert re.search(r"^4 of 10 windows of test .*one.* also occur in calibration .*two", problem)


def test_a_shared_document_is_found_at_any_alignment() -> None:
    """The shortest windows for which this is promised: three runs, less what they overlap."""
    length = 93
    generator = torch.Generator().manual_seed(0)
    document, *noise = (torch.randint(0, 50_000, (4 * length,), generator=generator) for _ in "123")
    first = TokenWindows(torch.cat([noise[0], document]).reshape(8, length), "a")
    for shift in range(length):
        ids = torch.cat([noise[1][: length + shift], document, noise[1][: length - shift]])
        second = TokenWindows(ids.reshape(6, length), "b")
        (problem,) = overlaps({"test": first, "validation": second})
        assert problem.startswith("4 of 8 windows of test"), shift


def test_a_phrase_that_recurs_is_no_overlap(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    phrase = letters(20, seed=5)
    paths = {}
    for seed, role in enumerate(ROLES):
        text = phrase.join(letters(60, seed=100 * seed + i) for i in range(10))
        paths[role] = ([write(tmp_path / role, text)], None)
    assert set(make_windows(spec_of(paths), tokenizer)) == set(ROLES)


@pytest.mark.parametrize(("shared", "refused"), [(40, False), (61, False), (62, True), (93, True)])
def test_a_window_is_shared_if_half_of_its_runs_are(shared: int, refused: bool) -> None:
    """A window of 93 tokens has 62 runs of 32; 31 of them lie in 62 consecutive tokens."""
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randint(0, 50_000, (2, 1, 93), generator=generator)
    two[0, :shared] = one[0, :shared]
    actual = overlaps({"test": TokenWindows(one, "a"), "calibration": TokenWindows(two, "b")})
    assert len(actual) == refused


def test_windows_shorter_than_a_run_are_compared_whole() -> None:
    ids = torch.arange(40).reshape(4, 10)
    apart = {"test": TokenWindows(ids, "a"), "validation": TokenWindows(ids + 40, "b")}
    assert overlaps(apart) == []
    (problem,) = overlaps({**apart, "calibration": TokenWindows(ids[[2]], "c")})
    assert problem.startswith("1 of 4 windows of test (a) also occur in calibration (c)")


def test_every_pair_that_shares_text_is_named() -> None:
    windows = {role: TokenWindows(torch.arange(64)[None], role) for role in ROLES}
    assert len(overlaps(windows)) == 3
