"""Muon, cut short, for factors, whose directions are of very unlike sizes; AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

MOMENTUM = 0.9
# Of an iteration whose slope at 0 is steep. Muon's five end with all singular values between 0.7
# and 1.2. One leaves the small ones small: of a few thousand tokens these are mostly noise, which
# adds up over the steps.
COEFFICIENTS = 3.4445, -4.7750, 2.0315
RMS = 0.2  # of the elements of an update, before the learning rate: about that of AdamW's
TINY = 1e-7


class Muon(torch.optim.AdamW):
    """AdamW, and for groups with ``is_matrix`` steps whose large singular values are much alike.

    The gradient of a factor is large along few directions. AdamW, which knows elements alone, goes
    on along them; with few steps the others never move.

    References:
        Jordan, *Muon: An optimizer for hidden layers in neural networks*, 2024, with the size of
        updates of Liu et al., *Muon is Scalable for LLM Training*, 2025, section 2.2; as
        torch.optim.Muon with ``ns_steps=1``, in a dtype of choice: CPUs multiply in bfloat16 very
        slowly or very fast.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, dtype: torch.dtype) -> None:
        """Take groups of parameters; products are worked out in a dtype."""
        super().__init__(groups, lr=lr)
        self.dtype = dtype

    @override
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step, after which matrices have no gradients."""
        for group in self.param_groups:
            for matrix in group["params"] if group["is_matrix"] else ():
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["step"] = torch.zeros(())  # which AdamW looks for
                    state["momentum"] = torch.zeros_like(matrix)
                state["step"] += 1
                state["momentum"].lerp_(matrix.grad, 1 - MOMENTUM)
                ahead = matrix.grad.lerp(state["momentum"], MOMENTUM)  # Nesterov's
                update = evened(ahead.to(self.dtype)).to(matrix.dtype)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * RMS * math.sqrt(max(matrix.shape)))
                matrix.grad = None
        return super().step(closure)


def evened(matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Return ``U p(S) V^T`` of ``U S V^T``: one iteration of Newton-Schulz.

    ``p(s) = a s + b s^3 + c s^5``, of singular values divided by the Frobenius norm.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if is_tall else matrix
    wide = wide / wide.norm().clamp_min(TINY)
    gram = wide @ wide.T
    wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if is_tall else wide


def optimizer_of(
    parameters: Mapping[str, nn.Parameter],
    matrices: Collection[str],
    *,
    lr: float,
    weight_decay: float,
    dtype: torch.dtype,
) -> Muon:
    """Return the optimizer of parameters by name, of which ``matrices`` take Muon's steps.

    Norms, biases and other vectors do not decay.
    """
    inside = [p for name, p in parameters.items() if name in matrices]
    others = [p for name, p in parameters.items() if name not in matrices and p.dim() > 1]
    vectors = [p for name, p in parameters.items() if p.dim() <= 1]
    groups = [
        {"params": inside, "weight_decay": weight_decay, "is_matrix": True},
        {"params": others, "weight_decay": weight_decay, "is_matrix": False},
        {"params": vectors, "weight_decay": 0.0, "is_matrix": False},
    ]
    return Muon([group for group in groups if group["params"]], lr, dtype)
