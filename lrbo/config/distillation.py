"""The section ``recover.distill``: how a whole model is trained towards the dense one."""

from __future__ import annotations

from dataclasses import dataclass

from lrbo.config import options
from lrbo.config.options import ANY_COUNT, one_of, option

TEXT, SELF = "text", "self"
COMPUTED, CACHED = "computed", "cached"
ALL, FACTORS = "all", "factors"
MUON, ADAMW = "muon", "adamw"


@dataclass
class DistillConfig:
    """How a whole model is trained towards the dense one.

    Attributes:
        optimizer: ``muon`` takes its steps for factors and thin layers, and AdamW's for all other
            numbers; ``adamw`` takes AdamW's for all.
        lr: Peak of the learning rate: it rises over the share ``warmup`` of the steps, or of
            the time where that ends first, and falls to a tenth.
        epochs: How often the text is read at most.
        batch_windows: Windows of a forward pass; a step has ``accumulation`` of them.
        kl: Weight of ``KL(dense || compressed)``; 0 is continued pretraining.
        ce: Weight of the text's own cross-entropy.
        hidden: Weight of the squared distance of hidden states, as a share of those of the dense
            model.
        temperature: Of both distributions; the divergence is multiplied by its square.
        teacher: Whether the dense model is run at each step, or once for each window, of whose
            distributions ``top_k`` tokens are stored and the rest as one.
        data: ``self`` trains on text that the dense model writes after the first token of each
            window.
        train: ``factors`` leaves norms, biases, scales and other numbers as they are.
        rounding_from: Share of the steps, or of the time, from which the loss sees factors in
            integers as they will be rounded; 1 is never.
        evaluate_every: Steps between two looks at the windows held back, which decide what is left.
        patience: Looks in a row without improvement that end it.
        save_minutes: What an interruption loses at most.
    """

    optimizer: str = option(MUON, one_of((MUON, ADAMW)))
    lr: float = option(5e-4, options.ABOVE_0)
    weight_decay: float = option(0.01, options.FROM_0)
    warmup: float = option(0.05, options.BELOW_1)
    epochs: int = option(8, ANY_COUNT)
    batch_windows: int = option(4, ANY_COUNT)
    accumulation: int = option(1, ANY_COUNT)
    kl: float = option(1.0, options.FROM_0)
    ce: float = option(0.1, options.FROM_0)
    hidden: float = option(0.0, options.FROM_0)
    temperature: float = option(1.0, options.ABOVE_0)
    teacher: str = option(COMPUTED, one_of((COMPUTED, CACHED)))
    top_k: int = option(64, ANY_COUNT)
    data: str = option(TEXT, one_of((TEXT, SELF)))
    train: str = option(ALL, one_of((ALL, FACTORS)))
    rounding_from: float = option(0.5, options.FROM_0_TO_1)
    evaluate_every: int = option(16, ANY_COUNT)
    patience: int = option(4, ANY_COUNT)
    save_minutes: float = option(5.0, options.ABOVE_0)


def distill_problems(config: DistillConfig, prefix: str = "recover.distill.") -> list[str]:
    """List what values that are each right by themselves cannot be together."""
    problems = []
    if config.kl == config.ce == config.hidden == 0:
        problems.append(f"{prefix}kl, ce and hidden are all 0: expected a weight above 0")
    if config.teacher == CACHED and config.temperature != 1:
        problems.append(
            f"{prefix}temperature={config.temperature!r}: expected 1 with teacher={CACHED}, which "
            "stores probabilities; take teacher=computed"
        )
    if config.teacher == CACHED and config.hidden:
        problems.append(
            f"{prefix}hidden={config.hidden!r}: expected 0 with teacher={CACHED}, which stores no "
            "hidden states; take teacher=computed"
        )
    return problems
