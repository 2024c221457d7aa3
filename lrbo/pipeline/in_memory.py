"""The steps from a dense model in memory to a compressed one: calibrate, factorize, allocate."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrbo import compression, export
from lrbo.accounting import STORAGES, ModelAccount, Storage, account
from lrbo.allocation import Allocation, Budget, Cost
from lrbo.calibration.collect import Calibration, CalibrationSettings
from lrbo.errors import BudgetError, ConfigError, DataError, ModelError, StatisticsError
from lrbo.evaluation.limits import Limits
from lrbo.evaluation.perplexity import Perplexity
from lrbo.evaluation.perplexity import score as score_checked
from lrbo.factorization.base import GRADIENT_STATISTICS, MATRICES, FactorizationMethod, Statistic
from lrbo.factorization.registry import method_named
from lrbo.families import family_of
from lrbo.layers import LowRankLinear, PivotedLinear
from lrbo.model import (
    first_other,
    is_linear,
    linear_weight,
    map_model,
    not_finite,
    require_as_configured,
    require_head,
    require_in_memory,
    require_stored_weights,
    weight_samples,
)
from lrbo.nested import LowRankFactors
from lrbo.optimization.base import least_loss, uniform_ratios
from lrbo.preparation import (
    curve_needs,
    factors_by_block,
    statistics_by_block,
    without_effect,
)
from lrbo.progress import Reporter
from lrbo.sensitivity import predicted_curves
from lrbo.specs import LayerSpec, ModelMap
from lrbo.terminal import PlainConsole
from lrbo.versions import versions
from lrbo.worker import allocation_parameters

Method = str | FactorizationMethod


class NoEffectWarning(UserWarning):
    """Layers that calibration saw do nothing: they cost nothing at any rank."""


def calibrate(
    model: PreTrainedModel,
    ids: Tensor,
    method: Method | Sequence[Method] = "loss_aware",
    *,
    curves: bool = True,
    settings: CalibrationSettings | None = None,
    progress: bool = True,
) -> Calibration:
    """Gather what a method must know of the inputs and output gradients of a model's layers.

    The text passes through the model block by block, and back if gradients are needed. A model
    in training is run as in evaluation, and is afterwards what it was.

    Args:
        model: A causal language model of a family in :mod:`lrbo.families`.
        ids: ``(windows, tokens)`` token ids; every position enters.
        method: Name or object, or several, which then share the statistics.
        curves: Gather also what loss curves need, for :meth:`Factorization.least_loss`; takes
            a pass back through the model, also for methods that need no gradients.
        settings: How; the defaults are those of ``lrbo search``.
        progress: Show on stderr how far it is.

    Returns:
        The statistics, in memory.

    Raises:
        ConfigError: If there is no method of that name; lists the known ones.
        DataError: If the ids are no windows of tokens of this model.
        ModelError: If the family of the model is unknown, or the model is compressed, or lets no
            gradients through.
        StatisticsError: If a layer saw a value that is not finite, naming it.
    """
    layers = _mapped(model)
    _check_ids(ids, model)
    methods = [method] if isinstance(method, str | FactorizationMethod) else method
    needs = frozenset[Statistic]().union(
        *(curve_needs(one) if curves else one.needs for one in map(_method, methods))
    )
    if not needs:
        return Calibration()
    if GRADIENT_STATISTICS & needs and any(p.is_inference() for p in model.parameters()):
        raise ModelError(
            f"the parameters of this {type(model).__name__} were made in torch.inference_mode(), "
            "through which gradients do not pass; load it outside, or ask for a method without "
            "gradients and curves=False"
        )
    # In the caller's inference mode there would be no gradients.
    with _as_evaluated(model), torch.inference_mode(False):
        parts = statistics_by_block(
            model,
            layers,
            ids.cpu().long().clone(),
            needs,
            settings or CalibrationSettings(),
            _reporter(progress),
        )
        gathered = Calibration.gather(parts)
    gathered.weights.update(weight_samples(model))
    return gathered


def factorize(
    model: PreTrainedModel,
    calibration: Calibration | None = None,
    method: Method = "loss_aware",
    *,
    storage: Storage = "pivoted",
    progress: bool = True,
) -> Factorization:
    """Factor every layer of a model's blocks once, so that each rank is a prefix of the factors.

    Args:
        model: The dense model, which is not changed.
        calibration: Of this model; ``None`` for a method that needs none.
        method: Name or object.
        storage: The form in which layers will be stored, and that budgets count.
        progress: Show on stderr how far it is.

    Raises:
        ConfigError: If there is no method or storage of that name; lists the known ones.
        ModelError: If the family of the model is unknown, or the model is compressed, or is not
            the one that was calibrated.
        StatisticsError: If the calibration lacks what the method needs, or a layer cannot be
            factored with it.
    """
    layers, how = _mapped(model), _method(method)
    if storage not in STORAGES:
        raise ConfigError([f"storage={storage!r}: expected {' or '.join(STORAGES)}"])
    if calibration is not None and not isinstance(calibration, Calibration):
        raise StatisticsError(
            f"calibration of type {type(calibration).__name__}: expected what lrbo.calibrate "
            "gives, or None; a method is given as method=NAME"
        )
    known = calibration or Calibration()
    name = repr(method) if isinstance(method, str) else type(method).__name__ + "()"
    for spec in layers.compressible:
        _check_statistics(spec, known.of(spec), how, f"lrbo.calibrate(model, ids, {name})")
    if other := first_other(known.weights, model):
        raise ModelError(
            f"{other} of this {type(model).__name__} is not that of the model that was calibrated, "
            "expected the same weights: statistics of one model say nothing of another. Gather "
            f"those of this one with lrbo.calibrate(model, ids, {name})"
        )
    factors: dict[str, LowRankFactors] = {}
    for part in factors_by_block(model, layers, how, known, _reporter(progress)):
        factors |= part
    if idle := without_effect(layers, factors):
        warnings.warn(idle, NoEffectWarning, stacklevel=2)
    names = {spec.name for spec in layers.compressible}
    own = {n: v for n, v in weight_samples(model).items() if n.rpartition(".")[0] in names}
    return Factorization(layers, how, storage, factors, own)


def score(
    model: PreTrainedModel, ids: Tensor, *, batch_windows: int = 4, chunk_tokens: int = 256
) -> Perplexity:
    """Score a model, dense or compressed, on windows of tokens.

    Args:
        model: A causal language model; one in training is run as in evaluation.
        ids: ``(windows, tokens)`` token ids; the first token of each window is context only.
        batch_windows: Windows per forward pass; does not change the result.
        chunk_tokens: Rows of logits at a time; does not change the result.

    Returns:
        ``value``, the perplexity; ``mean``, nats per token; ``nll``, their sum; and ``tokens``,
        how many were predicted.

    Raises:
        DataError: If the ids are no windows of tokens of this model.
        ModelError: If it is no causal language model of a family in :mod:`lrbo.families`, or is
            not in memory.
        NonFiniteError: With the count, if a token's loss is not finite.
    """
    _check_model(model)
    family_of(model.config.model_type)
    require_head(model)
    require_in_memory(model)
    _check_ids(ids, model, least=2)
    with _as_evaluated(model):
        return score_checked(model, ids, batch_windows=batch_windows, chunk_tokens=chunk_tokens)


@dataclass(frozen=True, repr=False)
class Factorization:
    """A model factored once: allocations at any budget, and the models that they give.

    Attributes:
        layers: The map of the dense model.
        method: How it was factored.
        storage: The form in which layers are stored, and that budgets count.
        factors: By layer name, float32 on the CPU; layers too small for any rank have none.
        weights: Samples of the parameters that were factored, by name.
    """

    layers: ModelMap
    method: FactorizationMethod
    storage: Storage
    factors: Mapping[str, LowRankFactors]
    weights: Mapping[str, Tensor]

    def __repr__(self) -> str:
        """Return what it is, without the numbers."""
        return f"<{len(self.factors)} layers factored by {self.method.name}, {self.storage}>"

    @property
    def cost(self) -> Cost:
        """Return what counts the stored parameters of a layer at a rank."""
        return partial(self.method.parameters, storage=self.storage)

    def uniform(self, keep_ratio: float, *, rank_multiple: int = 1) -> Allocation:
        """Return the allocation that keeps the same share of every layer.

        Args:
            keep_ratio: Of the parameters of the layers in the blocks.
            rank_multiple: Ranks are multiples of this.

        Raises:
            BudgetError: If even the smallest ranks exceed the budget, or it is no share.
        """
        budget = self._budget(keep_ratio, rank_multiple)
        return uniform_ratios(
            self.layers.compressible, budget, cost=self.cost, rank_multiple=rank_multiple
        )

    def least_loss(
        self, keep_ratio: float, *, rank_multiple: int = 1, dense: Sequence[str] = ()
    ) -> Allocation:
        """Return the allocation of least predicted loss, from the loss curves of the layers.

        Args:
            keep_ratio: Of the parameters of the layers in the blocks.
            rank_multiple: Ranks are multiples of this.
            dense: Names of layers that stay dense.

        Raises:
            BudgetError: If even the smallest ranks exceed the budget, or it is no share.
            ModelError: If one of ``dense`` is no layer of the blocks.
            StatisticsError: If calibration gathered nothing to predict losses from.
        """
        budget = self._budget(keep_ratio, rank_multiple)
        known = [spec.name for spec in self.layers.compressible]
        if strange := sorted({dense} if isinstance(dense, str) else set(dense) - set(known)):
            raise ModelError(
                f"dense={strange}: expected a list of names of layers in the blocks, such as "
                f"{known[0]!r}"
            )
        curves = predicted_curves(self.factors)
        if not curves:
            raise StatisticsError(
                "there are no loss curves: the calibration has no output gradients. Gather them "
                "with lrbo.calibrate(model, ids, curves=True), or take uniform(keep_ratio)."
            )
        return least_loss(
            curves,
            self.layers.compressible,
            budget,
            dense=dense,
            cost=self.cost,
            rank_multiple=rank_multiple,
        )

    def account(self, allocation: Allocation, *, bytes_per_parameter: int = 2) -> ModelAccount:
        """Count the whole model under an allocation: parameters, bytes, multiply-adds."""
        return account(
            self.layers,
            allocation.ranks,
            allocation_parameters(self.layers, allocation, self.cost),
            storage=self.storage,
            bytes_per_parameter=bytes_per_parameter,
        )

    def compressed(
        self, model: PreTrainedModel, allocation: Allocation, *, tokens: int = 0
    ) -> AbstractContextManager[nn.Module]:
        """Give the compressed model for the length of a ``with``; the dense one is put back.

        Args:
            model: That was factored.
            allocation: Ranks by layer name.
            tokens: That will be run through it; layers whose two thin products would take more
                operations than a dense one are then multiplied out. 0 multiplies nothing out.

        Raises:
            ModelError: If it is not the dense model that was factored.
        """
        self._check_dense(model, allocation)
        prefixes = compression.running(model, self.factors, allocation.ranks)
        return compression.compressed(model, allocation, prefixes, tokens=tokens)

    def compress_(self, model: PreTrainedModel, allocation: Allocation) -> None:
        """Replace the layers of the model by their low-rank forms, as they are stored, for good.

        Args:
            model: That was factored; changed.
            allocation: Ranks by layer name.

        Raises:
            ModelError: If it is not the dense model that was factored.
        """
        self._check_dense(model, allocation)
        compression.store_(model, allocation, self.factors, self.storage)

    def save(
        self,
        folder: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        allocation: Allocation,
    ) -> int:
        """Write a compressed model as a checkpoint: :func:`lrbo.load` opens it, or transformers.

        Args:
            folder: Must not exist.
            model: After :meth:`compress_`.
            tokenizer: Of the model.
            allocation: That was put in.

        Returns:
            Parameters in the files.

        Raises:
            CheckpointError: If the folder exists, or model and allocation do not agree.
        """
        counted = self.account(allocation, bytes_per_parameter=model.dtype.itemsize)
        about: dict[str, Any] = {
            "method": self.method.name,
            "keep_ratio": counted.keep_ratio,
            "versions": versions(),
        }
        return export.save(
            Path(folder),
            model,
            tokenizer,
            allocation,
            about,
            storage=self.storage,
            parameters=counted.model,
        )

    def _budget(self, keep_ratio: float, rank_multiple: int) -> Budget:
        """Return the budget that keeps a share of the parameters.

        Raises:
            BudgetError: If it is no share, or ranks cannot be such multiples.
        """
        if not 0 < keep_ratio <= 1:
            raise BudgetError(
                f"keep_ratio={keep_ratio!r}: expected a number above 0 and up to 1; 0.8 keeps 80%"
            )
        if rank_multiple < 1:
            raise BudgetError(f"rank_multiple={rank_multiple!r}: expected at least 1")
        return Budget.from_keep_ratio(self.layers.compressible, keep_ratio)

    def _check_dense(self, model: PreTrainedModel, allocation: Allocation) -> None:
        """Refuse a model whose layers are not those that were factored.

        Raises:
            ModelError: Naming the first of them.
        """
        modules = dict(model.named_modules())
        for name in allocation.ranks:
            module, spec = modules.get(name), self.layers.by_name.get(name)
            shape = None if spec is None else (spec.out_features, spec.in_features)
            if module is None or not is_linear(module) or linear_weight(module).shape != shape:
                raise ModelError(
                    f"{name} is no dense layer of shape {shape} in this {type(model).__name__}; "
                    "give the dense model that was factored, and an allocation of the same"
                )
            if allocation.ranks[name] is not None and (
                module._forward_hooks or module._forward_pre_hooks
            ):
                raise ModelError(
                    f"{name} of this {type(model).__name__} has forward hooks, which the low-rank "
                    "layer in its place would not run; remove them, and put them on again after"
                )
        if other := first_other(self.weights, model):
            raise ModelError(
                f"{other} of this {type(model).__name__} is not that of the model that was "
                "factored, expected the same weights; give the dense model that was factored, or "
                "factor this one with lrbo.factorize"
            )


def _method(method: Method) -> FactorizationMethod:
    """Return a method by its name, or as it is."""
    return method_named(method) if isinstance(method, str) else method


def _check_statistics(
    spec: LayerSpec, gathered: Mapping[Statistic, Tensor], method: FactorizationMethod, mend: str
) -> None:
    """Refuse statistics that a method cannot factor a layer with.

    Args:
        spec: The layer.
        gathered: What the calibration has of it.
        method: What is to read them.
        mend: The call that gathers them.

    Raises:
        StatisticsError: If some are missing, or are of a layer of another shape.
    """
    missing = sorted(need.value for need in method.needs - set(gathered))
    if missing:
        raise StatisticsError(
            f"{spec.name}: method {method.name!r} needs the statistics {', '.join(missing)}, and "
            f"the calibration has {', '.join(sorted(gathered)) or 'none'}; gather them with {mend}"
        )
    for statistic, tensor in gathered.items():
        size = spec.out_features if statistic is Statistic.OUTPUT_GRADIENT else spec.in_features
        expected = (size, size) if statistic in MATRICES else (size,)
        if tensor.shape != expected:
            raise StatisticsError(
                f"{spec.name}: the calibration has {statistic.value} of shape "
                f"{tuple(tensor.shape)}, expected {expected}: it is of another model. Gather "
                f"that of this one with {mend}"
            )


@contextmanager
def _as_evaluated(model: PreTrainedModel) -> Iterator[None]:
    """Run a model as evaluation does, without dropout and in its own precision, for a ``with``.

    Afterwards every module is in the mode in which it was.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _reporter(progress: bool) -> Reporter:
    """Return what shows progress, or nothing."""
    return Reporter() if progress else Reporter(PlainConsole(quiet=True))


