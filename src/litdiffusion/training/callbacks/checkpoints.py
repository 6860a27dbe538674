"""When a run is saved. How a checkpoint is written is in ``training/checkpoint_io.py``."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from litdiffusion.errors import UserError
from litdiffusion.system.files import hardlink
from litdiffusion.training.callbacks.attached import get_callback
from litdiffusion.training.callbacks.monitor import Monitor, check_finite, clock_stopped
from litdiffusion.training.callbacks.quality import MeasureSamples
from litdiffusion.training.module import LitDiffusion


class SaveCheckpoints(Checkpoint):
    """Keep ``last.ckpt`` and, as ``previous.ckpt``, the one before it; ``best.ckpt`` and milestones where asked for.

    A checkpoint is taken when the next step begins, that is after everything that belongs to the last one
    (its log line, validation, samples), so that a resumed run repeats nothing and omits nothing.

    Args:
        folder: where checkpoints lie.
        every_n_steps: optimizer steps between checkpoints.
        best: a number of the validation, such as ``val_loss`` or ``val_fid``; the checkpoint at which it was best is
            kept as ``best.ckpt``. None for none.
        milestones: steps whose checkpoints are kept for good, as ``step-0010000.ckpt``.
    """

    def __init__(
        self, folder: str, every_n_steps: int, best: str | None = None, milestones: Sequence[int] = ()
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be at least 1")
        if any(step < 1 for step in milestones):
            raise ValueError(f"milestones={list(milestones)}: each must be at least 1")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.best = best
        self.milestones = frozenset(milestones)
        self.best_value: float | None = None
        self.best_step = -1
        self.higher_is_better = False
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out whether the number that decides is better higher or lower.

        Raises:
            UserError: the run does not measure it.
        """
        if self.best is None:
            return
        assert isinstance(pl_module, LitDiffusion)
        measured = pl_module.all_metrics if get_callback(trainer, MeasureSamples) else pl_module.metrics
        metrics = {f"val_{name}": metric for name, metric in measured.items()}
        if self.best not in metrics:
            raise UserError(
                f"callbacks.save_checkpoints.best={self.best}: not measured in this run; choose {', '.join(metrics)}"
            )
        self.higher_is_better = metrics[self.best].higher_is_better

    def state_dict(self) -> dict[str, Any]:
        """Return what the best checkpoint was."""
        return {"best_value": self.best_value, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what the best checkpoint was."""
        self.best_value, self.best_step = state_dict["best_value"], state_dict["best_step"]

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
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step in self.milestones or self._is_best(trainer)
        if batch_idx % trainer.accumulate_grad_batches == 0 and due:
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
            self._keep(trainer)  # a kill may have come between the checkpoint and its further names
            return
        check_finite(trainer)
        if self._is_best(trainer):
            self.best_value, self.best_step = self._validated(trainer), trainer.global_step
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
        self._keep(trainer)

    def _keep(self, trainer: Trainer) -> None:
        """Give the last checkpoint its further names."""
        if not trainer.is_global_zero:
            return
        if self.best_step == self.saved_step:
            hardlink(self.last, self.folder / "best.ckpt")
        if self.saved_step in self.milestones:
            hardlink(self.last, self.folder / f"step-{self.saved_step:07d}.ckpt")

    def _is_best(self, trainer: Trainer) -> bool:
        value = self._validated(trainer)
        if value is None or not math.isfinite(value) or self.best_step == trainer.global_step:
            return False
        sign = -1 if self.higher_is_better else 1
        return self.best_value is None or sign * value < sign * self.best_value

    def _validated(self, trainer: Trainer) -> float | None:
        """Return the number that decides which checkpoint is best, where this step was validated."""
        monitor = get_callback(trainer, Monitor)
        if self.best is None or monitor is None or monitor.validated_step != trainer.global_step:
            return None
        return monitor.validated.get(self.best.replace("val_", "val/", 1))
