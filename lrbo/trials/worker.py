"""One trial from request to result: compress, evaluate, restore."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.allocation.allocate import Allocation
from lrbo.allocation.apply import compressed
from lrbo.errors import outcome_of
from lrbo.evaluation.memory import peak_memory_gib
from lrbo.evaluation.timing import TimingSettings, measure_latency
from lrbo.factorization.factors import Buffers
from lrbo.factorization.prepared import Prepared
from lrbo.layers.options import account
from lrbo.models.specs import ModelMap
from lrbo.tasks.causal_lm import CausalLM
from lrbo.tasks.model_task import ModelTask, OnScored, Reference
from lrbo.trials.racing import Race, paired_difference, spread_order, window_loss
from lrbo.trials.records import TrialRequest, TrialResult


@dataclass
class ExampleLosses:
    """Loss and divergence over the predictions of some examples, scored in any order."""

    sums: dict[int, tuple[float, float]] = field(default_factory=dict)
    means: dict[int, tuple[float, float]] = field(default_factory=dict)
    scored: int = 0

    def add(
        self,
        first: int,
        losses: Float[Tensor, "examples n"],
        divergences: Float[Tensor, "examples n"],
    ) -> None:
        """Add consecutive examples from index ``first`` on."""
        for index, (loss, divergence) in enumerate(zip(losses, divergences, strict=True), first):
            sums = float(loss.sum()), float(divergence.sum())
            self.sums[index] = sums
            self.means[index] = sums[0] / len(loss), sums[1] / len(loss)
        self.scored += losses.numel()

    def pairs(self, rival: Sequence[float], kl_weight: float) -> tuple[list[float], list[float]]:
        """Return the losses so far, and those of another trial on the same examples."""
        ours = [window_loss(*means, kl_weight) for means in self.means.values()]
        return ours, [rival[index] for index in self.means]

    @property
    def mean(self) -> tuple[float, float]:
        """The mean loss and divergence per prediction."""
        loss, divergence = map(math.fsum, zip(*self.sums.values(), strict=True))
        return loss / self.scored, divergence / self.scored


@dataclass
class Worker:
    """Evaluates allocations; model, factors and tokens live once, in here.

    A trial costs one forward pass over the validation tokens: it swaps prefixes of the factors
    in, scores, and puts the dense layers back. A prefix is multiplied out only where that is fewer
    operations for these tokens.
    """

    model: PreTrainedModel  # dense, in evaluation mode
    layers: ModelMap
    itemsize: int  # bytes of a parameter that is stored
    prepared: Mapping[str, Prepared]  # of each unit, in the model's dtype, on its device
    windows: Any  # validation examples, such as `(windows, tokens)` ids
    dense: Reference  # the dense model's predictions for the same examples
    task: ModelTask = field(default_factory=CausalLM)
    batch_windows: int = 4
    on_tokens: OnScored | None = None  # called with the number of predictions after each chunk
    race: Race | None = None  # gives hopeless trials up
    latency: TimingSettings | None = None  # of some more prefills, after the scoring
    buffers: Buffers = field(default_factory=dict)  # for prefixes that are multiplied out

    def __call__(self, request: TrialRequest) -> TrialResult:
        """Evaluate one allocation; an error that belongs to the trial is a result too."""
        start = time.perf_counter()
        try:
            result = self._evaluated(request)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            result = TrialResult(request.trial_index, outcome_of(error), error=reason)
        return replace(result, seconds=time.perf_counter() - start)

    def _evaluated(self, request: TrialRequest) -> TrialResult:
        index, count = request.trial_index, len(self.windows)
        losses = self._scored(request)
        shared = {
            "tokens": losses.scored,
            "peak_memory_gib": peak_memory_gib(self.model.device),
            **self.size_metrics(request.allocation),
        }
        if len(losses.means) < count:
            assert self.race is not None, "a trial was given up without a race"
            paired = losses.pairs(request.rival_losses, self.race.kl_weight)
            difference, error = paired_difference(*paired, count)
            objective = math.fsum(request.rival_losses) / count + difference
            estimate = {"objective": objective, "objective_sem": error}
            return TrialResult(index, "stopped", estimate | shared)
        metrics = self.task.record.measured(*losses.mean) | shared
        if self.latency is not None:  # a trial that was given up is on no front
            modules = {
                name: self.prepared[name].stand_in(name, option)
                for name, option in request.allocation.compressed.items()
            }
            metrics |= measure_latency(self.model, modules, self.windows.flatten(), self.latency)
        nll, kl = zip(*(losses.means[window] for window in range(count)), strict=True)
        return TrialResult(index, "completed", metrics, example_losses=nll, example_divergences=kl)

    def _scored(self, request: TrialRequest) -> ExampleLosses:
        """Score an allocation on the validation windows, or as many as it takes to lose."""
        model, race = self.model, self.race
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        losses = ExampleLosses()
        count, size = len(self.windows), self.batch_windows
        starts = range(0, count, size)
        order = range(len(starts)) if race is None else spread_order(len(starts))
        tokens = self.task.positions(self.windows)
        with compressed(
            model, request.allocation, self.prepared, tokens=tokens, buffers=self.buffers
        ):
            for index in order:
                first = starts[index]
                windows = self.windows[first : first + size]
                scored = self.task.compared(
                    model, windows, self.dense, first, on_scored=self.on_tokens
                )
                losses.add(first, *scored)
                if race is not None and request.rival_losses:
                    ours, rival = losses.pairs(request.rival_losses, race.kl_weight)
                    if race.is_lost(ours, rival, count, len(order) - 1):
                        break
        return losses

    def size_metrics(self, allocation: Allocation) -> dict[str, float]:
        """Return the sizes of an allocation; the keep ratio is of the budget's measure."""
        counted = account(self.layers, allocation.cost, itemsize=self.itemsize)
        return {
            "keep_ratio": counted.keep_ratio(allocation.budget.measure),
            "parameters": counted.units.parameters,
            "model_parameters": counted.model.parameters,
            "model_bytes": counted.model.bytes,
            "macs_per_token": counted.model.macs,
        }
