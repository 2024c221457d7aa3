"""A model whose blocks come from its checkpoint one at a time, so that one block fits in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lrbo.errors import ModelError, reading
from lrbo.families import family_of
from lrbo.stored import read_tensor, refuse_adapters, stored_names, stores_own_head, tensors_of


class LazyModel:
    """A causal language model of which only what lies outside its blocks is in memory.

    Attributes:
        model: Blocks on the meta device except while they are open.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """Read the headers of a checkpoint, and the embedding, final norm and head.

        Args:
            folder: A Hugging Face checkpoint, in one file or sharded.
            dtype: Of the weights in memory; ``None`` is that of the files.
            device: Where opened blocks are.

        Raises:
            ModelError: If the folder is no such checkpoint, a tensor is missing, or an adapter
                lies beside.
        """
        self.folder, self._dtype, self._device = folder, dtype, torch.device(device)
        with reading(ModelError, f"cannot read the model in {folder}"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        refuse_adapters(folder)
        explicit = getattr(config, "transformers_weights", None)
        self._tensors = tensors_of(folder, explicit=explicit)
        with torch.device("meta"):
            as_configured: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        if stores_own_head(as_configured, self._tensors):
            config.tie_word_embeddings = False
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        self.model = model.eval().requires_grad_(False)
        path = family_of(config.model_type).blocks
        blocks = self.model.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        self._blocks, self._path = blocks, path
        inside = {name for name, _ in self.model.named_parameters() if name.startswith(f"{path}.")}
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        outside = [name for name, _ in self.model.named_parameters() if name not in inside]
        self._load(name for name in outside if self._stored(name) or name not in tied)
        self.model.tie_weights()
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    def prefix(self, index: int) -> str:
        """Return how the names of a block's parameters begin in the model."""
        return f"{self._path}.{index}."

    @contextmanager
    def open_block(self, index: int) -> Iterator[nn.Module]:
        """Give a block with its weights, which are gone afterwards.

        Raises:
            ModelError: If a tensor is missing or a file is damaged, naming it.
        """
        block, prefix = self._blocks[index], self.prefix(index)
        names = [f"{prefix}{name}" for name, _ in block.named_parameters()]
        self._load(names)
        try:
            yield block
        finally:
            for name in names:
                empty = self.model.get_parameter(name).to("meta")
                self._put(name, empty)

    def read(self, name: str) -> Tensor:
        """Return a parameter as it is in its file, on the CPU.

        Args:
            name: In the model's own naming.

        Raises:
            ModelError: If it is missing or its file is damaged.
        """
        key = self._stored(name)
        if key is None:
            raise ModelError(
                f"{self.folder} has no tensor {name}; its files hold {len(self._tensors)} others, "
                f"such as {next(iter(self._tensors))}."
            )
        return read_tensor(self._tensors[key].file, key)

    def _stored(self, name: str) -> str | None:
        """Return the name under which a parameter is stored."""
        return next(iter(stored_names(self.model, name, self._tensors)), None)

    def _load(self, names: Iterable[str]) -> None:
        """Bring parameters into the model."""
        for name in names:
            tensor = self.read(name)
            expected = self.model.get_parameter(name).shape
            if tensor.shape != expected:
                raise ModelError(
                    f"{name} in {self.folder} has shape {tuple(tensor.shape)}, the configuration "
                    f"wants {tuple(expected)}."
                )
            self._put(name, tensor.to(self._device, self._dtype))

    def _put(self, name: str, tensor: Tensor) -> None:
        """Replace a parameter."""
        owner, _, last = name.rpartition(".")
        module = self.model.get_submodule(owner)
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
