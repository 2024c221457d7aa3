"""The configuration of a Llama whose blocks differ, for transformers and vLLM; written by lrbo."""

from typing import Any

from transformers import LlamaConfig


class Part(dict[str, Any]):
    """A part of a block, whose values are attributes too."""

    def __getattr__(self, name: str) -> Any:
        """Return a value; AttributeError where there is none."""
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class DeciLMConfig(LlamaConfig):
    """What the blocks are, as Nemotron-NAS states it: ``block_configs[3].ffn.ffn_mult``."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **values: Any) -> None:
        super().__init__(**values)
        self.block_configs = [
            Part({name: Part(part) for name, part in block.items()})
            for block in block_configs or []
        ]
