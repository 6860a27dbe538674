import http.server
import io
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_worlds import noise
from PIL import Image

from litdiffusion.data.decoding import decode_column
from litdiffusion.data.sources import Hub
from litdiffusion.data.stores import MemoryStore
from litdiffusion.errors import UserError

CLASSES = ("ant", "bee", "cow")


def table(count: int, seed: int = 0, label: str | None = "label", image: str = "image") -> datasets.Dataset:
    """Images of noise, 8x8 RGB as PNG; the label of image i is i mod 3."""
    columns: dict[str, Any] = {
        image: [Image.fromarray(noise(seed * 1000 + i, 8, 8, 3)) for i in range(count)]
    }
    features = {image: datasets.Image()}
    if label is not None:
        columns[label] = [i % 3 for i in range(count)]
        features[label] = datasets.ClassLabel(names=list(CLASSES))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def pixels(source: Hub) -> tuple[np.ndarray, np.ndarray]:
    train, test = (source.load(split).with_format("arrow")[:]["image"] for split in ("train", "test"))
    return tuple(decode_column(column, source.image_size, source.channels) for column in (train, test))


def test_a_parquet_file_is_shared_out_the_same_way_every_time(tmp_path: Path) -> None:
    table(20).to_parquet(tmp_path / "images.parquet")
    source = Hub(str(tmp_path / "images.parquet"), image_size=8, holdout=0.2)
    source.prepare()
    train, test = pixels(source)
    assert train.shape == (16, 3, 8, 8)
    assert test.shape == (4, 3, 8, 8)
    every = np.concatenate([train, test])
    expected = np.stack([np.moveaxis(noise(i, 8, 8, 3), -1, 0) for i in range(20)])
    assert sorted(map(bytes, every)) == sorted(map(bytes, expected))
    assert np.array_equal(pixels(Hub(str(tmp_path / "images.parquet"), image_size=8, holdout=0.2))[1], test)
    assert source.class_names == CLASSES


def test_a_folder_of_parquet_with_its_own_splits(tmp_path: Path) -> None:
    table(6).to_parquet(tmp_path / "train.parquet")
    table(3, seed=1).to_parquet(tmp_path / "test.parquet")
    table(2, seed=2).to_parquet(tmp_path / "validation.parquet")
    source = Hub(str(tmp_path), image_size=[4, 8], channels=1)
    assert [len(part) for part in pixels(source)] == [6, 3]
    assert source.load("test")["label"][:] == [0, 1, 2]
    assert [len(part) for part in pixels(Hub(str(tmp_path), test_split="validation"))] == [6, 2]
    assert [len(part) for part in pixels(Hub(str(tmp_path), train_split="test"))] == [3, 2]
    (tmp_path / "test.parquet").unlink()
    assert [len(part) for part in pixels(Hub(str(tmp_path)))] == [6, 2]


def test_what_the_library_saved_to_disk(tmp_path: Path) -> None:
    datasets.DatasetDict(train=table(5), test=table(2)).save_to_disk(tmp_path / "both")
    assert [len(part) for part in pixels(Hub(str(tmp_path / "both")))] == [5, 2]
    table(5).save_to_disk(tmp_path / "one")
    assert [len(part) for part in pixels(Hub(str(tmp_path / "one"), holdout=0.4))] == [3, 2]


def test_columns_are_found_by_type_whatever_their_names(tmp_path: Path) -> None:
    rows = table(6, label="species", image="photo").add_column("length", [1.5] * 6)
    rows.to_parquet(tmp_path / "odd.parquet")
    source = Hub(str(tmp_path / "odd.parquet"))
    assert source.load("train").column_names == ["image", "label"]
    assert source.class_names == CLASSES
    plain = Hub(str(tmp_path / "odd.parquet"), label_column=None)
    assert plain.load("train").column_names == ["image"]
    assert plain.class_names is None


