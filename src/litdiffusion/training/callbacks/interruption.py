"""Ctrl-C, SIGTERM, SIGHUP, and the signals by which Slurm announces the time limit: finish the step, save it, stop.

A validation or sampling between two steps may take longer than the time that Slurm leaves. Then the run stops in the
middle of it, and continues from its last checkpoint: a job that Slurm kills is not requeued.
"""

import math
import signal
import threading
import time
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Never

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from litdiffusion.system.processes import handling, stop_signals
from litdiffusion.training.callbacks.attached import get_callback
from litdiffusion.training.callbacks.checkpoints import SaveCheckpoints

AGREE_EVERY = 8
"""Steps between two agreements of several processes on whether to stop: to agree, they wait for each other."""

SLOW_SECONDS = 1.0
"""Where a step of any process takes longer, they agree at every step: then waiting costs little."""


class Interrupted(BaseException):
    """The run was asked to stop. It can be continued from this step, or from step ``saved`` where that is given."""

    def __init__(self, signum: int, step: int, saved: int | None = None) -> None:
        lost = "" if saved in (None, step) else f", of which {saved} are saved"
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}{lost}")
        self.signum = signum
        self.step = step


class StopCleanly(Callback):
    """Turn a signal into a checkpoint and ``Interrupted``; a Ctrl-C after it stops at once.

    Signals may be repeated: at the time limit, Slurm sends SIGTERM twice. When the training ends, in whatever way,
    Lightning restores the handlers that it found.

    Args:
        grace_seconds: from a signal, how long the run may take to come to the end of a step; then it stops without
            saving. Less than what ``scripts/slurm`` and ``hydra/launcher=slurm`` have Slurm leave, which is two
            minutes.
    """

    def __init__(self, grace_seconds: float = 80.0) -> None:
        if grace_seconds <= 0:
            raise ValueError(f"grace_seconds={grace_seconds}: must be above 0")
        self.grace_seconds = grace_seconds
        self.received: int | None = None
        self._agree_every = 1
        self._agreed_at: tuple[int, float] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have our handlers installed in place of Lightning's, which exit without saving.

        Lightning would act on a SIGTERM from before the first step even where its handler has been replaced since.
        """
        if stage != "fit":
            return
        connector = trainer._signal_connector

        def install() -> None:
            connector._original_handlers = connector._get_current_signal_handlers()
            if trainer.training or trainer.sanity_checking:  # a validation by itself has handlers of its own
                for signum in stop_signals():
                    signal.signal(signum, self._note)
                signal.signal(signal.SIGALRM, lambda signum, frame: self._out_of_time(trainer))

        connector.register_signal_handlers = install  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop between two steps, where the state is consistent.

        Raises:
            Interrupted: after saving, if a signal has come in.
        """
        if batch_idx % trainer.accumulate_grad_batches:
            return
        if trainer.world_size > 1 and trainer.global_step % self._agree_every:
            return
        signum = self._agree(trainer)
        if signum is None:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        if saving := get_callback(trainer, SaveCheckpoints):
            saving.save(trainer)
        raise Interrupted(signum, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree once more after the last step."""
        self._agree(trainer)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let nothing interrupt the end of the training."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        stop_child_observer()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop after the last step as after any other: it is saved by now.

        Raises:
            Interrupted: if a signal has come in since the last step began.
        """
        signal.setitimer(signal.ITIMER_REAL, 0)
        if stage == "fit" and self.received is not None:
            raise Interrupted(self.received, trainer.global_step)

    def _agree(self, trainer: Trainer) -> int | None:
        """Return the signal on which all processes stop after this step, or None: it is enough that one received it.

        A signal that comes in while they agree counts the next time.
        """
        if trainer.world_size == 1:
            return self.received
        mine = [float(self.received or 0), self._seconds_per_step(trainer.global_step)]
        agreed, slowest = trainer.strategy.reduce(
            torch.tensor(mine, device=trainer.strategy.root_device), reduce_op="max"
        ).tolist()
        self._agree_every = 1 if slowest > SLOW_SECONDS else AGREE_EVERY
        self.received = int(agreed) or self.received
        return int(agreed) or None

    def _seconds_per_step(self, step: int) -> float:
        """Return the mean time of the steps since the last agreement; infinity where there are none."""
        now = time.monotonic()
        before, self._agreed_at = self._agreed_at, (step, now)
        if before is None or step == before[0]:
            return math.inf
        return (now - before[1]) / (step - before[0])

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
            signal.setitimer(signal.ITIMER_REAL, self.grace_seconds)
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt

    def _out_of_time(self, trainer: Trainer) -> None:
        """Stop at once; where a checkpoint is being written, a second later.

        Raises:
            Interrupted: always otherwise.
        """
        saving = get_callback(trainer, SaveCheckpoints)
        if saving and saving.is_saving:
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            return
        assert self.received is not None
        raise Interrupted(self.received, trainer.global_step, saving.saved_step if saving else 0)


def stop_child_observer() -> None:
    """Stop Lightning's watch over the processes that it has started: the run is over.

    When one of them exits with a code other than 0, as after a signal, Lightning kills them all, this one first,
    even while it closes its loggers.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


def stopping_at_once(trainer: Trainer) -> AbstractContextManager[None]:
    """Raise ``Interrupted`` at once: after the training there is no step to finish, and everything is saved."""

    def stop(signum: int, frame: FrameType | None) -> Never:
        raise Interrupted(signum, trainer.global_step)

    return handling(stop_signals(), stop)
