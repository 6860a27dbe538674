"""The processes that share a run, as torch connects them; a process that is alone needs no process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from litdiffusion.system.launch import num_started

T = TypeVar("T")


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
