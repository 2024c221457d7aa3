"""What a model can read: one list of checks of model, tokenizer and text, for every command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """Which tokens a model has, and how many of them it reads at once.

    Attributes:
        name: Of the model, for messages.
        vocabulary: Token ids are below it; ``None`` where the model does not say.
        positions: Of a window, or of a prompt and what follows it. Beyond them learned positions
            do not exist, and rotary ones were not trained; ``None`` where there is no limit.
    """

    name: str
    vocabulary: int | None
    positions: int | None

    @classmethod
    def of(cls, config: Any, name: str) -> Limits:
        """Read the limits out of a model's configuration."""
        whole = {
            key: value
            for key in ("vocab_size", "max_position_embeddings")
            if isinstance(value := getattr(config, key, None), int) and value > 0
        }
        return cls(name, whole.get("vocab_size"), whole.get("max_position_embeddings"))

    def of_windows(
        self,
        windows: Mapping[str, Int[Tensor, "windows tokens"]],
        advice: str = "restore tokenizer and config.json",
    ) -> list[str]:
        """Check token windows.

        Args:
            windows: By what they are called in a message, none of them empty.
            advice: What to do where an id is none of the model's.

        Returns:
            The problems.
        """
        problems = []
        for name, ids in windows.items():
            low, high = int(ids.min()), int(ids.max())
            if low < 0:
                problems.append(f"{name}: the id {low:,} is below 0, expected tokens; {advice}")
            elif self.vocabulary is not None and high >= self.vocabulary:
                problems.append(
                    f"{name}: the id {high:,} is beyond the vocabulary of {self.name}, "
                    f"0..{self.vocabulary - 1:,}; {advice}"
                )
        lengths: dict[int, list[str]] = {}
        for name, ids in windows.items():
            lengths.setdefault(ids.shape[1], []).append(name)
        for length, names in lengths.items():
            if self.positions is not None and length > self.positions:
                problems.append(
                    f"{', '.join(names)}: windows of {length:,} tokens, but {self.name} has "
                    f"{self.positions:,} positions; choose shorter windows"
                )
        return problems

    def of_prompt(self, key: str, prompt: int, more: int) -> list[str]:
        """Check the length of a prompt together with that of what follows it.

        Args:
            key: Of the configuration.
            prompt: Tokens.
            more: Tokens that are added to it.
        """
        if self.positions is None or prompt + more <= self.positions:
            return []
        return [
            f"{key}: {prompt:,} tokens and {more:,} more, but {self.name} has {self.positions:,} "
            "positions; choose fewer"
        ]

    def of_tokenizer(self, size: int) -> list[str]:
        """Check the tokenizer itself, where texts are not known before they are read.

        Args:
            size: Of its vocabulary, without tokens that were added to it.
        """
        if self.vocabulary is None or size <= self.vocabulary:
            return []
        return [
            f"the tokenizer has {size:,} tokens, but {self.name} has a vocabulary of "
            f"{self.vocabulary:,}; restore tokenizer and config.json"
        ]
