"""A small compressed model, the dense one that it was made of, and text that the latter wrote."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.config.recovery import BlocksConfig
from lrbo.factorization.options import BaseOptions
from lrbo.layers.options import Option
from lrbo.models.model_map import map_model
from lrbo.pipeline.in_memory import calibrate, factorize
from lrbo.progress import PlainConsole, Reporter
from lrbo.recovery.stage import Recovery
from lrbo.recovery.trainable import make_trainable
from lrbo.tasks.causal_lm import CausalLM
from tests.support.allocations import decided
from tests.support.tiny import build

TOKENS, TRAINING, HELD_BACK = 24, 24, 8
FORMS = {  # of the layers of two blocks
    "self_attn.q_proj": ("factored 3", "shared_factored 3"),
    "self_attn.k_proj": ("pivoted 3", "shared_factored 3"),
    "self_attn.v_proj": ("lut4 1", "shared_factored 3"),
    "self_attn.o_proj": ("lut3 2", "factored_int8 5"),
    "mlp.gate_proj": ("sparse_2_4 1", "neurons 12"),
    "mlp.up_proj": ("kronecker 12 16 1", "neurons 12"),
    "mlp.down_proj": ("sparse_rows 20 2", "neurons 12"),
}


def written_by(model: PreTrainedModel, windows: int, tokens: int = TOKENS) -> Tensor:
    """Sample text from a model, whose perplexity on it no other model beats on average."""
    torch.manual_seed(0)
    start = torch.randint(3, model.config.vocab_size, (windows, 1))
    return model.generate(
        start, do_sample=True, max_new_tokens=tokens - 1, min_new_tokens=tokens - 1, top_k=0
    )


@dataclass
class Pair:
    """A dense model and a compressed one, with text."""

    dense: PreTrainedModel
    model: PreTrainedModel
    text: Tensor
    logged: list[tuple[str, float, int]] = field(default_factory=list)

    def recovery(self, folder: Path, settings: Any, **changes: Any) -> Recovery:
        """Prepare a stage on a copy of the compressed model."""
        folder.mkdir(parents=True, exist_ok=True)
        model = copy.deepcopy(self.model)
        deadline: Callable[[], float] = lambda: 1e6  # noqa: E731
        values: dict[str, Any] = {
            "model": model,
            "trainables": make_trainable(model),
            "dense": self.dense,
            "task": CausalLM(),
            "training": self.text[:TRAINING],
            "held_back": self.text[TRAINING:],
            "settings": settings,
            "deadline": deadline,
            "folder": folder,
            "reporter": Reporter(PlainConsole(quiet=True)),
            "log": lambda *row: self.logged.append(row),
            "seed": 0,
        }
        return Recovery(**values | changes)


def compressed_pair(
    keep: float = 0.5,
    case: str = "llama_tied",
    options: Mapping[str, Sequence[str]] | None = None,
) -> Pair:
    """Compress a tiny model whose predictions are sharp enough to be worth something.

    All layers alike, or each as ``options`` say, by its path in a block, for every block.
    """
    dense = build(case)
    with torch.no_grad():  # so that text of it is far from uniform
        dense.model.norm.weight.mul_(8.0)
    text = written_by(dense, TRAINING + HELD_BACK)
    model = copy.deepcopy(dense)
    calibration = calibrate(model, text[:TRAINING], progress=False)
    if options is None:
        factors = factorize(model, calibration, progress=False)
        allocation = factors.uniform(keep)
    else:
        units = {unit.name: unit for unit in map_model(model).compressible}
        taken = {
            name: Option.parse(each[unit.block])
            for path, each in options.items()
            for name, unit in units.items()
            if name.endswith(path)
        }
        names = [*dict.fromkeys(option.form for option in taken.values())]
        bases = BaseOptions(group_sizes=(16,), row_percentages=(20,))
        factors = factorize(model, calibration, forms=names, bases=bases, progress=False)
        allocation = decided(units.values(), taken)
    factors.compress_(model, allocation)
    return Pair(dense, model, text)


def divergence(dense: PreTrainedModel, model: PreTrainedModel, text: Tensor) -> float:
    """Mean KL of next-token distributions from the dense model, in nats."""
    with torch.no_grad():
        p, q = (each(text).logits.log_softmax(-1) for each in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def settings(**changes: Any) -> BlocksConfig:
    """Return settings of the stage blocks that a tiny model wants."""
    values = {"lr": 0.01, "epochs": 12, "batch_windows": 4, "weighting": "gradient"}
    return BlocksConfig(**values | changes)
