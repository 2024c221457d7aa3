"""How fast a compressed model is beside the dense one, timed in turns, so that load hits both."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

from lrbo.layers.joint import SkippedAttention, SkippedLinear, ThinLinear
from lrbo.layers.modules import compressed_layers, count_parameters, replace_modules
from lrbo.layers.tables import dense_modules, stored_modules
from lrbo.models.model_map import body_and_head, linear_bias, linear_weight, map_model
from lrbo.models.specs import LayerSpec

# Standard deviation of a normal variable per median absolute deviation, and standard error of
# a median per standard error of a mean.
NORMAL, MEDIAN = 1.4826, 1.2533

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class TimingSettings:
    """How a prefill and decoding are timed."""

    prompts: tuple[int, ...]  # lengths in tokens, each of which is timed
    batch: int = 1
    steps: int = 16  # tokens that are decoded
    repeats: int = 7
    warmup: int = 2  # runs before them, which do not count


@dataclass(frozen=True)
class Run:
    """Something to time; ``prepare`` is called before each ``run``, and not timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class PairedTimes:
    """Median seconds of a compressed model and of the dense one."""

    seconds: float
    dense_seconds: float
    ratio: float  # median of the ratios of neighbouring timings, compressed to dense
    ratio_error: float  # its standard error, from the spread of these

    @property
    def speedup(self) -> tuple[float, float]:
        """How many times faster the compressed model is, and the standard error of that."""
        return 1 / self.ratio, self.ratio_error / self.ratio**2

    @classmethod
    def of(cls, compressed: Sequence[float], dense: Sequence[float]) -> PairedTimes:
        """Take the medians of timings that were made in pairs, in seconds.

        Medians, because what disturbs a machine now and then makes single timings much longer.
        The error takes timings as independent; it is too small where one load lasts for several.
        """
        ratios = [mine / other for mine, other in zip(compressed, dense, strict=True)]
        ratio, count = statistics.median(ratios), len(ratios)
        spread = NORMAL * statistics.median(abs(one - ratio) for one in ratios)
        spread *= count / (count - 0.8)  # of few it is too small: Croux and Rousseeuw, 1992
        error = MEDIAN * spread / count**0.5
        return cls(statistics.median(compressed), statistics.median(dense), ratio, error)


@dataclass(frozen=True)
class Speed:
    """How fast both models read a prompt of so many tokens, or add tokens to it."""

    step: Phase
    compiled: bool
    prompt: int
    tokens_per_second: float  # of all sequences together
    dense_tokens_per_second: float
    speedup: float
    error: float  # standard error of it


@dataclass(frozen=True)
class KindSpeed:
    """How fast the compressed layers of a kind are, one after another, for the longest prompt."""

    kind: str
    layers: int
    keep_ratio: float  # of their parameters
    dense_ms: float
    ms: float
    speedup: float
    error: float  # standard error of it


@torch.inference_mode()
def measure_latency(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    ids: Int[Tensor, " tokens"],
    settings: TimingSettings,
) -> dict[str, float]:
    """Time a prefill and decoding steps of the dense ``model`` and of its compressed twin.

    A prefill reads the one prompt of the settings, the first of ``ids``, and ends with the logits
    after its last token; decoding adds its last tokens again. ``modules`` are the layers of the
    compressed model; the dense one, in evaluation mode, is not changed.

    Returns:
        ``prefill_latency_ratio`` and ``decode_latency_ratio``, compressed to dense, with standard
        errors ``..._sem``, and medians ``..._s`` and ``..._dense_s``, seconds per prefill or step.
    """
    (tokens,) = settings.prompts
    text = ids[None, :tokens].to(model.device)
    twin = _twin(model, stored_modules(model, modules))
    metrics: dict[str, float] = {}
    for phase, times in _timed(twin, model, text, tokens, settings):
        count = settings.steps if phase == "decode" else 1
        metrics |= {
            f"{phase}_latency_ratio": times.ratio,
            f"{phase}_latency_ratio_sem": times.ratio_error,
            f"{phase}_s": times.seconds / count,
            f"{phase}_dense_s": times.dense_seconds / count,
        }
    return metrics


