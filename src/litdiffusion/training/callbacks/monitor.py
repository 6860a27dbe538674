"""Numbers over the course of a run, and the guard that stops a run whose loss is no number."""

import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from litdiffusion.errors import UserError
from litdiffusion.evaluation.held_out import BINS
from litdiffusion.training.module import LitDiffusion, StepOutput


class Monitor(Callback):
    """Log loss, loss by tenth of 1..T, gradient norm, learning rate and throughput; stop at the first NaN.

    Every value is logged at an optimizer step, with ``images_seen`` beside it as the axis to compare runs on.
    The losses are means over all images since the last line. They travel in checkpoints, so a resumed run logs
    what an uninterrupted one would.

    Args:
        every_n_steps: optimizer steps between lines.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps
        self.loss_sums = torch.zeros(BINS, dtype=torch.float64)
        self.loss_counts = torch.zeros(BINS, dtype=torch.float64)
        self.grad_norm: Tensor | None = None
        self.images_per_second = 0.0
        self.loss: float | None = None
        self.val_loss: float | None = None
        self.validated_step = -1
        self._last_loss: Tensor | None = None
        self._seconds, self._images, self._started = 0.0, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """The unfinished line."""
        return {"loss_sums": self.loss_sums, "loss_counts": self.loss_counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the unfinished line."""
        self.loss_sums, self.loss_counts = state_dict["loss_sums"], state_dict["loss_counts"]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock: it measures steps, and neither sampling, validation nor saving between them."""
        self._started = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Take the norm of the gradient, before it is clipped, where a line is due."""
        if (trainer.global_step + 1) % self.every_n_steps == 0:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a step to the line, and log the line where it is full."""
        assert isinstance(pl_module, LitDiffusion)
        self._add(outputs, pl_module, trainer.world_size)
        step = trainer.global_step
        on_cpu = pl_module.device.type == "cpu"
        if on_cpu or step % self.every_n_steps == 0:  # on a GPU, looking at the loss waits for it
            self.check_loss(trainer)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and step % self.every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run shorter than a line has a loss and a speed too."""
        if self.loss is None and bool(self.loss_counts.sum() > 0):
            self.loss = float(self.loss_sums.sum() / self.loss_counts.sum())
        if not self.images_per_second and self._seconds:
            self.images_per_second = self._images / self._seconds

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the validation loss to the loggers."""
        if trainer.sanity_checking:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self.val_loss, self.validated_step = metrics.get("val/loss"), trainer.global_step
        log_metrics(trainer, metrics)

    def check_loss(self, trainer: Trainer) -> None:
        """Stop the run if the last loss is not finite.

        Raises:
            UserError: naming the step and the checkpoint to return to.
        """
        if self._last_loss is None or bool(torch.isfinite(self._last_loss)):
            return
        raise UserError(
            f"the loss became {float(self._last_loss)} at step {trainer.global_step}; the last good checkpoint is"
            " kept in the run folder: lower optimizer.lr, clip gradients (trainer.gradient_clip_val=1), or train with"
            " trainer.precision=32-true in a new run_dir"
        )

    def _add(self, outputs: StepOutput, module: LitDiffusion, world_size: int) -> None:
        self._last_loss = outputs["loss"].detach()
        bins = ((outputs["t"] - 1) * BINS) // module.denoiser.schedule.num_steps
        losses = outputs["losses"].double()
        self.loss_sums = self.loss_sums.to(losses.device).index_add(0, bins, losses)
        self.loss_counts = self.loss_counts.to(losses.device).index_add(0, bins, torch.ones_like(losses))
        if losses.is_cuda:
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - self._started
        self._images += len(losses) * world_size

    def _log(self, trainer: Trainer, module: LitDiffusion) -> None:
        sums, counts = trainer.strategy.reduce(
            torch.stack((self.loss_sums, self.loss_counts)), reduce_op="sum"
        )
        self.loss = float(sums.sum() / counts.sum())
        self.images_per_second = self._images / self._seconds if self._seconds else 0.0
        metrics = {
            "train/loss": self.loss,
            "train/lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "train/images_per_second": self.images_per_second,
        }
        if self.grad_norm is not None:
            metrics["train/grad_norm"] = float(self.grad_norm)
        metrics |= {f"train/loss_t{i:02d}": float(sums[i] / counts[i]) for i in range(BINS) if counts[i] > 0}
        module.log("train/loss", self.loss, logger=False, rank_zero_only=True)
        log_metrics(trainer, metrics)
        self.loss_sums, self.loss_counts = torch.zeros_like(sums), torch.zeros_like(counts)
        self._seconds, self._images = 0.0, 0


def images_seen(trainer: Trainer) -> int:
    """How many images the weights have been trained on, all processes together."""
    batch_size: int = trainer.datamodule.batch_size  # type: ignore[attr-defined]  # Lightning adds it untyped
    return trainer.global_step * trainer.accumulate_grad_batches * batch_size


def log_metrics(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Send metrics to every logger at the current optimizer step."""
    for logger in trainer.loggers:
        logger.log_metrics({"images_seen": images_seen(trainer), **metrics}, step=trainer.global_step)
