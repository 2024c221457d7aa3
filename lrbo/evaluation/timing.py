"""How fast a compressed model is beside its dense architecture, in turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

from lrbo.compression import replace_module
from lrbo.evaluation.latency import Clock, Latency, in_turns, seconds_of
from lrbo.layers import LowRankLinear, PivotedLinear, linear_of
from lrbo.model import body_and_head, map_model

Step = Literal["prefill", "decode"]
Pair = tuple[Callable[[], object], Callable[[], object]]
LowRank = LowRankLinear | PivotedLinear


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed, and how often.

    Attributes:
        prompts: Lengths of prompts, tokens.
        batch: Sequences at a time.
        steps: Tokens of each sequence that one timing of decoding adds to a prompt.
        repeats: Timings of each model.
        warmup: Runs of each model before them that do not count.
    """

    prompts: tuple[int, ...]
    batch: int = 1
    steps: int = 16
    repeats: int = 7
    warmup: int = 2


@dataclass(frozen=True)
class Speed:
    """How fast both models are at one thing.

    Attributes:
        step: Reading a prompt, up to the logits after it, or adding tokens to it.
        compiled: Whether both ran through ``torch.compile``.
        prompt: Tokens of each sequence before that.
        tokens_per_second: Of the compressed model, all sequences together.
        dense_tokens_per_second: Of the dense one.
        speedup: How many times faster the compressed model is: the median over neighbouring runs.
        error: Standard error of the speed-up.
    """

    step: Step
    compiled: bool
    prompt: int
    tokens_per_second: float
    dense_tokens_per_second: float
    speedup: float
    error: float

    @classmethod
    def of(cls, step: Step, prompt: int, tokens: int, timed: Latency, *, compiled: bool) -> Speed:
        """Turn times into speeds.

        Args:
            step: What was timed.
            prompt: Length of the prompt.
            tokens: That one timing processed.
            timed: Seconds.
            compiled: Whether through ``torch.compile``.
        """
        speedup = 1 / timed.ratio
        return cls(
            step,
            compiled,
            prompt,
            tokens / timed.seconds,
            tokens / timed.dense_seconds,
            speedup,
            timed.error * speedup**2,
        )


@dataclass(frozen=True)
class KindSpeed:
    """How fast the layers of a kind are, each alone and summed over the blocks.

    Attributes:
        kind: Of layers.
        layers: How many of the kind are low rank.
        keep_ratio: Their numbers to those of the dense ones.
        dense_ms: Milliseconds of the dense layers, for the longest prompt.
        ms: Of the low-rank ones.
        speedup: Median over neighbouring runs.
        error: Standard error of the speed-up.
    """

    kind: str
    layers: int
    keep_ratio: float
    dense_ms: float
    ms: float
    speedup: float
    error: float


def low_rank_layers(model: nn.Module) -> dict[str, LowRank]:
    """Return the low-rank layers of a model by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear | PivotedLinear)
    }


def shape_of(layer: LowRank) -> tuple[int, int]:
    """Return ``(out, in)`` of the dense layer that a low-rank layer stands for."""
    if isinstance(layer, LowRankLinear):
        return layer.left.out_features, layer.right.in_features
    return len(layer.places), layer.rows.in_features


def numbers_in(layer: nn.Module) -> int:
    """Return the number of parameters of a layer."""
    return sum(p.numel() for p in layer.parameters())


def dense_like(layer: LowRank) -> nn.Linear:
    """Return a dense layer of the shape, dtype and device of a low-rank one, of random numbers.

    How long a product takes does not depend on its numbers, so the dense checkpoint is not needed.
    """
    like = layer.right.weight if isinstance(layer, LowRankLinear) else layer.rows.weight
    out_features, in_features = shape_of(layer)
    weight = torch.empty(out_features, in_features, dtype=like.dtype, device=like.device)
    bias = None if layer.bias is None else torch.zeros_like(layer.bias)
    return linear_of(weight.normal_(std=in_features**-0.5), bias)


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with dense layers in place of low-rank ones; all others are shared."""
    layers = low_rank_layers(model)
    inside = {id(tensor) for layer in layers.values() for tensor in layer.parameters()}
    shared = {
        id(tensor): tensor
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in inside
    }
    # The memory of deepcopy: what is in it is not copied. Low-rank layers are kept out too.
    held = {id(layer): nn.Identity() for layer in layers.values()}
    twin = copy.deepcopy(model, shared | held)
    for name, layer in layers.items():
        replace_module(twin, name, dense_like(layer))
    return twin


def _timed(
    compressed: Pair, dense: Pair, device: torch.device, settings: SpeedSettings, clock: Clock
) -> Latency:
    """Time what two models do, in turns; what prepares it does not count."""

    def seconds(pair: Pair) -> float:
        prepare, run = pair
        prepare()
        return seconds_of(run, device, clock)

    return in_turns(
        partial(seconds, compressed), partial(seconds, dense), settings.repeats, settings.warmup
    )


