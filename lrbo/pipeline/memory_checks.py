"""What the steps on a model in memory refuse: statistics, models and token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.allocation.allocate import Allocation
from lrbo.calibration.statistics import MATRICES, Statistic
from lrbo.errors import ConfigError, DataError, ModelError, StatisticsError
from lrbo.factorization.base import FactorizationMethod
from lrbo.factorization.tables import table_needs
from lrbo.layers.form import DENSE_FORM
from lrbo.layers.forms import FORMS, form_named, is_delta, is_joint
from lrbo.layers.modules import compressed_layers
from lrbo.layers.options import DENSE
from lrbo.models.limits import Limits
from lrbo.models.model_map import is_linear, is_table, linear_weight, map_model
from lrbo.models.parameters import (
    first_other,
    not_finite,
    require_as_configured,
    require_stored_weights,
)
from lrbo.models.specs import LayerSpec, ModelMap
from lrbo.pipeline.checks import ALONE_TOO

# Of a size for each output, as an embedding has one for each token.
OF_OUTPUTS = {Statistic.OUTPUT_GRADIENT, Statistic.TOKEN_FREQUENCY, Statistic.LABEL_VARIANCE}


def check_statistics(
    spec: LayerSpec, gathered: Mapping[Statistic, Tensor], method: FactorizationMethod, mend: str
) -> None:
    """Refuse missing statistics and those of another layer; ``mend`` is the call for others."""
    needs, who = method.needs, f"method {method.name!r}"
    if spec.block is None:
        needs, who = table_needs(spec), "an embedding or a head"
    if missing := sorted(need.value for need in needs - set(gathered)):
        raise StatisticsError(
            f"{spec.name}: {who} needs the statistics {', '.join(missing)}, and "
            f"the calibration has {', '.join(sorted(gathered)) or 'none'}; gather them with {mend}"
        )
    for statistic, tensor in gathered.items():
        size = spec.out_features if statistic in OF_OUTPUTS else spec.in_features
        expected: tuple[int, ...] = (size, size) if statistic in MATRICES else (size,)
        if statistic is Statistic.WEIGHT_GRADIENT:
            expected = spec.out_features, spec.in_features
        if tensor.shape != expected:
            raise StatisticsError(
                f"{spec.name}: the calibration has {statistic.value} of shape "
                f"{tuple(tensor.shape)}, expected {expected}: it is of another model. Gather "
                f"that of this one with {mend}"
            )


def check_forms(forms: object, names: Sequence[str], *, has_base: bool) -> None:
    """Refuse names of forms, as they were given, that no model can be factored into.

    Raises:
        ConfigError: If a form is unknown or given twice, or none is beside dense, for single
            layers, or of a base where there is one.
    """
    for form in names:
        form_named(form)
    problem = None
    if not {*names} - {DENSE_FORM}:
        problem = f"expected one beside dense: {', '.join(FORMS)}"
    elif len({*names}) < len(names):
        problem = "expected each once"
    elif all(name == DENSE_FORM or is_joint(name) for name in names):
        problem = ALONE_TOO
    elif others := [n for n in names if n != DENSE_FORM and is_delta(n) != has_base]:
        need = "no base" if has_base else "the model that this one was fine-tuned from, base=MODEL"
        problem = f"{', '.join(others)} need {need}"
    if problem is not None:
        raise ConfigError([f"forms={forms!r}: {problem}"])


@contextmanager
def as_evaluated(model: PreTrainedModel) -> Iterator[None]:
    """Run a model as evaluation does, without dropout or autocast, and restore its modes."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def mapped(model: PreTrainedModel) -> ModelMap:
    """Map a dense model, whose parameters must be finite and as configured."""
    check_model(model)
    if compressed_layers(model):
        raise ModelError(
            f"this {type(model).__name__} is compressed already; only a dense model can be: give "
            "the one that it was made from."
        )
    require_stored_weights(model)
    layers = map_model(model)
    require_as_configured(model)
    if problem := not_finite(model):
        raise ModelError(f"this {type(model).__name__}: {problem} Take one whose numbers are.")
    return layers


def check_model(model: object) -> None:
    """Refuse what is no model in memory."""
    if isinstance(model, PreTrainedModel):
        return
    is_adapted = hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")
    raise ModelError(
        f"model of type {type(model).__name__}: expected a model of transformers in memory, as "
        "AutoModelForCausalLM.from_pretrained and lrbo.load give"
        + ("; merge its adapter with merge_and_unload()" if is_adapted else "")
    )


def check_ids(ids: Any, model: PreTrainedModel, least: int = 1) -> None:
    """Refuse what are no windows of at least ``least`` tokens of a model."""
    given, is_good = f"ids of type {type(ids).__name__}", False
    if isinstance(ids, Tensor):
        given = f"ids of shape {tuple(ids.shape)} and {ids.dtype}"
        is_whole = not ids.is_floating_point() and ids.dtype != torch.bool
        is_good = is_whole and ids.dim() == 2 and len(ids) > 0 and ids.shape[1] >= least
    if not is_good:
        raise DataError(
            f"{given}: expected whole numbers (windows, tokens), as "
            'tokenizer(text, return_tensors="pt").input_ids has; cut a long text into windows '
            "with ids[:, : count * 512].view(-1, 512)"
        )
    problems = Limits.of(model.config, "the model").of_windows(
        {"ids": ids}, "give what the tokenizer of this model gives for a text, without padding"
    )
    if problems:
        raise DataError(*problems)


def require_dense(
    model: PreTrainedModel, allocation: Allocation, layers: ModelMap, weights: Mapping[str, Tensor]
) -> None:
    """Refuse a model whose layers are not those that were factored, by samples of their weights."""
    modules = dict(model.named_modules())
    for name, option in allocation.options.items():
        module, spec = modules.get(name), layers.by_name.get(name)
        shape = None if spec is None else (spec.out_features, spec.in_features)
        is_dense = module is not None and (is_linear(module) or is_table(module))
        if module is None or not is_dense or linear_weight(module).shape != shape:
            raise ModelError(
                f"{name} is no dense layer of shape {shape} in this {type(model).__name__}; "
                "give the dense model that was factored, and an allocation of the same"
            )
        if option != DENSE and (module._forward_hooks or module._forward_pre_hooks):
            raise ModelError(
                f"{name} of this {type(model).__name__} has forward hooks, which the "
                "layer that replaces it would not run; remove them, and put them on again after"
            )
    if other := first_other(weights, model):
        raise ModelError(
            f"{other} of this {type(model).__name__} is not that of the model that was "
            "factored, expected the same weights; give the dense model that was factored, or "
            "factor this one with lrbo.factorize"
        )
