"""The token ids that a model has and the tokens that it reads at once, compared with texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """Sizes in a model's configuration, ``None`` where it does not state them."""

    name: str  # of the model, for messages
    vocabulary: int | None
    positions: int | None  # beyond which learned ones do not exist, and rotary ones are untrained

    @classmethod
    def of(cls, config: Any, name: str) -> Limits:
        """Read the limits out of a model's configuration."""
        sizes = (getattr(config, key, None) for key in ("vocab_size", "max_position_embeddings"))
        return cls(name, *(size if isinstance(size, int) and size > 0 else None for size in sizes))

    def of_windows(
        self,
        windows: Mapping[str, Int[Tensor, "windows tokens"]],
        advice: str = "restore tokenizer and config.json",
    ) -> list[str]:
        """Return the problems of token windows, none of them empty, by their names in messages."""
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
        for length in dict.fromkeys(ids.shape[1] for ids in windows.values()):
            names = [name for name, ids in windows.items() if ids.shape[1] == length]
            if self.positions is not None and length > self.positions:
                problems.append(
                    f"{', '.join(names)}: windows of {length:,} tokens, but {self.name} has "
                    f"{self.positions:,} positions; choose shorter windows"
                )
        return problems

    def of_prompt(self, key: str, prompt: int, more: int) -> list[str]:
        """Return the problem of a prompt that is too long with ``more`` tokens after it."""
        if self.positions is None or prompt + more <= self.positions:
            return []
        return [
            f"{key}: {prompt:,} tokens and {more:,} more, but {self.name} has {self.positions:,} "
            "positions; choose fewer"
        ]

    def of_tokenizer(self, size: int) -> list[str]:
        """Return the problem of a tokenizer of that size, added tokens not counted."""
        if self.vocabulary is None or size <= self.vocabulary:
            return []
        return [
            f"the tokenizer has {size:,} tokens, but {self.name} has a vocabulary of "
            f"{self.vocabulary:,}; restore tokenizer and config.json"
        ]
