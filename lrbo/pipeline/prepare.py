"""What all trials share, made once and cached: statistics, factors, loss curves."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from lrbo.calibration.cache import CalibrationFolder, calibration_fingerprint, save_calibration
from lrbo.calibration.collect import Calibration, CalibrationSettings, StatisticsByOwner, calibrate
from lrbo.calibration.statistics import GRADIENT_STATISTICS, TABLE_STATISTICS, Statistic
from lrbo.factorization.base import FactorizationMethod
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.cache import (
    LayerStatistics,
    factor_model,
    factors_fingerprint,
    load_factors,
    save_factors,
)
from lrbo.factorization.prepared import Prepared, UnitFactors
from lrbo.factorization.tables import table_needs
from lrbo.files.atomic import cache_folder
from lrbo.files.caches import cached
from lrbo.models.model_map import linear_weight
from lrbo.models.pairs import BaseModel
from lrbo.models.sources import ModelSource
from lrbo.models.specs import ModelMap
from lrbo.progress import Reporter
from lrbo.tasks.model_task import ModelTask


@dataclass(frozen=True)
class Preparation:
    """What statistics and factors depend on, beside the model's weights.

    ``needs`` are those of the method, of bases and joint forms, and of curves of loss and error if
    wanted; ``windows`` are calibration examples. In methods, ``digest`` is the model's fingerprint,
    ``dtype`` that of the loaded model.
    """

    source: ModelSource
    layers: ModelMap
    method: FactorizationMethod
    needs: frozenset[Statistic]
    windows: Any
    settings: CalibrationSettings
    task: ModelTask
    bases: BasePlan | None = None
    errors: bool = False  # of outputs, whether they are worked out
    joint: tuple[str, ...] = ()  # forms that several layers take together
    base: BaseModel | None = None  # of whose weights the changes are factored

    def statistics(
        self, digest: str, dtype: torch.dtype, reporter: Reporter, model: PreTrainedModel
    ) -> LayerStatistics:
        """Load the statistics of a model from the cache, or gather them."""
        name = self._calibration(digest, dtype)
        if name is None:
            return Calibration()
        folder = cache_folder() / "calibration" / name

        def make() -> None:
            parts = statistics_by_block(
                model, self.layers, self.windows, self.needs, self.settings, reporter, self.task
            )
            save_calibration(folder, parts, name)

        return cached(folder, make, lambda: CalibrationFolder(folder, name))

    def factors(
        self,
        digest: str,
        dtype: torch.dtype,
        device: torch.device,
        reporter: Reporter,
        model: PreTrainedModel | None = None,
    ) -> dict[str, Prepared]:
        """Load the factors of a model from the cache, or make them; float32 on the CPU.

        Files that are read back stay memory-mapped, so they cost memory only where they are used.
        ``model=None`` loads it on the device only if something is to be made.
        """
        calibration = self._calibration(digest, dtype)
        name = factors_fingerprint(
            digest,
            calibration,
            self.method,
            self.bases,
            self.errors,
            self.joint,
            None if self.base is None else self.base.fingerprint,
        )
        base = None if self.base is None else self.base.load()
        folder = cache_folder() / "factors" / name

        def make() -> None:
            loaded = model or self.task.load(self.source, dtype=dtype, device=device)
            parts = factors_by_block(
                self.source_weights(loaded),
                self.layers,
                self.method,
                self.statistics(digest, dtype, reporter, loaded),
                reporter,
                bases=self.bases,
                errors=self.errors,
                joint=self.joint,
                base=base,
                device=device,
            )
            save_factors(folder, parts, name)

        made = cached(folder, make, lambda: load_factors(folder, name))
        return made if base is None else on_base(made, base)

    def _calibration(self, digest: str, dtype: torch.dtype) -> str | None:
        """Return the cache name of the statistics; ``None`` if none are needed."""
        if not self.needs:
            return None
        return calibration_fingerprint(digest, self.windows, self.needs, self.settings, dtype=dtype)

    def source_weights(self, model: PreTrainedModel) -> PreTrainedModel:
        """Load the model in the dtype of its checkpoint, if that is another one."""
        own = self.task.load(self.source, dtype=None, device=torch.device("cpu"))
        return model if own.dtype == model.dtype else own


def statistics_by_block(
    model: PreTrainedModel,
    layers: ModelMap,
    windows: Any,
    needs: Collection[Statistic],
    settings: CalibrationSettings,
    reporter: Reporter,
    task: ModelTask,
) -> Iterator[StatisticsByOwner]:
    """Yield the statistics of a model as :func:`calibrate` gathers them, and show progress."""
    body = task.segments(model)
    passes = 2 if GRADIENT_STATISTICS & set(needs) else 1
    with reporter.step("Calibration", passes * len(body), "blocks") as advance:
        yield from calibrate(body, layers, windows, needs, settings, task=task, on_block=advance)


def factors_by_block(
    model: PreTrainedModel,
    layers: ModelMap,
    method: FactorizationMethod,
    statistics: LayerStatistics,
    reporter: Reporter,
    *,
    bases: BasePlan | None = None,
    errors: bool = False,
    joint: Collection[str] = (),
    base: PreTrainedModel | None = None,
    device: torch.device | None = None,
) -> Iterator[dict[str, Prepared]]:
    """Yield factors as :func:`factor_model` makes them, and show progress."""
    with reporter.step("Factorization", len(layers.compressible), "layers") as advance:
        yield from factor_model(
            model,
            layers,
            method,
            statistics,
            bases=bases,
            errors=errors,
            joint=joint,
            base=base,
            device=device,
            on_layer=lambda _: advance(1),
        )


def on_base(prepared: Mapping[str, Prepared], base: PreTrainedModel) -> dict[str, Prepared]:
    """Put the weights of a base model, which stay shared, under the changes of them."""
    shared: dict[str, Prepared] = {}
    for name, own in prepared.items():
        assert isinstance(own, UnitFactors)
        shared[name] = replace(own, shared=linear_weight(base.get_submodule(name)))
    return shared


def without_effect(layers: ModelMap, factors: Mapping[str, Prepared]) -> str | None:
    """Name the layers that cost nothing at any rank, by kind and block, if there are any."""
    blocks: dict[str, list[str]] = {}
    for spec in layers.compressible:
        if spec.name in factors and not factors[spec.name].has_effect:
            blocks.setdefault(spec.kind, []).append("-" if spec.block is None else str(spec.block))
    if not blocks:
        return None
    count = sum(map(len, blocks.values()))
    names = ", ".join(f"{kind} of {', '.join(depths)}" for kind, depths in blocks.items())
    return (
        f"{count} of {len(factors)} layers cost nothing at any rank on the calibration text "
        "(inputs, weight or its change, or gradients of outputs are zero, or a bias restores what "
        f"they give); by kind and block: {names}"
    )


def needs_of_tables(layers: ModelMap) -> frozenset[Statistic]:
    """Statistics that embedding and head need, if the map covers them."""
    tables = [spec for spec in layers.compressible if spec.block is None]
    needs = frozenset[Statistic]().union(*map(table_needs, tables))
    # Inputs of the head are gathered with its labels, in the backward pass.
    return needs & TABLE_STATISTICS


def curve_needs(method: FactorizationMethod) -> frozenset[Statistic]:
    """Statistics that a method and its loss curves need."""
    needs = method.needs | {Statistic.INPUT_MEAN, Statistic.OUTPUT_GRADIENT}
    if Statistic.POOLED_INPUT_COVARIANCE in needs:
        return needs  # good enough, and half the work of gathering both
    return needs | {Statistic.INPUT_COVARIANCE}
