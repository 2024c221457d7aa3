"""A study whose trials are made by hand, of a model that has shapes only."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from lrbo.accounting import ModelAccount, account
from lrbo.allocation import Allocation, Budget, Cost
from lrbo.config import composed, to_yaml
from lrbo.factorization.registry import method_named
from lrbo.loss_calibration import LossCalibration, Measurement, sensitivity_file
from lrbo.model import map_model
from lrbo.optimization.front import KEEP_RATIO, LATENCIES
from lrbo.optimization.space import SearchSpace, build_space
from lrbo.optimization.study import Study
from lrbo.optimization.weights import WeightSpace, build_weight_space
from lrbo.schema import SearchConfig
from lrbo.specs import ModelMap
from lrbo.trial import TrialRecord, TrialRequest
from lrbo.worker import allocation_parameters
from tests.fakes import make_about, make_curves
from tests.tiny import build_on_meta

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
        self.method = method_named(config.method.name)
        compressible, space = self.layers.compressible, config.space
        self.budget = Budget.from_keep_ratio(compressible, config.budget.keep_ratio)
        self.storage = config.budget.storage
        self.cost: Cost = partial(self.method.parameters, storage=self.storage)  # type: ignore[arg-type]
        self.space: SearchSpace | WeightSpace
        if space.type == "weights":
            self.space = build_weight_space(
                compressible,
                self.budget,
                groups=space.groups,
                dense=space.dense,
                knots=space.knots,
                exponent=space.exponent,
                width=space.bounds[1],
                cost=self.cost,
                rank_multiple=space.rank_multiple,
            ).with_curves(make_curves(compressible))
        else:
            self.space = build_space(
                compressible,
                self.budget,
                groups=space.groups,
                dense=space.dense,
                granularity=space.granularity,  # type: ignore[arg-type]
                depth_groups=space.depth_groups,
                bounds=(space.bounds[0], space.bounds[1]),
                start=space.start,
                cost=self.cost,
                rank_multiple=space.rank_multiple,
            )
        about = make_about(
            self.layers.layers,
            self.space,
            seed=config.seed,
            data={
                role: {"text": f"words[{role}]", "windows": windows, "digest": "a digest"}
                for role in ("calibration", "validation", "test")
            },
            timed=config.latency.enabled,
            budget_parameters=self.budget.parameters,
            storage=self.storage,
            adds_bias=config.method.name == "bolaco",
        )
        self.is_front = config.budget.lowest is not None
        if self.is_front:
            about["variables"] |= {KEEP_RATIO: [config.budget.lowest, config.budget.keep_ratio]}
        self.study = Study(folder)
        self.study.begin(about, to_yaml(config))

    def counted(self, allocation: Allocation) -> ModelAccount:
        """Count an allocation as a worker does."""
        return account(
            self.layers,
            allocation.ranks,
            allocation_parameters(self.layers, allocation, self.cost),
            storage=self.storage,  # type: ignore[arg-type]
            bytes_per_parameter=BYTES,
        )

    def suggest(self, index: int, origin: str, allocation: Allocation | None = None) -> None:
        """Write that a trial was suggested: the baseline or a point of the space."""
        point: Mapping[str, float] = {}
        if allocation is None and origin == "uniform":
            allocation = self.space.uniform()
        elif allocation is None:
            point = self.space.sobol_point(index, 0)
            allocation = self.space.allocate(point)
        variables = dict(self.space.realised(allocation, point) or {})
        if self.is_front and variables:
            variables[KEEP_RATIO] = self.counted(allocation).keep_ratio
        request = TrialRequest(index, origin, variables, allocation, index)  # type: ignore[arg-type]
        self.study.record_suggestion(
            request, {name: SECONDS[name] for name in ("suggestion", "allocation")}
        )

    def complete(
        self,
        index: int,
        nll: float,
        origin: str = "sobol",
        allocation: Allocation | None = None,
        windows: Sequence[float] = (),
        **metrics: float,
    ) -> TrialRecord:
        """Write all of a trial with a value."""
        self.suggest(index, origin, allocation)
        counted = self.counted(self.study.state.trials[index].request.allocation)
        whole = {
            "nll": nll,
            "perplexity": math.exp(nll),
            "kl_dense_to_compressed": nll / 8,
            "tokens": TOKENS,
            "peak_memory_gib": 0.5,
            "keep_ratio": counted.keep_ratio,
            "parameters": counted.compressible,
            "model_parameters": counted.model,
            "model_bytes": counted.bytes,
            "macs_per_token": counted.macs_per_token,
            "objective": nll,
        }
        if self.study.about()["timed"]:
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
            window_nll=windows,
            window_kl=[nll / 8 for nll in windows],
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
        found = LossCalibration.fit([Measurement(spec.name, spec.kind, 1, p, m) for p, m in pairs])
        found.save(sensitivity_file(self.study.folder))
        return found

    def compressed(self, trial: int, folder: Path | str, **tags: str) -> None:
        """Write that a checkpoint was written."""
        known = {"keep_ratio": "0.7990", "validation_perplexity": "7.3891", "format": "lrbo"}
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
            window_nll=windows or [nll] * WINDOWS,
        )  # fmt: skip
