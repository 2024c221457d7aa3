"""Low ranks as a LoRA adapter of PEFT: over integers, or what a model adds to its base."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrbo.checkpoints.export import checkpoint_folder
from lrbo.config.choices import ITEMSIZES
from lrbo.data.windows import Role, TokenWindows
from lrbo.errors import CheckpointError, LrboError, reading
from lrbo.files.parsing import parse_json
from lrbo.layers.based import INT8, BasedLinear
from lrbo.layers.modules import low_rank_layers
from lrbo.layers.options import Option
from lrbo.models.devices import dtype_name
from lrbo.models.headers import ADAPTER_CONFIG, CONFIG
from lrbo.models.model_map import is_tied
from lrbo.models.pairs import BaseModel, base_source
from lrbo.models.parameters import cast_
from lrbo.models.sources import ModelSource

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT, DTYPE = "base_fingerprint", "dtype"  # in the head of the weights


def is_delta_adapter(folder: str | Path) -> bool:
    """Whether a folder is an adapter alone, as ``lrbo compress`` writes of a delta."""
    return (Path(folder) / ADAPTER_CONFIG).is_file() and not (Path(folder) / CONFIG).exists()


def base_of(folder: str | Path) -> ModelSource:
    """Return the base model that an adapter names; CheckpointError if it names none."""
    path = Path(folder) / ADAPTER_CONFIG
    with reading(CheckpointError, f"cannot read {path}", own=LrboError):
        name = parse_json(path.read_bytes(), str(path))["base_model_name_or_path"]
        if not isinstance(name, str):
            raise CheckpointError(f"base_model_name_or_path is {name!r}, expected a text")
    return base_source(name)


def stored_dtype(folder: str | Path) -> str:
    """Return the dtype of the model that an adapter was written of.

    Raises:
        CheckpointError: If its file cannot be read, or is not of ``lrbo compress``.
    """
    return _metadata(folder)[DTYPE]


def _metadata(folder: str | Path) -> dict[str, str]:
    """Read the header of the weights."""
    file = Path(folder) / WEIGHTS
    with reading(CheckpointError, f"cannot read {file}"), safe_open(file, "pt") as tensors:
        metadata: dict[str, str] = tensors.metadata() or {}
    if FINGERPRINT not in metadata or metadata.get(DTYPE) not in ITEMSIZES:
        raise CheckpointError(
            f"{file} does not say the dtype and the fingerprint of its base, which lrbo compress "
            "writes: it is another adapter; merge it, and give the model"
        )
    return metadata


def load_adapted(
    folder: str | Path, *, dtype: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    """Open the base of an adapter with the adapter on its layers.

    Raises:
        ModelError: If the base is missing or damaged, or another than the adapter was made for.
        CheckpointError: If PEFT cannot read the adapter, or is not installed.
    """
    metadata = _metadata(folder)
    base = BaseModel(base_of(folder), metadata[FINGERPRINT]).load()
    cast_(base, dtype or getattr(torch, metadata[DTYPE]))
    base = base.to(device)
    with reading(CheckpointError, f"cannot read {folder}", own=LrboError):
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(base, str(folder)).eval().requires_grad_(False)
    model: PreTrainedModel = adapted.get_base_model()
    return model


def write_adapter(
    folder: Path,
    ranks: Mapping[str, int],
    tensors: Mapping[str, Tensor],
    *,
    base: str | None = None,
    whole: Collection[str] = (),
    by_columns: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write low ranks with a scaling of 1: the alpha of each is its rank.

    Args:
        folder: That exists.
        ranks: Of each layer.
        tensors: By the names that PEFT has for them.
        base: What the configuration names as the base model.
        whole: Modules that are replaced whole.
        by_columns: Whether layers store their weight as ``(in, out)``.
        metadata: More for the head of the weights.
    """
    from peft import LoraConfig

    largest = max(ranks.values())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=largest,
        lora_alpha=largest,
        target_modules=[*ranks],
        rank_pattern=dict(ranks),
        alpha_pattern=dict(ranks),
        modules_to_save=[*whole] or None,
        fan_in_fan_out=by_columns,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    own = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(own, folder / WEIGHTS, metadata={"format": "pt", **(metadata or {})})


