import io
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from image_worlds import noise
from PIL import Image

from litdiffusion.data.decoding import array_dataset, decode_column
from litdiffusion.data.pictures import read_image
from litdiffusion.errors import UserError


def decode(image: Image.Image, size: tuple[int, int], channels: int, suffix: str = "png") -> np.ndarray:
    """Through a real encoded file in a real Arrow column."""
    return decode_bytes(encoded(image, suffix), size, channels)


def encoded(image: Image.Image, suffix: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix)
    return buffer.getvalue()


def decode_bytes(data: bytes, size: tuple[int, int], channels: int) -> np.ndarray:
    features = datasets.Features(image=datasets.Image())
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": "some/name.png"}]}, features=features
    )
    return decode_column(rows.with_format("arrow")[:]["image"], size, channels)[0]


def test_an_image_of_the_right_size_is_untouched() -> None:
    rgb, gray = noise(0, 6, 5, 3), noise(1, 6, 5)
    assert np.array_equal(decode(Image.fromarray(rgb), (6, 5), 3), np.moveaxis(rgb, -1, 0))
    assert np.array_equal(decode(Image.fromarray(gray), (6, 5), 1), gray[None])


def test_gray_becomes_three_equal_channels_and_colour_its_luma() -> None:
    gray = noise(1, 4, 4)
    assert np.array_equal(decode(Image.fromarray(gray), (4, 4), 3), np.stack([gray] * 3))
    pure = np.zeros((1, 3, 3), np.uint8)
    pure[0, range(3), range(3)] = 255
    assert decode(Image.fromarray(pure), (1, 3), 1).ravel() == pytest.approx([76, 150, 29], abs=1)  # BT.601


def test_sixteen_bit_gray_keeps_its_range() -> None:
    """Pillow's plain conversion would turn every value above 255 into white."""
    deep = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    image = Image.fromarray(deep)
    assert image.mode == "I;16"
    assert decode(image, (1, 4), 1).ravel().tolist() == [0, 1, 128, 255]
    assert decode(image, (1, 4), 3)[2].ravel().tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 99.6, 255.0], [0, 100, 255]), ([0.0] * 3, [0] * 3)],
)
def test_floats_are_read_as_0_to_1_or_0_to_255(values: list[float], expected: list[int]) -> None:
    assert (
        decode(Image.fromarray(np.array([values], np.float32)), (1, 3), 1, "tiff").ravel().tolist()
        == expected
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(values: list[int]) -> bytes:
    """One row of 16-bit RGB, which Pillow reads but does not write."""
    row = b"\0" + b"".join(struct.pack(">3H", value, value, value) for value in values)
    header = chunk(b"IHDR", struct.pack(">2I5B", len(values), 1, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


def tiff(*values: float, dtype: str = "float32") -> bytes:
    return encoded(Image.fromarray(np.array([values], dtype)), "tiff")


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (tiff(0, 1023, dtype="uint16"), "0 to 1023, where 0 would be black and 65535 white"),
        (tiff(7, 4095, dtype="uint16"), "7 to 4095"),
        (tiff(0, 16383, dtype="uint16"), "0 to 16383"),
        (deep_png([0, 4095]), "0 to 3855, where 0 would be black and 65535 white"),
        (tiff(0, 70000, dtype="int32"), "0 to 70000"),
        (tiff(-1000, 3000, dtype="int32"), "-1000 to 3000"),
        (tiff(0, 1.02), "0 to 1.02, where 0 would be black and 255 white"),
        (tiff(-0.1, 0.9), "-0.1 to 0.9, where 0 would be black and 1 white"),
        (tiff(0, float("nan")), "nan"),
    ],
)
def test_values_of_unknown_range_are_refused_not_darkened_or_cut(data: bytes, values: str) -> None:
    with pytest.raises(UserError, match=f"{values}.*scale them to that range, or to 8 bits"):
        decode_bytes(data, (1, 2), 1)


def test_sixteen_bit_colours_keep_their_range() -> None:
    assert decode_bytes(deep_png([0, 128 * 257, 65535]), (1, 3), 3)[1].ravel().tolist() == [0, 128, 255]
    assert decode_bytes(deep_png([0, 0, 0]), (1, 3), 1).ravel().tolist() == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"garbage", b"MM\0*\0\0\0\x08\xff"])
