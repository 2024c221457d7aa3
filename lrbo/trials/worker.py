"""One trial from request to result: compress, evaluate, restore."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.accounting import Storage, account
from lrbo.allocation import Allocation, Cost
from lrbo.compression import Buffers, compressed
from lrbo.errors import outcome_of
from lrbo.evaluation.divergence import DenseReference
from lrbo.evaluation.latency import LatencySettings, executed_layers, measure_latency
from lrbo.evaluation.perplexity import OnTokens, Perplexity, predictions
from lrbo.nested import LowRankFactors
from lrbo.paired import paired_difference
from lrbo.racing import Race, spread_order, window_loss
from lrbo.specs import ModelMap
from lrbo.trial import TrialRequest, TrialResult


@dataclass
class WindowLosses:
    """Losses of some validation windows, whatever the order in which they were scored.

    Attributes:
        sums: By window, nll and divergence summed over its tokens, nats.
        means: By window, the same per token.
        tokens: That were scored.
    """

    sums: dict[int, tuple[float, float]] = field(default_factory=dict)
    means: dict[int, tuple[float, float]] = field(default_factory=dict)
    tokens: int = 0

    def add(
        self, first: int, windows: int, nll: Float[Tensor, " n"], divergence: Float[Tensor, " n"]
    ) -> None:
        """Take in consecutive windows, token by token.

        Args:
            first: Number of the first window.
            windows: How many there are.
            nll: Of all their scored tokens, window after window, nats.
            divergence: From the dense model, of the same tokens, nats.
        """
        pairs = zip(nll.view(windows, -1), divergence.view(windows, -1), strict=True)
        for place, (lost, diverged) in enumerate(pairs):
            sums = float(lost.sum()), float(diverged.sum())
            self.sums[first + place] = sums
            self.means[first + place] = sums[0] / len(lost), sums[1] / len(lost)
        self.tokens += len(nll)

    def beside(self, rival: Sequence[float], kl_weight: float) -> tuple[list[float], list[float]]:
        """Return the losses so far, and those of another trial on the same windows.

        Args:
            rival: Loss of every window, of the other trial.
            kl_weight: Weight of the divergence in the loss of a window.
        """
        mine = [window_loss(nll, kl, kl_weight) for nll, kl in self.means.values()]
        return mine, [rival[place] for place in self.means]

    @property
    def nll(self) -> float:
        """Return the summed nll, nats."""
        return math.fsum(lost for lost, _ in self.sums.values())

    @property
    def divergence(self) -> float:
        """Return the summed divergence, nats."""
        return math.fsum(diverged for _, diverged in self.sums.values())


@dataclass
class Worker:
    """Evaluates allocations; model, factors and tokens live once, in here.

    A trial costs one forward pass over the validation tokens: it swaps prefixes of the factors
    in, scores, and puts the dense layers back. Nothing is factored or tokenized, and a prefix is
    multiplied out only where that is fewer operations for these tokens.

    Attributes:
        model: The dense model, in evaluation mode.
        layers: Its map.
        factors: Of each compressible layer, in the model's dtype and on its device.
        cost: Stored parameters of a layer at a rank.
        storage: The form that ``cost`` counts.
        windows: ``(windows, tokens)`` validation ids.
        dense: What the dense model says about the same tokens.
        batch_windows: Windows per forward pass.
        chunk_tokens: Rows of logits at a time.
        on_tokens: Told the number of tokens after each chunk.
        race: When to give a trial up; ``None`` scores every one whole.
        latency: What is timed after the scoring; ``None`` times nothing. It takes some prefills
            more, and as much memory as the compressed layers.
        buffers: For prefixes that are multiplied out; filled by the first trials.
    """

    model: PreTrainedModel
    layers: ModelMap
    factors: Mapping[str, LowRankFactors]
    cost: Cost
    storage: Storage
    windows: Int[Tensor, "windows tokens"]
    dense: DenseReference
    batch_windows: int = 4
    chunk_tokens: int = 256
    on_tokens: OnTokens | None = None
    race: Race | None = None
    latency: LatencySettings | None = None
    buffers: Buffers = field(default_factory=dict)

    def __call__(self, request: TrialRequest) -> TrialResult:
        """Evaluate one allocation.

        Returns:
            The result. An error that belongs to the trial (no memory, a loss that is not
            finite) is a result too, with its reason; a defect is raised.
        """
        start = time.perf_counter()
        try:
            losses = self._scored(request)
            metrics = self._metrics(request, losses)
            is_whole = len(losses.means) == len(self.windows)
            if is_whole:  # a trial that was given up is on no front
                metrics |= self._latency(request.allocation)
        except Exception as error:
            outcome = outcome_of(error)
            seconds = time.perf_counter() - start
            reason = f"{type(error).__name__}: {error}"
            return TrialResult(request.trial_index, outcome, {}, seconds, reason)
        seconds = time.perf_counter() - start
        if not is_whole:
            return TrialResult(request.trial_index, "stopped", metrics, seconds)
        nll, kl = zip(*(losses.means[index] for index in range(len(self.windows))), strict=True)
        return TrialResult(
            request.trial_index, "completed", metrics, seconds, window_nll=nll, window_kl=kl
        )

    def _scored(self, request: TrialRequest) -> WindowLosses:
        """Score an allocation on the validation windows, or as many as it takes to lose."""
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        losses = WindowLosses()
        count, width = self.windows.shape
        starts = range(0, count, self.batch_windows)
        order = range(len(starts)) if self.race is None else spread_order(len(starts))
        tokens = self.windows.numel()
        with compressed(
            self.model, request.allocation, self.factors, tokens=tokens, buffers=self.buffers
        ):
            for place in order:
                start = starts[place]
                windows = self.windows[start : start + self.batch_windows]
                nll, divergence = [], []
                for chunk in predictions(
                    self.model,
                    windows,
                    batch_windows=self.batch_windows,
                    chunk_tokens=self.chunk_tokens,
                ):
                    here = replace(chunk, first=chunk.first + start * (width - 1))
                    nll.append(here.nll.double())
                    divergence.append(self.dense.kl_dense_to_compressed(here).double())
                    if self.on_tokens is not None:
                        self.on_tokens(len(chunk.nll))
                losses.add(start, len(windows), torch.cat(nll), torch.cat(divergence))
                if self.race is not None and request.rival_losses:
                    mine, rival = losses.beside(request.rival_losses, self.race.kl_weight)
                    if self.race.is_lost(mine, rival, count, len(order) - 1):
                        break
        return losses

    def _latency(self, allocation: Allocation) -> dict[str, float]:
        """Time the model as it would be exported, if that is asked for."""
        if self.latency is None:
            return {}
        modules = executed_layers(allocation, self.factors, self.storage)
        return measure_latency(self.model, modules, self.windows.flatten(), self.latency)

    def _metrics(self, request: TrialRequest, losses: WindowLosses) -> dict[str, float]:
        """Return the metrics of a trial: its losses, or what those scored say of its loss."""
        shared = {
            "tokens": losses.tokens,
            "peak_memory_gib": peak_memory_gib(self.model.device),
            **self.size_metrics(request.allocation),
        }
        count = len(self.windows)
        if len(losses.means) < count:
            assert self.race is not None, "a trial was given up without a race"
            beside = losses.beside(request.rival_losses, self.race.kl_weight)
            difference, error = paired_difference(*beside, count)
            rival = math.fsum(request.rival_losses) / count
            return {"objective": rival + difference, "objective_sem": error, **shared}
        total = Perplexity(losses.nll, losses.tokens)
        return {
            "nll": total.mean,
            "perplexity": total.value,
            "kl_dense_to_compressed": losses.divergence / losses.tokens,
            **shared,
        }

    def size_metrics(self, allocation: Allocation) -> dict[str, float]:
        """Return what the allocation holds and costs, as in ``ModelAccount``."""
        counted = account(
            self.layers,
            allocation.ranks,
            allocation_parameters(self.layers, allocation, self.cost),
            storage=self.storage,
            bytes_per_parameter=self.model.dtype.itemsize,
        )
        return {
            "keep_ratio": counted.keep_ratio,
            "parameters": counted.compressible,
            "model_parameters": counted.model,
            "model_bytes": counted.bytes,
            "macs_per_token": counted.macs_per_token,
        }


def allocation_parameters(layers: ModelMap, allocation: Allocation, cost: Cost) -> dict[str, int]:
    """Return the stored parameters of each allocated layer.

    Args:
        layers: The map of the dense model.
        allocation: Ranks by layer name.
        cost: Stored parameters of a layer at a rank, as the budget counts them.
    """
    return {
        name: layers.by_name[name].parameters if rank is None else cost(layers.by_name[name], rank)
        for name, rank in allocation.ranks.items()
    }


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: of the device since the trial began, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
