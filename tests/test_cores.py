"""The threads of torch fit the cores that the process may use, and leave them to others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrbo.cores import available_cores, prepare_threads

AFFINITY = available_cores(Path("absent"))


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", AFFINITY),
        ("100000 100000", 1),
        ("1000 100000", 1),  # a hundredth of a core is still one thread
        ("6400000000 100000", AFFINITY),
        ("garbled", AFFINITY),
    ],
)
def test_cores_are_those_of_the_affinity_within_the_quota(
    tmp_path: Path, quota: str, cores: int
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(f"{quota}\n")
    assert available_cores(file) == cores


def test_the_affinity_counts() -> None:
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, [{one}]);"
        "from lrbo.cores import available_cores; print(available_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_a_thread_that_waits_sleeps_and_the_number_of_threads_stays_that_of_torch() -> None:
    environment: dict[str, str] = {}
    assert prepare_threads(environment, cores=8, affinity=8, load=1.0) == []
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192"}


def test_a_quota_below_the_affinity_sets_the_number_and_says_so() -> None:
    environment: dict[str, str] = {}
    (note,) = prepare_threads(environment, cores=2, affinity=64, load=0.0)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert "2 of 64" in note


def test_the_load_changes_no_number_and_is_told() -> None:
    environment: dict[str, str] = {}
    (note,) = prepare_threads(environment, cores=2, affinity=2, load=11.5)
    assert "OMP_NUM_THREADS" not in environment
    assert "load 11.5 on 2 cores" in note
    assert "OMP_NUM_THREADS=1 " in note
    (note,) = prepare_threads({}, cores=64, affinity=64, load=128.0)
    assert "OMP_NUM_THREADS=21 " in note


def test_what_the_user_has_set_stays() -> None:
    environment = {
        "OMP_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "ACTIVE",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7",
    }
    before = dict(environment)
    assert prepare_threads(environment, cores=2, affinity=64, load=1000.0) == []
    assert environment == before


@pytest.mark.parametrize(("before", "expected"), [("", "PASSIVE"), ("import torch", "None")])
def test_a_function_prepares_threads_as_its_command_does_until_torch_is_loaded(
    before: str, expected: str
) -> None:
    code = (
        f"{before}\n"
        "import os, types; from lrbo import api\n"
        "run = lambda config, reporter: {'policy': os.environ.get('OMP_WAIT_POLICY')}\n"
        "api.imported = lambda name: types.SimpleNamespace(run=run)\n"
        "print(api.evaluate('model=tiny')['policy'])"
    )
    environment = {name: text for name, text in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == f"{expected}\n"
