import gzip
from pathlib import Path

import numpy as np
import pytest
from image_worlds import FILES, noise, small_copy

from litdiffusion.data.decoding import decode_column
from litdiffusion.data.idx import write_idx
from litdiffusion.data.sources import Digits, FashionMNIST
from litdiffusion.errors import UserError


def pixels(source: FashionMNIST | Digits, split: str) -> np.ndarray:
    assert split in ("train", "test")
    rows = source.load("train" if split == "train" else "test").with_format("arrow")[:]
    return decode_column(rows["image"], source.image_size, source.channels)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_folder_of_idx_files_gzipped_or_not(tmp_path: Path, suffix: str) -> None:
    values = small_copy(tmp_path, suffix)
    source = FashionMNIST(tmp_path)
    source.prepare()
    assert np.array_equal(pixels(source, "train")[:, 0], values[FILES[0]])
    assert np.array_equal(pixels(source, "test")[:, 0], values[FILES[2]])
    assert source.load("test")["label"][:] == values[FILES[3]].tolist()
    assert source.class_names is not None
    assert source.class_names[9] == "Ankle boot"


def test_the_real_fashion_mnist(fashion_mnist_folder: Path) -> None:
    source = FashionMNIST(str(fashion_mnist_folder))
    train, test = pixels(source, "train"), pixels(source, "test")
    assert train.shape == (60_000, 1, 28, 28)
    assert test.shape == (10_000, 1, 28, 28)
    assert train.mean() / 255 == pytest.approx(
        0.2860, abs=1e-4
    )  # the mean and deviation everyone normalizes by
    assert train.std() / 255 == pytest.approx(0.3530, abs=1e-4)
    assert np.bincount(source.load("train")["label"][:]).tolist() == [6000] * 10
    assert np.bincount(source.load("test")["label"][:]).tolist() == [1000] * 10
    assert source.flip


def test_debian_s_folder_comes_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = small_copy(tmp_path / "debian", ".gz")
    monkeypatch.setattr("litdiffusion.data.sources.fashion_mnist.DEBIAN_FOLDER", tmp_path / "debian")
    source = FashionMNIST(tmp_path / "nothing-here")
    assert np.array_equal(pixels(source, "test")[:, 0], values[FILES[2]])
    own = small_copy(tmp_path / "own")
    own[FILES[2]] = own[FILES[2]][::-1]
    write_idx(tmp_path / "own" / FILES[2], own[FILES[2]])
    assert np.array_equal(pixels(FashionMNIST(tmp_path / "own"), "test")[:, 0], own[FILES[2]])


@pytest.mark.usefixtures("no_debian")
def test_without_data_the_three_ways_are_named_at_once(
    tmp_path: Path, no_hub: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    source = FashionMNIST(tmp_path / "nothing-here")
    with pytest.raises(UserError) as error:
        source.prepare()
    [_] = (line for line in no_hub if "fashion_mnist" in line)  # no second try, which would wait
    text = str(error.value)
    assert "\n" not in text
    for part in (
        str(tmp_path / "nothing-here"),
        "make data",
        "apt install dataset-fashion-mnist",
        "data.path=DIR",
        "Hub",
    ):
        assert part in text
    with pytest.raises(UserError, match="make data"):
        source.load("train")
    assert capfd.readouterr().err == ""


def test_an_incomplete_folder_says_what_it_lacks(tmp_path: Path) -> None:
    small_copy(tmp_path)
    (tmp_path / FILES[3]).unlink()
    with pytest.raises(UserError, match=f"{tmp_path} lacks {FILES[3]}"):
        FashionMNIST(tmp_path).load("train")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; give the folder"):
        FashionMNIST(tmp_path / "file").load("train")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    small_copy(tmp_path, ".gz")
    file = tmp_path / f"{FILES[0]}.gz"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=file.name):
        FashionMNIST(tmp_path).load("train")
    assert len(FashionMNIST(tmp_path).load("test")) == 5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (FILES[1], noise(0, 19) % 10, "20 images.*19 labels"),
        (FILES[1], np.full(20, 47, np.uint8), "label 47"),
        (FILES[0], noise(0, 20), "3 dimensions"),
        (FILES[0], noise(0, 0, 28, 28), "0 images"),
    ],
)
def test_files_that_do_not_belong_together_are_named(
    tmp_path: Path, name: str, value: np.ndarray, message: str
) -> None:
    small_copy(tmp_path)
    write_idx(tmp_path / name, value)
    with pytest.raises(UserError, match=message) as error:
        FashionMNIST(tmp_path).load("train")
    assert name in str(error.value)


def test_a_gzipped_file_under_the_plain_name_is_read_by_its_content(tmp_path: Path) -> None:
    values = small_copy(tmp_path)
    plain = tmp_path / FILES[0]
    plain.write_bytes(gzip.compress(plain.read_bytes()))
    assert np.array_equal(pixels(FashionMNIST(tmp_path), "train")[:, 0], values[FILES[0]])


def test_size_and_channels_are_honoured(tmp_path: Path) -> None:
    small_copy(tmp_path)
    assert pixels(FashionMNIST(tmp_path, image_size=32, channels=3), "train").shape == (20, 3, 32, 32)
    assert pixels(FashionMNIST(tmp_path, image_size=[16, 24]), "test").shape == (5, 1, 16, 24)


def test_digits_are_the_library_s_and_split_once_for_all() -> None:
    source = Digits()
    train, test = pixels(source, "train"), pixels(source, "test")
    assert train.shape == (1498, 1, 8, 8)
    assert test.shape == (299, 1, 8, 8)
    assert (train.min(), train.max()) == (0, 255)
    assert len(np.unique(train)) == 17
    assert np.array_equal(pixels(Digits(), "test"), test)
    assert source.class_names == tuple("0123456789")
    assert not source.flip
    assert min(np.bincount(source.load("test")["label"][:], minlength=10)) > 20
    assert pixels(Digits(image_size=16, channels=3), "test").shape == (299, 3, 16, 16)


@pytest.mark.parametrize("size", [0, -4, [8], [8, 0], [8, 8, 8], []])
def test_an_impossible_size_is_refused(size: int | list[int]) -> None:
    with pytest.raises(ValueError, match=r"image_size=.*must be a positive integer"):
        Digits(image_size=size)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_an_impossible_number_of_channels_is_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"channels={channels}: must be 1"):
        Digits(channels=channels)


def test_an_unreadable_copy_is_no_reason_for_silence(tmp_path: Path) -> None:
    small_copy(tmp_path)
    (tmp_path / FILES[0]).unlink()
    (tmp_path / FILES[0]).mkdir()
    with pytest.raises(UserError, match="lacks"):
        FashionMNIST(tmp_path).load("train")


def test_images_of_no_pixels_are_one_line(tmp_path: Path) -> None:
    for images, labels in (FILES[:2], FILES[2:]):
        write_idx(tmp_path / images, np.zeros((20, 0, 0), np.uint8))
        write_idx(tmp_path / labels, np.zeros(20, np.uint8))
    with pytest.raises(UserError, match="images of 0 x 0 pixels"):
        FashionMNIST(path=tmp_path).load("train")
