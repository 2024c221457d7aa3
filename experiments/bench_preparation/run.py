"""What do all forms of a layer cost to prepare, and in a trial, beside plain ranks and dense?

    python experiments/bench_preparation/run.py

Layers of the shapes of SmolLM2-135M with random weights, inputs and gradients, on one thread.
Everything is measured in one process and in alternation, in seconds of the processor.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lrbo.allocation.apply import replaced, trial_modules
from lrbo.calibration.statistics import Statistic
from lrbo.config.choices import FORM_PRESETS
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prepare_unit import prepared_unit
from lrbo.factorization.prepared import Prepared
from lrbo.factorization.registry import method_named
from lrbo.layers.form import Grid
from lrbo.layers.forms import Based, form_named
from lrbo.layers.options import Option

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
REPEATS = 1 if SMOKE else 3
SHRINK = 3 if SMOKE else 1
# By kind: outputs, inputs, and how many of the shape are in a block.
SHAPES = {
    "q_proj, o_proj": (576, 576, 2),
    "k_proj, v_proj": (192, 576, 2),
    "gate_proj, up_proj": (1536, 576, 2),
    "down_proj": (576, 1536, 1),
}
FORMS = FORM_PRESETS["bytes"]
WINDOWS, TOKENS, BATCH = (2, 64, 1) if SMOKE else (8, 1024, 4)
PLAIN, ALL = "factorization alone", "all forms together"


def moment(size: int, generator: torch.Generator) -> Tensor:
    """Draw a second moment whose energies fall as those of trained models do, a few far above."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    energy = torch.arange(1, size + 1, dtype=torch.float64) ** -1.2
    scale = torch.ones(size, dtype=torch.float64)
    scale[:3] = 10.0
    root = scale[:, None] * basis * energy.sqrt()
    return root @ root.T


def layer(out: int, into: int) -> tuple[nn.Linear, Mapping[Statistic, Tensor]]:
    """Draw a layer in bfloat16 and the statistics that the preset needs."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(into, out, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    spread = torch.rand(out, 1, generator=generator) + 0.5
    module.weight.copy_(torch.randn(out, into, generator=generator) * spread / into**0.5)
    mean = torch.randn(into, generator=generator, dtype=torch.float64) / into**0.5
    return module, {
        Statistic.INPUT_MEAN: mean / 4,
        Statistic.INPUT_COVARIANCE: moment(into, generator),
        Statistic.OUTPUT_GRADIENT: moment(out, generator) / out,
    }


def plans() -> Iterator[tuple[str, BasePlan | None]]:
    """Name what is measured: nothing, each form that is made alone, and all of them."""
    yield PLAIN, None
    for form in FORMS:
        if (plan := BasePlan.of((form,), BaseOptions())) is not None:
            yield form, plan
    yield ALL, BasePlan.of(FORMS, BaseOptions())


def seconds(action: Callable[[], object]) -> float:
    """Return how long the processor works for an action."""
    start = time.process_time()
    action()
    return time.process_time() - start


def in_turns(actions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median time of each action; the first of all warms up."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(REPEATS + 1):
        for name, action in actions.items():
            taken[name].append(seconds(action))
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def preparations() -> None:
    """Print seconds of each layer and form beside its factorization alone."""
    method = method_named("loss_aware")
    totals = {name: 0.0 for name, _ in plans()}
    print("| layer | shape | factorization s | all forms s | ratio |")
    print("|---|---|---:|---:|---:|")
    for kind, (out, into, count) in SHAPES.items():
        module, given = layer(out // SHRINK, into // SHRINK)
        prepare = partial(prepared_unit, module, method, given, None, errors=False)
        median = in_turns({name: partial(prepare, bases=plan) for name, plan in plans()})
        shape = f"{module.out_features}x{module.in_features}"
        ratio = median[ALL] / median[PLAIN]
        print(f"| {kind} | {shape} | {median[PLAIN]:.3f} | {median[ALL]:.3f} | {ratio:.2f} |")
        for name, value in median.items():
            totals[name] += count * value
    print("\n| of a block of seven layers | s | over factorization |")
    print("|---|---:|---:|")
    for name, value in totals.items():
        own = value if name in (PLAIN, ALL) else value - totals[PLAIN]
        label = name if name in (PLAIN, ALL) else f"{name}, beside it"
        print(f"| {label} | {own:.3f} | {own / totals[PLAIN]:.2f} |")


def option_of(name: str, shape: tuple[int, int]) -> Option:
    """Return an option of a form with the largest rank over a base, or half of the ranks."""
    form, half = form_named(name), min(shape) // 2
    if not isinstance(form, Based):
        return Option(name, (half,))
    (level,) = form.bases(Grid())
    return Option(name, (*level, min(form.largest_rank(*shape), half)))


def trials() -> None:
    """Print seconds of a trial in each form, and in all of them by turns, beside dense."""
    hidden, neurons, heads = (each // SHRINK for each in (576, 1536, 9))
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=neurons, num_attention_heads=heads,
        num_key_value_heads=heads // 3, num_hidden_layers=2, vocab_size=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(1024, (WINDOWS, TOKENS))
    plan, made = BasePlan.of(FORMS, BaseOptions()), dict[tuple[int, int], Prepared]()
    layers = {n: m for n, m in model.model.named_modules() if isinstance(m, nn.Linear)}
    shapes = {f"model.{n}": (m.out_features, m.in_features) for n, m in layers.items()}
    for shape in {*shapes.values()}:
        module, given = layer(*shape)
        made[shape] = prepared_unit(
            module, method_named("loss_aware"), given, None, bases=plan, errors=False
        )

    def forward() -> None:
        with torch.inference_mode():
            for batch in ids.split(BATCH):
                model(batch, use_cache=False, logits_to_keep=1)

    def trial(forms: tuple[str, ...]) -> Callable[[], None]:
        turns = zip(shapes.items(), itertools.cycle(forms))
        options = {name: option_of(form, shape) for (name, shape), form in turns}
        parts = {}
        for name, option in options.items():
            ranks = {option.family: option.rank}
            part = made[shapes[name]].only(ranks, torch.float32, torch.device("cpu"))
            assert part is not None
            parts[name] = part
        buffers: dict[str, Tensor] = {}

        def run() -> None:
            modules = trial_modules(model, options, parts, ids.numel(), buffers)
            with replaced(model, modules):
                forward()

        return run

    actions: dict[str, Callable[[], None]] = {"dense": forward}
    actions |= {form: trial((form,)) for form in FORMS} | {"all of them by turns": trial(FORMS)}
    median = in_turns(actions)
    print("\n| trial | s | over dense |")
    print("|---|---:|---:|")
    for name, value in median.items():
        print(f"| {name} | {value:.3f} | {value / median['dense']:.2f} |")


def main() -> None:
    """Measure, and print tables."""
    torch.set_num_threads(1)
    preparations()
    trials()


if __name__ == "__main__":
    main()
