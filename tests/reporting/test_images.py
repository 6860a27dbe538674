from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from litdiffusion.data.arrays import read_images
from litdiffusion.diffusion import schedules
from litdiffusion.reporting.images import GUTTER, PAPER, grid, noised_strip, save, save_each, strip, to_uint8


def ramp(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Images that differ in every pixel as far as 256 values allow, in [-1, 1]."""
    values = torch.arange(count * channels * height * width) % 256
    return values.reshape(count, channels, height, width) / 127.5 - 1


def pixels(image: Image.Image) -> torch.Tensor:
    """[height, width, channels] of a picture."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.reshape(image.height, image.width, len(image.getbands()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_inverts_the_scaling_exactly(dtype):
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(values.to(dtype) / 127.5 - 1), values)


def test_to_uint8_clamps_and_rounds():
    values = torch.tensor([-torch.inf, -1.5, -1.0, 0.0039, 1.0, 1.02, torch.inf])
    assert to_uint8(values).tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_to_uint8_refuses_nan_by_name():
    with pytest.raises(ValueError, match=r"NaN \(2 values\)"):
        to_uint8(torch.tensor([0.0, torch.nan, torch.nan]))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grid_places_every_pixel(channels, mode):
    images = ramp(5, channels, 6, 4)
    picture = grid(images, columns=3, min_pixels=8)
    assert picture.mode == mode
    assert picture.size == (3 * 8 + 4 * GUTTER, 2 * 12 + 3 * GUTTER)
    shown = pixels(picture)
    for index in range(5):
        row, column = divmod(index, 3)
        top, left = GUTTER + row * (12 + GUTTER), GUTTER + column * (8 + GUTTER)
        tile = shown[top : top + 12 : 2, left : left + 8 : 2]
        assert torch.equal(tile, to_uint8(images[index]).movedim(0, -1))
        assert torch.equal(tile, shown[top + 1 : top + 12 : 2, left + 1 : left + 8 : 2])
    assert (shown[:GUTTER] == PAPER).all()
    assert (shown[-(12 + GUTTER) :, -(8 + GUTTER) :] == PAPER).all()


@pytest.mark.parametrize(
    ("count", "size"), [(1, (1, 1)), (4, (4, 1)), (5, (3, 2)), (16, (4, 4)), (64, (8, 8))]
)
def test_grid_chooses_its_columns(count, size):
    picture = grid(ramp(count, 1, 8, 8), min_pixels=8)
    assert picture.size == tuple(n * (8 + GUTTER) + GUTTER for n in size)


def test_grid_leaves_large_images_as_they_are():
    assert grid(ramp(1, 3, 128, 100)).size == (100 + 2 * GUTTER, 128 + 2 * GUTTER)


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (0, 1, 4, 4), (1, 1, 0, 4)])
def test_grid_refuses_a_shape_that_is_no_picture(shape):
    with pytest.raises(ValueError, match=str(list(shape)).replace("[", r"\[")):
        grid(torch.zeros(shape))


def test_grid_refuses_no_columns():
    with pytest.raises(ValueError, match="at least one column"):
        grid(ramp(2, 1, 4, 4), columns=0)


@pytest.mark.parametrize(
    ("caption", "side"), [("t = {}", 4), ("t = {}", 128), ("{} % of all training steps", 28)]
)
def test_captions_stand_apart_above_their_pictures(caption, side):
    captions = [caption.format(t) for t in (0, 0.25, 0.5, 0.75, 1)]
    black = torch.full((2, 1, side, side), -1.0)
    picture = strip([black] * 5, captions)
    shown = pixels(picture)[:, :, 0]
    # The pictures are black all over and the ink of the captions is gray, so the first black row ends the head.
    head = int((shown == 0).any(dim=1).nonzero()[0]) - GUTTER
    inked = (shown[:head] < PAPER).any(dim=0)
    assert head > 10
    assert not inked[0]
    assert not inked[-1]
    black_columns = (shown[head:] == 0).any(dim=0)
    starts = (black_columns[1:] & ~black_columns[:-1]).nonzero().flatten().tolist()
    stops = (black_columns[:-1] & ~black_columns[1:]).nonzero().flatten().tolist()
    middles = [(start + stop) / 2 for start, stop in zip(starts, stops, strict=True)]
    assert len(middles) == 5
    for left, right in pairwise(middles):
        gap = inked[round(left) : round(right)]
        blank = (~gap).nonzero().flatten()
        assert len(blank) >= 4, "neighbouring captions touch"


@pytest.mark.parametrize("count", [0, 2])
def test_strip_needs_a_caption_for_each_column(count):
    with pytest.raises(ValueError, match=f"a caption for each: {count}, 0 given"):
        strip([ramp(1, 1, 4, 4)] * count, [])


@pytest.mark.parametrize("channels", [1, 3])
def test_noised_strip_goes_from_the_image_to_noise(channels):
    images, side = ramp(2, channels, 84, 84), 84
    shown = pixels(noised_strip(schedules.Flow(), images)).float()[-(side + GUTTER) : -GUTTER]
    columns = [shown[:, start : start + side] for start in range(GUTTER, shown.shape[1], side + GUTTER)]
    assert torch.equal(columns[0], to_uint8(images[1]).movedim(0, -1).float())
    # A row is one path, which is straight under this schedule: where no shade is cut off, the steps are alike.
    path = torch.stack(columns[1:4])
    inside = ((path > 0) & (path < 255)).all(dim=0)
    assert inside.float().mean() > 0.1
    assert path.diff(n=2, dim=0).abs()[:, inside].max() <= 2


def test_noised_strip_is_repeatable_and_follows_its_seed():
    schedule, images = schedules.linear(10), ramp(1, 1, 8, 8)
    first, again, other = (noised_strip(schedule, images, seed=seed) for seed in (0, 0, 1))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_save_writes_a_png_that_reads_back(tmp_path: Path):
    picture = grid(ramp(3, 3, 8, 8))
    save(picture, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as read:
        assert read.format == "PNG"
        assert read.tobytes() == picture.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_becomes_a_file_of_its_own(channels, tmp_path):
    pixels = torch.randint(0, 256, (3, channels, 4, 5), dtype=torch.uint8)
    save_each(pixels, tmp_path / "pngs")
    assert torch.equal(read_images(tmp_path / "pngs"), pixels)
