"""What the tests on a GPU share: the device, small data, and the guard against waiting.

``make gpu`` runs them. In a dry run of the kit (``LITDIFFUSION_GPU_DRY_RUN=1``) the CPU stands in for the GPU, so
that the tests themselves are known to work.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer

from litdiffusion.data.idx import write_idx

DRY_RUN = bool(os.environ.get("LITDIFFUSION_GPU_DRY_RUN"))
DEVICE = torch.device("cpu" if DRY_RUN else "cuda")
ON_DEVICE = f"trainer={'cpu' if DRY_RUN else 'gpu'}"
NUM_STEPS = 2 if DRY_RUN else 8
"""Of each sampling."""

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY_RUN and not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"),
]
"""``pytestmark`` of every file here."""

not_in_a_dry_run = pytest.mark.skipif(DRY_RUN, reason="the CPU has nothing of the kind")


def write_small_fashion_mnist(folder: Path) -> None:
    """Fashion-MNIST in form, with 64 training and 16 test images: one bright bar each, of a place and a label."""
    folder.mkdir(parents=True)
    for split, count in (("train", 64), ("t10k", 16)):
        images = np.zeros((count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for image, label in zip(images, labels, strict=True):
            image[:, 2 + 2 * label : 6 + 2 * label] = 255
        write_idx(folder / f"{split}-images-idx3-ubyte", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte", labels)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise wherever the host would wait for the GPU, as torch notices it; nothing in a dry run."""
    if DRY_RUN:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NoWaiting(Callback):
    """Forbids waiting from the end of step ``first`` to the end of step ``last`` of a training."""

    guarded: ClassVar[int] = 0
    """Steps that ended under the guard; for the tests, which see no more of this object than its effect."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self._guard = ExitStack()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        NoWaiting.guarded += self.first < trainer.global_step <= self.last
        if trainer.global_step == self.first:
            self._guard.enter_context(no_waiting())
        if trainer.global_step == self.last:
            self._guard.close()

    def on_exception(self, *args: Any) -> None:
        self._guard.close()
