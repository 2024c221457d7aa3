"""`auto` is what this machine does best, and what is not here is refused by name."""

import time

import pytest
import torch

from lrbo.errors import ConfigError
from lrbo.models import devices
from lrbo.models.devices import resolve_device, resolve_dtype

CPU = torch.device("cpu")


def test_a_named_dtype_is_taken_at_its_word() -> None:
    names = ("float32", "bfloat16", "float16")
    assert [resolve_dtype(name, CPU) for name in names] == [getattr(torch, name) for name in names]


@pytest.mark.parametrize(
    ("bfloat16", "expected"), [(0.2, torch.bfloat16), (0.9, torch.float32), (3.0, torch.float32)]
)
def test_auto_takes_bfloat16_where_it_is_clearly_faster(
    bfloat16: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16}
    monkeypatch.setattr(devices, "_matmul_seconds", lambda dtype, device, tokens: seconds[dtype])
    assert resolve_dtype("auto", CPU) is expected


def test_a_cpu_without_bfloat16_is_not_kept_busy_by_a_whole_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = {torch.float32: 0.001, torch.bfloat16: 0.2}
    batches = []

    def measured(dtype: torch.dtype, device: torch.device, tokens: int) -> float:
        batches.append(tokens)
        return seconds[dtype]

    monkeypatch.setattr(devices, "_matmul_seconds", measured)
    assert resolve_dtype("auto", CPU) is torch.float32
    assert max(batches) == devices.BATCH
    assert batches.count(devices.BATCH) == 1  # of float32


def test_the_measurement_is_a_time() -> None:
    start = time.perf_counter()
    actual = devices._matmul_seconds(torch.float32, CPU, devices.BATCH)
    assert 0.0 < actual < time.perf_counter() - start


def test_auto_takes_an_accelerator_where_there_is_one() -> None:
    actual = torch.accelerator.current_accelerator(check_available=True)
    assert resolve_device("auto") == (CPU if actual is None else actual)
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("device", ["gpu", "cuda:97", ""])
def test_a_device_that_does_not_exist_is_refused_by_name(device: str) -> None:
    expected = rf"model\.device='{device}' cannot be used here: expected auto or cpu\b"
    with pytest.raises(ConfigError, match=expected) as refused:
        resolve_device(device)
    assert len(str(refused.value)) < 200  # without all the types that torch has on any machine
