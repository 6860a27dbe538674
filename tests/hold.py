"""Imported by the runs themselves: makes one wait in its middle, so that what happens to it happens there."""

import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from litdiffusion.training.callbacks import StopCleanly

PATIENCE_SECONDS = 300


class Hold(Callback):
    """Wait after ``step`` steps until a signal has come. The step after it is still finished and saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        stop = next(callback for callback in trainer.callbacks if isinstance(callback, StopCleanly))
        deadline = time.monotonic() + PATIENCE_SECONDS
        while trainer.global_step == self.step and stop.received is None:
            assert time.monotonic() < deadline, "no signal has come"
            time.sleep(0.02)


class EndlessValidation(Callback):
    """The validation after ``step`` steps never ends, the first time; ``begun`` is a file that says that it has."""

    def __init__(self, step: int, begun: str) -> None:
        self.step, self.begun = step, Path(begun)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.begun.exists():
            self.begun.touch()
            time.sleep(PATIENCE_SECONDS)
            raise AssertionError("nothing has ended it")


class SlowToLeave(Callback):
    """The first process takes its time, as a logger may that still has to upload something."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero:
            time.sleep(12)
