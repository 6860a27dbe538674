"""Moving tensors to the device that computes, without making the host wait for it.

A GPU works through a queue that the host fills ahead. Where the host stops to wait, the queue runs empty and the GPU
stands idle. So a step of training or sampling reads nothing from the device, and copies to it by ``to_device``.
"""

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


def precise_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
