"""A model whose weights stay in its files: a block in memory at a time, or all of them mapped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lrbo.allocation.allocate import Allocation
from lrbo.factorization.factors import LowRankFactors
from lrbo.layers.modules import replace_module
from lrbo.models.families import family_of
from lrbo.models.headers import stored_names, tensors_of
from lrbo.models.loading import load_skeleton
from lrbo.models.model_map import is_tied
from lrbo.models.sources import ModelSource


class LazyModel:
    """A causal language model of which only what lies outside its blocks is in memory.

    Attributes:
        model: Blocks on the meta device except while they are open.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        """Read the headers of a checkpoint, and the embedding, final norm and head.

        Args:
            folder: A Hugging Face checkpoint, in one file or sharded.
            dtype: Of the weights in memory; ``None`` is that of the files.

        Raises:
            ModelError: If the files do not hold the model that ``config.json`` describes.
        """
        skeleton = load_skeleton(ModelSource("hf", str(folder)))
        config = skeleton.config
        config.tie_word_embeddings = is_tied(skeleton)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        self.model = model.eval().requires_grad_(False)
        self._tensors, self._dtype = tensors_of(folder, repr(str(folder))), dtype  # mapped
        self._path = family_of(config.model_type).blocks
        self._load(name for name in self._absent() if not name.startswith(f"{self._path}."))
        self.model.tie_weights()

    @contextmanager
    def open_block(self, index: int) -> Iterator[nn.Module]:
        """Give a block with its weights, which are gone afterwards."""
        prefix = f"{self._path}.{index}"
        block = self.model.get_submodule(prefix)
        names = [f"{prefix}.{name}" for name, _ in block.named_parameters()]
        self._load(names)
        try:
            yield block
        finally:
            for name in names:
                _put(self.model, name, self.model.get_parameter(name).to("meta"))

    def load_rest(self) -> None:
        """Take what is not in memory from the files; mapped, where its dtype is that of these."""
        self._load(self._absent())

    def _absent(self) -> list[str]:
        """Name the parameters that are on the meta device."""
        return [name for name, tensor in self.model.named_parameters() if tensor.is_meta]

    def _load(self, names: Iterable[str]) -> None:
        for name in names:
            for key in stored_names(self.model, name, self._tensors):  # none of a tied head
                _put(self.model, name, self._tensors[key].to(dtype=self._dtype))


def compress_mapped(
    lazy: LazyModel, allocation: Allocation, prepared: Mapping[str, LowRankFactors], folder: Path
) -> PreTrainedModel:
    """Compress a model of which every weight is in a file that is mapped into memory.

    Args:
        lazy: In the dtype of its files; afterwards the compressed model.
        allocation: An option per layer.
        prepared: Of the layers that are not dense.
        folder: Where compressed layers are written, one after another, and mapped from.
    """
    folder.mkdir()
    for name, option in allocation.compressed.items():
        layer = prepared[name].stored(name, option, lazy.model.dtype)
        _map(layer, folder / f"{name}.safetensors")
        replace_module(lazy.model, name, layer)
    lazy.load_rest()
    return lazy.model


def _map(module: nn.Module, file: Path) -> None:
    """Write the parameters of a module to a file, and map them from there."""
    save_file({n: p.detach().contiguous() for n, p in module.named_parameters()}, file)
    for name, tensor in load_file(file).items():
        _put(module, name, tensor)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter."""
    owner, _, last = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    module.get_submodule(owner).register_parameter(last, parameter)