@torch.inference_mode()
def measure_speed(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    settings: TimingSettings,
    *,
    compiled: bool = False,
    on_run: Callable[[], object] = lambda: None,
) -> list[Speed]:
    """Time a prefill and decoding of a compressed model and its dense twin, per length of prompt.

    ``on_run`` is called after each; compiling does not count.
    """
    speeds = []
    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    for prompt in settings.prompts:
        shape = (settings.batch, prompt + settings.steps)
        ids = torch.randint(size, shape, generator=generator).to(model.device)
        for phase, times in _timed(model, twin, ids, prompt, settings, compiled=compiled):
            count = settings.batch * (prompt if phase == "prefill" else settings.steps)
            rates = count / times.seconds, count / times.dense_seconds
            speeds.append(Speed(phase, compiled, prompt, *rates, *times.speedup))
            on_run()
    return speeds


@torch.inference_mode()
def measure_kinds(
    model: PreTrainedModel, twin: PreTrainedModel, settings: TimingSettings
) -> list[KindSpeed]:
    """Time the compressed layers of each kind against dense ones, on rows of the longest prompt.

    Those that are skipped are not run, and so not timed.
    """
    specs = map_model(twin).by_name
    kinds: dict[str, list[str]] = {}
    for name, layer in compressed_layers(model).items():
        if not isinstance(layer, SkippedLinear):
            kinds.setdefault(specs[name].kind, []).append(name)
    speeds = []
    for kind, names in kinds.items():
        shape = (settings.batch, max(settings.prompts))
        mine, other = (  # of what is looked up and multiplied with, the product takes longer
            {n: each.get_submodule(specs[n].tied_to or n) for n in names} for each in (model, twin)
        )
        widths = {_width(each, specs[n]) for layers in (mine, other) for n, each in layers.items()}
        rows = {
            width: torch.randn(*shape, width, device=model.device).to(model.dtype)
            for width in sorted(widths)
        }
        ids = torch.zeros(shape, dtype=torch.int64, device=model.device)

        def run(
            layers: Mapping[str, nn.Module],
            rows: Mapping[int, Tensor] = rows,
            ids: Tensor = ids,
        ) -> None:
            for name, layer in layers.items():  # as in a model: no output is kept
                spec = specs[name]
                layer(rows[_width(layer, spec)] if spec.multiplies else ids)

        runs = Run(partial(run, mine)), Run(partial(run, other))
        times = _in_turns(*runs, model.device, settings)
        low_rank, dense = (
            sum(count_parameters(each.get_submodule(name)) for name in names)
            for each in (model, twin)
        )
        ms = 1e3 * times.dense_seconds, 1e3 * times.seconds
        speeds.append(KindSpeed(kind, len(names), low_rank / dense, *ms, *times.speedup))
    return speeds


def _width(layer: nn.Module, spec: LayerSpec) -> int:
    """Return the number of inputs of a layer, compressed or dense."""
    return layer.in_features if isinstance(layer, ThinLinear) else spec.in_features


def _timed(
    compressed: PreTrainedModel,
    dense: PreTrainedModel,
    ids: Int[Tensor, "batch tokens"],
    prompt: int,
    settings: TimingSettings,
    *,
    compiled: bool = False,
) -> Iterator[tuple[Phase, PairedTimes]]:
    """Time a prefill of the first ``prompt`` tokens, and decoding of the last steps."""
    phases: dict[Phase, Callable[[PreTrainedModel], Run]] = {
        "prefill": lambda model: prefill(model, ids[:, :prompt], compiled=compiled),
        "decode": lambda model: decode(model, ids, settings.steps, compiled=compiled),
    }
    for phase, run_of in phases.items():
        if compiled:
            torch.compiler.reset()  # else later lengths would be compiled for any length
        yield phase, _in_turns(run_of(compressed), run_of(dense), dense.device, settings)