def _mapped(model: PreTrainedModel) -> ModelMap:
    """Return the map of a model that can be compressed.

    Raises:
        ModelError: If the family is unknown, the model is compressed, or its parameters are not
            finite, or not those of its configuration.
    """
    _check_model(model)
    if any(isinstance(module, LowRankLinear | PivotedLinear) for module in model.modules()):
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


def _check_model(model: object) -> None:
    """Refuse what is no model in memory.

    Raises:
        ModelError: Saying what came, and what is expected.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"model of type {type(model).__name__}: expected a model of transformers in memory, "
            "as AutoModelForCausalLM.from_pretrained and lrbo.load give"
            + ("; merge its adapter with merge_and_unload()" if _is_adapted(model) else "")
        )


def _is_adapted(model: object) -> bool:
    """Tell an adapted model of PEFT, which wraps one of transformers."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


def _check_ids(ids: Any, model: PreTrainedModel, least: int = 1) -> None:
    """Refuse what are no windows of tokens of a model.

    Args:
        ids: Whatever came.
        model: Of which they are to be.
        least: Tokens per window.

    Raises:
        DataError: Saying what came, and what is expected.
    """
    came, good = f"ids of type {type(ids).__name__}", False
    if isinstance(ids, Tensor):
        came = f"ids of shape {tuple(ids.shape)} and {ids.dtype}"
        good = ids.dim() == 2 and len(ids) > 0 and ids.shape[1] >= least
        good = good and not ids.is_floating_point() and ids.dtype != torch.bool
    if not good:
        raise DataError(
            f"{came}: expected whole numbers (windows, tokens), as "
            'tokenizer(text, return_tensors="pt").input_ids has; cut a long text into windows '
            "with ids[:, : count * 512].view(-1, 512)"
        )
    problems = Limits.of(model.config, "the model").of_windows(
        {"ids": ids}, "give what the tokenizer of this model gives for a text, without padding"
    )
    if problems:
        raise DataError(*problems)
