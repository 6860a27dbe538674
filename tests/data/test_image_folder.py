import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from image_worlds import save_images
from PIL import Image, features

from litdiffusion.data.decoding import decode_column
from litdiffusion.data.sources import ImageFolder
from litdiffusion.errors import UserError


def files(source: ImageFolder) -> tuple[set[str], set[str]]:
    """Paths of both splits, relative to the source's folder."""
    rows = {
        split: source.load(split).cast_column("image", datasets.Image(decode=False))
        for split in ("train", "test")
    }
    train, test = (
        {os.path.relpath(r["image"]["path"], source.path) for r in rows[s]} for s in ("train", "test")
    )
    return train, test


def labels(source: ImageFolder) -> dict[str, str]:
    """Class name of every image by its relative path."""
    found = {}
    for split in ("train", "test"):
        rows = source.load(split).cast_column("image", datasets.Image(decode=False))
        for row in rows:
            assert source.class_names is not None
            found[os.path.relpath(row["image"]["path"], source.path)] = source.class_names[row["label"]]
    return found


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings so far: after a command in the same process, caplog has what is below them as well."""
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_a_flat_folder_has_no_labels_and_holds_out_a_tenth(tmp_path: Path) -> None:
    paths = save_images(tmp_path, 200)
    source = ImageFolder(tmp_path, image_size=8, channels=3)
    train, test = files(source)
    assert train | test == {path.name for path in paths}
    assert not train & test
    assert 8 <= len(test) <= 35
    assert source.class_names is None
    assert source.load("train").column_names == ["image"]
    assert isinstance(source.load("train").features["image"], datasets.Image)


def test_the_holdout_is_stable_when_images_come_or_the_folder_moves(tmp_path: Path) -> None:
    save_images(tmp_path / "a", 60)
    _, before = files(ImageFolder(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    _, moved = files(ImageFolder(tmp_path / "b"))
    assert moved == before
    save_images(tmp_path / "b", 100)
    train, after = files(ImageFolder(tmp_path / "b"))
    assert before < after
    assert not before & train


@pytest.mark.parametrize("holdout", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3])
def test_each_side_has_an_image(tmp_path: Path, holdout: float, count: int) -> None:
    save_images(tmp_path, count)
    train, test = files(ImageFolder(tmp_path, holdout=holdout))
    assert len(train) >= 1
    assert len(test) >= 1
    assert len(train) + len(test) == count


def test_class_folders_give_labels_at_any_depth_and_in_any_case_of_suffix(tmp_path: Path) -> None:
    save_images(tmp_path / "dog" / "old", 6)
    save_images(tmp_path / "cat", 6, suffix=".JPG")
    save_images(tmp_path / "cat" / "young" / "very", 6, suffix=".webp")
    source = ImageFolder(tmp_path)
    found = labels(source)
    assert source.class_names == ("cat", "dog")
    assert len(found) == 18
    assert all(path.startswith(name) for path, name in found.items())


def test_one_subfolder_or_loose_images_make_no_classes(tmp_path: Path) -> None:
    save_images(tmp_path / "img_align", 5)
    one = ImageFolder(tmp_path)
    assert len(files(one)[0] | files(one)[1]) == 5
    assert one.class_names is None
    save_images(tmp_path / "other", 5)
    save_images(tmp_path, 1)
    mixed = ImageFolder(tmp_path)
    assert len(files(mixed)[0] | files(mixed)[1]) == 11
    assert mixed.class_names is None


@pytest.mark.parametrize("held_out", ["test", "val", "validation", "Test"])
def test_a_train_and_a_held_out_folder_are_taken_as_they_are(tmp_path: Path, held_out: str) -> None:
    for split, count in (("train", 6), (held_out, 3)):
        for name in ("cat", "dog"):
            save_images(tmp_path / split / name, count)
    source = ImageFolder(tmp_path)
    train, test = files(source)
    assert len(train) == 12
    assert all(path.startswith("train/") for path in train)
    assert len(test) == 6
    assert all(path.startswith(f"{held_out}/") for path in test)
    assert source.class_names == ("cat", "dog")
    assert {path.split("/")[1] == name for path, name in labels(source).items()} == {True}


def test_test_goes_before_val_and_train_alone_is_shared_out(tmp_path: Path) -> None:
    save_images(tmp_path / "train", 10)
    alone = ImageFolder(tmp_path)
    assert len(files(alone)[0] | files(alone)[1]) == 10
    assert alone.class_names is None
    save_images(tmp_path / "val", 2)
    save_images(tmp_path / "test", 3)
    assert len(files(ImageFolder(tmp_path))[1]) == 3


def test_a_held_out_class_without_training_images_is_named(tmp_path: Path) -> None:
    for folder in ("train/cat", "train/dog", "test/cat", "test/dgo"):
        save_images(tmp_path / folder, 2)
    with pytest.raises(UserError, match="lacks: dgo"):
        ImageFolder(tmp_path).load("train")


def test_a_flat_held_out_folder_takes_the_labels_from_both(tmp_path: Path) -> None:
    for folder in ("train/cat", "train/dog", "test"):
        save_images(tmp_path / folder, 2)
    source = ImageFolder(tmp_path)
    assert source.load("train").column_names == source.load("test").column_names == ["image"]
    assert source.class_names is None


@pytest.mark.parametrize(
    "names",
    [
        [str(i) for i in range(12)],
        ["-1", "0", "01", "1", "10", "a", "class_2", "class_10", "z"],
        ["2 cats", "10 cats", "cat2dog9", "cat2dog10"],
    ],
)
def test_classes_are_numbered_in_natural_order(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        save_images(tmp_path / name, 2)
    source = ImageFolder(tmp_path)
    assert all(path.startswith(f"{name}/") for path, name in labels(source).items())
    assert source.class_names == tuple(names)


def test_whatever_pillow_opens_is_used_and_all_else_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    suffixes = [".png", ".JPG", ".jp2", ".tga", ".ico", *([".avif"] if features.check("avif") else [])]
    for suffix in suffixes:
        save_images(tmp_path / "a", 2, suffix=suffix)
    save_images(tmp_path / "a" / "_blurred", 2)
    assert len(set().union(*files(ImageFolder(tmp_path)))) == 2 * len(suffixes) + 2
    assert warned(caplog) == []
    save_images(tmp_path / ".cache", 3)
    save_images(tmp_path / "__MACOSX", 3)
    for name in ("._000.png", "notes.TXT", "1.heic", "2.HEIC", "raw", "plot.eps", "icon.svg", "all.zip"):
        (tmp_path / "a" / name).write_bytes(b"not an image")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    assert len(set().union(*files(ImageFolder(tmp_path)))) == 2 * len(suffixes) + 2
    [message] = warned(caplog)
    assert message.startswith(f"{tmp_path}: left out: hidden (3), .heic (2), ")
    for other in (
        ".txt",
        ".eps",
        ".svg",
        ".zip",
        "without a suffix",
        "pipes or devices",
        "links to folders read already",
    ):
        assert f"{other} (1)" in message


def test_what_this_program_has_drawn_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in (tmp_path, tmp_path / "runs" / "a"):
        paths = save_images(folder, 5)
        (folder / "provenance.json").write_text("[]")
        (folder / "sample.json").write_text("{}")
        save_images(folder / "samples", 2)
        for name in ("curves.png", "grid.png"):
            (folder / name).write_bytes(paths[0].read_bytes())
    save_images(tmp_path / "runs", 5)
    train, test = files(ImageFolder(tmp_path))
    assert train | test == {f"{folder}{i:03d}.png" for folder in ("", "runs/", "runs/a/") for i in range(5)}
    assert "drawn by litdiffusion (6)" in caplog.text


def test_images_beside_the_splits_are_counted_and_train_may_be_a_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train", "car", "plane"):
        save_images(tmp_path / name, 4)
    source = ImageFolder(tmp_path)
    assert len(labels(source)) == 12
    assert source.class_names == ("car", "plane", "train")
    assert warned(caplog) == []
    save_images(tmp_path / "test", 3)
    save_images(tmp_path, 1)
    assert [len(split) for split in files(ImageFolder(tmp_path))] == [4, 3]
    assert "left out: images outside train and test (9)" in caplog.text
    save_images(tmp_path / "one" / "train", 1)
    save_images(tmp_path / "one", 5)
    with pytest.raises(UserError, match=r"only one image, .*left out: images outside train \(5\)"):
        ImageFolder(tmp_path / "one").load("train")


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    save_images(tmp_path / "elsewhere", 3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    train, test = files(ImageFolder(tmp_path / "data"))
    assert len(train | test) == 3


def test_gray_and_colour_files_mix(tmp_path: Path) -> None:
    save_images(tmp_path, 3, size=(20, 12))
    Image.new("L", (8, 8), 77).save(tmp_path / "gray.png")
    Image.new("P", (8, 8)).save(tmp_path / "palette.gif")
    for channels in (1, 3):
        source = ImageFolder(str(tmp_path), image_size=[16, 8], channels=channels)
        for split in ("train", "test"):
            rows = source.load("train" if split == "train" else "test").with_format("arrow")[:]
            pixels = decode_column(rows["image"], source.image_size, channels)
            assert pixels.shape[1:] == (channels, 16, 8)
            assert pixels.dtype == np.uint8


def test_a_missing_an_empty_and_a_too_small_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: there is no such folder"):
        ImageFolder(tmp_path / "nowhere").load("train")
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "empty" / "readme.txt").write_text("x")
    with pytest.raises(UserError, match=r"empty has no images.*\.png.*; left out: \.txt \(1\)"):
        ImageFolder(tmp_path / "empty").load("train")
    save_images(tmp_path / "single", 1)
    with pytest.raises(UserError, match=r"single has only one image"):
        ImageFolder(tmp_path / "single").load("test")
    (tmp_path / "photo.png").write_text("x")
    with pytest.raises(UserError, match=r"photo\.png is a file"):
        ImageFolder(tmp_path / "photo.png").load("train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_folder_is_named(tmp_path: Path) -> None:
    save_images(tmp_path / "open", 3)
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match=r"cannot read the folder .*closed"):
        ImageFolder(tmp_path).load("train")


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.1, 5.0])
def test_an_impossible_holdout_is_refused(tmp_path: Path, holdout: float) -> None:
    with pytest.raises(ValueError, match=r"holdout=.* must lie between"):
        ImageFolder(tmp_path, holdout=holdout)


def test_a_name_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    save_images(tmp_path, 3)
    with open(os.fsencode(tmp_path) + b"/\xff\xfe.png", "wb") as file:  # noqa: PTH123  # pathlib has no bytes
        file.write(b"x")
    with pytest.raises(UserError, match=r"udcff\\udcfe\.png'.*rename it"):
        ImageFolder(tmp_path).load("train")
