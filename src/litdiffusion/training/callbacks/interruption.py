"""Ctrl-C, SIGTERM, and the signals by which Slurm announces the end: finish the step, save it, stop."""

import signal
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from litdiffusion.training.callbacks.checkpoints import SaveCheckpoints

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""USR1 is what ``scripts/slurm`` asks for before the time limit, USR2 what submitit asks for."""


class Interrupted(BaseException):
    """The run was asked to stop, has saved its state, and can be continued."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum
        self.step = step


class StopCleanly(Callback):
    """Turn a signal into a checkpoint and ``Interrupted``; a Ctrl-C after it stops at once.

    Slurm repeats itself: at the time limit, SIGTERM comes twice.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers, in place of Lightning's, which leave without saving."""
        self._previous = {signum: signal.signal(signum, self._note) for signum in SIGNALS}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the old handlers back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the old handlers back."""
        self._restore()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop here, between two steps, where everything is whole.

        Raises:
            Interrupted: after saving, if a signal has come in.
        """
        if self.received is None or batch_idx % trainer.accumulate_grad_batches:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning adds it untyped
            if isinstance(callback, SaveCheckpoints):
                callback.save(trainer)
        raise Interrupted(self.received, trainer.global_step)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
        elif signum == signal.SIGINT:
            self._restore()
            raise KeyboardInterrupt

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
