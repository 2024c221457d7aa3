"""A second task: a tiny regression network of plain linear layers, without blocks or tokens."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from lrbo.data.windows import Role
from lrbo.errors import DataError, NonFiniteError
from lrbo.models.sources import ModelSource
from lrbo.models.specs import LayerSpec, ModelMap
from lrbo.tasks.metrics import Metric, Task

INPUTS, HIDDEN, OUTPUTS = 12, 24, 6
COUNTS: Mapping[Role, int] = {"calibration": 96, "validation": 32, "test": 32}

RECORD = Task(
    "regression",
    (
        Metric("squared_error", "squared error", "error", unit="squared units"),
        Metric("rms_error", "rms error", "rms", of_loss=lambda loss: math.sqrt(2 * loss)),
        Metric("distance", "distance from dense", "distance", unit="squared units", dense=0.0),
    ),
    shown="rms_error",
    divergence="distance",
    hub_tag="tabular-regression",
)


class RegressionConfig(PretrainedConfig):
    model_type = "tiny_regression"


class Regression(PreTrainedModel):
    """Three linear layers with ``tanh`` between them; the last one has no bias."""

    config_class = RegressionConfig

    def __init__(self, config: RegressionConfig) -> None:
        super().__init__(config)
        self.first = nn.Linear(INPUTS, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.third = nn.Linear(HIDDEN, OUTPUTS, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 / math.sqrt(module.in_features))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.third(self.second(self.first(inputs).tanh()).tanh())
        return outputs


def register() -> None:
    AutoConfig.register("tiny_regression", RegressionConfig, exist_ok=True)
    AutoModel.register(RegressionConfig, Regression, exist_ok=True)


class OneSegment:
    """The whole network is one block."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 1

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def open_block(self, index: int) -> AbstractContextManager[nn.Module]:
        assert index == 0
        return nullcontext(self.model)

    def embed(self, examples: Tensor) -> Tensor:
        return examples[:, None, :INPUTS].to(next(self.model.parameters()))

    def run(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        outputs: Tensor = block(hidden)
        return outputs

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden


def half_squares(difference: Tensor) -> Tensor:
    """Return half the squared length of each row: ``(n, d)`` to ``(n, 1)``, float64."""
    return difference.double().square().sum(-1, keepdim=True) / 2


@dataclass(frozen=True)
class Outputs:
    """What the dense network says of examples."""

    outputs: Tensor
    loss: float

    @property
    def scored(self) -> int:
        return len(self.outputs)

    def save(self, path: Path) -> None:
        save_file({"outputs": self.outputs}, path, metadata={"loss": repr(self.loss)})


@dataclass(frozen=True)
class RegressionTask:
    """Half the squared error, which is nats of a Gaussian of unit variance."""

    batch_windows: int = 4
    chunk_tokens: int = 256
    kl_top: int = 128

    record: ClassVar[Task] = RECORD
    auto_class: ClassVar[str] = "AutoModel"

    def skeleton(self, source: ModelSource) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(source.path)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModel.from_config(config)
        return model

    def load(
        self, source: ModelSource, *, dtype: torch.dtype | None, device: torch.device
    ) -> PreTrainedModel:
        model: PreTrainedModel = AutoModel.from_pretrained(source.path, dtype=dtype or "auto")
        return model.to(device).eval().requires_grad_(False)

    def tokenizer(self, source: ModelSource) -> None:
        return None

    def map(self, model: PreTrainedModel) -> ModelMap:
        layers = tuple(
            LayerSpec(
                name, name, 0, module.out_features, module.in_features,
                module.bias is not None, site=name,
            )
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        )  # fmt: skip
        return ModelMap(layers, sum(p.numel() for p in model.parameters()), 1)

    def problems(
        self, skeleton: PreTrainedModel, name: str, examples: Mapping[str, Tensor]
    ) -> list[str]:
        return []

    def segments(self, model: PreTrainedModel) -> OneSegment:
        return OneSegment(model)

    def positions(self, examples: Tensor) -> int:
        return len(examples)

    def output_gradients(
        self, segments: Any, states: Tensor, examples: Tensor, *, labels: str, seed: int,
        batch_windows: int, on_logits: Any = None,
    ) -> int:  # fmt: skip
        if labels == "sampled":
            generator = torch.Generator().manual_seed(seed)
            states.copy_(torch.randn(states.shape, generator=generator))
        else:
            states.sub_(examples[:, None, INPUTS:])
        return len(examples)

    def distance(self, segments: Any, dense: Tensor, other: Tensor) -> float:
        return float(half_squares((dense - other).flatten(0, 1)).mean())

    def losses(self, model: nn.Module, examples: Tensor, *, on_scored: Any = None) -> Tensor:
        return self._scored(model, examples, on_scored)[1][:, 0]

    def compared(
        self, model: nn.Module, examples: Tensor, reference: Outputs, first: int, *,
        on_scored: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        outputs, losses = self._scored(model, examples, on_scored)
        dense = reference.outputs[first : first + len(examples)]
        return losses, half_squares(outputs - dense)

    def measure_dense(
        self, model: nn.Module, examples: Tensor, *, on_scored: Any = None
    ) -> Outputs:
        outputs, losses = self._scored(model, examples, on_scored)
        return Outputs(outputs, float(losses.mean()))

    def load_reference(self, path: Path) -> Outputs:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return Outputs(file.get_tensor("outputs"), float(file.metadata()["loss"]))

    def _scored(self, model: nn.Module, examples: Tensor, on_scored: Any) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            outputs = model(examples[:, :INPUTS].to(next(model.parameters()))).float()
        losses = half_squares(outputs - examples[:, INPUTS:])
        if bad := int((~torch.isfinite(losses)).sum()):
            raise NonFiniteError(f"{bad} losses are not finite")
        if on_scored is not None:
            on_scored(len(losses))
        return outputs, losses


@dataclass(frozen=True)
class Rows:
    """Inputs and targets beside each other: ``(examples, inputs + outputs)``."""

    examples: Tensor
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.examples.numpy().tobytes()).hexdigest()[:16]

    @property
    def scored(self) -> int:
        return len(self.examples)

    def only(self, indices: Sequence[int]) -> "Rows":
        return Rows(self.examples[list(indices)], self.text)


class RowSource:
    """Draws inputs, of which two features say little, and noisy targets of a fixed network."""

    def make(self, config: Any, source: ModelSource) -> dict[Role, Rows]:
        generator = torch.Generator().manual_seed(config.seed)
        model = RegressionTask().load(source, dtype=None, device=torch.device("cpu"))
        rows = {}
        for role, count in COUNTS.items():
            inputs = torch.randn(count, INPUTS, generator=generator)
            inputs[:, :2] *= 0.01
            with torch.no_grad():
                targets = model(inputs)
            noise = 0.1 * torch.randn(targets.shape, generator=generator)
            rows[role] = Rows(torch.cat([inputs, targets + noise], 1), f"rows[{role}]")
        return rows

    def save(self, path: Path, examples: Mapping[Role, Rows]) -> None:
        save_file({role: each.examples for role, each in examples.items()}, path)

    def load(self, path: Path) -> dict[Role, Rows]:
        if not path.exists():
            raise DataError(f"{path} is missing")
        return {role: Rows(rows, f"rows[{role}]") for role, rows in load_file(path).items()}  # type: ignore[misc]
