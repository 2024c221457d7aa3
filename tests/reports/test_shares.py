"""What kinds of layers keep over depth, counted again layer by layer, whatever was searched."""

from pathlib import Path

import pandas as pd
import pytest

from lrbo.layers.options import Measure
from lrbo.reports import allocations
from lrbo.trials.records import TrialRecord
from tests.support.journal import BYTES, Journal

# Ratios are divided once here and once there, in another order of the same sums.
RATIO = {"rel": 1e-12}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "mine")


def kept_share(journal: Journal, record: TrialRecord, names: list[str]) -> float:
    """Return the share of their dense cost that layers keep."""
    allocation = record.request.allocation
    measure = allocation.budget.measure
    specs = [journal.layers.by_name[name] for name in names]
    dense = {
        "parameters": sum(spec.parameters for spec in specs),
        "bytes": sum(BYTES * spec.parameters for spec in specs),
        "macs": sum(spec.out_features * spec.in_features for spec in specs),
    }
    return sum(allocation.costs[name].of(measure) for name in names) / dense[measure]


def names_of(journal: Journal, *kinds: str, block: int | None = None) -> list[str]:
    return [
        spec.name
        for spec in journal.layers.compressible
        if spec.kind in kinds and block in (None, spec.block)
    ]


@pytest.mark.parametrize("space", ["per_kind", "per_kind_and_depth", "per_layer", "weights"])
@pytest.mark.parametrize("origin", ["uniform", "sobol"])
@pytest.mark.parametrize("measure", ["parameters", "bytes", "macs"])
def test_shares_are_counted_by_kind_and_depth_whatever_was_searched(
    tmp_path: Path, space: str, origin: str, measure: Measure
) -> None:
    journal = Journal(
        tmp_path / "mine",
        f"space={space}",
        "space.forms=[factored,pivoted]",
        f"budget.measure={measure}",
    )
    record = journal.complete(0, 2.0, origin)
    shares = allocations.kept_by_depth(
        allocations.options_frame(journal.study.about, record.request.allocation)
    )
    kinds = list(dict.fromkeys(spec.kind for spec in journal.layers.compressible))
    assert list(shares.columns) == ["block 0", "block 1", "all"]
    assert list(shares.index) == [*kinds, "all"]
    for block, column in ((0, "block 0"), (1, "block 1"), (None, "all")):
        for kind in kinds:
            expected = kept_share(journal, record, names_of(journal, kind, block=block))
            assert shares.loc[kind, column] == pytest.approx(expected, **RATIO)
        everything = kept_share(journal, record, names_of(journal, *kinds, block=block))
        assert shares.loc["all", column] == pytest.approx(everything, **RATIO)
    assert shares.loc["all", "all"] == pytest.approx(record.metrics["keep_ratio"], **RATIO)


@pytest.mark.parametrize(
    ("blocks", "columns"),
    [
        (1, ["all"]),
        (2, ["block 0", "block 1", "all"]),
        (3, ["block 0", "block 1", "block 2", "all"]),
        (4, ["blocks 0-1", "block 2", "block 3", "all"]),
        (30, ["blocks 0-9", "blocks 10-19", "blocks 20-29", "all"]),
    ],
)
def test_depth_is_told_apart_in_thirds(blocks: int, columns: list[str]) -> None:
    rows = [
        (f"{kind}.{block}", kind, block, 1 + block, 10 + size)
        for block in range(blocks)
        for kind, size in (("q", 100), ("down", 300))
        if (kind, block) != ("down", 0)  # a model need not have every kind in every block
    ]
    table = pd.DataFrame(rows, columns=["name", "kind", "block", "stored", "dense"])
    table = table.astype({"block": "Int64"})
    shares = allocations.kept_by_depth(table)
    assert list(shares.columns) == columns
    # Each block is in one column: the sums of the columns are those of all.
    covered = []
    for column in columns[:-1]:
        first, _, last = column.split()[1].partition("-")
        inside = range(int(first), int(last or first) + 1)
        covered += inside
        some = table[table["block"].isin(list(inside))]
        assert shares.loc["all", column] == some["stored"].sum() / some["dense"].sum()
        one = some[some["kind"] == "down"]
        if len(one):
            assert shares.loc["down", column] == one["stored"].sum() / one["dense"].sum()
        else:
            assert pd.isna(shares.loc["down", column])
    assert covered in ([], list(range(blocks)))
