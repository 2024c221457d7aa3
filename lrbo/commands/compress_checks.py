"""What a format cannot hold of a trial, said before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from lrbo.checkpoints import nemotron_nas as nas
from lrbo.checkpoints.merged import with_biases
from lrbo.checkpoints.stock import schemes_of, unfit, vllm_problems
from lrbo.config.schema import CompressConfig
from lrbo.errors import ConfigError
from lrbo.layers.joint_form import SharedFactored, Skip
from lrbo.layers.modules import PRODUCTS
from lrbo.models.loading import load_config
from lrbo.pipeline import planning
from lrbo.pipeline.refinements import refinement_problems
from lrbo.trials.records import TrialRecord


def require_room(
    config: CompressConfig, plan: planning.Plan, records: Sequence[TrialRecord]
) -> None:
    """Refuse forms and biases that a format cannot hold, and trials without what is asked for."""
    tried = records if config.refit.enabled else records[:1]
    if problems := refinement_problems(config.bases, plan, tried):
        raise ConfigError(problems)
    if config.format == "remote_code":
        for record in records:
            for name, option in record.request.allocation.compressed.items():
                is_lookup = plan.layers.by_name[name].is_lookup
                if is_lookup or option.form not in (*PRODUCTS, SharedFactored.name):
                    lacks = "embedding that is not dense" if is_lookup else option.form
                    raise ConfigError(
                        [
                            f"format='remote_code': its modelling file has no {lacks}, which "
                            f"{name} is in trial {record.request.trial_index}; expected "
                            "format=lrbo, or format=merged"
                        ]
                    )
    if config.format not in ("merged", "nemotron_nas", "adapter"):
        return
    model_config = load_config(plan.source)
    if config.format == "nemotron_nas" and (reason := nas.unfit(model_config)) is not None:
        raise ConfigError([f"format='nemotron_nas': {reason}; expected format=lrbo or merged"])
    taken = [record.request.allocation.compressed for record in records]
    compressed = {name for options in taken for name in options}
    biased = [name for name in plan.added_biases if name in compressed]
    skipped = {n for options in taken for n, option in options.items() if option.form == Skip.name}
    if config.format == "adapter" and plan.base is not None:
        return  # what it cannot hold, weights decide
    biased += [
        spec.name
        for spec in plan.layers.compressible
        if spec.name in skipped and spec.is_closing and not spec.has_bias
    ]
    dense = with_biases(model_config, biased)
    if config.format == "adapter":
        _require_stock(records, dense, vllm=config.vllm)


def _require_stock(records: Sequence[TrialRecord], dense: PreTrainedModel, *, vllm: bool) -> None:
    """Refuse options of trials that compressed-tensors and PEFT cannot hold, or vLLM not read."""
    problems = []
    for record in records:
        trial = f"trial {record.request.trial_index}"
        options = record.request.allocation.compressed
        if (reason := unfit(options, dense)) is not None:
            problems.append(
                f"format='adapter' cannot hold {trial}: {reason}; expected format=lrbo or merged, "
                "or a search with space.forms=[stock]"
            )
        elif vllm:
            rank = max((option.level[-1] for option in options.values()), default=0)
            schemes = schemes_of(options, dense, vllm=True)
            problems += [
                f"vllm=True: vLLM cannot read {trial}: {clause}; expected vllm=false"
                for clause in vllm_problems(schemes, rank, dense)
            ]
    if problems:
        raise ConfigError(problems)
