from pathlib import Path

import pytest
import torch

from litdiffusion.diffusion import SamplerOutput
from litdiffusion.reporting.images import grid, to_uint8
from litdiffusion.reporting.steps import MAX_BYTES, MAX_STEPS, read_steps, save_steps
from small_worlds import images


def outputs(steps: int, count: int, size: int) -> list[SamplerOutput]:
    return [
        SamplerOutput(
            1 - i / (steps - 1), images(count, size=size, seed=i), images(count, size=size, seed=99)
        )
        for i in range(steps)
    ]


def test_steps_are_read_as_they_were(tmp_path: Path) -> None:
    steps = outputs(5, count=3, size=8)
    save_steps(steps, tmp_path / "denoising.npz")
    for step, (t, x, x0) in zip(steps, read_steps(tmp_path / "denoising.npz"), strict=True):
        assert t == step.t
        for images_, picture in ((step.x, x), (step.x0, x0)):
            assert picture.tobytes() == grid(to_uint8(images_) / 127.5 - 1).tobytes()


@pytest.mark.parametrize(
    ("count", "size", "kept"), [(20, 4, 8), (8, 128, 1_000_000 // (2 * MAX_STEPS * 128**2))]
)
def test_long_processes_and_large_images_are_kept_in_part(
    tmp_path: Path, count: int, size: int, kept: int
) -> None:
    save_steps(outputs(40, count, size), tmp_path / "a.npz")
    assert (tmp_path / "a.npz").stat().st_size < 1.1 * MAX_BYTES
    read = read_steps(tmp_path / "a.npz")
    assert [read[0][0], read[-1][0]] == [1, 0]
    assert len(read) == MAX_STEPS
    assert read[0][1].size == grid(torch.zeros(kept, 1, size, size)).size
