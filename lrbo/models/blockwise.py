"""Run the body of a model one block at a time, so that one block's weights suffice."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from mmap import mmap
from tempfile import TemporaryFile
from types import MethodType
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.errors import ModelError
from lrbo.models.families import family_of
from lrbo.models.model_map import body_and_head

States: TypeAlias = Float[Tensor, "windows tokens d"]
# Opens a block: its weights are at hand inside the `with`, and may be gone after it.
OpenBlock = Callable[[int], AbstractContextManager[nn.Module]]
# What a block is called with beside its hidden states.
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Scratch:
    """Room for hidden states: main memory up to a limit, then temporary files without a name.

    The system deletes a file with its tensor, also where the process is killed.
    """

    def __init__(self, memory_bytes: int = 2 * 2**30) -> None:
        self._left = memory_bytes

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        if size <= self._left:
            self._left -= size
            return torch.empty(shape, dtype=dtype)
        with TemporaryFile(prefix="lrbo-") as file:
            if hasattr(os, "posix_fallocate"):
                # Writing to room that is not there would end the process (SIGBUS), without error.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return torch.frombuffer(mmap(file.fileno(), size), dtype=dtype).view(shape)


class BlockwiseBody:
    """The :class:`~lrbo.tasks.model_task.Segments` of a causal language model.

    The body runs once per batch shape with stand-ins for its blocks, which record the other
    arguments of a block of this family (masks, rotary embeddings, positions).
    """

    def __init__(self, model: PreTrainedModel, open_block: OpenBlock | None = None) -> None:
        self.model = model
        self._body, _ = body_and_head(model)
        blocks = model.get_submodule(family_of(model.config.model_type).blocks)
        assert isinstance(blocks, nn.ModuleList)
        self._blocks = list(blocks)
        self.open_block = open_block or (lambda index: nullcontext(self._blocks[index]))
        self._calls: dict[tuple[int, int], list[_Arguments]] = {}  # of each block, by batch shape

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def device(self) -> torch.device:
        """Device of the embedding and so of the blocks' inputs."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight.device

    def embed(self, ids: Int[Tensor, "windows tokens"]) -> States:
        """Return the input of the first block for token ids, outside of any graph."""
        hidden, _ = self._pass(ids, None)
        return hidden.detach()  # a model in training may have a hook that asks for its gradient

    def run(self, block: nn.Module, index: int, hidden: States) -> States:
        """Run a block; ModelError if it returns anything but hidden states."""
        shape = (hidden.shape[0], hidden.shape[1])
        if shape not in self._calls:
            self.embed(torch.zeros(shape, dtype=torch.long, device=hidden.device))
        args, kwargs = self._calls[shape][index]
        result = block(hidden, *args, **kwargs)
        if not isinstance(result, Tensor):
            raise ModelError(
                f"block {index} of {type(self.model).__name__} returns a "
                f"{type(result).__name__}, expected hidden states alone; use transformers >= 5."
            )
        return result

    def finish(self, hidden: States) -> States:
        """Return the input of the head, from the output of the last block."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        _, finished = self._pass(ids, hidden)
        return finished

    def _pass(self, ids: Tensor, output: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the first block's input, and what the body makes of the last one's ``output``."""
        calls: list[_Arguments] = []
        first_inputs: list[Tensor] = []

        def stand_in(_block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if not calls:
                first_inputs.append(hidden)
            calls.append((args[1:], kwargs))
            is_last = output is not None and len(calls) == len(self._blocks)
            return output if is_last else hidden

        # no_grad, not inference_mode: the recorded arguments enter graphs later. The caller's
        # mode holds where the output passes through the final norm.
        with_graph = output is not None and torch.is_grad_enabled()
        with ExitStack() as restored, torch.set_grad_enabled(with_graph):
            for block in self._blocks:  # replaced is only the forward: attributes stay readable
                if wrapper := vars(block).get("forward"):  # of accelerate, for example
                    restored.callback(setattr, block, "forward", wrapper)
                else:
                    restored.callback(vars(block).pop, "forward", None)  # a signal may come first
                block.forward = MethodType(stand_in, block)
            finished = self._body(ids.to(self.device), use_cache=False).last_hidden_state
        self._calls[(ids.shape[0], ids.shape[1])] = calls
        return first_inputs[0], finished


@contextmanager
def watching(
    root: nn.Module, names: Iterable[str], watch: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call ``watch`` with name, input and output of modules of ``root`` that run inside."""

    def hook(name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        watch(name, inputs[0], output)

    with ExitStack() as hooks:
        for name in names:
            module = root.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(hook, name)))
        yield
