from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from litdiffusion.diffusion import SamplerOutput, schedules
from litdiffusion.diffusion.process import q_sample
from litdiffusion.reporting import gif
from litdiffusion.reporting.gif import Film, pick_frames, save_gif
from litdiffusion.reporting.images import grid


def denoising(count: int, channels: int, num_frames: int) -> list[torch.Tensor]:
    """Disks that emerge from noise as with a perfect denoiser, each frame with noise of its own."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.linspace(-1, 1, 28)
    radius = torch.linspace(0.3, 0.9, count)[:, None, None, None]
    x0 = ((radius - (axis[:, None] ** 2 + axis**2).sqrt()) * 3).clamp(-1, 1).repeat(1, channels, 1, 1)
    schedule = schedules.linear(300)
    times = torch.linspace(1, 0, num_frames, dtype=torch.float64)
    return [
        q_sample(schedule, x0, t.expand(count), torch.randn(x0.shape, generator=generator)) for t in times
    ]


@pytest.mark.parametrize(("num_steps", "num_frames"), [(300, 60), (1000, 60), (61, 60), (5, 2), (300, 300)])
def test_picked_frames_rise_evenly_from_first_to_last(num_steps, num_frames):
    picked = pick_frames(num_steps, num_frames)
    gaps = [after - before for before, after in pairwise(picked)]
    assert (picked[0], picked[-1], len(picked)) == (0, num_steps, num_frames)
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


def test_few_steps_are_all_shown():
    assert pick_frames(4, 60) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("num_steps", "num_frames"), [(0, 10), (10, 1)])
def test_pick_frames_refuses_too_few_steps_or_frames(num_steps, num_frames):
    with pytest.raises(ValueError, match=f"cannot pick {num_frames} frames of {num_steps} steps"):
        pick_frames(num_steps, num_frames)


def test_gif_shows_all_frames_and_pauses_on_the_last(tmp_path: Path):
    frames = denoising(4, 1, 8)
    save_gif(frames, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        durations = []
        for index in range(film.n_frames):
            film.seek(index)
            durations.append(film.info["duration"])
        assert film.info["loop"] == 0
        assert film.size == grid(frames[0]).size
        assert durations == [50] * 7 + [1500]
        assert film.convert("L").tobytes() == grid(frames[-1]).tobytes(), "the last frame is shown exactly"


def test_gif_does_not_autoscale(tmp_path: Path):
    dark = torch.full((1, 1, 28, 28), -0.9)
    dark[..., :14] = -0.5
    save_gif([dark, dark + 0.2], tmp_path / "dark.gif")
    with Image.open(tmp_path / "dark.gif") as film:
        shades = sorted(set(film.convert("L").crop((4, 4, 54, 54)).tobytes()))
        assert shades == pytest.approx([0.05 * 255, 0.25 * 255], abs=1)


def test_gif_of_64_images_in_60_frames_is_well_below_a_megabyte(tmp_path: Path):
    path = tmp_path / "film.gif"
    save_gif(denoising(64, 1, 60), path)
    assert path.stat().st_size < 880_000
    with Image.open(path) as film:
        assert film.n_frames == 60
        assert film.size == grid(torch.zeros(16, 1, 28, 28)).size


def test_a_smaller_limit_means_fewer_shades_of_noise_but_the_same_last_frame(tmp_path: Path):
    frames = denoising(4, 1, 10)
    sizes, lasts = [], []
    for max_bytes in (30_000, 100_000):
        path = tmp_path / f"{max_bytes}.gif"
        save_gif(frames, path, max_bytes=max_bytes)
        sizes.append(path.stat().st_size)
        with Image.open(path) as film:
            film.seek(9)
            lasts.append(film.convert("L").tobytes())
    assert sizes[0] < sizes[1] / 2
    assert lasts[0] == lasts[1]


def test_colour_gif_keeps_white_gutters_and_true_colours_at_the_end(tmp_path: Path):
    frames = denoising(4, 3, 6)
    frames[-1][:, 0] = -1
    save_gif(frames, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        for index in range(6):
            film.seek(index)
            assert film.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        shown, meant = film.convert("RGB"), grid(frames[-1])
        difference = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).float()
        difference -= torch.frombuffer(bytearray(meant.tobytes()), dtype=torch.uint8).float()
        assert difference.abs().mean() < 3


def test_gif_refuses_no_frames_and_mixed_frames(tmp_path: Path):
    with pytest.raises(ValueError, match="at least one frame"):
        save_gif([], tmp_path / "film.gif")
    with pytest.raises(ValueError, match=r"differ in shape: \[\(1, 1, 4, 4\), \(1, 1, 8, 8\)\]"):
        save_gif([torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 8, 8)], tmp_path / "film.gif")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("num_images", [1, 5, 40])
def test_a_film_is_the_same_on_any_number_of_processes(
    processes: int, num_images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draws its share in batches; some have nothing to draw."""
    films = []
    for rank in range(processes):
        film = Film([0, 2, 3])
        share = range(num_images * rank // processes, num_images * (rank + 1) // processes)
        for start in range(share.start, share.stop, 7):
            batch = torch.arange(start, min(start + 7, share.stop)).reshape(-1, 1, 1, 1).float()
            for moment in range(4):
                film.watch(start, SamplerOutput(t=1 - moment / 3, x=batch + 100.0 * moment, x0=batch))
        films.append(film)
    monkeypatch.setattr(gif, "gathered", lambda kept: [film._kept for film in films])
    for film in films:
        for frame, moment in zip(film.frames(), (0, 2, 3), strict=True):
            assert frame.flatten().tolist() == [100 * moment + i for i in range(min(num_images, 16))]
