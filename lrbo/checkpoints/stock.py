"""Integers as compressed-tensors packs them, and the low rank over them as a LoRA adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrbo.checkpoints.export import checkpoint_folder, write_tensors
from lrbo.checkpoints.lora import thin_weights, write_adapter
from lrbo.checkpoints.merged import frame_of
from lrbo.checkpoints.structure import Structure
from lrbo.data.windows import Role, TokenWindows
from lrbo.errors import CheckpointError, LrboError, reading, some
from lrbo.files.paths import ADAPTER, BASE, model_folder
from lrbo.layers.based import BasedLinear
from lrbo.layers.form import Form
from lrbo.layers.forms import FORMS, Quantized, form_named
from lrbo.layers.modules import low_rank_layers
from lrbo.layers.options import DENSE, Option
from lrbo.layers.packing import unpack
from lrbo.models.loading import load_model
from lrbo.models.sources import ModelSource

# And the least release of either: before, the first packed 3 and 5 bits in another way.
PACKAGES, LEAST = ("compressed-tensors", "peft"), (0, 18)
PACKED, STATUS = "pack-quantized", "compressed"  # as the library calls them
# What vLLM's kernels of integers (Marlin) take, and the largest ranks that it makes room for.
VLLM_BITS, VLLM_GROUP_SIZES = (4, 8), (32, 64, 128)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Layers that vLLM runs as one, and which must be packed alike.
VLLM_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, order=True)
class Scheme:
    """How the integers of a layer are stored."""

    bits: int
    group_size: int

    def __str__(self) -> str:
        """For readers."""
        return f"{self.bits} bits in groups of {self.group_size}"


def missing_packages() -> str | None:
    """Name the packages that are needed and not installed, with the pip command, if any."""
    names = [name for name in PACKAGES if _release(name) < LEAST]
    if not names:
        return None
    least = ".".join(map(str, LEAST))
    return (
        f"the format adapter needs {' and '.join(names)}, {least} or newer; run: pip install "
        "'lrbo[export]'"
    )


def _release(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in metadata.version(package).split(".")[:2])
    except metadata.PackageNotFoundError:
        return (0,)


def unfit(options: Mapping[str, Option], dense: nn.Module) -> str | None:
    """Say which layers of a model the formats cannot hold, by form; ``None`` where they can.

    Args:
        options: By layer; dense ones are left dense.
        dense: The model before any layer was replaced, maybe on the meta device.
    """
    layers: dict[str, list[str]] = {}
    for name, option in options.items():
        form, kind = form_named(option.form), type(dense.get_submodule(name))
        if option == DENSE:
            continue
        if _bits(form) is None:
            layers.setdefault(form.name, []).append(name)
        elif kind is not nn.Linear:
            layers.setdefault(f"{form.name} of a {kind.__name__}", []).append(name)
    if not layers:
        return None
    held = [form.name for form in FORMS.values() if _bits(form) is not None]
    return (
        f"it holds {', '.join(held)} of nn.Linear layers, with a low rank or without, and dense "
        f"ones, but not {', '.join(f'{form} ({some(own, 3)})' for form, own in layers.items())}"
    )


def _bits(form: Form) -> int | None:
    """Return the bits that hold the integers of a form less their zero points, if eight do.

    transformers reads no zero points of this format: it expects them unpacked, and from 0.18 on the
    library packs them.
    """
    bits = form.bits + (not form.symmetric) if isinstance(form, Quantized) else 9
    return bits if bits <= 8 else None


def schemes_of(options: Mapping[str, Option], dense: nn.Module, *, vllm: bool) -> dict[str, Scheme]:
    """Return how the integers of layers are stored, of which :func:`unfit` finds none at fault.

    For ``vllm`` layers that it runs as one are packed alike, in the widest bits and the smallest
    groups of them, and all in bits and groups that it takes: the same numbers in more bytes.
    """
    schemes = {}
    for name, option in options.items():
        bits = _bits(form_named(option.form))
        if bits is not None:
            schemes[name] = Scheme(bits, option.level[0])
    if not vllm:
        return schemes
    together = {name: names for names in _fused(dense) for name in names}
    for names in {tuple(together.get(name, [name])) for name in schemes}:
        own = [schemes[name] for name in names if name in schemes]
        widest = max(scheme.bits for scheme in own)
        bits = next(bits for bits in VLLM_BITS if bits >= widest)
        size = min(VLLM_GROUP_SIZES[-1], *(scheme.group_size for scheme in own))
        schemes |= {name: Scheme(bits, size) for name in names if name in schemes}
    return schemes


def vllm_problems(schemes: Mapping[str, Scheme], rank: int, dense: nn.Module) -> list[str]:
    """Say, a clause each, what vLLM does not take, as of its sources of 2026.

    Args:
        schemes: Of the integers, by layer.
        rank: The largest over them.
        dense: As of :func:`unfit`.
    """
    layers: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        layers.setdefault(scheme, []).append(name)
    problems = [
        f"its kernels do not take {scheme} ({some(names, 2)})"
        for scheme, names in sorted(layers.items())
        if scheme.bits not in VLLM_BITS or scheme.group_size not in VLLM_GROUP_SIZES
    ]
    apart = [names for names in _fused(dense) if len({*map(schemes.get, names)}) > 1]
    if apart:
        problems.append(
            f"it runs {some([' and '.join(names) for names in apart], 1)} as one layer, and they "
            "are not packed alike"
        )
    if rank > VLLM_RANKS[-1]:
        problems.append(f"it takes ranks up to {VLLM_RANKS[-1]}, not {rank}")
    return problems


def _linear(dense: nn.Module) -> list[str]:
    return [name for name, part in dense.named_modules() if type(part) is nn.Linear]


def _fused(dense: nn.Module) -> Iterator[list[str]]:
    """Yield the names of the layers of a model that vLLM runs as one."""
    names = _linear(dense)
    for kinds in VLLM_FUSED:
        for first in [name for name in names if name.endswith(f".{kinds[0]}")]:
            parent = first.removesuffix(kinds[0])
            yield [f"{parent}{kind}" for kind in kinds if f"{parent}{kind}" in names]


def load(folder: str, *, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """Open a model, or what :meth:`Stock.save` wrote, with its adapter on the layers of the base.

    Raises:
        ModelError: As of :func:`lrbo.models.loading.load_model`.
        CheckpointError: If PEFT cannot read the adapter, or is not installed.
    """
    own, adapter = model_folder(folder), Path(folder) / ADAPTER
    has_adapter = own != folder and adapter.is_dir()
    if has_adapter and (problem := missing_packages()) is not None:
        raise CheckpointError(problem)
    model = load_model(ModelSource("hf", own), dtype=dtype, device=device)
    if not has_adapter:
        return model
    with reading(CheckpointError, f"cannot read {adapter}", own=LrboError):
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, str(adapter)).eval().requires_grad_(False)
    base: PreTrainedModel = adapted.get_base_model()
    return base


@dataclass(frozen=True)
class Stock:
    """A model of dense layers, integers and low ranks over integers, in formats of others.

    Attributes:
        frame: The dense model, on the meta device, with the biases that were added.
        schemes: Of the integers, by layer.
        ranks: Of the low ranks over them that are not 0, by layer.
        base: Tensors of the model without low ranks, by name.
        adapter: Of the low ranks, by name.
    """

    frame: PreTrainedModel
    schemes: Mapping[str, Scheme]
    ranks: Mapping[str, int]
    base: Mapping[str, Tensor]
    adapter: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, model: PreTrainedModel, options: Mapping[str, Option], *, vllm: bool = False
    ) -> Stock:
        """Convert a compressed model, which stays as it is; ``vllm`` as of :func:`schemes_of`.

        Raises:
            CheckpointError: If the architecture has no parameter for a bias.
        """
        frame, base = frame_of(model, Structure.of(model))
        schemes = schemes_of(options, frame, vllm=vllm)
        ranks, adapter = {}, dict[str, Tensor]()
        for name, layer in low_rank_layers(model).items():
            assert isinstance(layer, BasedLinear)
            base |= {f"{name}.{own}": each for own, each in _packed(layer, schemes[name]).items()}
            if layer.rank:
                ranks[name] = layer.rank
                inner, outer = thin_weights(layer, model.dtype)
                adapter[f"base_model.model.{name}.lora_A.weight"] = inner
                adapter[f"base_model.model.{name}.lora_B.weight"] = outer
        return cls(frame, schemes, ranks, base, adapter)

    @property
    def base_bytes(self) -> int:
        """Of the tensors of the base."""
        return sum(tensor.nbytes for tensor in self.base.values())

    @property
    def adapter_bytes(self) -> int:
        """Of the tensors of the adapter."""
        return sum(tensor.nbytes for tensor in self.adapter.values())

    @property
    def parameters(self) -> int:
        """All numbers, each integer one, without scales and shapes."""
        names = tuple(f"{name}.weight_" for name in self.schemes)
        others = [t.numel() for n, t in self.base.items() if not n.startswith(names)]
        packed = [self.frame.get_parameter(f"{name}.weight").numel() for name in self.schemes]
        return sum([*others, *packed, *(tensor.numel() for tensor in self.adapter.values())])

    @property
    def rank(self) -> int:
        """The largest rank of the adapter, 0 without one."""
        return max(self.ranks.values(), default=0)

    @property
    def vllm_rank(self) -> int:
        """The ``--max-lora-rank`` of vLLM that makes room for it, if one does."""
        return next((rank for rank in VLLM_RANKS if rank >= self.rank), VLLM_RANKS[-1])

    @property
    def vllm_problems(self) -> list[str]:
        """As of :func:`vllm_problems`."""
        return vllm_problems(self.schemes, self.rank, self.frame)

    def save(
        self,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        card: str | None = None,
        windows: Mapping[Role, TokenWindows] | None = None,
    ) -> None:
        """Write ``base``, a model for transformers, and ``adapter``, an adapter for PEFT, if any.

        They are folders side by side, so that nothing opens as a model that lacks its low ranks
        unless it is asked for. The arguments are as of :func:`lrbo.checkpoints.export.save`.

        Raises:
            CheckpointError: If the folder exists or cannot be written.
        """
        with checkpoint_folder(folder, model, tokenizer, card, windows, BASE) as beside:
            write_tensors(beside / BASE, self.base)
            config = copy.deepcopy(self.frame.config)
            config.dtype = model.dtype
            config.architectures = [type(model).__name__]
            if self.schemes:
                config.quantization_config = self.quantization()
            config.save_pretrained(beside / BASE)
            if self.adapter:
                (beside / ADAPTER).mkdir()
                write_adapter(beside / ADAPTER, self.ranks, self.adapter)

    def quantization(self) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``."""
        import compressed_tensors
        from compressed_tensors.quantization import QuantizationConfig

        layers: dict[Scheme, list[str]] = {}
        for name, scheme in self.schemes.items():
            layers.setdefault(scheme, []).append(name)
        groups = {}
        for index, (scheme, names) in enumerate(sorted(layers.items())):
            weights = {"num_bits": scheme.bits, "type": "int", "symmetric": True}
            weights |= {"strategy": "group", "group_size": scheme.group_size}
            groups[f"group_{index}"] = {"targets": names, "weights": weights, "format": PACKED}
        values = QuantizationConfig.model_validate(
            {
                "config_groups": groups,
                "ignore": [name for name in _linear(self.frame) if name not in self.schemes],
                "format": PACKED,
                "quantization_status": STATUS,
            }
        ).model_dump(mode="json")
        version = compressed_tensors.__version__
        return {**values, "quant_method": "compressed-tensors", "version": version}


def _packed(layer: BasedLinear, scheme: Scheme) -> dict[str, Tensor]:
    """Return the integers of a layer, less zero points, as the library packs them."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    form, scale = layer.form, layer.get_buffer("scale")
    assert isinstance(form, Quantized)
    codes = unpack(layer.get_buffer("packed"), form.bits).to(torch.int16)
    if form.symmetric:
        codes -= 2 ** (form.bits - 1)
    else:
        codes.view(*scale.shape, -1).sub_(layer.get_buffer("zero")[:, :, None])
    size = layer.in_features // scale.shape[1]
    return {
        "weight_packed": pack_to_int32(codes.to(torch.int8), scheme.bits),
        "weight_scale": scale.repeat_interleave(size // scheme.group_size, 1),
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }
