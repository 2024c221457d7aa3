"""The sections of end-to-end stages: how a whole model is trained towards the dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lrbo.config import options
from lrbo.config.options import ANY_COUNT, one_of, option

TEXT, SELF = "text", "self"
COMPUTED, CACHED = "computed", "cached"
ALL, FACTORS = "all", "factors"
MUON, ADAMW = "muon", "adamw"
LORA, DIAGONAL, LORA_SPARSE, TENSOR_TRAIN = "lora", "diagonal", "lora_sparse", "tensor_train"
SIDES = ("left", "right")  # of a product, as its parameters are called


@dataclass
class TrainingConfig:
    """How a whole model is trained towards the dense one, whatever of it is trained.

    Attributes:
        optimizer: ``muon`` takes its steps for factors and thin layers, and AdamW's for all other
            numbers; ``adamw`` takes AdamW's for all.
        warmup: Share of the steps, or of the time where that ends first, over which the learning
            rate rises; it falls to a tenth then.
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
        evaluate_every: Steps between two looks at the windows held back, which decide what is left.
        patience: Looks in a row without improvement that divide the learning rate by three; the
            fourth time they end it.
        save_minutes: What an interruption loses at most.
    """

    optimizer: str = option(MUON, one_of((MUON, ADAMW)))
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
    evaluate_every: int = option(16, ANY_COUNT)
    patience: int = option(2, ANY_COUNT)
    save_minutes: float = option(5.0, options.ABOVE_0)


@dataclass
class DistillConfig(TrainingConfig):
    """What ``distill`` trains.

    Attributes:
        lr: Peak of the learning rate; null is 0.7 of the step along the gradient of a first batch
            that lowers the loss on the windows held back most.
        train: ``factors`` leaves norms, biases, scales and other numbers as they are.
    """

    lr: float | None = option(None, options.ABOVE_0.or_null())
    train: str = option(ALL, one_of((ALL, FACTORS)))


class Form(NamedTuple):
    """A form of update, with the values that stand for null."""

    lr: float
    rank: int
    alpha: float | None  # None where it has no such option
    entries: float | None


FORMS: Mapping[str, Form] = {
    LORA: Form(1e-3, 8, 16.0, None),
    DIAGONAL: Form(1e-2, 256, None, None),
    LORA_SPARSE: Form(1e-3, 8, 16.0, 0.01),
    TENSOR_TRAIN: Form(1e-2, 5, 1.0, None),
}


@dataclass
class AdapterConfig(TrainingConfig):
    """What ``adapter`` trains; null stands for what the form has in ``FORMS``.

    Attributes:
        lr: Peak of the learning rate.
        form: Of the update of a factor or thin layer.
        rank: Of the update; of ``diagonal`` the directions that it may scale, of ``tensor_train``
            the rank between two cores. A matrix of a smaller side has that.
        alpha: The update is multiplied by ``alpha / rank``, a tensor train by ``alpha``.
        entries: Share of those of a matrix that ``lora_sparse`` trains one by one.
        sides: ``left`` or ``right`` alone, of the two thin matrices of a layer, or ``all``.
    """

    optimizer: str = option(ADAMW, one_of((MUON, ADAMW)))
    lr: float | None = option(None, options.ABOVE_0.or_null())
    form: str = option(LORA, one_of(FORMS))
    rank: int | None = option(None, ANY_COUNT.or_null())
    alpha: float | None = option(None, options.ABOVE_0.or_null())
    entries: float | None = option(None, options.ABOVE_0_TO_1.or_null())
    sides: str = option(ALL, one_of((ALL, *SIDES)))


@dataclass
class MixedRankConfig(DistillConfig):
    """How layers take turns with those of the dense model.

    Attributes:
        probability: With which a layer is the dense model's in a step, at first.
        decay: Share of the steps, or of the time, over which the probability falls to 0.
        consistency: Weight of the divergence between two passes of other layers; 0 takes one.
    """

    probability: float = option(0.2, options.BELOW_1)
    decay: float = option(0.5, options.ABOVE_0_TO_1)
    consistency: float = option(1.0, options.FROM_0)


def training_problems(config: TrainingConfig, prefix: str) -> list[str]:
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
    if isinstance(config, AdapterConfig) and config.form in FORMS:
        form = FORMS[config.form]
        for name in ("alpha", "entries"):
            value = getattr(config, name)
            if value is not None and getattr(form, name) is None:
                others = " or ".join(n for n, f in FORMS.items() if getattr(f, name) is not None)
                problems.append(
                    f"{prefix}{name}={value!r}: expected null with form={config.form}, which has "
                    f"none; leave it out, or take form={others}"
                )
    return problems
