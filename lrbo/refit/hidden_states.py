"""Two streams of hidden states, of the dense and of the compressed model, block after block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lrbo.blockwise import BlockwiseBody, Scratch, watching_inputs
from lrbo.calibration.moments import Moments
from lrbo.errors import StatisticsError
from lrbo.linalg import require_finite
from lrbo.reduced_rank import PairMoments


@contextmanager
def _answers(block: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the last answers of layers, for the length of a ``with``."""
    found: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def answered(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            del module, inputs
            found[path] = output

        return answered

    handles = [block.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# Of rows of an input's drift, and of what the residual stream lacks: what a layer is asked for.
Asked = Callable[[Tensor, Tensor | None], Tensor]


class _ReachedError(Exception):
    """A pass has come to the site that it was made for: the rest of the block is not needed."""


class Streams:
    """Hidden states of all windows between blocks, in the dense and in the compressed model.

    Beside them, what the sites of one block read in the dense model is kept. Everything is in
    main memory up to a limit, and beyond it in temporary files, until :meth:`close`.

    Attributes:
        writers: Paths inside a block of the layers that add to the residual stream.

    Args:
        body: Runs the blocks.
        windows: ``(windows, tokens)`` token ids.
        batches: The windows of each forward pass.
        memory_bytes: The limit.
        writers: Of the attributes, the first one first; at their sites what the stream lacks
            before the addition is kept too.
    """

    def __init__(
        self,
        body: BlockwiseBody,
        windows: Int[Tensor, "windows tokens"],
        batches: Sequence[slice],
        memory_bytes: int,
        writers: Sequence[str] = (),
    ) -> None:
        self._body, self._batches, self.writers = body, batches, tuple(writers)
        self._shape = (windows.shape[0], windows.shape[1])
        self._scratch = Scratch(memory_bytes)
        self._kept: dict[str, Tensor] = {}
        for batch in batches:
            hidden = body.embed(windows[batch])
            self._keep("dense", batch, hidden)
            self._keep("compressed", batch, hidden)

    def close(self) -> None:
        """Give up memory and files."""
        self._kept.clear()
        self._scratch.close()

    def advance_dense(self, block: nn.Module, index: int, sites: Sequence[str]) -> None:
        """Take the dense stream through a dense block, and keep what its sites read.

        Args:
            block: The block, open.
            index: Its depth.
            sites: Paths inside the block.
        """
        writers = [path for path in sites if path in self.writers]
        for batch in self._batches:

            def keep(path: str, inputs: Tensor, batch: slice = batch) -> None:
                self._keep(f"site {path}", batch, inputs)

            entering = self._kept["dense"][batch]
            with watching_inputs(block, sites, keep), _answers(block, writers) as answers:
                leaving = self._run("dense", block, index, batch)
            for path in writers:
                self._keep(f"at {path}", batch, self._before(path, entering, leaving, answers))
            self._keep("dense", batch, leaving)

    def advance_compressed(self, block: nn.Module, index: int) -> None:
        """Take the compressed stream through a compressed block.

        Args:
            block: The block, open.
            index: Its depth.
        """
        for batch in self._batches:
            self._keep("compressed", batch, self._run("compressed", block, index, batch))

    def moments(
        self,
        block: nn.Module,
        index: int,
        site: str,
        batches: Sequence[slice],
        asked: Asked | None = None,
    ) -> PairMoments:
        """Return the moments of what a site reads in the compressed model, and of what is asked.

        Args:
            block: The block, compressed as far as the site needs; what follows is not run.
            index: Its depth.
            site: Path inside the block; the dense stream has passed it.
            batches: The windows that count.
            asked: Makes what is asked of the drift and, at a writer, of what the residual stream
                lacks there (else ``None``); rows in, rows out. By default it is the drift.

        Raises:
            StatisticsError: If an input is not finite, or the block does not run the site.
        """
        read: list[Tensor] = []
        writes = asked is not None and site in self.writers
        whole = writes and site != self.writers[0]

        def stop(path: str, inputs: Tensor) -> None:
            del path
            read.append(inputs)
            if not whole:
                raise _ReachedError

        moments: Moments | None = None
        size = 0
        with (
            watching_inputs(block, [site], stop),
            _answers(block, [site] if whole else []) as answers,
        ):
            for batch in batches:
                entering = leaving = self._kept["compressed"][batch]
                with suppress(_ReachedError):
                    leaving = self._run("compressed", block, index, batch)
                if not read:
                    raise StatisticsError(
                        f"block {index}: running it does not run {site}; every mapped layer must "
                        "run once per token. Correct the family's sites in lrbo/families.py."
                    )
                inputs = read.pop().flatten(0, -2)
                dense = self._kept[f"site {site}"][batch].flatten(0, 1).to(inputs.device)
                # The difference of two half-precision inputs is exact in float32.
                wide = torch.promote_types(inputs.dtype, torch.float32)
                inputs = inputs.to(wide)
                beside = dense.to(wide) - inputs
                if asked is not None:
                    lacking = None
                    if writes:
                        here = self._before(site, entering, leaving, answers)
                        there = self._kept[f"at {site}"][batch]
                        lacking = (there.to(here) - here).flatten(0, -2).to(beside)
                    beside = asked(beside, lacking)
                rows = torch.cat([inputs, beside], 1)
                require_finite(f"block {index}: input of {site} and what is asked of it", rows)
                moments = moments or Moments.empty(rows.shape[1], rows.device)
                moments.update(rows)
                size = inputs.shape[1]
        assert moments is not None
        return PairMoments.of(moments, size)

    def _before(
        self, path: str, entering: Tensor, leaving: Tensor, answers: dict[str, Tensor]
    ) -> Tensor:
        """Return the residual stream, float32 at least, as a layer finds it that adds to it.

        The first layer finds what enters the block; the last one what leaves it but for its own
        answer, whether attention and MLP follow each other or stand side by side. In half
        precision that is off by the rounding of what leaves.
        """
        wide = torch.promote_types(leaving.dtype, torch.float32)
        if path == self.writers[0]:
            return entering.to(wide)
        return leaving.to(wide) - answers.pop(path).reshape(leaving.shape).to(wide)

    def _run(self, stream: str, block: nn.Module, index: int, batch: slice) -> Tensor:
        """Return what a block makes of some windows of a stream."""
        hidden = self._kept[stream][batch].to(self._body.device)
        return self._body.run(block, index, hidden)

    def _keep(self, name: str, batch: slice, values: Tensor) -> None:
        """Write the values of some windows where those of all are kept."""
        if name not in self._kept:
            shape = (*self._shape, values.shape[-1])
            self._kept[name] = self._scratch.empty(*shape, dtype=values.dtype)
        # OPT hands the tokens of all windows to its MLP in one row.
        self._kept[name][batch] = values.reshape(-1, self._shape[1], values.shape[-1])
