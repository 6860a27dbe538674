"""Moving tensors to the device that computes, without making the host wait for it.

A GPU works through a queue that the host fills ahead. Where the host stops to wait, the queue runs empty and the GPU
stands idle. So a step of training or sampling reads nothing from the device, and copies to it by ``to_device``.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return ``x`` on a device. Where that is a GPU, the copy joins its queue and the host goes on.

    CUDA copies in the background from page-locked memory only, so ``x`` is brought there first. Torch keeps that
    memory until the copy is done.
    """
    if x.device.type != "cpu" or device.type in ("cpu", "mps"):  # mps needs the host to wait
        return x.to(device)
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


WITHOUT_FLOAT64 = {"mps"}
"""Kinds of device that have no float64: Apple's GPUs."""


def precise_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device has no float64."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Inside the block, make new tensors in float32 and on the CPU, as torch does unless a program says otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # Entered where it is needed alone: it slows down every call of torch.
        with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
