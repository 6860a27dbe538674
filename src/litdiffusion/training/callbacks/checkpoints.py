"""When a run is saved. How a checkpoint is written is in ``training/checkpoint_io.py``."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from litdiffusion.errors import UserError
from litdiffusion.training.callbacks.monitor import Monitor


class SaveCheckpoints(Checkpoint):
    """Keep ``last.ckpt`` and, as ``previous.ckpt``, the one before it.

    A checkpoint is taken when the next step begins, that is after everything that belongs to the last one
    (its log line, validation, samples), so that a resumed run repeats nothing and omits nothing.

    Args:
        folder: where checkpoints lie.
        every_n_steps: optimizer steps between checkpoints.
        model_config: what rebuilds denoiser, sampler and loss, as plain values.
        data_config: what rebuilds the data source, as plain values.
    """

    def __init__(
        self,
        folder: str,
        every_n_steps: int,
        model_config: dict[str, Any],
        data_config: dict[str, Any],
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be at least 1")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.model_config = model_config
        self.data_config = data_config
        self.saved_step = 0

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run need not save what it has just read."""
        self.saved_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save where a checkpoint is due."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run."""
        self.save(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Make the checkpoint self-contained."""
        checkpoint["model_config"] = self.model_config
        checkpoint["data_config"] = self.data_config

    def save(self, trainer: Trainer) -> None:
        """Save the current step, unless it is saved already.

        Raises:
            UserError: the loss or a weight is not finite; the last good checkpoint stays.
        """
        if trainer.global_step == self.saved_step:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning adds it untyped
            if isinstance(callback, Monitor):
                callback.check_loss(trainer)
        if not all(bool(torch.isfinite(p).all()) for p in trainer.lightning_module.parameters()):
            raise UserError(
                f"a weight became infinite or NaN by step {trainer.global_step}; the last good checkpoint is kept:"
                " lower optimizer.lr or train with trainer.precision=32-true in a new run_dir"
            )
        if trainer.is_global_zero and self.last.exists():
            self._keep_as_previous()
        trainer.save_checkpoint(self.last)
        self.saved_step = trainer.global_step

    def _keep_as_previous(self) -> None:
        """Give the file a second name; at no moment is there no ``last.ckpt``."""
        temporary = self.folder / ".previous.ckpt"
        temporary.unlink(missing_ok=True)
        os.link(self.last, temporary)
        temporary.replace(self.folder / "previous.ckpt")
