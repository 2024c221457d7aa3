"""Two streams of hidden states, of the dense and of the compressed model, block after block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lrbo.blockwise import BlockwiseBody, Scratch, watching_inputs
from lrbo.calibration.moments import Moments
from lrbo.errors import StatisticsError
from lrbo.linalg import require_finite
from lrbo.reduced_rank import DriftMoments


class _ReachedError(Exception):
    """A pass has come to the site that it was made for: the rest of the block is not needed."""


class Streams:
    """Hidden states of all windows between blocks, in the dense and in the compressed model.

    Beside them, what the sites of one block read in the dense model is kept. Everything is in
    main memory up to a limit, and beyond it in temporary files, until :meth:`close`.

    Args:
        body: Runs the blocks.
        windows: ``(windows, tokens)`` token ids.
        batches: The windows of each forward pass.
        memory_bytes: The limit.
    """

    def __init__(
        self,
        body: BlockwiseBody,
        windows: Int[Tensor, "windows tokens"],
        batches: Sequence[slice],
        memory_bytes: int,
    ) -> None:
        self._body, self._batches = body, batches
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
        for batch in self._batches:

            def keep(path: str, inputs: Tensor, batch: slice = batch) -> None:
                self._keep(f"site {path}", batch, inputs)

            with watching_inputs(block, sites, keep):
                self._keep("dense", batch, self._run("dense", block, index, batch))

    def advance_compressed(self, block: nn.Module, index: int) -> None:
        """Take the compressed stream through a compressed block.

        Args:
            block: The block, open.
            index: Its depth.
        """
        for batch in self._batches:
            self._keep("compressed", batch, self._run("compressed", block, index, batch))

    def moments(
        self, block: nn.Module, index: int, site: str, batches: Sequence[slice]
    ) -> DriftMoments:
        """Return the moments of what a site reads in the compressed model, and of its drift.

        Args:
            block: The block, compressed as far as the site needs; what follows is not run.
            index: Its depth.
            site: Path inside the block; the dense stream has passed it.
            batches: The windows that count.

        Raises:
            StatisticsError: If an input is not finite, or the block does not run the site.
        """
        read: list[Tensor] = []

        def stop(path: str, inputs: Tensor) -> None:
            del path
            read.append(inputs)
            raise _ReachedError

        moments: Moments | None = None
        with watching_inputs(block, [site], stop):
            for batch in batches:
                with suppress(_ReachedError):
                    self._run("compressed", block, index, batch)
                if not read:
                    raise StatisticsError(
                        f"block {index}: running it does not run {site}; every mapped layer must "
                        "run once per token. Correct the family's sites in lrbo/families.py."
                    )
                inputs = read.pop().flatten(0, -2)
                dense = self._kept[f"site {site}"][batch].flatten(0, 1).to(inputs.device)
                # The difference of two half-precision inputs is exact in float32.
                wide = torch.promote_types(inputs.dtype, torch.float32)
                drift = dense.to(wide) - inputs.to(wide)
                rows = torch.cat([inputs.to(wide), drift], 1)
                require_finite(f"block {index}: input of {site} and its drift", rows)
                moments = moments or Moments.empty(rows.shape[1], rows.device)
                moments.update(rows)
        assert moments is not None
        return DriftMoments.of(moments)

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
