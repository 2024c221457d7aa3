"""The steps from a dense model in memory to a compressed one: calibrate, factorize, allocate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrbo.allocation import apply
from lrbo.allocation.allocate import Allocation, dense_cost
from lrbo.calibration.collect import Calibration, CalibrationSettings
from lrbo.calibration.statistics import GRADIENT_STATISTICS, Statistic
from lrbo.checkpoints import export
from lrbo.config.choices import BLOCKS
from lrbo.config.rules import INCLUDE
from lrbo.errors import BudgetError, ConfigError, ModelError, StatisticsError
from lrbo.factorization.base import FactorizationMethod
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prepared import Prepared
from lrbo.factorization.registry import method_named
from lrbo.layers.forms import is_joint
from lrbo.layers.options import MEASURES, Budget, Measure, ModelAccount, account, as_stored
from lrbo.models.families import family_of
from lrbo.models.model_map import require_head
from lrbo.models.parameters import first_other, require_in_memory, weight_samples
from lrbo.models.specs import ModelMap
from lrbo.optimization.space import Problem
from lrbo.pipeline import memory_checks
from lrbo.pipeline.checks import of_tables_alone
from lrbo.pipeline.delta import Difference
from lrbo.pipeline.prepare import (
    curve_needs,
    factors_by_block,
    needs_of_tables,
    on_base,
    statistics_by_block,
    without_effect,
)
from lrbo.pipeline.search_space import menus_of, without_bases, without_parts
from lrbo.progress import PlainConsole, Reporter
from lrbo.study.versions import versions
from lrbo.tasks.causal_lm import CausalLM
from lrbo.tasks.perplexity import Perplexity
from lrbo.tasks.perplexity import score as score_checked

Method = str | FactorizationMethod


class NoEffectWarning(UserWarning):
    """Layers that calibration saw do nothing: they cost nothing at any rank."""


def calibrate(
    model: PreTrainedModel,
    ids: Tensor,
    method: Method | Sequence[Method] = "loss_aware",
    *,
    curves: bool = True,
    include: Sequence[str] = (BLOCKS,),
    settings: CalibrationSettings | None = None,
    progress: bool = True,
) -> Calibration:
    """Gather what a method must know of the inputs and output gradients of a model's layers.

    Args:
        model: A causal language model of a family in :mod:`lrbo.models.families`; left unchanged.
        ids: ``(windows, tokens)`` token ids; every position enters.
        method: Name or object, or several, which then share the statistics.
        curves: Gather also what :meth:`Factorization.least_loss` needs, in a backward pass.
        include: Parts of the model, ``"blocks"`` and beside it ``"embedding"`` or ``"head"``, which
            are calibrated in a backward pass.
        settings: By default those of ``lrbo search``.
        progress: Show progress on stderr.

    Raises:
        ConfigError: If there is no method of that name.
        DataError: If the ids are no windows of tokens of this model.
        ModelError: If the family is unknown, or the model is compressed or lets no gradients pass.
        StatisticsError: If a layer saw a value that is not finite.
    """
    layers = _covered(model, include)
    memory_checks.check_ids(ids, model)
    methods = [method] if isinstance(method, str | FactorizationMethod) else method
    needs = frozenset[Statistic]().union(
        needs_of_tables(layers),
        *(curve_needs(one) if curves else one.needs for one in map(_method, methods)),
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
    with memory_checks.as_evaluated(model), torch.inference_mode(False):
        windows, settings = ids.cpu().long().clone(), settings or CalibrationSettings()
        parts = statistics_by_block(
            model, layers, windows, needs, settings, _reporter(progress), CausalLM()
        )
        gathered = Calibration.gather(parts)
    gathered.weights.update(weight_samples(model))
    return gathered


def factorize(
    model: PreTrainedModel,
    calibration: Calibration | None = None,
    method: Method = "loss_aware",
    *,
    forms: str | Sequence[str] = "pivoted",
    bases: BaseOptions | None = None,
    include: Sequence[str] = (BLOCKS,),
    base: PreTrainedModel | None = None,
    progress: bool = True,
) -> Factorization:
    """Factor every layer of a model's blocks once, so that each rank is a prefix of the factors.

    Args:
        model: The dense model, which is not changed.
        calibration: Of this model; ``None`` for a method that needs none.
        method: Name or object.
        forms: What a layer may become, beside dense: one name or several. The first is that of
            uniform allocations.
        bases: How the bases of forms that have one are made; by default by GPTQ, integers in
            groups of 64.
        include: Parts of the model, as they were calibrated; the embedding and the head are
            factored in the metric of the loss, whatever the method.
        base: The model that this one was fine-tuned from, dense and unchanged: for the forms
            ``delta``, ``delta_int8`` and ``delta_bands``, of what was added to it.
        progress: Show progress on stderr.

    Raises:
        ConfigError: If there is no method or form of that name, or a layer cannot
            have one.
        ModelError: If the family is unknown, or the model is compressed or was not calibrated.
        StatisticsError: If the calibration lacks what the method needs, or does not suit a layer.
    """
    layers, how = _covered(model, include), _method(method)
    names = (forms,) if isinstance(forms, str) else tuple(forms)
    memory_checks.check_forms(forms, names, has_base=base is not None)
    if problems := [*of_tables_alone("forms", names, "include", include)]:
        raise ConfigError(problems)
    difference = None if base is None else Difference.in_memory(model, base, layers)
    if calibration is not None and not isinstance(calibration, Calibration):
        raise StatisticsError(
            f"calibration of type {type(calibration).__name__}: expected what lrbo.calibrate "
            "gives, or None; a method is given as method=NAME"
        )
    statistics = calibration or Calibration()
    name = repr(method) if isinstance(method, str) else type(method).__name__ + "()"
    call = f"lrbo.calibrate(model, ids, {name})"
    for spec in layers.compressible:
        memory_checks.check_statistics(spec, statistics.of(spec), how, call)
    if other := first_other(statistics.weights, model):
        raise ModelError(
            f"{other} of this {type(model).__name__} is not that of the model that was calibrated, "
            "expected the same weights: statistics of one model say nothing of another. Gather "
            f"those of this one with {call}"
        )
    options = bases or BaseOptions()
    problems = without_bases(layers.compressible, names, options)
    problems += without_parts(layers.compressible, names)
    if problems:
        raise ConfigError(problems)
    factors: dict[str, Prepared] = {}
    plan, reporter = BasePlan.of(names, options), _reporter(progress)
    joint = [each for each in names if is_joint(each)]
    parts = factors_by_block(
        model, layers, how, statistics, reporter, bases=plan, joint=joint, base=base
    )
    for part in parts:
        factors |= part if base is None else on_base(part, base)
    if idle := without_effect(layers, factors):
        warnings.warn(idle, NoEffectWarning, stacklevel=2)
    inside = {spec.name for spec in layers.compressible}
    own = {n: v for n, v in weight_samples(model).items() if n.rpartition(".")[0] in inside}
    layers = layers if difference is None else difference.layers
    return Factorization(layers, how, names, factors, model.dtype, own, options, difference)


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
        ``value``, the perplexity; ``mean``, nats per token; ``nll``, their sum; and ``tokens``.

    Raises:
        DataError: If the ids are no windows of tokens of this model.
        ModelError: If the family is unknown, or the model is not in memory.
        NonFiniteError: With the count, if a token's loss is not finite.
    """
    memory_checks.check_model(model)
    family_of(model.config.model_type)
    require_head(model)
    require_in_memory(model)
    memory_checks.check_ids(ids, model, least=2)
    with memory_checks.as_evaluated(model):
        return score_checked(model, ids, batch_windows=batch_windows, chunk_tokens=chunk_tokens)


