"""How long a compressed model takes, in times of the dense one, measured side by side."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.accounting import Storage
from lrbo.allocation import Allocation
from lrbo.compression import replaced
from lrbo.families import is_pointwise
from lrbo.layers import LowRankLinear, PivotedLinear
from lrbo.model import body_and_head
from lrbo.nested import LowRankFactors
from lrbo.options import STEPS

Clock = Callable[[], float]
# Standard deviation of a normal variable per median absolute deviation, and standard error of
# the median of many per that of their mean.
NORMAL, MEDIAN = 1.4826, 1.2533


@dataclass(frozen=True)
class LatencySettings:
    """What is timed, and how often.

    Attributes:
        tokens: Of the text that a prefill reads, and that a decoding step has before it.
        repeats: Timings of each model.
        warmup: Runs of each model before them that do not count.
    """

    tokens: int
    repeats: int = 7
    warmup: int = 1


@dataclass(frozen=True)
class Latency:
    """Timings of a compressed model and of the dense one.

    Attributes:
        seconds: Median, of the compressed model.
        dense_seconds: Median, of the dense model.
        ratio: Median of the ratios of neighbouring timings, compressed to dense.
        error: Standard error of the ratio, from the spread of these.
    """

    seconds: float
    dense_seconds: float
    ratio: float
    error: float

    @classmethod
    def of(cls, compressed: list[float], dense: list[float]) -> Latency:
        """Take the medians of timings that were made in pairs.

        Medians, because what disturbs a machine now and then makes single timings much longer.
        The error takes timings as independent; where a load lasts for several of them it is more.
        """
        ratios = [mine / other for mine, other in zip(compressed, dense, strict=True)]
        ratio = statistics.median(ratios)
        spread = NORMAL * statistics.median(abs(one - ratio) for one in ratios)
        count = len(ratios)
        spread *= count / (count - 0.8)  # of few it is too small: Croux and Rousseeuw, 1992
        error = MEDIAN * spread / count**0.5
        return cls(statistics.median(compressed), statistics.median(dense), ratio, error)


def executed_layers(
    allocation: Allocation, factors: Mapping[str, LowRankFactors], storage: Storage
) -> dict[str, nn.Module]:
    """Return the layers that an exported model would run, as far as their speed goes.

    A pivoted layer has the modules, shapes and memory layout of an exported one, but is filled
    with numbers of the factors: choosing pivots takes seconds per layer, and how long a product
    takes does not depend on its numbers. So what such a layer answers means nothing.

    Args:
        allocation: Ranks by layer name; dense layers are left out.
        factors: In the dtype and on the device of the model.
        storage: The form of the layers.
    """
    made: dict[str, nn.Module] = {}
    for name, rank in allocation.ranks.items():
        if rank is None:
            continue
        found = factors[name].at_rank(rank)
        left, right = found.left.weight, found.right.weight
        if storage == "factored":
            made[name] = LowRankLinear.from_tensors(left.contiguous(), right, found.bias)
        else:
            # Outputs are gathered from all over the place, as they are after a choice of pivots.
            generator = torch.Generator().manual_seed(rank)
            places = torch.randperm(len(left), generator=generator).to(left.device, torch.int32)
            layer = PivotedLinear(right, left[rank:].contiguous(), places, found.bias)
            made[name] = layer.take_pointwise(is_pointwise(name))
    return made


def measure_latency(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    ids: Int[Tensor, " tokens"],
    settings: LatencySettings,
    *,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Time a prefill and decoding steps of the compressed model and of the dense one.

    One sequence at a time. A prefill reads ``tokens`` tokens and ends with the logits after the
    last one. Decoding steps add the last ``STEPS`` tokens to the others in a cache, one by one.
    Dense and compressed model take turns, and take turns in being first, so that what slows the
    machine slows both; on an accelerator every timing waits until it has finished.

    Args:
        model: The dense model, in evaluation mode; afterwards as before.
        modules: The layers of the compressed model, by name.
        ids: At least ``tokens`` of them; which ones makes no difference.
        settings: What is timed, and how often.
        clock: Seconds.

    Returns:
        ``prefill_latency_ratio`` and ``decode_latency_ratio``, compressed to dense, each with
        its standard error in ``..._sem``, and the medians that they belong to, ``..._s`` and
        ``..._dense_s``, seconds per prefill or per decoding step.

    Raises:
        ValueError: If there are fewer ids than tokens, or not one before the decoding steps.
    """
    tokens = settings.tokens
    if not STEPS < tokens <= len(ids):
        raise ValueError(
            f"{tokens} tokens are to be timed: expected more than the {STEPS} decoding steps, and "
            f"at most the {len(ids)} ids that were given."
        )
    body, head = body_and_head(model)
    ids = ids[None, :tokens].to(model.device)
    known = tokens - STEPS

    def prefill(_: None) -> None:
        # Rows, not [:, -1:], which a frozen bfloat16 head on a CPU takes 60 times as long for.
        head(body(ids, use_cache=False).last_hidden_state[:, -1])

    def decode(cache: Any) -> None:
        for place in range(known, tokens):
            step = body(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            head(step.last_hidden_state)

    with torch.inference_mode():
        read = _in_turns(model, modules, prefill, lambda: None, settings, clock)
        cache = body(ids[:, :known], use_cache=True).past_key_values
        # Each timing begins with the same cache, to which the steps add.
        written = _in_turns(model, modules, decode, lambda: copy.deepcopy(cache), settings, clock)
    found: dict[str, float] = {}
    for name, latency, count in (("prefill", read, 1), ("decode", written, STEPS)):
        found |= {
            f"{name}_latency_ratio": latency.ratio,
            f"{name}_latency_ratio_sem": latency.error,
            f"{name}_s": latency.seconds / count,
            f"{name}_dense_s": latency.dense_seconds / count,
        }
    return found


def _in_turns(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    run: Callable[[Any], None],
    prepare: Callable[[], Any],
    settings: LatencySettings,
    clock: Clock,
) -> Latency:
    """Time a run of the dense model and one of the compressed model, in turns.

    Args:
        model: The dense model.
        modules: The layers of the compressed one.
        run: What is timed.
        prepare: Makes what ``run`` takes; is not timed.
        settings: How often.
        clock: Seconds.
    """

    def timed(layers: Mapping[str, nn.Module]) -> float:
        with replaced(model, layers):
            given = prepare()
            return seconds_of(partial(run, given), model.device, clock)

    return in_turns(partial(timed, modules), partial(timed, {}), settings.repeats, settings.warmup)


def in_turns(
    compressed: Callable[[], float], dense: Callable[[], float], repeats: int, warmup: int
) -> Latency:
    """Time two models in turns, which take turns in being first.

    Args:
        compressed: Times the compressed model once and answers seconds.
        dense: The same of the dense one.
        repeats: Timings of each that count.
        warmup: Timings of each before them that do not.
    """
    mine, other = [], []
    for turn in range(warmup + repeats):
        if turn % 2:
            one, two = compressed(), dense()
        else:
            two, one = dense(), compressed()
        if turn >= warmup:
            mine.append(one)
            other.append(two)
    return Latency.of(mine, other)


def seconds_of(run: Callable[[], object], device: torch.device, clock: Clock) -> float:
    """Time something, from when a device has done what it was given until it has done this."""
    wait_for(device)
    start = clock()
    run()
    wait_for(device)
    return clock() - start


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
