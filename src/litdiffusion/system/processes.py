"""The processes that share a run, as torch connects them; a process that is alone needs no process group."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from litdiffusion.system.launch import num_started

T = TypeVar("T")

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


def usable_cores() -> list[int]:
    """Return the cores that this process may run on: under a job scheduler, fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def rank_and_number() -> tuple[int, int]:
    """Return this process's rank in torch's process group and the group's size; (0, 1) where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def share_of(count: int) -> range:
    """Return this process's part of ``range(count)``: one after the other, in order of rank."""
    rank, number = rank_and_number()
    return range(count * rank // number, count * (rank + 1) // number)


def gathered(value: T) -> list[T]:
    """Return every process's value, in order of rank; all of them must call this. Tensors travel on the CPU."""
    _, number = rank_and_number()
    if number == 1:
        return [value]
    values: list[T | None] = [None] * number
    dist.all_gather_object(values, value)
    return [each for each in values if each is not None]


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Connect the processes that torchrun has started for the duration of the block; alone, do nothing."""
    if num_started() == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()  # or the first to finish would leave the others with a broken connection
    finally:
        dist.destroy_process_group()