def thin_weights(
    layer: BasedLinear, dtype: torch.dtype
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Return the factors of a low rank, of which integers that multiply inputs are at most 1.

    These are integers over 128: the rounding is that of the layer, and in float16 nothing
    overflows.
    """
    factors = layer.factors
    assert factors is not None
    if factors.scale is None:
        return factors.right.to(dtype), factors.left.to(dtype)
    whole = INT8 + 1
    left, right = factors._replace(scale=torch.ones_like(factors.scale)).wide(torch.float32)
    scaled = left.to(dtype) * factors.scale.to(dtype) * whole
    return (right / whole).to(dtype), scaled


@dataclass(frozen=True)
class DeltaAdapter:
    """What a model adds to its base as an adapter: low ranks, and modules that are another.

    Attributes:
        base: With its fingerprint.
        ranks: By layer, those of 0 left out.
        whole: Modules that are replaced whole: dense layers, norms, embeddings.
        tensors: By the names that PEFT has for them.
        by_columns: Whether layers store their weight as ``(in, out)``.
    """

    base: BaseModel
    ranks: Mapping[str, int]
    whole: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    by_columns: bool

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        options: Mapping[str, Option],
        changed: Collection[str],
        base: BaseModel,
        *,
        by_columns: bool = False,
    ) -> DeltaAdapter:
        """Convert a compressed model, which stays as it is.

        Args:
            model: With its layers that add to the base.
            options: Of all compressible layers.
            changed: Parameters of no such layer that are others than in the base.
            base: That layers add to.
            by_columns: Whether dense layers store their weight as ``(in, out)``.

        Raises:
            CheckpointError: If no layer has a rank.
        """
        ranks, tensors, layers = {}, dict[str, Tensor](), low_rank_layers(model)
        for name, layer in layers.items():
            assert isinstance(layer, BasedLinear)
            if layer.rank:
                ranks[name] = layer.rank
                inner, outer = thin_weights(layer, model.dtype)
                tensors[f"{PREFIX}{name}.lora_A.weight"] = inner
                tensors[f"{PREFIX}{name}.lora_B.weight"] = outer
        if not ranks:
            raise CheckpointError(
                "no layer of this model has a rank, and an adapter of none is none; take "
                "format=lrbo or merged, or a larger budget"
            )
        whole = dict.fromkeys(name for name in options if name not in layers)
        whole |= dict.fromkeys(name.rpartition(".")[0] for name in changed)
        names = {id(module): name for name, module in model.named_modules()}
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        if is_tied(model) and names[id(table)] in whole:
            whole[names[id(head)]] = None  # which PEFT does not tie to what replaces the other
        for name in whole:
            for own, parameter in model.get_submodule(name).named_parameters():
                tensors[f"{PREFIX}{name}.{own}"] = parameter.detach().clone()
        return cls(base, ranks, tuple(whole), tensors, by_columns)

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """All numbers."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks.values())

    @property
    def base_name(self) -> str:
        """The folder or hub id of the base for other loaders."""
        return name_for_others(self.base.source)

    def save(
        self,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        card: str | None = None,
        windows: Mapping[Role, TokenWindows] | None = None,
    ) -> None:
        """Write the adapter; the arguments are as of :func:`lrbo.checkpoints.export.save`.

        Raises:
            CheckpointError: If the folder exists or cannot be written.
        """
        with checkpoint_folder(folder, model, tokenizer, card, windows) as beside:
            write_adapter(
                beside,
                self.ranks,
                self.tensors,
                base=self.base_name,
                whole=self.whole,
                by_columns=self.by_columns,
                metadata={FINGERPRINT: self.base.fingerprint, DTYPE: dtype_name(model.dtype)},
            )


def name_for_others(source: ModelSource) -> str:
    """Return the folder or hub id of a model, as programs other than this one read it."""
    if source.source == "tiny":
        return source.path
    name = source.folder_or_hub_id()
    return str(name.absolute()) if isinstance(name, Path) else name
