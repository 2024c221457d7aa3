"""Metrics of tasks, and the sizes and latencies of any model: names, units, formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial

from lrbo.config import choices

MISSING = "-"  # printed where a value is not known


@dataclass(frozen=True)
class Metric:
    """A number that a trial records."""

    name: str  # its key in the record of a trial
    label: str  # on axes, in sentences and wide tables
    short: str = ""  # in narrow tables; empty for the label
    unit: str = ""  # empty for a plain number
    lower_is_better: bool = True
    spec: str = ".4f"  # of a precise value, for Python and plotly alike
    formatting: Callable[[float], str] | None = None  # of a value in a table; None takes `spec`
    dense: float | None = None  # value of the dense model, where the definition gives it
    is_log: bool = False  # whether an axis of values far apart is logarithmic
    of_loss: Callable[[float], float] | None = None  # from the mean loss, where it follows

    @property
    def head(self) -> str:
        """Head of a column in a narrow table."""
        return self.short or self.label

    def text(self, value: float | None) -> str:
        """Write a value for a table; a dash for one that is not known."""
        if value is None or math.isnan(value) or self.formatting is None:
            return self.precise(value)
        return self.formatting(value)

    def precise(self, value: float | None) -> str:
        """Write a value with all the digits that tell trials apart."""
        return MISSING if value is None or math.isnan(value) else format(value, self.spec)

    def of(self, metrics: Mapping[str, float]) -> str:
        """Write the value in a record of metrics, with its standard error where it has one."""
        value, error = metrics.get(self.name), metrics.get(f"{self.name}_sem")
        return self.text(value) if value is None or error is None else with_error(value, error)


@dataclass(frozen=True)
class Task:
    """Metrics and words for the results of a task."""

    name: str  # in `study.json`
    metrics: tuple[Metric, ...]  # of quality; a search minimizes the first
    shown: str  # name of the metric that people read
    divergence: str  # name of the metric of the distance from the dense model
    hub_tag: str  # of such models on the hub
    counted: str = "examples"  # what is scored, in the plural

    def measured(self, loss: float, divergence: float | None = None) -> dict[str, float]:
        """Return the metrics of a model by name, from its mean loss and divergence."""
        values = {self.minimized.name: loss}
        values |= {m.name: m.of_loss(loss) for m in self.metrics if m.of_loss is not None}
        return values if divergence is None else values | {self.divergence: divergence}

    @property
    def minimized(self) -> Metric:
        """The metric that a search minimizes."""
        return self.metrics[0]

    @property
    def headline(self) -> Metric:
        """The metric that people read."""
        return next(metric for metric in self.metrics if metric.name == self.shown)

    @property
    def scores(self) -> tuple[Metric, ...]:
        """Metrics of every model scored on a text: minimized and headline."""
        return tuple(dict.fromkeys((self.minimized, self.headline)))


def with_error(value: float, error: float) -> str:
    """Write a number and its standard error to the digits that the error leaves.

    Example:
        >>> with_error(-0.00123, 0.00207), with_error(1.2345, 0.51), with_error(31.4, 12.0)
        ('-0.0012 +- 0.0021', '1.23 +- 0.51', '31 +- 12')
    """
    if not (error > 0 and math.isfinite(error)):
        return f"{value:.4g} +- {error:.2g}"
    digits = max(0, 1 - math.floor(math.log10(float(f"{error:.1e}"))))
    return f"{value:.{digits}f} +- {error:.{digits}f}"


def perplexity_of(nll: float) -> float:
    """Exponentiate nats per token: ``inf`` above 709.78, as in every float."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def perplexity_text(value: float) -> str:
    """Write a perplexity with as many digits as matter.

    Example:
        >>> perplexity_text(17.2345), perplexity_text(1234.5), perplexity_text(3.2e9)
        ('17.23', '1,234', '3.2e+09')
    """
    if value < 1_000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1_000_000 else f"{value:.1e}"


def count_text(value: float) -> str:
    """Write a large number in thousands, millions or billions.

    Example:
        >>> count_text(960), count_text(1234567), count_text(7e9)
        ('960', '1.235M', '7B')
    """
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.0f}"


def bytes_text(value: float) -> str:
    """Write a number of bytes in binary units.

    Example:
        >>> bytes_text(960), bytes_text(1536), bytes_text(2**37)
        ('960 B', '1.5 KiB', '128 GiB')
    """
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.{0 if value >= 100 * unit else 1}f} {name}"
    return f"{value:.0f} B"


CAUSAL_LM = Task(
    "causal_lm",
    (
        Metric("nll", "nll", unit="nats per token"),
        Metric(
            "perplexity",
            "perplexity",
            "ppl",
            spec=".3f",
            formatting=perplexity_text,
            is_log=True,
            of_loss=perplexity_of,
        ),
        Metric(
            "kl_dense_to_compressed", "KL(dense || compressed)", "KL", "nats per token", dense=0.0
        ),
    ),
    shown="perplexity",
    divergence="kl_dense_to_compressed",
    hub_tag="text-generation",
    counted="tokens",
)
TASKS: MutableMapping[str, Task] = {CAUSAL_LM.name: CAUSAL_LM}

_count = partial(Metric, spec=",.0f")
KEEP_RATIO = Metric(
    choices.KEEP_RATIO,
    "kept in the compressible layers",
    "kept",
    spec=".3%",
    formatting="{:.2%}".format,
    dense=1.0,
)
PARAMETERS = _count("parameters", "parameters of the compressible layers", "parameters")
# What a front may trade the loss against, as `config.choices` names it: known of every trial...
SIZES = (
    KEEP_RATIO,
    _count("model_parameters", "parameters of the whole model", "params", formatting=count_text),
    _count("model_bytes", "bytes of the whole model", "size", formatting=bytes_text),
    _count("macs_per_token", "multiply-adds per token", "MACs", formatting=count_text),
)
# ... and measured where latency.enabled asks for it; each with its standard error beside it.
LATENCIES = tuple(
    Metric(name, f"time of a {step}", spec=".3f", dense=1.0)
    for name, step in zip(choices.LATENCIES, ("prefill", "decoding step"), strict=True)
)
COSTS: Mapping[str, Metric] = {m.name: m for m in (*SIZES, PARAMETERS, *LATENCIES)}