def _in_turns(
    compressed: Run, dense: Run, device: torch.device, settings: TimingSettings
) -> PairedTimes:
    """Time two models in turns, which take turns in being first."""
    mine: list[float] = []
    other: list[float] = []
    order = [(dense, other), (compressed, mine)]
    for _ in range(settings.warmup + settings.repeats):
        for timed, seconds in order:
            timed.prepare()
            wait_for(device)
            start = perf_counter()
            timed.run()
            wait_for(device)
            seconds.append(perf_counter() - start)
        order.reverse()
    return PairedTimes.of(mine[settings.warmup :], other[settings.warmup :])


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def prefill(
    model: PreTrainedModel, ids: Int[Tensor, "batch tokens"], *, compiled: bool = False
) -> Run:
    """Read prompts, up to the logits after the last token, ``(batch, vocabulary)``."""
    body, head = body_and_head(model)
    run = torch.compile(body, dynamic=False) if compiled else body
    # Rows, not [:, -1:]: a CPU multiplies such a view by a frozen bfloat16 weight 60 times slower.
    return Run(lambda: head(run(ids, use_cache=False).last_hidden_state[:, -1]))


def decode(
    model: PreTrainedModel, ids: Int[Tensor, "batch tokens"], steps: int, *, compiled: bool = False
) -> Run:
    """Add the last ``steps`` tokens to the others one by one, from a cache of these.

    The run gives the logits after each, ``(batch, 1, vocabulary)``. Compiled, the cache has a
    fixed size, as in ``generate(cache_implementation="static")``, and on CUDA the steps are
    replayed as graphs.
    """
    body, head = body_and_head(model)
    prompt = ids.shape[1] - steps
    run: Callable[..., Any] = body
    cache: Any
    if compiled:
        mode = "reduce-overhead" if ids.device.type == "cuda" else "default"
        run = torch.compile(body, dynamic=False, mode=mode)
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    else:
        filled = DynamicCache(config=model.config)
        body(ids[:, :prompt], past_key_values=filled, use_cache=True)

    def prepare() -> None:
        nonlocal cache
        if compiled:  # its address in memory is compiled in
            cache.reset()
            body(ids[:, :prompt], past_key_values=cache, use_cache=True)
        else:
            cache = copy.deepcopy(filled)

    def add() -> list[Tensor]:
        tokens = torch.split(ids[:, prompt:], 1, dim=1)
        steps = (run(each, past_key_values=cache, use_cache=True) for each in tokens)
        return [head(step.last_hidden_state) for step in steps]

    return Run(add, prepare)


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a compressed model with dense layers, of random weights, instead of compressed ones.

    How long a product takes does not depend on its values, so the dense checkpoint is not needed.
    """
    with torch.device("meta"):
        dense = type(model)(copy.deepcopy(model.config))
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, SkippedAttention):
            layers[name] = dense.get_submodule(name)
            for own, child in module.named_children():  # norms; its layers follow
                if not isinstance(child, SkippedLinear):
                    layers[name].add_module(own, child)
    for name, layer in compressed_layers(model).items():
        before, has_bias = dense.get_submodule(name), layer.bias is not None
        if isinstance(layer, ThinLinear | SkippedLinear):
            has_bias = linear_bias(before) is not None
        rows, columns = linear_weight(before).shape
        weight = layer.weight.new_empty(rows, columns).normal_(std=columns**-0.5)
        bias = weight.new_zeros(rows) if has_bias else None
        layers |= dense_modules(model, name, weight, bias)
    return _twin(model, layers)


def _twin(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> PreTrainedModel:
    """Copy a model without its weights, which both then share, and replace layers of the copy."""
    # The memory of deepcopy: what is in it is not copied.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    replace_modules(twin, layers)
    return twin
