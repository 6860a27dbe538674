"""Images from anywhere: what is read, and how each thing that cannot be measured is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from litdiffusion.data.arrays import read_images
from litdiffusion.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


@pytest.mark.parametrize("key", ["images", "arr_0"])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_under_either_name(key: str, channels: int, tmp_path: Path) -> None:
    images = read_images(saved(tmp_path, **{key: PIXELS[..., :channels], "labels": np.arange(5)}))
    assert images.shape == (5, channels, 6, 4)
    assert torch.equal(images, torch.from_numpy(PIXELS[..., :channels]).permute(0, 3, 1, 2))


def test_gray_arrays_need_no_channel(tmp_path: Path) -> None:
    assert read_images(saved(tmp_path, images=PIXELS[..., 0])).shape == (5, 1, 6, 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_pngs_in_the_order_of_names(channels: int, tmp_path: Path) -> None:
    pixels = PIXELS[..., 0] if channels == 1 else PIXELS
    for i, name in enumerate(("b.png", "a.PNG", "c.png")):
        Image.fromarray(pixels[i]).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    expected = PIXELS[[1, 0, 2]][..., :channels].transpose(0, 3, 1, 2)
    assert np.array_equal(read_images(tmp_path).numpy(), expected)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (PIXELS / 255.0, r"float64 from 0 to 1; they must be uint8 from 0 to 255"),
        (PIXELS.astype(np.float32) * np.nan, "float32 with NaN or infinity; they must be uint8"),
        (PIXELS.astype(np.int64), "int64 from 0 to 255; they must be uint8"),
        (PIXELS[:1], r"1 image\(s\); two are the least"),
        (PIXELS[:0], r"0 image\(s\); two are the least"),
        (PIXELS // 255, "no value is above 1; they must run from 0 to 255"),
        (PIXELS.transpose(0, 3, 1, 2), r"an array of shape \[5, 3, 6, 4\]; it must be \[N, H, W, C\]"),
        (PIXELS[0, 0], r"an array of shape \[4, 3\]; it must be"),
        (np.array(["a"]), "<U1; they must be uint8"),
    ],
)
def test_what_is_no_set_of_images(array: np.ndarray, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^images=.*x.npz: {reason}"):
        read_images(saved(tmp_path, images=array))


def test_files_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it holds pictures; the images must be under images or arr_0"):
        read_images(saved(tmp_path, pictures=PIXELS))
    with pytest.raises(UserError, match="there is no such file or folder"):
        read_images(tmp_path / "nowhere.npz")
    with pytest.raises(UserError, match=r"not an .npz file of arrays, or a damaged one"):
        read_images(saved(tmp_path, images=np.array([{}], dtype=object)))
    whole = saved(tmp_path, images=PIXELS).read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"not an .npz file of arrays, or a damaged one"):
        read_images(tmp_path / "half.npz")
    np.save(tmp_path / "x.npy", PIXELS)
    with pytest.raises(UserError, match=r"a single array; save it by np.savez"):
        read_images(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("picture", "what"),
    [
        (Image.new("RGBA", (4, 6)), "an alpha channel"),
        (Image.new("LA", (4, 6)), "an alpha channel"),
        (Image.fromarray(np.zeros((6, 4), np.uint16)), "16 bits for each channel"),
    ],
    ids=lambda each: getattr(each, "mode", None),
)
def test_pictures_whose_pixels_would_be_changed(picture: Image.Image, what: str, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"a.png has {what}; save it as gray or RGB, with 8 bits"):
        read_images(tmp_path)


def test_images_of_another_shape_than_the_data(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"they are \[3, 6, 4\] .*, and those of the data \[1, 28, 28\]: give"
    ):
        read_images(saved(tmp_path, images=PIXELS), (1, 28, 28))


def test_folders_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .png file in this folder"):
        read_images(tmp_path)
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    Image.fromarray(PIXELS[0, :3]).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"a.png is \[6, 4, 3\] and b.png \[3, 4, 3\]"):
        read_images(tmp_path)
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"b.png cannot be read"):
        read_images(tmp_path)
