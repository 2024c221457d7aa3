"""Run the body of a model one block at a time, so that one block's weights suffice."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.errors import ModelError
from lrbo.families import family_of
from lrbo.model import body_and_head

# Opens a block: its weights are at hand inside the `with`, and may be gone after it.
OpenBlock = Callable[[int], AbstractContextManager[nn.Module]]


class Scratch:
    """Room for hidden states: main memory up to a limit, beyond it temporary files.

    Use it as a context manager, or close it; the tensors are gone after it.

    Args:
        memory_bytes: The limit.
    """

    def __init__(self, memory_bytes: int = 2 * 2**30) -> None:
        self._left = memory_bytes
        self._files = 0
        self._folder: TemporaryDirectory[str] | None = None

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor on the CPU."""
        size = math.prod(shape)
        if size * dtype.itemsize <= self._left:
            self._left -= size * dtype.itemsize
            return torch.empty(shape, dtype=dtype)
        self._folder = self._folder or TemporaryDirectory(prefix="lrbo-")
        self._files += 1
        path = Path(self._folder.name) / str(self._files)
        if hasattr(os, "posix_fallocate"):
            # Room that is not there would end the process in the middle (SIGBUS), not as an error.
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def __enter__(self) -> Scratch:
        """Begin."""
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        self.close()

    def close(self) -> None:
        """Delete the files."""
        if self._folder is not None:
            self._folder.cleanup()


class BlockwiseBody:
    """The body of a causal language model as embedding, blocks and final norm.

    What a block is called with beside its hidden states (masks, rotary embeddings, positions)
    is the body's own business: the body is run once per batch shape with its blocks replaced by
    stand-ins that write these arguments down, so that every family works as it is.

    Attributes:
        model: In evaluation mode; never changed for longer than a call.
        open_block: Gives block ``i``; by default from the model as it is.
    """

    def __init__(self, model: PreTrainedModel, open_block: OpenBlock | None = None) -> None:
        self.model = model
        self._body, _ = body_and_head(model)
        blocks = model.get_submodule(family_of(model.config.model_type).blocks)
        assert isinstance(blocks, nn.ModuleList)
        self._blocks = list(blocks)
        self.open_block = open_block or (lambda index: nullcontext(self._blocks[index]))
        self._calls: dict[tuple[int, int], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    @property
    def device(self) -> torch.device:
        """Return where the embedding is, and so where blocks run."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight.device

    def embed(self, ids: Int[Tensor, "windows tokens"]) -> Float[Tensor, "windows tokens d"]:
        """Return what the first block is given for token ids, outside of any graph."""
        hidden, _ = self._pass(ids, None)
        return hidden.detach()  # a model in training may have a hook that asks for its gradient

    def run(
        self, block: nn.Module, index: int, hidden: Float[Tensor, "windows tokens d"]
    ) -> Float[Tensor, "windows tokens d"]:
        """Run one block; follows the caller's gradient mode.

        Args:
            block: What ``open_block(index)`` gave.
            index: Its depth.
            hidden: Input of the block, on its device.

        Raises:
            ModelError: If the block answers with anything but hidden states.
        """
        args, kwargs = self._arguments(hidden)[index]
        result = block(hidden, *args, **kwargs)
        if not isinstance(result, Tensor):
            raise ModelError(
                f"block {index} of {type(self.model).__name__} answers with a "
                f"{type(result).__name__}, expected hidden states alone; use transformers >= 5."
            )
        return result

    def finish(
        self, hidden: Float[Tensor, "windows tokens d"]
    ) -> Float[Tensor, "windows tokens d"]:
        """Return what the head is given, from the output of the last block."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        _, finished = self._pass(ids, hidden)
        return finished

    def _arguments(self, hidden: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return what each block is called with, for batches of this shape."""
        shape = (hidden.shape[0], hidden.shape[1])
        if shape not in self._calls:
            self.embed(torch.zeros(shape, dtype=torch.long, device=hidden.device))
        return self._calls[shape]

    def _pass(self, ids: Tensor, answer: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the body without its blocks.

        Returns:
            What enters the first block, and the end of the body when the last block answers
            with ``answer`` (or, without one, with what the first was given).
        """
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        entered: list[Tensor] = []

        def stand_in(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            del block
            given = dict(kwargs)
            hidden = args[0] if args else given.pop("hidden_states")
            if not entered:
                entered.append(hidden)
            calls.append((args[1:], given))
            last = answer is not None and len(calls) == len(self._blocks)
            return answer if last else hidden

        # no_grad, not inference_mode: what is written down here enters graphs later. The
        # caller's mode holds where the answer passes through the final norm.
        with_graph = answer is not None and torch.is_grad_enabled()
        with _forwards(self._blocks, stand_in), torch.set_grad_enabled(with_graph):
            finished = self._body(ids.to(self.device), use_cache=False).last_hidden_state
        self._calls[(ids.shape[0], ids.shape[1])] = calls
        return entered[0], finished


@contextmanager
def watching_inputs(
    root: nn.Module, names: Iterable[str], watch: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Show what modules read, for the length of a ``with``.

    Args:
        root: The model, or a block.
        names: Of modules, as ``root`` calls them.
        watch: Told a module's name and its input.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: watch(name, inputs[0])

    handles = [root.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _forwards(blocks: list[nn.Module], stand_in: Callable[..., Any]) -> Iterator[None]:
    """Replace what blocks do for the length of a ``with``; their attributes stay readable."""
    own = [vars(block).get("forward") for block in blocks]  # of those that something has wrapped
    for block in blocks:
        block.forward = MethodType(stand_in, block)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
