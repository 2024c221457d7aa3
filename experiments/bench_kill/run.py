"""Kill searches 1,000 times at random moments; each must end as if nothing had happened."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kills import PLACES, TRIALS, Nursery, Pace, judge, killed, left_alone, moments, nursery, search

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
ALL, KILLS = (1, 2) if SMOKE else (1000, 40)  # together, and of one study
SEEDS = 1 if SMOKE else 4  # of the studies: what they propose


def one(nest: Nursery, folder: Path, number: int, pace: Pace, reference: Path) -> dict[str, Any]:
    """Kill one study again and again, let it finish, and say what came of it."""
    seed = number % SEEDS
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run that was stopped in here
    folder.mkdir()
    places = killed(nest, folder, seed, moments(random.Random(number), KILLS, pace))
    nest.run(folder, search(seed))
    verdict = judge(folder, reference)
    result = {"study": number, "kills": len(places), "places": Counter(places), **asdict(verdict)}
    (folder / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    if not verdict.problems:  # what went wrong is kept, to be looked at
        for name in ("studies", "cache", "outputs"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return result


def run(root: Path) -> list[dict[str, Any]]:
    """Run studies until there are enough kills, and return the results of all of them.

    Those that ended in ``place`` before are taken as they are.
    """
    results: list[dict[str, Any]] = []
    references: dict[int, tuple[Path, Pace]] = {}
    with nursery() as nest:
        # A kill that came when the search was over is none, so their number is not known before.
        while sum(result["kills"] for result in results) < ALL:
            number = len(results)
            folder = root / f"study_{number:03d}"
            if (folder / "result.json").is_file():
                results.append(json.loads((folder / "result.json").read_text(encoding="utf-8")))
                continue
            seed = number % SEEDS
            if seed not in references:
                alone = root / f"alone_{seed}"
                shutil.rmtree(alone, ignore_errors=True)
                alone.mkdir()
                references[seed] = alone, left_alone(nest, alone, seed)
            reference, pace = references[seed]
            results.append(one(nest, folder, number, pace, reference))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print the tables of the README."""
    print("| where kills fell | kills |\n|---|---:|")
    for place in PLACES:
        print(f"| {place} | {sum(result['places'].get(place, 0) for result in results)} |")
    rows = {
        "kills": sum(result["kills"] for result in results),
        "studies": len(results),
        "trials": len(results) * TRIALS,
        "trials begun more than once": sum(result["again"] for result in results),
        "studies with a problem": sum(bool(result["problems"]) for result in results),
        "largest difference of a variable": f"{max(result['variables'] for result in results):.2g}",
        "largest difference of a loss": f"{max(result['loss'] for result in results):.2g}",
    }
    print("\n| quantity | found |\n|---|---:|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


def main() -> int:
    """Run, print, and fail if a study ended otherwise than one that was left alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="to keep results in, and go on from")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) if folder is None else folder.absolute()
        root.mkdir(parents=True, exist_ok=True)
        results = run(root)
    show(results)
    problems = [problem for result in results for problem in result["problems"]]
    print("\n".join(problems), file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
