"""Hidden states of the dense and of the compressed model, side by side through the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lrbo.allocation.apply import replaced
from lrbo.calibration.moments import Moments
from lrbo.errors import StatisticsError
from lrbo.linalg import require_finite
from lrbo.models.blockwise import Scratch, watching
from lrbo.refit.regression import PairMoments
from lrbo.tasks.model_task import Segments


class _ReachedError(Exception):
    """Ends a pass at the site that it was made for."""


class _Silent(nn.Module):
    """A layer in a pass that needs its inputs alone: adds nothing to a stream of this width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)


class _KnownAttention(nn.Module):
    """An attention in a pass that comes after it: what its last layer reads is known."""

    def __init__(self, last: nn.Module, inputs: Tensor) -> None:
        super().__init__()
        self.last, self.inputs = last, inputs

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return self.last(self.inputs), None


class Streams:
    """Hidden states of all windows between blocks, in the dense and in the compressed model.

    The inputs of one block's sites in the dense model are stored too, and, for the ``writers``,
    the stream before their addition: paths, in forward order, of the layers in a block that add to
    the residual stream. Once a writer's moments are gathered, those of the compressed model take
    their room, and later passes do not run again what is before it. ``first`` are modules of the
    compressed model, by name, that come before its blocks. Each of ``batches`` is one forward pass
    of windows of ``length`` positions.
    """

    def __init__(
        self,
        body: Segments,
        scratch: Scratch,
        windows: Any,
        batches: Sequence[slice],
        blend: float,
        feedback: float,
        writers: Sequence[str],
        first: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self._body, self._scratch, self._batches = body, scratch, batches
        self._blend, self._feedback, self.writers = blend, feedback, writers
        self._count, self._stored = len(windows), dict[str, Tensor]()
        self._passed = set[str]()  # the writers whose compressed inputs are stored
        for batch in batches:
            hidden = body.embed(windows[batch])
            self.length = hidden.shape[1]
            self._store("dense", batch, hidden)
            if first:
                with replaced(body.model, first):
                    hidden = body.embed(windows[batch])
            self._store("compressed", batch, hidden)

    def advance_dense(self, block: nn.Module, index: int, sites: Sequence[str]) -> None:
        """Take the dense stream through an open dense block, and store the inputs of its sites."""
        outputs: dict[str, Tensor] = {}
        self._passed.clear()
        for batch in self._batches:

            def store(path: str, inputs: Tensor, output: Tensor, batch: slice = batch) -> None:
                self._store(f"site {path}", batch, inputs)
                if path in self.writers:
                    outputs[path] = output

            entering = self._stored["dense"][batch]
            with watching(block, sites, store):
                leaving = self._body.run(block, index, entering.to(self._body.device))
            for path, output in outputs.items():
                self._store(f"at {path}", batch, self._before(path, entering, leaving, output))
            outputs.clear()
            self._store("dense", batch, leaving)

    def advance_compressed(self, block: nn.Module, index: int) -> None:
        """Take the compressed stream through an open compressed block."""
        last = self.writers[-1] if self.writers else None
        for batch in self._batches:
            if last in self._passed:
                output = block.get_submodule(last)(self._at("site", last, batch))
                before = self._at("at", last, batch)
                leaving = before + output.reshape(before.shape)
            else:
                leaving = self._run(block, index, batch)
            self._store("compressed", batch, leaving)

    def moments(
        self,
        block: nn.Module,
        index: int,
        site: str,
        batches: Sequence[slice],
        weight: Tensor | None,
    ) -> PairMoments:
        """Gather the moments of a site's input in the compressed model and of its target.

        The block is compressed up to the site, and run no further; the dense stream has passed it.
        ``site`` is the first layer that reads it. Of a writer, which is gathered from all batches
        before the next site, the inputs then take the room of those of the dense model.
        The target is what a layer of this dense weight should add to its output, token by token:
        ``blend W d`` for the drift ``d``, and for a writer also ``feedback`` times the stream's
        error. Without a weight it is the drift.

        Raises:
            StatisticsError: If an input is not finite, or the block does not run the site.
        """
        writes = weight is not None and site in self.writers
        whole = writes and site != self.writers[0]
        reached: list[tuple[Tensor, Tensor]] = []

        def stop(_: str, inputs: Tensor, output: Tensor) -> None:
            reached.append((inputs, output))
            if not whole:
                raise _ReachedError

        moments: Moments | None = None
        size = 0
        silent = _Silent(self._stored["compressed"].shape[-1])
        with replaced(block, {site: silent}), watching(block, [site], stop):
            for batch in batches:
                entering = leaving = self._stored["compressed"][batch]
                with suppress(_ReachedError):
                    leaving = self._run(block, index, batch, site)
                if not reached:
                    raise StatisticsError(
                        f"block {index}: running it does not run {site}; every mapped layer must "
                        "run once per token. Correct the family's sites in lrbo/models/families.py."
                    )
                given, output = reached.pop()
                # The difference of two half-precision inputs is exact in float32.
                wide = torch.promote_types(given.dtype, torch.float32)
                inputs = given.flatten(0, -2).to(wide)
                target = self._stored[f"site {site}"][batch].flatten(0, 1).to(inputs) - inputs
                if weight is not None:
                    target = self._blend * (target @ weight.to(target).T)
                if writes:
                    here = self._before(site, entering, leaving, output)
                    error = self._stored[f"at {site}"][batch].to(here) - here
                    target = target + self._feedback * error.flatten(0, -2).to(target)
                    self._store(f"site {site}", batch, given)
                    self._store(f"at {site}", batch, here)
                rows = torch.cat([inputs, target], 1)
                require_finite(f"block {index}: input of {site} and its target", rows)
                moments = moments or Moments(rows.shape[1], rows.device)
                moments.update(rows)
                size = inputs.shape[1]
        assert moments is not None
        if writes:
            self._passed.add(site)
        return PairMoments.of(moments, size)

    def _before(self, path: str, entering: Tensor, leaving: Tensor, output: Tensor) -> Tensor:
        """Return the residual stream before a layer adds to it, float32 or wider.

        For the first writer that is the block's input; for the last one the block's output minus
        the layer's own, also where attention and MLP run in parallel. In half precision it is off
        by the rounding of the block's output.
        """
        wide = torch.promote_types(leaving.dtype, torch.float32)
        if path == self.writers[0]:
            return entering.to(wide)
        before: Tensor = leaving.to(wide) - output.reshape(leaving.shape).to(wide)
        return before

    def _run(self, block: nn.Module, index: int, batch: slice, site: str | None = None) -> Tensor:
        """Run a compressed block on its stream, for the inputs of a site if one is named."""
        known: dict[str, nn.Module] = {}
        for first in self.writers[:1]:
            if first in self._passed and first != site:
                last, inputs = block.get_submodule(first), self._at("site", first, batch)
                known[first.rpartition(".")[0]] = _KnownAttention(last, inputs)
        with replaced(block, known):
            hidden = self._stored["compressed"][batch].to(self._body.device)
            return self._body.run(block, index, hidden)

    def _at(self, kind: str, path: str, batch: slice) -> Tensor:
        return self._stored[f"{kind} {path}"][batch].to(self._body.device)

    def _store(self, name: str, batch: slice, values: Tensor) -> None:
        if name not in self._stored:
            shape = (self._count, self.length, values.shape[-1])
            self._stored[name] = self._scratch.empty(*shape, dtype=values.dtype)
        # OPT flattens the tokens of all windows before its MLP.
        self._stored[name][batch] = values.reshape(-1, self.length, values.shape[-1])