def test_integer_and_text_labels_are_numbered_alike_in_both_splits(tmp_path: Path) -> None:
    base = table(6, label=None)
    base.add_column("label", [7, 3, 7, 10, 3, 7]).to_parquet(tmp_path / "train.parquet")
    base.select([0, 1]).add_column("label", [10, 99]).to_parquet(tmp_path / "test.parquet")
    source = Hub(str(tmp_path))
    assert source.load("train")["label"][:] == [1, 0, 1, 2, 0, 1]
    assert source.load("test")["label"][:] == [2, 3]
    assert source.class_names == ("3", "7", "10", "99")
    words = tmp_path / "words.parquet"
    base.add_column("kind", ["b", "a", "b", "c", "a", "b"]).to_parquet(words)
    assert Hub(str(words)).load("train").column_names == ["image"]
    named = Hub(str(words), label_column="kind")
    assert sorted(named.load("train")["label"][:] + named.load("test")["label"][:]) == [0, 0, 1, 1, 1, 2]
    assert named.class_names == ("a", "b", "c")


def test_a_test_split_with_blanked_labels_is_passed_over(tmp_path: Path) -> None:
    table(6).to_parquet(tmp_path / "train.parquet")
    blank = table(3, label=None).add_column("label", [-1] * 3)
    blank.cast_column("label", datasets.ClassLabel(names=list(CLASSES))).to_parquet(tmp_path / "test.parquet")
    table(2, seed=1).to_parquet(tmp_path / "validation.parquet")
    assert Hub(str(tmp_path)).load("test")["label"][:] == [0, 1]
    assert len(Hub(str(tmp_path), label_column=None).load("test")) == 3
    with pytest.raises(UserError, match=r"without a label \(3 of 9; .*label_column=null"):
        Hub(str(tmp_path), test_split="test", label_column="label").load("test")
    datasets.DatasetDict(train=table(4), test=table(3, label=None)).save_to_disk(tmp_path / "without")
    for folder in (
        tmp_path,
        tmp_path / "without",
    ):  # found by themselves, they hinder no training without labels
        source = Hub(str(folder), test_split="test")
        assert source.load("test").column_names == source.load("train").column_names == ["image"]
        assert len(source.load("test")) == 3


@pytest.mark.parametrize(
    ("kind", "labels", "names"),
    [
        *((kind, ["b", "a", "c", "b"], ("a", "b", "c")) for kind in (pa.large_string(), pa.string_view())),
        (pa.dictionary(pa.int8(), pa.string()), ["b", "a", "c", "b"], ("a", "b", "c")),
        (pa.string(), ["10", "2", "x9", "2"], ("2", "10", "x9")),
        *((kind, [7, 3, 10, 7], ("3", "7", "10")) for kind in (pa.int8(), pa.uint64(), pa.float64())),
        (pa.bool_(), [True, False, True, True], ("False", "True")),
        (pa.int64(), [1, -1, 1, 1], ("-1", "1")),
    ],
    ids=str,
)
def test_labels_of_any_type_are_classes(
    tmp_path: Path, kind: pa.DataType, labels: list[object], names: tuple[str, ...]
) -> None:
    images = table(4, label=None).with_format("arrow")[:]
    pq.write_table(images.append_column("label", pa.array(labels, kind)), tmp_path / "typed.parquet")
    source = Hub(str(tmp_path / "typed.parquet"))
    source.hold_out = False
    rows = source.load("train")
    assert source.class_names == names
    assert [names[label] for label in rows["label"]] == [str(label) for label in labels]


