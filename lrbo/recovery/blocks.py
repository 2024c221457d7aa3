"""Block by block: the compressed stream comes in, and the dense stream's output is the target."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrbo.calibration.collect import batches_of
from lrbo.config.distillation import MUON
from lrbo.config.recovery import BlocksConfig
from lrbo.errors import NonFiniteError
from lrbo.models.blockwise import Scratch
from lrbo.recovery.block_windows import windows_in_time
from lrbo.recovery.gradients import Metric, output_metrics, windows_for
from lrbo.recovery.learning_rate import rate_factor
from lrbo.recovery.optimizer import optimizer_of
from lrbo.recovery.stage import Recovery, StageReport
from lrbo.recovery.states import read_tensors, write_tensors
from lrbo.tasks.model_task import Segments

NAME = "blocks"
CLIP = 1.0  # largest norm of a gradient, of a loss that begins at 1
CHECKS = 5  # of a block on the windows held back, after equal numbers of steps
PATIENCE = 2  # checks in a row that are worse than the best
MOMENTS = "gradients.safetensors"


def run(recovery: Recovery) -> StageReport:
    """Train the parameters of one block after the other, each towards the dense model's output.

    The input of a block is what the blocks before it, already trained, make of the text; its target
    is the output of the dense block in the dense model, so that errors do not add up (AA-SVD). The
    parameters that were best on the windows held back stay: those from before, if none were better.
    Only one block and its optimizer are in training, beside two hidden states of all windows.

    The loss that is reported is the sum over blocks of what the errors of their outputs on windows
    held back come to, by themselves: nats per token with ``weighting=gradient``, else mean squares.

    Raises:
        NonFiniteError: If a loss is not finite, naming block and step.
        StatisticsError: If a gradient of the dense model is not finite.
    """
    return _Work(recovery).run()


def spent(folder: Path) -> float:
    """Return the seconds that the finished blocks of an interrupted run took."""
    files = sorted(folder.glob("block_*.safetensors"))
    return sum(
        float(read[0]["seconds"]) for file in files if (read := read_tensors(file)) is not None
    )


class BlockLoss:
    """The mean error of a block's output over tokens, weighed or plain."""

    def __init__(self, metric: Metric | None, device: torch.device) -> None:
        self.metric = None if metric is None else Metric(metric.moment.to(device), metric.most)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss in float32."""
        error = output.float() - target.float()
        if self.metric is None:
            return error.square().mean()
        return self.metric.cost(error, target).mean()


class _Work:
    """Both streams, and what is trained of the block that they have come to."""

    def __init__(self, recovery: Recovery) -> None:
        self.recovery, self.settings = recovery, recovery.settings
        assert isinstance(self.settings, BlocksConfig)
        self.dense, self.body = (
            recovery.task.segments(model) for model in (recovery.dense, recovery.model)
        )
        self.scratch = Scratch(int(self.settings.memory_gib * 2**30))
        self.step_seconds: float | None = None  # what parts of the work take, as last measured
        self.pass_seconds = 0.0
        is_muon = self.settings.optimizer == MUON
        self.matrices = recovery.trainables.matrices if is_muon else frozenset[str]()
        self.names = {id(p): name for name, p in recovery.trainables.named_parameters()}

    def run(self) -> StageReport:
        """Go through the blocks."""
        start, count = time.perf_counter() - spent(self.recovery.folder), len(self.body)
        metrics = self._metrics()
        parts = windows_in_time(self.recovery, self.dense, CHECKS)
        self.windows, self.seen = torch.cat(parts), len(parts[0])
        size = self.settings.batch_windows
        self.fitting = batches_of(0, self.seen, size)
        self.judging = batches_of(self.seen, len(self.windows), size)
        streams = [self._embedded(body) for body in (self.dense, self.body)]
        rows, trained = list[dict[str, Any]](), 0
        with self.recovery.reporter.step("Blocks", count, "blocks") as advance:
            for index in range(count):
                self._advance(self.dense, index, streams[0])
                loss = BlockLoss(None if metrics is None else metrics[index], self.body.device)
                with self.body.open_block(index) as block:
                    row = self._resumed(index) or self._train(block, index, streams, loss)
                    trained += sum(p.numel() for p in block.parameters() if id(p) in self.names)
                rows.append(row)
                if index < count - 1:
                    self._advance(self.body, index, streams[1])
                for name in ("before", "after"):
                    self.recovery.log(f"{NAME}/{name}", row[name], index)
                advance(1)
        before, after = (sum(row[name] for row in rows) for name in ("before", "after"))
        kept = sum(row["after"] >= row["before"] for row in rows)
        short = sum(row["stopped"] == "minutes" for row in rows)
        stopped = [f"{kept} of {count} blocks stay what they were: no better"] if kept else []
        stopped += (
            [f"{short} of {count} blocks had fewer steps than asked: minutes"] if short else []
        )
        return StageReport(
            NAME,
            time.perf_counter() - start,
            sum(row["steps"] for row in rows),
            sum(row["tokens"] for row in rows),
            before,
            after,
            "; ".join(stopped) or None,
            tuple(rows),
            trained,
        )

    def _metrics(self) -> list[Metric] | None:
        """Gather the metrics that weigh the errors of outputs, or read them if they were."""
        if self.settings.weighting == "none":
            return None
        path = self.recovery.folder / MOMENTS
        if (read := read_tensors(path)) is not None:
            scales = read[0]["scales"]
            return [Metric(read[1][str(index)], most) for index, most in enumerate(scales)]
        training = self.recovery.training
        width = self.recovery.dense.get_input_embeddings().weight.shape[1]
        count = windows_for(int(width), *training.shape)
        sample = training[[index * len(training) // count for index in range(count)]]
        steps = 2 * len(self.body)
        with self.recovery.reporter.step("Gradients of blocks", steps, "blocks") as advance:
            metrics = output_metrics(
                self.recovery.dense,
                self.recovery.task,
                sample,
                seed=self.recovery.seed,
                batch_windows=self.settings.batch_windows,
                scratch=Scratch(int(self.settings.memory_gib * 2**30)),
                on_block=advance,
            )
        tensors = {str(index): metric.moment for index, metric in enumerate(metrics)}
        scales = [metric.most for metric in metrics]
        write_tensors(path, tensors, {"windows": count, "scales": scales})
        return metrics

    def _embedded(self, body: Segments) -> Tensor:
        states: Tensor | None = None
        with torch.no_grad():
            for batch in [*self.fitting, *self.judging]:
                hidden = body.embed(self.windows[batch])
                if states is None:
                    shape = (len(self.windows), *hidden.shape[1:])
                    states = self.scratch.empty(*shape, dtype=hidden.dtype)
                states[batch] = hidden.to(states)
        assert states is not None
        return states

    def _advance(self, body: Segments, index: int, states: Tensor) -> None:
        """Replace the states of all windows by what a block makes of them."""
        start = time.perf_counter()
        with body.open_block(index) as block, torch.no_grad():
            for batch in [*self.fitting, *self.judging]:
                states[batch] = body.run(block, index, states[batch].to(body.device)).to(states)
        self.pass_seconds = time.perf_counter() - start

    def _resumed(self, index: int) -> dict[str, Any] | None:
        """Take over a block that was finished before an interruption."""
        read = read_tensors(self._file(index))
        if read is None:
            return None
        row, tensors = read
        self.recovery.trainables.load_state(tensors)
        return row

    def _file(self, index: int) -> Path:
        return self.recovery.folder / f"block_{index:03d}.safetensors"

    def _train(
        self, block: nn.Module, index: int, streams: Sequence[Tensor], loss: BlockLoss
    ) -> dict[str, Any]:
        start = time.perf_counter()
        target, entering = streams
        own = {self.names[id(p)]: p for p in block.parameters() if id(p) in self.names}
        training = _Training(self, block, index, own, entering, target, loss)
        row = training.run() if own else training.idle()
        row["seconds"] = time.perf_counter() - start
        tensors = {name: parameter.detach() for name, parameter in own.items()}
        write_tensors(self._file(index), tensors, row)
        return row


class _Training:
    """The steps of one block."""

    def __init__(
        self,
        work: _Work,
        block: nn.Module,
        index: int,
        own: Mapping[str, nn.Parameter],
        entering: Tensor,
        target: Tensor,
        loss: BlockLoss,
    ) -> None:
        self.work, self.block, self.index, self.own = work, block, index, own
        self.entering, self.target, self.loss = entering, target, loss
        self.settings = work.settings

    def idle(self) -> dict[str, Any]:
        """Report a block without anything to train."""
        judged = self._judged()
        return self._row(judged, judged, 0, None)

    def run(self) -> dict[str, Any]:
        """Train, and leave the parameters that were best on the windows held back."""
        start = time.perf_counter()
        before = best = self._judged()
        if before == 0:
            return self._row(before, before, 0, None)
        kept = self._copy()
        steps, stopped = self._planned(before, time.perf_counter() - start)
        optimizer = optimizer_of(
            self.own,
            self.work.matrices,
            lr=self.settings.lr,
            weight_decay=self.settings.weight_decay,
            dtype=self.entering.dtype,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_factor((step + 1) / steps, self.settings.warmup)
        )
        checks = {math.ceil(steps * (at + 1) / CHECKS) for at in range(CHECKS)}
        worse = done = 0
        seconds = 0.0
        for step, windows in enumerate(self._batches(steps), start=1):
            start = time.perf_counter()
            optimizer.zero_grad()
            torch.autograd.backward(self._loss_of(windows, before, step))
            nn.utils.clip_grad_norm_(self.own.values(), CLIP)
            optimizer.step()
            schedule.step()
            done = step
            seconds += time.perf_counter() - start
            if step not in checks:
                continue
            judged = self._judged(step)
            part = CHECKS * self.index + math.ceil(CHECKS * step / steps)
            self.work.recovery.log(f"{NAME}/held_back", judged / before, part)
            if judged < best:
                best, kept, worse = judged, self._copy(), 0
            else:
                worse += 1
            if worse == PATIENCE and step < steps:
                stopped = "no better"
                break
        if done:
            self.work.step_seconds = seconds / done
        self.work.recovery.trainables.load_state(kept)
        return self._row(before, best, done, stopped)

    def _planned(self, before: float, check_seconds: float) -> tuple[int, str | None]:
        """Return the number of steps, and why it is less than what was asked for.

        All blocks that are left have as many, with the passes of both streams and the checks.
        """
        work, settings = self.work, self.settings
        recovery = work.recovery
        each = settings.batch_windows * work.windows.shape[1]
        if recovery.tokens is None:
            steps = settings.epochs * math.ceil(work.seen / settings.batch_windows)
        else:
            steps = math.ceil(recovery.tokens / each)
        if work.step_seconds is None:  # the first run is slower than all others
            for _ in range(2):
                start = time.perf_counter()
                torch.autograd.backward(self._loss_of(next(self._batches(1)), before, 0))
                work.step_seconds = time.perf_counter() - start
        blocks = len(work.body) - self.index
        others = (2 * blocks - 1) * work.pass_seconds
        others += ((CHECKS + 1) * blocks - 1) * check_seconds
        left = (recovery.deadline() - others) / blocks
        possible = int(left / max(work.step_seconds or 0.0, 1e-6))
        return (steps, None) if steps <= possible else (max(possible, 1), "minutes")

    def _batches(self, steps: int) -> Any:
        """Yield the windows of each step, in an order that seed and block decide."""
        generator = torch.Generator().manual_seed(self.work.recovery.seed * 1000 + self.index)
        size, order = self.settings.batch_windows, torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            while len(order) < size:
                order = torch.cat([order, torch.randperm(self.work.seen, generator=generator)])
            yield order[:size]
            order = order[size:]

    def _loss_of(self, windows: Tensor, before: float, step: int) -> Tensor:
        """Return the loss of some windows, as a share of that before."""
        device = self.work.body.device
        entering, target = (each[windows].to(device) for each in (self.entering, self.target))
        with torch.enable_grad():
            output = self.work.body.run(self.block, self.index, entering)
            loss = self.loss(output, target) / before
        self._require_finite(loss, step)
        return loss

    def _judged(self, step: int = 0) -> float:
        """Return the loss on the windows held back."""
        device, total, count = self.work.body.device, 0.0, 0
        with torch.no_grad():
            for batch in self.work.judging:
                output = self.work.body.run(self.block, self.index, self.entering[batch].to(device))
                loss = self.loss(output, self.target[batch].to(device))
                self._require_finite(loss, step)
                total += float(loss) * len(output)
                count += len(output)
        return total / count

    def _require_finite(self, loss: Tensor, step: int) -> None:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"stage {NAME}: the loss of block {self.index} is {value} at step {step}, "
                f"expected a number; the blocks before it are kept in {self.work.recovery.folder}. "
                "Begin again with a smaller recover.blocks.lr, or model.dtype=float32"
            )

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.own.items()}

    def _row(self, before: float, after: float, steps: int, stopped: str | None) -> dict[str, Any]:
        tokens = steps * self.settings.batch_windows * self.work.windows.shape[1]
        return {
            "block": self.index,
            "before": before,
            "after": after,
            "steps": steps,
            "tokens": tokens,
            "stopped": stopped,
        }
