"""One trial from request to result: compress, evaluate, restore."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.accounting import Storage, account
from lrbo.allocation import Allocation, Cost
from lrbo.compression import Buffers, compressed
from lrbo.errors import outcome_of
from lrbo.evaluation.divergence import DenseReference
from lrbo.evaluation.perplexity import OnTokens, Perplexity, predictions
from lrbo.model import ModelMap
from lrbo.nested import LowRankFactors
from lrbo.trial import TrialRequest, TrialResult


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
    buffers: Buffers = field(default_factory=dict)

    def __call__(self, request: TrialRequest) -> TrialResult:
        """Evaluate one allocation.

        Returns:
            The result. An error that belongs to the trial (no memory, a loss that is not
            finite) is a result too, with its reason; a defect is raised.
        """
        start = time.perf_counter()
        try:
            metrics = self._evaluate(request.allocation)
        except Exception as error:
            outcome = outcome_of(error)
            seconds = time.perf_counter() - start
            reason = f"{type(error).__name__}: {error}"
            return TrialResult(request.trial_index, outcome, {}, seconds, reason)
        seconds = time.perf_counter() - start
        return TrialResult(request.trial_index, "completed", metrics, seconds)

    def _evaluate(self, allocation: Allocation) -> dict[str, float]:
        """Return the metrics of an allocation on the validation tokens."""
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        total = Perplexity(0.0, 0)
        divergence = 0.0
        tokens = self.windows.numel()
        with compressed(self.model, allocation, self.factors, tokens=tokens, buffers=self.buffers):
            for chunk in predictions(
                self.model,
                self.windows,
                batch_windows=self.batch_windows,
                chunk_tokens=self.chunk_tokens,
            ):
                total += Perplexity(float(chunk.nll.double().sum()), len(chunk.nll))
                divergence += float(self.dense.kl_dense_to_compressed(chunk).double().sum())
                if self.on_tokens is not None:
                    self.on_tokens(len(chunk.nll))
        return {
            "nll": total.mean,
            "perplexity": total.value if total.mean < 700 else math.inf,
            "kl_dense_to_compressed": divergence / total.tokens,
            "tokens": total.tokens,
            "peak_memory_gib": peak_memory_gib(self.model.device),
            **self.size_metrics(allocation),
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
    """Return the stored parameters of each allocated layer."""
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