@pytest.mark.parametrize(
    "labels",
    [[1, None, 2, 1], [0, -1, 1, 0], [None] * 4, [0.5, 1.0, 2.0, 1.0], [[1], [2], [1], [2]], [b"a"] * 4],
)
def test_labels_that_are_missing_or_no_classes_hinder_only_those_who_name_them(
    tmp_path: Path, labels: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    images = table(4, label=None).with_format("arrow")[:]
    pq.write_table(images.append_column("label", pa.array(labels)), tmp_path / "gaps.parquet")
    with pytest.raises(UserError, match=r"without a label \(\d of 4; .*data.label_column=null"):
        Hub(str(tmp_path / "gaps.parquet"), label_column="label").load("train")
    source = Hub(str(tmp_path / "gaps.parquet"))
    assert source.load("train").column_names == ["image"]
    assert source.class_names is None
    assert "its labels are ignored" in caplog.text or labels == [[1], [2], [1], [2]]


def test_classes_that_two_splits_number_otherwise_are_told_apart_by_name(tmp_path: Path) -> None:
    other = table(3).cast_column("label", datasets.ClassLabel(names=["cow", "ant", "bee"]))
    datasets.DatasetDict(train=table(4), test=other).save_to_disk(tmp_path)
    source = Hub(str(tmp_path))
    assert [CLASSES[label] for label in source.load("test")["label"]] == ["cow", "ant", "bee"]
    assert source.class_names == CLASSES


def test_parts_of_splits_are_chosen_as_the_library_writes_them(tmp_path: Path) -> None:
    datasets.DatasetDict(train=table(8), test=table(4, seed=1)).save_to_disk(tmp_path)

    def sizes(train_split: str, test_split: str = "auto") -> list[int]:
        return [
            len(part) for part in pixels(Hub(str(tmp_path), train_split=train_split, test_split=test_split))
        ]

    assert sizes("train[:4]") == [4, 4]
    assert sizes("train[25%:]", "test[:2]") == [6, 2]
    assert sizes("train[:-2]", "train[-2:]") == [6, 2]
    assert sizes("train[:2]+train[3:]") == [7, 4]
    assert sizes("train+test") == [11, 1]  # nothing that is trained on is held out
    assert np.array_equal(
        pixels(Hub(str(tmp_path), train_split="train[5:7]"))[0], pixels(Hub(str(tmp_path)))[0][5:7]
    )
    for wrong in ("train[a:]", "train[:101%]", "train+extra"):
        with pytest.raises(UserError, match=rf"no split '{re.escape(wrong)}'; it has train, test \("):
            sizes(wrong)
    for empty in ("train[:0]", "train[6:3]", "train[9:12]", "train+test[:0]"):
        with pytest.raises(UserError, match=rf"'{re.escape(empty)}' takes no images from 't"):
            sizes(empty)
    with pytest.raises(UserError, match=r"takes some images of .* twice"):
        sizes("train[:4]+train[3:]")


def test_held_out_images_that_are_trained_on_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datasets.DatasetDict(train=table(8), test=table(4, seed=1)).save_to_disk(tmp_path)
    Hub(str(tmp_path), train_split="train[:6]", test_split="train[6:]+test").load("test")
    assert not caplog.records
    Hub(str(tmp_path), train_split="train[:6]+test[:1]", test_split="train[4:]+test").load("test")
    assert "3 held-out images are trained on, too" in caplog.text


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    datasets.DatasetDict(train=table(4), test=table(4).select([])).save_to_disk(folder)
    with pytest.raises(UserError, match="cannot load the data set"):  # the library opens no empty split
        Hub(str(folder)).load("train")


def test_parquet_of_other_tools(tmp_path: Path) -> None:
    """Bytes without the library's metadata: a {bytes, path} struct is recognised, others by their name."""
    encoded = [row["image"] for row in table(4).cast_column("image", datasets.Image(decode=False))]
    pq.write_table(pa.table({"picture": encoded}), tmp_path / "struct.parquet")
    assert [len(part) for part in pixels(Hub(str(tmp_path / "struct.parquet")))] == [3, 1]
    pq.write_table(pa.table({"raw": [e["bytes"] for e in encoded]}), tmp_path / "bytes.parquet")
    assert [len(part) for part in pixels(Hub(str(tmp_path / "bytes.parquet"), image_column="raw"))] == [3, 1]
    plain = pa.array([e["bytes"] for e in encoded], pa.large_binary())
    for number, column in enumerate((plain, pa.StructArray.from_arrays([plain], ["bytes"]))):
        file = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"id": [1, 2, 3, 4], "image": column}), file)
        assert [len(part) for part in pixels(Hub(str(file)))] == [3, 1]


