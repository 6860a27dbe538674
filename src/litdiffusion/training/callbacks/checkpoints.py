"""When a run is saved. How a checkpoint is written is in ``training/checkpoint_io.py``."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from litdiffusion.training.callbacks.monitor import check_finite, clock_stopped


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
        """Note the step that was read, which need not be saved again; stop where a callback had stopped the run."""
        self.saved_step = checkpoint["global_step"]
        is_own = Path(str(trainer.ckpt_path)).parent == self.folder
        trainer.should_stop = is_own and checkpoint.get("stopped_before", -1) >= trainer.max_steps

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
        """Make the checkpoint self-contained, and its counters those of the end of a step.

        From there Lightning resumes with the next one, whichever hook has saved. From a count that includes the batch
        that is about to start, it would validate one step early from then on; from one of a finished step, it would
        count a step with a validation twice in what it logs.
        """
        checkpoint.update(self.embedded, optimizer=type(trainer.optimizers[0]).__name__)
        if trainer.should_stop:
            checkpoint["stopped_before"] = trainer.max_steps
        loop = checkpoint["loops"]["fit_loop"]
        progress = loop["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            done = counts["processed"]
            counts.update(ready=done, started=done, completed=done - 1)
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - 1

    def save(self, trainer: Trainer, again: bool = False) -> None:
        """Save the current step; one that is saved already only where ``again`` is set.

        Raises:
            UserError: a loss or a weight is not finite; the last good checkpoint stays.
        """
        known = trainer.global_step == self.saved_step
        if known and not again:
            return
        check_finite(trainer)
        writer: Any = trainer.strategy.checkpoint_io
        self.is_saving = True
        try:
            with clock_stopped(trainer):
                writer.previous = None if known else self.folder / "previous.ckpt"
                trainer.save_checkpoint(self.last)
        finally:
            self.is_saving = False
            writer.previous = None  # a ModelCheckpoint beside this one keeps no previous file
        self.saved_step = trainer.global_step
