"""A plan with a base model -> what of the model is written, and what formats cannot hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from lrbo.config.choices import BLOCKS
from lrbo.errors import ConfigError, ModelError, some
from lrbo.layers.options import Option
from lrbo.models.model_map import is_transposed
from lrbo.models.pairs import (
    SAME,
    BaseModel,
    base_source,
    changed_beside,
    changed_biases,
    is_same,
    other_settings,
    unlike,
    with_changes,
)
from lrbo.models.specs import ModelMap
from lrbo.pipeline.memory_checks import mapped
from lrbo.pipeline.planning import Plan

SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Difference:
    """What a model in memory shares with its base, and what it does not.

    Attributes:
        base: As planned.
        layers: The map of the model, whose parameters are those that are not shared.
        changed: Parameters that are of no compressible layer and others than in the base.
        shared: Those that are of none and the same.
        biases: Layers whose bias is another than in the base.
        settings: Of the configuration that outputs depend on and that differ, in words.
        by_columns: Whether layers store their weight as ``(in, out)``.
    """

    base: BaseModel
    layers: ModelMap
    changed: tuple[str, ...]
    shared: frozenset[str]
    biases: tuple[str, ...]
    settings: tuple[str, ...]
    by_columns: bool

    @classmethod
    def of(cls, plan: Plan, model: PreTrainedModel) -> Difference | None:
        """Compare the dense model with the base of a plan, if it has one.

        Raises:
            ModelError: If the base is missing, or another one by now.
        """
        if plan.base is None:
            return None
        return cls.between(model, plan.base.load(), plan.base, plan.layers)

    @classmethod
    def between(
        cls, model: PreTrainedModel, loaded: PreTrainedModel, base: BaseModel, layers: ModelMap
    ) -> Difference:
        """Compare a dense model, of which some layers are covered, with a base in memory."""
        changed = changed_beside(model, loaded, layers)
        inside = tuple(f"{spec.name}." for spec in layers.compressible)
        names = (name for name, _ in model.named_parameters() if not name.startswith(inside))
        return cls(
            base,
            with_changes(layers, changed),
            tuple(changed),
            frozenset(name for name in names if name not in changed),
            tuple(changed_biases(model, loaded, layers)),
            tuple(other_settings(model, loaded)),
            any(is_transposed(module) for module in model.modules()),
        )

    @classmethod
    def in_memory(
        cls, model: PreTrainedModel, base: PreTrainedModel, layers: ModelMap
    ) -> Difference:
        """Compare two models in memory, of which one is the base.

        Raises:
            ModelError: If it is no base of the model, or the same, or embedding or head are
                covered.
        """
        mapped(base)
        problems = unlike(model, base, "base")
        if layers.include != (BLOCKS,):
            problems.append(f"include={list(layers.include)}: expected [{BLOCKS!r}] with a base")
        if not problems and is_same(model, base):
            problems.append(f"base: {SAME}")
        if problems:
            raise ModelError("; ".join(problems))
        return cls.between(model, base, BaseModel.of(base_source(base.name_or_path), base), layers)

    def text(self) -> str:
        """Say what changed beside the layers that are compressed, and is stored as it is."""
        if not self.changed:
            return "nothing else of the model changed"
        count = self.layers.parameters - sum(spec.parameters for spec in self.layers.compressible)
        names = some(self.changed, SHOWN)
        return f"{count:,} more parameters changed and are stored as they are: {names}"

    def require_adapter(self, options: Iterable[Mapping[str, Option]], added: list[str]) -> None:
        """Refuse what an adapter cannot hold: biases of layers with a low rank, and settings.

        ``added`` are layers to which the method adds a bias.

        Raises:
            ConfigError: Naming the layers.
        """
        compressed = {name for each in options for name in each}
        problems = [
            f"an adapter has no room for {what} of {some(names, SHOWN)}; expected format=lrbo or "
            "merged, or another method"
            for what, names in (
                ("a bias that the method adds, as", [n for n in added if n in compressed]),
                ("the changed bias", [n for n in self.biases if n in compressed]),
            )
            if names
        ]
        if self.settings:
            problems.append(
                "an adapter runs with the configuration of the base, and that of the model has "
                f"{some(self.settings, SHOWN)}; expected format=lrbo or merged"
            )
        if problems:
            raise ConfigError([f"format='adapter': {problem}" for problem in problems])
