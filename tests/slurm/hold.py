"""Imported by the jobs themselves: makes a run wait in its middle, so that what happens to it happens there."""

import time
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