@dataclass(frozen=True, repr=False)
class Factorization:
    """A model factored once: allocations at any budget, and the models that they give.

    ``factors``, by layer name, are float32 on the CPU; layers too small for any rank have none.
    ``weights`` are samples of the parameters that were factored. With a base, ``layers`` count what
    was added to it alone.
    """

    layers: ModelMap
    method: FactorizationMethod
    forms: tuple[str, ...]
    factors: Mapping[str, Prepared]
    dtype: torch.dtype
    weights: Mapping[str, Tensor]
    bases: BaseOptions = field(default_factory=BaseOptions)
    difference: Difference | None = None

    def __repr__(self) -> str:
        """Layers, method and forms, without the elements."""
        forms = ", ".join(self.forms)
        return f"<{len(self.factors)} layers factored by {self.method.name}, {forms}>"

    def uniform(
        self, keep_ratio: float, *, measure: Measure = "parameters", rank_multiple: int = 1
    ) -> Allocation:
        """Return the allocation that keeps the same share of every layer.

        Args:
            keep_ratio: Of what the layers that are covered cost dense.
            measure: What is counted: ``"parameters"``, ``"bytes"`` or ``"macs"``.
            rank_multiple: Ranks are multiples of this.

        Raises:
            BudgetError: If even the cheapest options exceed the budget, or it is no share.
            ConfigError: If there is no such measure.
        """
        return self._problem(keep_ratio, measure, rank_multiple).uniform()

    def least_loss(
        self,
        keep_ratio: float,
        *,
        measure: Measure = "parameters",
        rank_multiple: int = 1,
        dense: Sequence[str] = (),
    ) -> Allocation:
        """Allocate so that the predicted loss is least.

        Args:
            keep_ratio: Of what the layers that are covered cost dense.
            measure: What is counted: ``"parameters"``, ``"bytes"`` or ``"macs"``.
            rank_multiple: Ranks are multiples of this.
            dense: Names of layers that stay dense.

        Raises:
            BudgetError: If even the cheapest options exceed the budget, or it is no share.
            ConfigError: If there is no such measure.
            ModelError: If one of ``dense`` is no layer that is covered.
            StatisticsError: If calibration gathered nothing to predict losses from.
        """
        problem = self._problem(keep_ratio, measure, rank_multiple)
        unknown = sorted({dense} if isinstance(dense, str) else set(dense) - set(problem.menus))
        if unknown:
            raise ModelError(
                f"dense={unknown}: expected a list of names of layers that are covered, such as "
                f"{next(iter(problem.menus))!r}"
            )
        problem = replace(problem, dense=tuple(dense)).with_losses(self.factors)
        if not problem.is_predicted:
            raise StatisticsError(
                "no losses are predicted: the calibration has no output gradients. Gather them "
                "with lrbo.calibrate(model, ids, curves=True), or take uniform(keep_ratio)."
            )
        return problem.by_loss()

    def account(self, allocation: Allocation) -> ModelAccount:
        """Count the whole model under an allocation: parameters, bytes, multiply-adds."""
        return account(self.layers, allocation.cost, itemsize=self.dtype.itemsize)

    def compressed(
        self, model: PreTrainedModel, allocation: Allocation, *, tokens: int = 0
    ) -> AbstractContextManager[nn.Module]:
        """Compress the model for the length of a ``with``, and put the dense layers back.

        Args:
            model: That was factored.
            allocation: An option per layer.
            tokens: That will be run through it; layers whose two thin products would take more
                operations than a dense one are then multiplied out. 0 multiplies nothing out.

        Raises:
            ModelError: If it is not the dense model that was factored.
        """
        memory_checks.require_dense(model, allocation, self.layers, self.weights)
        factors = apply.on_device(model, self.factors, allocation.ranks)
        return apply.compressed(model, allocation, factors, tokens=tokens)

    def compress_(self, model: PreTrainedModel, allocation: Allocation) -> None:
        """Replace the layers of the model by their options, as they are stored, for good.

        Args:
            model: That was factored; changed.
            allocation: An option per layer.

        Raises:
            ModelError: If it is not the dense model that was factored.
        """
        memory_checks.require_dense(model, allocation, self.layers, self.weights)
        apply.store_(model, allocation, self.factors)

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
        costs, counted = as_stored(
            self.layers, allocation.options, self.method.adds_bias, model.dtype.itemsize
        )
        keep_ratio = counted.keep_ratio(allocation.budget.measure)
        return export.save(
            Path(folder),
            model,
            tokenizer,
            allocation,
            {"method": self.method.name, "keep_ratio": keep_ratio, "versions": versions()},
            costs={name: costs[name] for name in allocation.compressed},
            parameters=counted.model.parameters,
            base=None if self.difference is None else self.difference.base,
            shared=() if self.difference is None else self.difference.shared,
        )

    def _problem(self, keep_ratio: float, measure: Measure, rank_multiple: int) -> Problem:
        if not 0 < keep_ratio <= 1:
            raise BudgetError(
                f"keep_ratio={keep_ratio!r}: expected a number above 0 and up to 1; 0.8 keeps 80%"
            )
        if rank_multiple < 1:
            raise BudgetError(f"rank_multiple={rank_multiple!r}: expected at least 1")
        if measure not in MEASURES:
            raise ConfigError([f"measure={measure!r}: expected {' or '.join(MEASURES)}"])
        menus = menus_of(
            self.layers.compressible,
            self.forms,
            self.method,
            self.dtype,
            multiple=rank_multiple,
            options=self.bases,
            measure=measure,
        )
        return Problem(menus, Budget.keeping(keep_ratio, dense_cost(menus), measure))


def _method(method: Method) -> FactorizationMethod:
    return method_named(method) if isinstance(method, str) else method


def _covered(model: PreTrainedModel, include: Sequence[str]) -> ModelMap:
    """Map a dense model, of which some parts are meant."""
    layers = memory_checks.mapped(model)
    if problems := INCLUDE.problems("include", list(include)):
        raise ConfigError(problems)
    return layers.covering(include)


def _reporter(progress: bool) -> Reporter:
    return Reporter() if progress else Reporter(PlainConsole(quiet=True))