def test_no_column_or_too_many_are_listed(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(
        UserError, match=r"no column of images; it has text, n: name one by data\.image_column"
    ):
        Hub(str(tmp_path / "text.parquet")).load("train")
    two = datasets.concatenate_datasets(
        [table(3, label=None, image=name) for name in ("before", "after")], axis=1
    )
    two.to_parquet(tmp_path / "two.parquet")
    with pytest.raises(UserError, match=r"choose data\.image_column from before, after"):
        Hub(str(tmp_path / "two.parquet")).load("train")
    assert len(Hub(str(tmp_path / "two.parquet"), image_column="after").load("train")) == 2
    with pytest.raises(UserError, match="no column 'befor'; it has before, after"):
        Hub(str(tmp_path / "two.parquet"), image_column="befor").load("train")
    with pytest.raises(UserError, match="no column 'kind'"):
        Hub(str(tmp_path / "two.parquet"), image_column="after", label_column="kind").load("train")
    with pytest.raises(UserError, match="'n' holds no images"):
        Hub(str(tmp_path / "text.parquet"), image_column="n", holdout=0.5).load("train")


@pytest.mark.parametrize("option", ["train_split", "test_split"])
def test_an_unknown_split_is_named_with_those_there_are(tmp_path: Path, option: str) -> None:
    table(3).to_parquet(tmp_path / "train.parquet")
    table(3).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(UserError, match="no split 'extra'; it has train, test"):
        Hub(str(tmp_path), **{option: "extra"}).load("train")


def test_wrong_paths_and_damaged_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 is not enough")
    (tmp_path / "photo.png").write_bytes(b"x")
    table(1).to_parquet(tmp_path / "single.parquet")
    cases = {
        str(tmp_path / "gone"): "no such file or folder",
        "./gone": "no such file or folder",
        "gone.parquet": "no such file or folder",
        str(tmp_path / "empty"): "cannot load",
        str(tmp_path / "bad.parquet"): "cannot load",
        str(tmp_path / "photo.png"): "data=image_folder",
        str(tmp_path / "single.parquet"): "at least 2 are needed",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            Hub(name).load("train")
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_asked_once_and_quietly(
    no_hub: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="Hub cannot be reached for owner/images") as error:
        Hub("owner/images").prepare()
    [_] = (line for line in no_hub if "owner/images" in line)  # no second try, which would wait
    assert "\n" not in str(error.value)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # HF_DATASETS_OFFLINE=1
    with pytest.raises(UserError, match="HF_DATASETS_OFFLINE is set"):
        Hub("owner/images").prepare()
    assert len([line for line in no_hub if "owner/images" in line]) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("no_hub")
def test_an_earlier_download_serves_while_the_hub_is_away(
    tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "toy").mkdir()
    table(5).to_parquet(tmp_path / "toy" / "train.parquet")
    datasets.load_dataset(str(tmp_path / "toy"))
    [cached] = (path for path in (own_cache / "toy").glob("*/*/*") if path.is_dir())
    place = own_cache / "owner___toy" / "default" / cached.parent.name
    place.mkdir(parents=True)
    cached.rename(place / cached.name)
    assert len(Hub("owner/toy", holdout=0.2).load("train")) == 4
    assert "earlier download of owner/toy" in caplog.text
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub answers for a data set that is not there."""

    def do_GET(self) -> None:
        if "silent" in self.path:
            time.sleep(1.0)
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_an_unknown_a_gated_and_a_malformed_name_are_told_apart(
    serve_as_hub: Callable[[type], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_as_hub(FakeHub)
    for name, message in {
        "owner/nothing": "the Hub has no data set 'owner/nothing'",
        "owner/gated": "owner/gated is gated: ask for access",
        "three/part/name": "the Hub has no data set 'three/part/name'",
        "white space": "the Hub has no data set 'white space'",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            Hub(name).load("train")
        assert "\n" not in str(error.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.2)  # what the variable sets
    with pytest.raises(UserError, match="Hub cannot be reached for owner/silent"):
        Hub("owner/silent").load("train")


@pytest.mark.parametrize("columns", [{"image_column": "label"}, {"label_column": "image"}])
def test_one_column_cannot_be_both(columns: dict[str, str], tmp_path: Path) -> None:
    rows = {"image": [Image.new("L", (4, 4))] * 4, "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(
        rows, features=datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    ).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="cannot be both image and label"):
        Hub(str(tmp_path / "rows.parquet"), **columns).load("train")


def test_an_unreadable_row_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "png")
    rows = [{"bytes": buffer.getvalue() if row != 17 else b"junk", "path": None} for row in range(40)]
    datasets.Dataset.from_dict({"image": rows}).to_parquet(tmp_path / "rows.parquet")
    source = Hub(str(tmp_path / "rows.parquet"), image_size=8, channels=1, holdout=0.3)
    splits = [source.load(split) for split in ("train", "test")]
    with pytest.raises(UserError, match=r"row 17 of the data set .*: not an image"):
        [MemoryStore(split, (8, 8), 1) for split in splits]
