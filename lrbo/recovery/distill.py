"""End to end: the whole compressed model is trained towards the dense model's distributions."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lrbo.config.distillation import (
    FACTORS,
    MUON,
    SELF,
    SIDES,
    DistillConfig,
    TrainingConfig,
)
from lrbo.errors import ModelError, NonFiniteError
from lrbo.files.atomic import write_text
from lrbo.files.parsing import parse_json, to_json
from lrbo.recovery.judging import windows_in_time
from lrbo.recovery.learning_rate import CLIP, RUNG, learning_rate, rate_factor
from lrbo.recovery.optimizer import optimizer_of
from lrbo.recovery.self_text import sampled_windows
from lrbo.recovery.stage import Recovery, StageReport
from lrbo.recovery.states import read_tensors, write_tensors
from lrbo.recovery.student import Student, Windows
from lrbo.tasks.model_task import Reference

CUTS = 3  # of the learning rate, where looks do not improve
SAYS_SECONDS = 60.0  # between two lines about how it goes
BEST, DENSE, OWN_TEXT = "best.safetensors", "dense.safetensors", "text.safetensors"
CHECKPOINTS, PROGRESS = "checkpoint-", "progress.json"


def run(recovery: Recovery) -> StageReport:
    """Train all parameters towards the distributions of the dense model, and leave the best.

    The loss is ``kl KL(dense || compressed) + ce nll + hidden D`` per token of the training
    windows, with ``D`` of :func:`lrbo.recovery.divergence.hidden_distance`. Windows held back judge
    it, without ``D``: that figure is reported, and the state of its least value is what is left,
    the one before if none is better. Factors in integers are always seen as they will be rounded.
    It goes on from the last checkpoint in the folder, if there is one.

    Raises:
        NonFiniteError: With the step, if a loss or a gradient is not finite; the model then has the
            best state so far.
    """
    return Distillation(recovery).run()


def spent(folder: Path) -> float:
    """Return the seconds of an interrupted run, up to its last checkpoint."""
    files = [*folder.glob(f"{CHECKPOINTS}*/{PROGRESS}")]
    return max((parse_json(f.read_bytes(), str(f))["spent"] for f in files), default=0.0)


class Distillation(TrainerCallback):  # type: ignore[misc]
    """A training by transformers' Trainer, of which it judges, saves and ends the steps.

    Attributes:
        name: Of the stage.
    """

    name: ClassVar[str] = "distill"

    def __init__(self, recovery: Recovery) -> None:
        assert isinstance(recovery.settings, TrainingConfig)
        self.recovery = recovery
        self.settings: TrainingConfig = recovery.settings
        self.student = self._student(self._parameters())
        self.start = self.saved = self.said = time.perf_counter()
        self.before_start = 0.0  # seconds of training before an interruption
        self.step_seconds = self.judge_seconds = 0.0
        self.steps = self.total = self.judged_at = self.best_step = self.worse = self.cuts = 0
        self.before = self.best = math.inf
        self.stopped: str | None = None
        self.best_state: dict[str, Tensor] = {}
        self.lr = self._lr

    def run(self) -> StageReport:
        """Train, judge, and put back the best state, also where training fails."""
        recovery = self.recovery
        recovery.model.eval()
        count = sum(parameter.numel() for parameter in self.student.parameters())
        recovery.reporter.say(f"Stage {self.name} trains {count:,} numbers{self._about()}")
        try:
            self._judged_and_trained()
        finally:
            self._put_back()
        if not self.best < self.before:
            no_better = "no better on the windows that judge: the model is as before"
            self.stopped = "; ".join(filter(None, [self.stopped, no_better]))
        self._say()
        return StageReport(
            self.name,
            self.spent,
            self.steps,
            self.student.tokens,
            self.before,
            min(self.best, self.before),
            self.stopped,
            trained=count,
        )

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Select the parameters to train, by name, and freeze all others.

        Raises:
            ModelError: If nothing is left to train.
        """
        settings, every = self.settings, dict(self.recovery.trainables.named_parameters())
        assert isinstance(settings, DistillConfig)
        is_all = settings.train != FACTORS
        own = {n: p for n, p in every.items() if is_all or n.rpartition(".")[2] in SIDES}
        if not own:
            raise ModelError(
                f"nothing to train: no layer has what train={settings.train} trains, expected "
                "low ranks; take train=all"
            )
        for name, parameter in every.items():
            parameter.requires_grad_(name in own)
        return own

    def _student(self, trained: dict[str, nn.Parameter]) -> Student:
        """Return the loss of what is trained."""
        return Student(self.recovery, trained)

    def _about(self) -> str:
        """Say what the numbers are that are trained, where it is not all of a kind."""
        return ""

    def _state(self) -> dict[str, Tensor]:
        """Copy the parameters that the model has now."""
        return self.recovery.trainables.state()

    def _put_back(self) -> None:
        """Leave the best state so far, in a model of which all is trainable again."""
        trainables = self.recovery.trainables
        trainables.load_state(self.best_state)
        for _, parameter in trainables.named_parameters():
            parameter.requires_grad_()

    def _judged_and_trained(self) -> None:
        recovery = self.recovery
        training = self._text()
        self.total = self._steps(training)
        self.judging = windows_in_time(recovery, None if recovery.tokens is None else self.total)
        self.reference = self._dense_reference()
        checkpoint = self._resumed()
        if checkpoint is None:
            self.best = self.before = self._judge(0)
            self.best_state = self._state()
        if recovery.deadline() <= 0:
            self.stopped = "minutes"
        elif self.steps < self.total:
            try:
                self._find_rate(training)
                if self.lr is not None:
                    self._train(training, self.lr, checkpoint)
            except NonFiniteError as error:
                raise NonFiniteError(self._what_failed(error)) from error

    @property
    def spent(self) -> float:
        """Seconds, those before an interruption included."""
        return self.before_start + time.perf_counter() - self.start

    def progress(self, step: int) -> float:
        """The share of the steps that is done with one, or of the time, if that ends first."""
        left = max(self.recovery.deadline(), 0.0)
        of_time = self.spent / (self.spent + left) if self.spent else 0.0
        return min(max((step + 1) / self.total, of_time), 1.0)

    def _find_rate(self, training: Int[Tensor, "windows tokens"]) -> None:
        """Set the learning rate where none was given, or say why there is none."""
        if self.lr is None:
            judged, trainables = (lambda: self._judged()[0]), self.recovery.trainables
            restore = partial(trainables.load_state, self.best_state)
            self.lr = learning_rate(
                self.student, training, self._optimizer, judged, self.before, restore
            )
            if self.lr is None:
                self.stopped = "no step along the first gradient is better"
                return
            self.recovery.reporter.say(f"Stage {self.name}: learning rate {self.lr:.2g}")
            self.recovery.log(f"{self.name}/lr", self.lr, 0)

    def _train(
        self, training: Int[Tensor, "windows tokens"], lr: float, checkpoint: Path | None
    ) -> None:
        settings, folder = self.settings, self.recovery.folder
        with _own_random_numbers():
            arguments = TrainingArguments(
                output_dir=str(folder), max_steps=self.total, learning_rate=lr,
                per_device_train_batch_size=settings.batch_windows,
                gradient_accumulation_steps=settings.accumulation, max_grad_norm=CLIP,
                seed=self.recovery.seed, data_seed=self.recovery.seed,
                use_cpu=self.recovery.model.device.type == "cpu", disable_tqdm=True, report_to=[],
                logging_strategy="no", save_strategy="no", save_total_limit=2,
                logging_nan_inf_filter=False, remove_unused_columns=False,
                dataloader_pin_memory=False,
            )  # fmt: skip
            arguments._n_gpu = min(arguments.n_gpu, 1)  # several by accelerate, in processes
            optimizer = self._optimizer(lr)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step: rate_factor(self.progress(step), settings.warmup) / RUNG**self.cuts,
            )
            trainer = Trainer(
                self.student,
                arguments,
                train_dataset=Windows(training),
                callbacks=[self],
                optimizers=(optimizer, schedule),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if self.judged_at < self.steps:
                self._judge_step()

    def _optimizer(self, lr: float) -> torch.optim.Optimizer:
        trained = {n.replace("/", "."): p for n, p in self.student.trained.items()}
        return optimizer_of(
            trained,
            self._matrices() if self.settings.optimizer == MUON else (),
            lr=lr,
            weight_decay=self.settings.weight_decay,
            dtype=self.recovery.dense.dtype,
        )

    @property
    def _lr(self) -> float | None:
        assert isinstance(self.settings, DistillConfig)
        return self.settings.lr

    def _matrices(self) -> frozenset[str]:
        """Name the parameters that take Muon's steps, if it is to take them."""
        return self.recovery.trainables.matrices

    def _steps(self, training: Int[Tensor, "windows tokens"]) -> int:
        """Return the number of steps, if time does not end them."""
        settings, tokens = self.settings, self.recovery.tokens
        size = min(settings.batch_windows, len(training))
        if tokens is not None:
            return math.ceil(tokens / (size * settings.accumulation * training.shape[1]))
        return settings.epochs * math.ceil(math.ceil(len(training) / size) / settings.accumulation)

    def on_step_begin(self, *_args: Any, **_: Any) -> None:
        """Note when a step begins."""
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, *_args: Any, **_: Any) -> None:
        """Refuse gradients that are not finite, before they reach a parameter."""
        self.student.require_finite_gradients()

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Judge, save and end a step."""
        self.steps = state.global_step
        self.step_seconds = time.perf_counter() - self.began
        for name, value in self.student.last.items():
            self.recovery.log(f"{self.name}/{name}", value, self.steps)
        if self.steps % self.settings.evaluate_every == 0:
            self._judge_step()
        if time.perf_counter() - self.saved > 60 * self.settings.save_minutes:
            control.should_save = True
        if self.worse >= self.settings.patience and self.cuts < CUTS:
            self.cuts, self.worse = self.cuts + 1, 0
        elif self.worse >= self.settings.patience:
            self.stopped, control.should_training_stop = "no better", True
        elif self.steps < self.total and self.recovery.deadline() < self._reserve:
            self.stopped, control.should_training_stop = "minutes", True

    @property
    def _reserve(self) -> float:
        """Seconds that another step takes, and what follows it."""
        return self.step_seconds + self.judge_seconds

    def on_save(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Write the best state and, last, what makes a checkpoint whole."""
        about = {"loss": self.best, "step": self.best_step}
        write_tensors(self.recovery.folder / BEST, self.best_state, about)
        progress = {
            "before": self.before,
            "worse": self.worse,
            "cuts": self.cuts,
            "spent": self.spent,
            "tokens": self.student.tokens,
            "lr": self.lr,
        }
        folder = self.recovery.folder / f"{CHECKPOINTS}{state.global_step}"
        write_text(folder / PROGRESS, to_json(progress))
        self.saved = time.perf_counter()

    def _judge_step(self) -> None:
        judged, self.judged_at = self._judge(self.steps), self.steps
        if judged < self.best:
            self.best, self.best_step, self.worse = judged, self.steps, 0
            self.best_state = self._state()
        else:
            self.worse += 1
        if time.perf_counter() - self.said > SAYS_SECONDS:
            self._say()

    def _judge(self, step: int) -> float:
        """Score, log and time the windows held back."""
        start = time.perf_counter()
        loss, parts = self._judged()
        for name, value in {**parts, "held_back": loss}.items():
            self.recovery.log(f"{self.name}/{name}", value, step)
        self.judge_seconds = time.perf_counter() - start
        return loss

    def _judged(self) -> tuple[float, dict[str, float]]:
        """Return the loss on the windows held back, of the model as it would be stored."""
        nll, divergence = self.recovery.task.compared(
            self.recovery.model, self.judging, self.reference, 0
        )
        parts = {"held_back_kl": float(divergence.mean()), "held_back_nll": float(nll.mean())}
        settings = self.settings
        return settings.kl * parts["held_back_kl"] + settings.ce * parts["held_back_nll"], parts

    def _resumed(self) -> Path | None:
        """Return the last whole checkpoint, and take over what was known then."""
        folder = self.recovery.folder
        whole = [path.parent for path in folder.glob(f"{CHECKPOINTS}*/{PROGRESS}")]
        best = read_tensors(folder / BEST)
        if not whole or best is None:
            return None
        last = max(whole, key=lambda path: int(path.name.removeprefix(CHECKPOINTS)))
        progress = parse_json((last / PROGRESS).read_bytes(), str(last / PROGRESS))
        self.before, self.worse, self.cuts = (progress[k] for k in ("before", "worse", "cuts"))
        self.before_start, self.student.tokens = progress["spent"], progress["tokens"]
        self.lr = progress["lr"]
        self.best, self.best_step, self.best_state = best[0]["loss"], best[0]["step"], best[1]
        self.steps = self.judged_at = int(last.name.removeprefix(CHECKPOINTS))
        return last

    def _text(self) -> Int[Tensor, "windows tokens"]:
        """Return the training windows, or windows that the dense model writes."""
        recovery, path = self.recovery, self.recovery.folder / OWN_TEXT
        if self.settings.data != SELF:
            return recovery.training
        if (read := read_tensors(path)) is not None:
            return read[1]["ids"]
        ids = sampled_windows(
            recovery.dense,
            recovery.training,
            seed=recovery.seed,
            batch_windows=4 * self.settings.batch_windows,
            reporter=recovery.reporter,
        )
        write_tensors(path, {"ids": ids}, {})
        return ids

    def _dense_reference(self) -> Reference:
        """Score the dense model on the windows that judge, once."""
        recovery, path = self.recovery, self.recovery.folder / DENSE
        if path.exists():
            return recovery.task.load_reference(path)
        reference = recovery.task.measure_dense(recovery.dense, self.judging)
        reference.save(path)
        return reference

    def _say(self) -> None:
        self.said = time.perf_counter()
        self.recovery.reporter.say(
            f"Stage {self.name}: {self.steps:,} steps, {self.student.tokens:,} tokens in "
            f"{self.spent:,.0f} s; on the windows that judge {self.before:.4f} before, best "
            f"{min(self.best, self.before):.4f}"
        )

    def _what_failed(self, error: NonFiniteError) -> str:
        return (
            f"stage {self.name}, step {self.steps + 1}: {error}; the model has the best state so "
            f"far, of step {self.best_step}. Begin again with a smaller recover.{self.name}.lr, or "
            "model.dtype=float32"
        )


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Give generators of random numbers back as they were: the Trainer seeds all of them."""
    before = random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(before)
