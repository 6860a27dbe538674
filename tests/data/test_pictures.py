from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from litdiffusion.data.pictures import read_given, read_image, read_mask
from litdiffusion.errors import UserError
from litdiffusion.reporting.images import to_uint8

SHAPE = (1, 8, 8)


def written(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels.astype(np.uint8)).save(path, **options)
    return path


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape)


def test_a_picture_of_the_models_size_keeps_every_pixel(tmp_path):
    gray, colour = pixels(8, 8), pixels(8, 8, 3)
    image = read_image("image", written(tmp_path / "gray.png", gray), SHAPE)
    assert torch.equal(to_uint8(image)[0], torch.tensor(gray, dtype=torch.uint8))
    image = read_image("image", written(tmp_path / "colour.png", colour), (3, 8, 8))
    assert torch.equal(to_uint8(image), torch.tensor(colour, dtype=torch.uint8).movedim(-1, 0))


def test_other_pictures_are_brought_to_the_models_shape(tmp_path):
    path = written(tmp_path / "wide.png", pixels(20, 50, 3))
    assert read_image("image", path, (1, 8, 12)).shape == (1, 8, 12)
    path = written(tmp_path / "white.png", np.full((30, 30), 255))
    assert torch.equal(read_image("image", path, (3, 8, 8)), torch.ones(3, 8, 8))


def halves(height: int, width: int) -> np.ndarray:
    """Black on the left, white on the right."""
    return np.broadcast_to(np.arange(width) >= width / 2, (height, width)) * 255


@pytest.mark.parametrize("mask_size", [(8, 8), (20, 20), (20, 60), (4, 2)])
def test_a_mask_of_any_size_lies_over_the_whole_picture(tmp_path, mask_size):
    image = written(tmp_path / "image.png", pixels(20, 60))
    mask = read_mask("mask", written(tmp_path / "mask.png", halves(*mask_size)), image, (3, 8, 8))
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 8, 8)
    assert torch.equal(mask, (torch.arange(8) >= 4).expand(1, 8, 8))


def test_white_begins_at_128_and_the_mask_is_cropped_as_the_picture_is(tmp_path):
    shades = np.array([[0, 127, 128, 255]] * 4)
    image = written(tmp_path / "image.png", pixels(4, 4))
    mask = read_mask("mask", written(tmp_path / "mask.png", shades), image, (1, 4, 4))
    assert mask[0, 0].tolist() == [False, False, True, True]
    # Of a wide picture only the middle third is left, and so of its mask: white is where it was.
    wide = written(tmp_path / "wide.png", pixels(8, 24))
    edge = np.zeros((8, 24))
    edge[:, 10:12] = 255
    mask = read_mask("mask", written(tmp_path / "edge.png", edge), wide, SHAPE)
    assert mask[0, 0].tolist() == [False, False, True, True, False, False, False, False]


@pytest.mark.parametrize("mode", ["1", "I;16", "RGBA", "LA", "P"])
def test_of_a_mask_what_is_white_or_painted_white_on_nothing_counts(tmp_path, mode):
    image, gray = (
        written(tmp_path / "image.png", pixels(8, 8)),
        Image.fromarray(halves(8, 8).astype(np.uint8)),
    )
    layer = Image.new("RGBA", gray.size, (255, 255, 255, 0))
    layer.paste("white", mask=gray)
    mask = {
        "1": lambda: gray.convert("1"),
        "I;16": lambda: Image.fromarray(np.asarray(gray).astype(np.uint16) * 257),
        "RGBA": lambda: layer,
        "LA": lambda: layer.convert("LA"),
        "P": lambda: layer.quantize(),
    }[mode]()
    mask.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as saved:
        assert saved.mode == mode
    read = read_mask("mask", tmp_path / "mask.png", image, SHAPE)
    assert torch.equal(read, (torch.arange(8) >= 4).expand(1, 8, 8))


def test_a_picture_turned_by_its_camera_and_its_mask_are_both_seen_upright(tmp_path):
    turned = Image.fromarray(np.full((10, 30), 200, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    # Upright it is 30 high and 10 wide: of a mask that is white at the top, a middle third is all black.
    mask = np.zeros((30, 10))
    mask[:15] = 255
    read = read_mask("mask", written(tmp_path / "mask.png", mask), tmp_path / "turned.jpg", SHAPE)
    assert torch.equal(read, (torch.arange(8) < 4)[:, None].expand(1, 8, 8))


def test_what_an_edit_is_given_comes_as_batches(tmp_path):
    images = [written(tmp_path / f"{i}.png", pixels(8, 8, seed=i)) for i in range(3)]
    mask = written(tmp_path / "mask.png", halves(8, 8))
    given = read_given({"image": images, "image2": images[:1], "mask": [mask]}, SHAPE)
    assert {key: tuple(value.shape) for key, value in given.items()} == {
        "image": (3, 1, 8, 8),
        "image2": (1, 1, 8, 8),
        "mask": (3, 1, 8, 8),
    }
    assert torch.equal(given["image"][2], read_image("image", images[2], SHAPE))
    with pytest.raises(UserError, match="mask: 2 masks for 3 images"):
        read_given({"image": images, "mask": [mask, mask]}, SHAPE)


def test_unreadable_pictures_are_named_in_one_line(tmp_path):
    good = written(tmp_path / "good.png", pixels(8, 8))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    black = written(tmp_path / "black.png", np.zeros((8, 8)))
    for path, words in (
        (tmp_path / "nowhere.png", "there is no such file"),
        (tmp_path, "there is no such file"),
        (tmp_path / "text.png", "cannot be read as a picture"),
        (tmp_path / "cut.png", "cannot be read as a picture"),
    ):
        with pytest.raises(UserError) as caught:
            read_image("image2", path, SHAPE)
        assert str(caught.value).startswith(f"image2={path}: {words}")
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=f"mask={path}: {words}"):
            read_mask("mask", path, good, SHAPE)
    with pytest.raises(UserError, match="no pixel of it is white"):
        read_mask("mask", black, good, SHAPE)
