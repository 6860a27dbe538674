"""Numbers over the course of a run; a run whose loss is not finite is stopped."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from litdiffusion.diffusion.devices import precise_dtype, to_device
from litdiffusion.evaluation.metric import BINS, TENTHS, tenth_of
from litdiffusion.system.processes import gathered, rank_and_number
from litdiffusion.training.callbacks.attached import get_callback
from litdiffusion.training.callbacks.nan_guard import check_weights, diverged
from litdiffusion.training.module import LitDiffusion, StepOutput

STATE = ("loss", "validated", "validated_step", "images_per_second")
"""What of a ``Monitor`` a checkpoint keeps beside its unfinished line."""


class Monitor(Callback):
    """Log loss (by noise level, too), gradient norm, learning rate and throughput; stop at the first NaN.

    What is logged by ``self.log``, in the module or in a callback, joins the row: the latest value since the last
    one. The losses are means over all images since the last line, weighted where some times are drawn more often than
    others. All of these travel in checkpoints, so a resumed run logs what an uninterrupted one would, and sums up
    what one resumed at its end has left. The losses are summed on the device: on a GPU, only the steps that log a
    line wait for it.

    Args:
        every_n_steps: optimizer steps between lines.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps
        self.line = torch.zeros(2, BINS, dtype=torch.float64)  # sums of losses and of weights
        self.grad_norm: Tensor | None = None
        self.images_per_second = 0.0
        self.loss: float | None = None
        self.validated: dict[str, float] = {}
        self.row: dict[str, float] | None = None  # complete but for what the hooks after this one log
        self.logged: dict[str, Tensor | float] = {}
        self.validated_step = -1
        self.clock = Clock()
        self._images = 0
        self._nonfinite_since: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """The unfinished line, as each process has it, and what the last ones said; all processes call this."""
        kept = {name: getattr(self, name) for name in STATE}
        return {**kept, "logged": floats(self.logged), "line": torch.stack(gathered(self.line.cpu()))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the unfinished line: each process its own, or the first one all, if their number has changed."""
        for name in (*STATE, "logged"):
            setattr(self, name, state_dict[name])
        line: Tensor = state_dict["line"]
        rank, number = rank_and_number()
        if number == len(line):
            self.line = line[rank]
        elif rank == 0:
            self.line = line.sum(0)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock with the first step; from then on the wait for data counts as well."""
        self._log_row(trainer, pl_module)
        self.clock.start(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Take the norm of the gradient, before it is clipped, where a line is due."""
        if (trainer.global_step + 1) % self.every_n_steps == 0:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients)
            if isinstance(trainer.strategy, FSDPStrategy):  # each process holds a part of each gradient
                self.grad_norm = trainer.strategy.reduce(self.grad_norm.square(), reduce_op="sum").sqrt()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a step to the line, and sum the line up where it is full."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        step = trainer.global_step + (not stepped)
        self._add(outputs, trainer.world_size, step)
        due = step % self.every_n_steps == 0
        if due or pl_module.device.type == "cpu":  # on a GPU, looking at the loss waits for it
            self.check_loss(trainer)
        if stepped and due:
            self.row = self._sum_up(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have callbacks find the loss of the last line, as they would have without an interruption."""
        if self.loss is not None:
            trainer.callback_metrics["train/loss"] = torch.tensor(self.loss)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run shorter than a line has a loss and a speed too."""
        self._log_row(trainer, pl_module)
        self.clock.stop(trainer)
        self.check_loss(trainer)
        sums, weights = self._line_of_all(trainer)
        if self.loss is None and bool(weights.sum() > 0):
            self.loss = float(sums.sum() / weights.sum())
        if not self.images_per_second:
            self.images_per_second = self._speed()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exclude validation from the throughput."""
        self._log_row(trainer, pl_module)
        self.clock.stop(trainer)
        check_finite(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand what validation has measured to the loggers."""
        assert isinstance(pl_module, LitDiffusion)
        measured = floats(pl_module.take_logged(training=False))
        if not trainer.sanity_checking:
            self.validated, self.validated_step = measured, trainer.global_step
            log_metrics(trainer, measured)
        self.clock.start(trainer)

    def check_loss(self, trainer: Trainer) -> None:
        """Stop the run if a loss was not finite, on any process; all of them must call this.

        Raises:
            UserError: naming the step and the checkpoint to return to.
        """
        if self._nonfinite_since is None:
            return
        step = int(trainer.strategy.reduce(self._nonfinite_since.float(), reduce_op="max"))
        if step:
            raise diverged(trainer, "the loss", step)

    def _add(self, outputs: StepOutput, world_size: int, step: int) -> None:
        output = outputs["output"]
        losses = output.losses.detach().to(precise_dtype(output.losses.device))
        weights = torch.ones_like(losses) if output.weights is None else output.weights.to(losses)
        t = torch.ones_like(losses) if output.t is None else output.t
        added = torch.stack((weights * losses, weights))
        bins = tenth_of(t)
        self.line = to_device(self.line.to(losses.dtype), losses.device).index_add(1, bins, added)
        self._images += len(losses) * world_size
        # Which step was the first is kept on the device: reading it is what waits.
        since = torch.zeros_like(bins[0]) if self._nonfinite_since is None else self._nonfinite_since
        sound = torch.isfinite(outputs["loss"].detach()) | (since > 0)
        self._nonfinite_since = torch.where(sound, since, step)

    def _log_row(self, trainer: Trainer, module: LightningModule) -> None:
        """Add what has been logged meanwhile, before anything is saved, and log the row if there is one."""
        assert isinstance(module, LitDiffusion)
        self.logged |= module.take_logged(training=True)
        if self.row is not None:
            log_metrics(trainer, self.row | floats(self.logged))
            self.row, self.logged = None, {}

    def _sum_up(self, trainer: Trainer) -> dict[str, float]:
        sums, weights = self._line_of_all(trainer)
        self.loss = float(sums.sum() / weights.sum())
        self.clock.stop(trainer)
        self.images_per_second = self._speed()
        metrics = {
            "train/loss": self.loss,
            "train/lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "train/images_per_second": self.images_per_second,
        }
        if self.grad_norm is not None:
            metrics["train/grad_norm"] = float(self.grad_norm)
        for tenth, total, weight in zip(TENTHS, sums.tolist(), weights.tolist(), strict=True):
            if weight:
                metrics[f"train/loss{tenth}"] = total / weight
        trainer.callback_metrics["train/loss"] = torch.tensor(self.loss)
        self.line = torch.zeros_like(self.line)
        self._images = 0
        self.clock.restart(trainer)
        return metrics

    def _line_of_all(self, trainer: Trainer) -> Tensor:
        return trainer.strategy.reduce(
            self.line.clone(), reduce_op="sum"
        ).cpu()  # a clone: it may sum in place

    def _speed(self) -> float:
        return self._images / self.clock.seconds if self.clock.seconds else 0.0


class Clock:
    """A stopwatch for the training alone. It waits for the device when it is stopped or started, never between."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def start(self, trainer: Trainer) -> None:
        """Start, unless it runs."""
        if self._since is None:
            self._since = _now(trainer)

    def stop(self, trainer: Trainer) -> None:
        """Stop, if it runs."""
        if self._since is not None:
            self.seconds += _now(trainer) - self._since
            self._since = None

    def restart(self, trainer: Trainer) -> None:
        """Run from 0."""
        self.seconds, self._since = 0.0, None
        self.start(trainer)


@contextmanager
def clock_stopped(trainer: Trainer) -> Iterator[None]:
    """Pause the training clock, if there is one, inside the block."""
    monitor = get_callback(trainer, Monitor)
    if monitor is None:
        yield
        return
    monitor.clock.stop(trainer)
    yield
    monitor.clock.start(trainer)


def check_finite(trainer: Trainer) -> None:
    """Stop the run rather than save, show or measure a model that has diverged.

    Raises:
        UserError: a loss or a weight was not finite.
    """
    if monitor := get_callback(trainer, Monitor):
        monitor.check_loss(trainer)
    check_weights(trainer)


def log_metrics(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Send metrics to every logger at the current optimizer step, past the reach of ``kill -9``."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def floats(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Read values off the device."""
    return {name: float(value) for name, value in values.items()}


def _now(trainer: Trainer) -> float:
    """The time when the device has done all it was given."""
    device = trainer.strategy.root_device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