def test_garbage_for_exif_data_does_not_matter(exif: bytes, tmp_path: Path) -> None:
    whole = png()
    path = tmp_path / "photo.png"
    path.write_bytes(whole[:33] + chunk(b"eXIf", exif) + whole[33:])
    assert np.array_equal(decode_bytes(path.read_bytes(), (32, 32), 3), decode_bytes(whole, (32, 32), 3))
    assert read_image("image", path, (3, 32, 32)).shape == (3, 32, 32)


def test_what_follows_an_image_and_what_it_is_called_do_not_matter() -> None:
    for data in (png(), encoded(Image.fromarray(noise(0, 8, 8, 3)), "webp")):
        assert np.array_equal(decode_bytes(data + b"more", (8, 8), 3), decode_bytes(data, (8, 8), 3))


def test_an_image_of_too_many_pixels_is_not_to_be_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(
        UserError, match=r"name\.png: it has more than 1,000 pixels, so make it smaller; replace it"
    ):
        decode_bytes(png(), (8, 8), 3)


def test_one_bit_images_are_black_and_white() -> None:
    assert decode(Image.fromarray(np.array([[True, False]])), (1, 2), 1).ravel().tolist() == [255, 0]


def test_transparency_lies_on_white() -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0]]], np.uint8)
    assert decode(Image.fromarray(rgba), (1, 2), 3).reshape(3, 2).T.tolist() == [[200, 0, 0], [255, 255, 255]]
    gray_alpha = Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8))
    assert gray_alpha.mode == "LA"
    assert decode(gray_alpha, (1, 2), 1).ravel().tolist() == [9, 255]


def test_white_on_transparent_is_refused_not_blank(tmp_path: Path) -> None:
    white = Image.fromarray(np.array([[[255, 255], [255, 0]]], np.uint8))
    with pytest.raises(UserError, match=r"it is white on transparent, .*: give it a background"):
        decode(white, (1, 2), 1)
    white.save(tmp_path / "white.png")
    with pytest.raises(UserError, match=r"image=.*white\.png: it is white on transparent"):
        read_image("image", tmp_path / "white.png", (1, 1, 2))
    for alpha in (0, 255):  # nothing at all, and an opaque page
        blank = Image.fromarray(np.array([[[255, alpha]] * 2], np.uint8))
        assert decode(blank, (1, 2), 1).ravel().tolist() == [255, 255]


def test_palettes_are_looked_up_with_their_transparent_colour() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    assert decode(image, (1, 3), 3).reshape(3, 3).T.tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    buffer = io.BytesIO()
    image.save(buffer, "png", transparency=1)
    pixels = decode_bytes(buffer.getvalue(), (1, 3), 3).reshape(3, 3).T.tolist()
    assert pixels == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


def test_cmyk_and_rotated_photographs_come_out_upright_rgb() -> None:
    assert decode(Image.new("CMYK", (2, 2), (255, 0, 0, 0)), (2, 2), 3, "tiff")[:, 0, 0].tolist() == [
        0,
        255,
        255,
    ]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    for suffix in ("png", "tiff", "webp"):
        buffer = io.BytesIO()
        Image.fromarray(np.array([[0, 255]], np.uint8)).save(buffer, suffix, exif=exif, lossless=True)
        assert decode_bytes(buffer.getvalue(), (2, 1), 1).tolist() == [[[0], [255]]]


def test_the_shorter_side_is_resized_and_the_centre_cropped() -> None:
    """A wide image of three thirds: the middle third is what a square crop keeps."""
    thirds = np.repeat(np.array([[50, 150, 250]], np.uint8), 30, axis=1).repeat(30, axis=0)
    assert (decode(Image.fromarray(thirds), (10, 10), 1)[0, :, 2:-2] == 150).all()
    assert decode(Image.fromarray(thirds), (12, 20), 1).shape == (1, 12, 20)
    assert decode(Image.fromarray(thirds), (64, 64), 1).shape == (1, 64, 64)


