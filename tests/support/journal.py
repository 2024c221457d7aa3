"""A study whose trials are made by hand, of a model that has shapes only."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lrbo.allocation.allocate import Allocation
from lrbo.allocation.loss_calibration import LossCalibration, Measurement, sensitivity_file
from lrbo.config.choices import KEEP_RATIO, LATENCIES
from lrbo.config.compose import composed
from lrbo.config.saved import to_yaml
from lrbo.config.schema import SearchConfig
from lrbo.factorization.registry import method_named
from lrbo.layers.options import ModelAccount, account
from lrbo.models.model_map import map_model
from lrbo.models.specs import ModelMap
from lrbo.optimization.budgets import FrontSpace
from lrbo.optimization.space import Space, sobol_point
from lrbo.pipeline.search_space import build_search_space
from lrbo.study.journal import Study
from lrbo.trials.records import TrialRecord, TrialRequest
from tests.support.fakes import make_about, make_curves, predicted
from tests.support.tiny import build_on_meta

# Exact in binary, so that their sums are exact too.
SECONDS = {"suggestion": 0.5, "allocation": 0.25, "scoring": 2.0, "logging": 0.125}
TOKENS = 960
BYTES = 4
WINDOWS = 4  # of each text


class Journal:
    """A study of a tiny model that exists on the meta device only; its trials are made by hand."""

    def __init__(
        self, folder: Path, *overrides: str, case: str = "llama_untied", windows: int = WINDOWS
    ) -> None:
        config = composed("search", ["experiment=tiny", *overrides])
        assert isinstance(config, SearchConfig)
        self.layers: ModelMap = map_model(build_on_meta(case))
        self.method = method_named(config.method["name"])
        units = self.layers.compressible
        space = build_search_space(config, units, self.method, torch.float32)
        whole = space.inside if isinstance(space, FrontSpace) else space
        self.is_front = isinstance(space, FrontSpace)
        self.space: Space = whole.of(whole.problem.keeping(config.budget.keep_ratio))
        if config.space.type == "weights":
            self.space = self.space.of(predicted(self.space.problem, make_curves(units)))
        about = make_about(
            self.layers.layers,
            self.space,
            seed=config.seed,
            model_parameters=self.layers.parameters,
            data={
                role: {"text": f"words[{role}]", "windows": windows, "digest": "a digest"}
                for role in ("calibration", "validation", "test")
            },
            timed=config.latency.enabled,
            forms=list(config.space.forms),
            added_biases=[u.name for u in units if self.method.adds_bias and not u.has_bias],
        )
        if self.is_front:
            about["variables"] |= {KEEP_RATIO: [config.budget.lowest, config.budget.keep_ratio]}
        self.study = Study(folder)
        self.study.begin(about, to_yaml(config))

    def counted(self, allocation: Allocation) -> ModelAccount:
        """Count an allocation as a worker does."""
        return account(self.layers, allocation.cost, itemsize=BYTES)

    def keep_ratio(self, allocation: Allocation) -> float:
        """Return the keep ratio of an allocation."""
        return self.space.problem.share(allocation)

    def suggest(self, index: int, origin: str, allocation: Allocation | None = None) -> None:
        """Write that a trial was suggested: the baseline or a point of the space."""
        point: Mapping[str, float] = {}
        if allocation is None and origin == "uniform":
            allocation = self.space.problem.uniform()
        elif allocation is None:
            point = sobol_point(self.space, index, 0)
            allocation = self.space.allocate(point)
        variables = dict(self.space.realised(allocation, point))
        if self.is_front and variables:
            variables[KEEP_RATIO] = self.keep_ratio(allocation)
        request = TrialRequest(index, origin, variables, allocation, index)  # type: ignore[arg-type]
        self.study.record_suggestion(
            request, {name: SECONDS[name] for name in ("suggestion", "allocation")}
        )

    def complete(
        self,
        index: int,
        nll: float = 5.0,
        origin: str = "sobol",
        allocation: Allocation | None = None,
        windows: Sequence[float] = (),
        **metrics: float,
    ) -> TrialRecord:
        """Write all of a trial with a value."""
        self.suggest(index, origin, allocation)
        decided = self.study.state.trials[index].request.allocation
        counted = self.counted(decided)
        whole = {
            "nll": nll,
            "perplexity": math.exp(nll),
            "kl_dense_to_compressed": nll / 8,
            "tokens": TOKENS,
            "peak_memory_gib": 0.5,
            "keep_ratio": self.keep_ratio(decided),
            "parameters": counted.units.parameters,
            "model_parameters": counted.model.parameters,
            "model_bytes": counted.model.bytes,
            "macs_per_token": counted.model.macs,
            "objective": nll,
        }
        if self.study.about.timed:
            whole |= {f"{name}{end}": 1.0 for name in LATENCIES for end in ("", "_sem")}
        return self._end(index, "completed", None, whole | metrics, windows)

    def fail(self, index: int, error: str | None, outcome: str = "abandoned") -> TrialRecord:
        """Write all of a trial without a value."""
        self.suggest(index, "sobol")
        return self._end(index, outcome, error, {})

    def _end(
        self,
        index: int,
        outcome: str,
        error: str | None,
        metrics: Mapping[str, float],
        windows: Sequence[float] = (),
    ) -> TrialRecord:
        self.study.record("started", trial=index)
        self.study.record(
            "ended",
            trial=index,
            outcome=outcome,
            metrics=metrics,
            error=error,
            seconds={"scoring": SECONDS["scoring"]},
            example_losses=windows,
            example_divergences=[nll / 8 for nll in windows],
        )
        self.study.record("logged", trial=index, seconds=SECONDS["logging"])
        return self.study.state.trials[index]

    def score_dense(self, nll: float) -> None:
        """Write what the dense model scored."""
        metrics = {"nll": nll, "perplexity": math.exp(nll), "tokens": TOKENS}
        self.study.record("dense", metrics=metrics)

    def measured(self, pairs: Sequence[tuple[float, float]]) -> LossCalibration:
        """Keep measurements of single layers: pairs of predicted and measured loss."""
        spec = self.layers.compressible[0]
        calibration = LossCalibration(
            tuple(Measurement(spec.name, spec.kind, "factored 1", p, m) for p, m in pairs)
        )
        calibration.save(sensitivity_file(self.study.folder))
        return calibration

    def compressed(self, trial: int, folder: Path | str, **tags: str) -> None:
        """Write that a checkpoint was written."""
        known = {"keep_ratio": "0.7990", "validation": "7.3891", "format": "lrbo"}
        self.study.record(
            "compressed", id=str(folder), trial=trial, folder=str(folder), register="none",
            tags=known | {"dtype": "float32"} | tags,
        )  # fmt: skip

    def tested(
        self, label: str, trial: int | None, nll: float, windows: Sequence[float] = ()
    ) -> None:
        """Write a score on the test text."""
        metrics = {"nll": nll, "perplexity": math.exp(nll), "tokens": TOKENS}
        self.study.record(
            "tested", label=label, trial=trial, text="words[test]", metrics=metrics,
            example_losses=windows or [nll] * WINDOWS,
        )  # fmt: skip
