"""The reverse process step by step: x_t, and the estimate of x_0 that was made of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from litdiffusion.diffusion import SamplerOutput
from litdiffusion.reporting.gif import pick_frames
from litdiffusion.reporting.images import grid, to_uint8
from litdiffusion.system.files import whole_file

MAX_STEPS, MAX_IMAGES = 16, 8
MAX_BYTES = 1_000_000
"""Noise does not compress: of large images, fewer are kept."""


def save_steps(steps: Sequence[SamplerOutput], path: Path) -> None:
    """Write some of the steps as an ``.npz`` file: ``t`` [steps], ``x`` and ``x0`` uint8 [steps, N, C, H, W]."""
    shown = [steps[i] for i in pick_frames(len(steps) - 1, MAX_STEPS)]
    count = min(MAX_IMAGES, max(1, MAX_BYTES // (2 * len(shown) * shown[0].x[0].numel())))
    x, x0 = (
        torch.stack([to_uint8(getattr(step, name)[:count]) for step in shown]).numpy() for name in ("x", "x0")
    )
    with whole_file(path) as temporary:
        np.savez_compressed(temporary, t=np.array([step.t for step in shown]), x=x, x0=x0)


def read_steps(path: Path) -> list[tuple[float, Image.Image, Image.Image]]:
    """Return what ``save_steps`` has written: of each step its t, and the grids of x_t and of the estimate of x_0.

    Raises:
        Exception: the file is damaged, in whatever way.
    """

    def picture(images: np.ndarray) -> Image.Image:
        return grid(torch.from_numpy(images) / 127.5 - 1)

    with np.load(path) as found:
        steps = zip(found["t"], found["x"], found["x0"], strict=True)
        return [(float(t), picture(x), picture(x0)) for t, x, x0 in steps]