def test_shrinking_is_antialiased() -> None:
    """The finest checkerboard averages to gray; without a filter it would alias to black or white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = decode(Image.fromarray(board), (8, 8), 1).astype(float)
    assert np.abs(small - 127.5).max() < 8


def test_extreme_shapes_survive() -> None:
    assert decode(Image.fromarray(noise(0, 1, 500)), (8, 8), 1).shape == (1, 8, 8)
    assert decode(Image.fromarray(noise(0, 1, 1)), (8, 6), 3).shape == (3, 8, 6)


def png() -> bytes:
    return encoded(Image.fromarray(noise(0, 32, 32, 3)))


@pytest.mark.parametrize("data", [b"", b"no image", png()[:200], png()[:1500]])
def test_an_undecodable_image_is_named_in_one_line(data: bytes) -> None:
    with pytest.raises(UserError, match=r"cannot read image some/name\.png") as error:
        decode_bytes(data, (8, 8), 3)
    assert "\n" not in str(error.value)


def test_of_many_undecodable_images_the_first_are_named_and_all_counted() -> None:
    features = datasets.Features(image=datasets.Image())
    records = [{"bytes": b"x" if i % 2 else png(), "path": None} for i in range(10)]
    rows = datasets.Dataset.from_dict({"image": records}, features=features)
    with pytest.raises(UserError) as error:
        decode_column(rows.with_format("arrow")[:]["image"], (8, 8), 3)
    named = "; ".join(
        f"in row {i} of the data set (the first is 0): not an image Pillow can open" for i in (1, 3, 5)
    )
    assert str(error.value).startswith(f"cannot read 5 images: {named}; and 2 more; replace them")


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    features = datasets.Features(image=datasets.Image())
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "gone.png")]}, features=features)
    with pytest.raises(UserError, match=r"gone\.png.*No such file"):
        decode_column(rows.with_format("arrow")[:]["image"], (8, 8), 3)


def test_a_missing_image_is_an_error_too() -> None:
    features = datasets.Features(image=datasets.Image())
    rows = datasets.Dataset.from_dict({"image": [None]}, features=features)
    with pytest.raises(UserError, match=r"row 0 of the data set .* has no image"):
        decode_column(rows.with_format("arrow")[:]["image"], (8, 8), 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_go_through_arrow_unharmed(channels: int) -> None:
    images, labels = noise(3, 5, channels, 4, 6), np.arange(5, dtype=np.uint8)
    rows = array_dataset(images, labels, list("abcde"))
    assert rows.features["image"] == datasets.Array3D(shape=(channels, 4, 6), dtype="uint8")
    assert rows["label"][:] == [0, 1, 2, 3, 4]
    assert np.array_equal(np.array(rows[2]["image"]), images[2])
    arrow = rows.with_format("arrow")
    assert np.array_equal(decode_column(arrow[:]["image"], (4, 6), channels), images)
    assert np.array_equal(decode_column(arrow[[4, 1]]["image"], (4, 6), channels), images[[4, 1]])
    assert np.array_equal(decode_column(arrow[1:3]["image"], (4, 6), channels), images[1:3])
    selected = rows.select([3, 0]).with_format("arrow")
    assert np.array_equal(decode_column(selected[:]["image"], (4, 6), channels), images[[3, 0]])


def test_arrays_are_converted_and_resized_like_files() -> None:
    images = noise(4, 2, 3, 12, 9)
    column = array_dataset(images, np.zeros(2, np.uint8), ["a"]).with_format("arrow")[:]["image"]
    for size, channels in [((6, 6), 3), ((12, 9), 1), ((20, 10), 1)]:
        by_file = [decode(Image.fromarray(np.moveaxis(image, 0, -1)), size, channels) for image in images]
        assert np.array_equal(decode_column(column, size, channels), np.stack(by_file))
