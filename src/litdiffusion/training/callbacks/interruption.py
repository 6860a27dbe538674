"""Ctrl-C, SIGTERM, and the signals by which Slurm announces the end: finish the step, save it, stop.

What comes between two steps, a validation or sampling, may take longer than the time that Slurm leaves. Such a run
stops in the middle of it, and goes on from its last checkpoint: to be killed would mean not to be requeued.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Never

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from litdiffusion.system.processes import STOP_SIGNALS
from litdiffusion.training.callbacks.attached import get_callback
from litdiffusion.training.callbacks.checkpoints import SaveCheckpoints

AGREE_EVERY = 8
"""Steps between two looks at what has reached the other processes, where there are any: looking waits for them."""

SLOW_SECONDS = 1.0
"""Where a step of any of them takes longer, they look at each: waiting is cheap then, and the time limit near."""


class Interrupted(BaseException):
    """The run was asked to stop, and can be continued: where it is, if that is saved, or from step ``saved``."""

    def __init__(self, signum: int, step: int, saved: int | None = None) -> None:
        lost = "" if saved in (None, step) else f", of which {saved} are saved"
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}{lost}")
        self.signum = signum
        self.step = step


class StopCleanly(Callback):
    """Turn a signal into a checkpoint and ``Interrupted``; a Ctrl-C after it stops at once.

    Slurm repeats itself: at the time limit, SIGTERM comes twice. When the training ends, in whatever way, Lightning
    puts the handlers back that it found.

    Args:
        grace_seconds: from a signal that announces the end (SIGUSR1, SIGUSR2), how long the run may take to come to
            the end of a step; then it stops without saving. Less than what ``scripts/slurm`` and
            ``hydra/launcher=slurm`` have Slurm leave, which is two minutes.
    """

    def __init__(self, grace_seconds: float = 80.0) -> None:
        if grace_seconds <= 0:
            raise ValueError(f"grace_seconds={grace_seconds}: must be above 0")
        self.grace_seconds = grace_seconds
        self.received: int | None = None
        self._agree_every = 1
        self._agreed_at: tuple[int, float] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have our handlers installed in place of Lightning's, which leave without a word and without saving.

        Lightning remembers a SIGTERM that came before the first step, even where its handler is replaced by then.
        """
        if stage != "fit":
            return
        connector = trainer._signal_connector

        def install() -> None:
            connector._original_handlers = connector._get_current_signal_handlers()
            if trainer.training or trainer.sanity_checking:  # a validation by itself has handlers of its own
                for signum in STOP_SIGNALS:
                    signal.signal(signum, self._note)
                signal.signal(signal.SIGALRM, lambda signum, frame: self._out_of_time(trainer))

        connector.register_signal_handlers = install  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop here, between two steps, where everything is whole.

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
        """After the last step there is one more chance to agree."""
        self._agree(trainer)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Whatever ends the training, nothing interrupts how it leaves."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        stop_child_observer()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop after the last step as after any other: by now it is saved.

        Raises:
            Interrupted: if a signal has come in since the last step began.
        """
        signal.setitimer(signal.ITIMER_REAL, 0)
        if stage == "fit" and self.received is not None:
            raise Interrupted(self.received, trainer.global_step)

    def _agree(self, trainer: Trainer) -> int | None:
        """Return the signal on which all processes stop here, after the same step: one has received it.

        What comes in while they agree is not forgotten: it counts the next time.
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
        """Return the time since the last agreement by the steps since then; infinity, where there are none."""
        now = time.monotonic()
        before, self._agreed_at = self._agreed_at, (step, now)
        if before is None or step == before[0]:
            return math.inf
        return (now - before[1]) / (step - before[0])

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
            if signum in (signal.SIGUSR1, signal.SIGUSR2):
                signal.setitimer(signal.ITIMER_REAL, self.grace_seconds)
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt

    def _out_of_time(self, trainer: Trainer) -> None:
        """Stop on the spot, but for a checkpoint that is being written: it will not be long.

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


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Leave a Ctrl-C to the kernel, as other signals are until ``StopCleanly`` listens.

    Processes that wait for each other do so in C++, where Python's own handler would not be heard.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def stopping_at_once(trainer: Trainer) -> Iterator[None]:
    """Raise ``Interrupted`` on the spot where there is no step to finish: everything trained is saved."""

    def stop(signum: int, frame: FrameType | None) -> Never:
        raise Interrupted(signum, trainer.global_step)

    previous = {signum: signal.signal(signum, stop) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
