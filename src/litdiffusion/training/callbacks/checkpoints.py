"""When a run is saved. How a checkpoint is written is in ``training/checkpoint_io.py``."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from litdiffusion.training.callbacks.monitor import check_finite, clock_stopped
from litdiffusion.training.checkpoint_io import WholeCheckpointIO


class SaveCheckpoints(Checkpoint):
    """Keep ``last.ckpt`` and, as ``previous.ckpt``, the one before it.

    A checkpoint is taken when the next step begins, that is after everything that belongs to the last one
    (its log line, validation, samples), so that a resumed run repeats nothing and omits nothing.

    Args:
        folder: where checkpoints lie.
        every_n_steps: optimizer steps between checkpoints.
    """

    def __init__(self, folder: str, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be at least 1")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.embedded: dict[str, Any] = {}
        self.saved_step = 0
        self.is_saving = False

    def embed(self, **plain_values: Any) -> None:
        """Set what every checkpoint carries, so that it can be opened without any other file."""
        self.embedded = plain_values

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "last.ckpt"

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the step that was read: it need not be saved again."""
        self.saved_step = checkpoint["global_step"]

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
        """Make the checkpoint self-contained, and its counters those of a finished step."""
        checkpoint.update(self.embedded)
        # Lightning has counted the batch that is about to start. Resumed from that count, the run would count it
        # twice, and validate one step early from then on.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts["ready"] = counts["completed"]

    def save(self, trainer: Trainer, again: bool = False) -> None:
        """Save the current step; one that is saved already only where ``again`` is set.

        Raises:
            UserError: a loss or a weight is not finite; the last good checkpoint stays.
        """
        known = trainer.global_step == self.saved_step
        if known and not again:
            return
        check_finite(trainer)
        self.is_saving = True
        try:
            with clock_stopped(trainer):
                writer = trainer.strategy.checkpoint_io
                if isinstance(writer, WholeCheckpointIO):
                    writer.previous = None if known else self.folder / "previous.ckpt"
                trainer.save_checkpoint(self.last)
        finally:
            self.is_saving = False
        self.saved_step = trainer.global_step
