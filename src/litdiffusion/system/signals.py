"""Signals: which of them ask a run to stop, and who handles them."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # Windows, where images are drawn but nothing is trained
)
"""Signals that ask a run to stop: SIGHUP when its terminal is closed; ``scripts/slurm`` have SIGUSR1 sent before the
time limit, submitit SIGUSR2.

Terminals and Slurm send them to every process of a job, helpers included; those that train decide what follows.
"""


def stop_signals() -> list[signal.Signals]:
    """Return the signals at which this process is to stop: without SIGHUP where ``nohup`` has it ignored."""
    return [s for s in STOP_SIGNALS if s.name != "SIGHUP" or signal.getsignal(s) is not signal.SIG_IGN]


@contextmanager
def handling(
    signals: Iterable[int], handler: Callable[[int, FrameType | None], object] | signal.Handlers | None
) -> Iterator[None]:
    """Handle signals so in the block; outside the main thread, which alone receives them, do nothing."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, handler) for signum in signals} if is_main else {}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


@contextmanager
def interruptible() -> Iterator[None]:
    """Have a Ctrl-C raise KeyboardInterrupt in the block. Elsewhere it ends a command: see ``system.startup``.

    While Hydra composes, OmegaConf could turn the exception into another, and the command would go on.
    """
    at_once = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    with handling([signal.SIGINT] if at_once else [], signal.default_int_handler):
        yield