def prefill_of(model: PreTrainedModel, ids: Tensor, *, compiled: bool) -> Pair:
    """Return what reads prompts, up to the logits after the last token.

    Args:
        model: Any causal language model.
        ids: ``(batch, tokens)``.
        compiled: Whether the body runs through ``torch.compile``.
    """
    body, head = body_and_head(model)
    run = torch.compile(body, dynamic=False) if compiled else body
    # Rows, not [:, -1:]: a CPU multiplies such a view by a frozen bfloat16 weight 60 times slower.
    return (lambda: None), lambda: head(run(ids, use_cache=False).last_hidden_state[:, -1])


def decode_of(model: PreTrainedModel, ids: Tensor, steps: int, *, compiled: bool) -> Pair:
    """Return what adds the last ``steps`` tokens to the others one by one, from their cache.

    It answers their logits. Compiled, the cache has a fixed size, as in
    ``generate(cache_implementation="static")``, and on CUDA the steps are replayed as graphs.

    Args:
        model: Any causal language model.
        ids: ``(batch, tokens + steps)``.
        steps: How many.
        compiled: Whether the body runs through ``torch.compile``.
    """
    body, head = body_and_head(model)
    known = ids.shape[1] - steps
    run: Callable[..., Any] = body
    static = None
    if compiled:
        mode = "reduce-overhead" if ids.device.type == "cuda" else "default"
        run = torch.compile(body, dynamic=False, mode=mode)
        static = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    else:
        read = DynamicCache(config=model.config)
        body(ids[:, :known], past_key_values=read, use_cache=True)
    cache: Any = static

    def prepare() -> None:
        nonlocal cache
        if static is None:
            cache = copy.deepcopy(read)
        else:  # its place in memory is compiled in
            static.reset()
            body(ids[:, :known], past_key_values=static, use_cache=True)

    def decode() -> Tensor:
        logits = []
        for place in range(known, known + steps):
            step = run(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            logits.append(head(step.last_hidden_state))
        return torch.cat(logits, 1)

    return prepare, decode


@torch.inference_mode()
def measure_speed(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    settings: SpeedSettings,
    *,
    compiled: bool = False,
    on_run: Callable[[], object] | None = None,
    clock: Clock = time.perf_counter,
) -> list[Speed]:
    """Time reading prompts and decoding, of a compressed model and its dense twin.

    Args:
        model: Compressed.
        twin: From :func:`dense_twin`.
        settings: What is timed, and how often.
        compiled: Whether both run through ``torch.compile``; compiling does not count.
        on_run: Told of each that is done.
        clock: Seconds.

    Returns:
        For each length of prompt, prefill and decoding.
    """
    found = []
    size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    for prompt in settings.prompts:
        shape = (settings.batch, prompt + settings.steps)
        ids = torch.randint(size, shape, generator=generator).to(model.device)
        ways: dict[Step, tuple[Callable[[PreTrainedModel], Pair], int]] = {
            "prefill": (partial(prefill_of, ids=ids[:, :prompt], compiled=compiled), prompt),
            "decode": (
                partial(decode_of, ids=ids, steps=settings.steps, compiled=compiled),
                settings.steps,
            ),
        }
        for step, (way, tokens) in ways.items():
            torch.compiler.reset()  # else later lengths would be compiled for any length
            timed = _timed(way(model), way(twin), model.device, settings, clock)
            count = settings.batch * tokens
            found.append(Speed.of(step, prompt, count, timed, compiled=compiled))
            if on_run is not None:
                on_run()
    return found


@torch.inference_mode()
def measure_kinds(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    settings: SpeedSettings,
    *,
    clock: Clock = time.perf_counter,
) -> list[KindSpeed]:
    """Time the low-rank layers of each kind against dense ones, on as many rows as a prompt has.

    Args:
        model: Compressed.
        twin: From :func:`dense_twin`.
        settings: The longest prompt counts.
        clock: Seconds.
    """
    specs = map_model(twin).by_name
    kinds: dict[str, list[str]] = {}
    for name in low_rank_layers(model):
        kinds.setdefault(specs[name].kind, []).append(name)
    found = []
    for kind, names in kinds.items():
        mine = [model.get_submodule(name) for name in names]
        other = [twin.get_submodule(name) for name in names]
        shape = (settings.batch, max(settings.prompts))
        rows = {
            width: torch.randn(*shape, width, device=model.device).to(model.dtype)
            for width in sorted({specs[name].in_features for name in names})
        }
        inputs = [rows[specs[name].in_features] for name in names]
        pair = _all_of(mine, inputs), _all_of(other, inputs)
        timed = _timed(*pair, model.device, settings, clock)
        ratio = sum(map(numbers_in, mine)) / sum(map(numbers_in, other))
        found.append(
            KindSpeed(
                kind,
                len(names),
                ratio,
                1e3 * timed.dense_seconds,
                1e3 * timed.seconds,
                1 / timed.ratio,
                timed.error / timed.ratio**2,
            )
        )
    return found


def _all_of(layers: list[nn.Module], inputs: list[Tensor]) -> Pair:
    """Return what runs layers one after another, as in a model: no answer is kept."""

    def run() -> None:
        for layer, rows in zip(layers, inputs, strict=True):
            layer(rows)

    return (lambda: None), run


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters of a model, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
