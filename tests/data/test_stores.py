import io
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from image_worlds import noise, save_images
from PIL import Image

from litdiffusion.configuration.messages import user_error
from litdiffusion.data.decoding import array_dataset
from litdiffusion.data.fingerprint import changes, fingerprint
from litdiffusion.data.sources import ImageFolder
from litdiffusion.data.stores import ArrowStore, MemoryStore, Request, to_float
from litdiffusion.errors import UserError


def requests(*indices: list[int]) -> Iterator[Request]:
    return iter([Request(rows, start=7 * i, step=i) for i, rows in enumerate(indices)])


def folder_dataset(folder: Path) -> datasets.Dataset:
    for name in ("cat", "dog"):
        save_images(folder / name, 15, size=(11, 13))
    return ImageFolder(folder).load("train")


def test_to_float_is_exact_at_the_ends_and_inverted_by_rounding() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    scaled = to_float(levels)
    assert scaled.dtype == torch.float32
    assert (scaled[0], scaled[-1]) == (-1.0, 1.0)
    assert torch.equal(((scaled + 1) * 127.5).round().to(torch.uint8), levels)
    assert levels[255] == 255  # the input is left as it was


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_read_what_memory_holds_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    deep = tmp_path / ("x" * 110)  # the path of a socket has at most 107 characters
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    rows = folder_dataset(tmp_path / "images")
    wanted = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3, 5], [8]]
    memory = list(MemoryStore(rows, (8, 6), 3).batches(requests(*wanted)))
    disk = list(ArrowStore(rows, (8, 6), 3, num_workers).batches(requests(*wanted)))
    assert len(memory) == len(disk) == 4
    for one, other, indices in zip(memory, disk, wanted, strict=True):
        assert one.images.shape == (len(indices), 3, 8, 6)
        assert torch.equal(one.images, other.images)
        assert one.labels is not None
        assert other.labels is not None
        assert torch.equal(one.labels, other.labels)
        assert one.labels.tolist() == [rows[i]["label"] for i in indices]
        assert (one.start, one.step) == (other.start, other.step)


def test_memory_holds_one_contiguous_uint8_tensor_of_many_chunks() -> None:
    images, labels = noise(0, 700, 1, 5, 4), (np.arange(700) % 7).astype(np.uint8)
    store = MemoryStore(array_dataset(images, labels, list("abcdefg")), (5, 4), 1)
    assert store.images.dtype == torch.uint8
    assert store.images.is_contiguous()
    assert np.array_equal(store.images.numpy(), images)
    assert store.labels is not None
    assert np.array_equal(store.labels.numpy(), labels)
    assert len(store) == 700


def test_for_a_gpu_every_batch_is_page_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels too; what is read to be looked at is not."""
    locked: list[torch.Tensor] = []

    def pin_memory(x: torch.Tensor) -> torch.Tensor:
        locked.append(x.clone())
        return locked[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)  # which asks for a GPU
    rows, wanted = folder_dataset(tmp_path), ([3, 1], [4])
    plain, store = MemoryStore(rows, (8, 6), 3), MemoryStore(rows, (8, 6), 3, pin_memory=True)
    for one, other in zip(plain.batches(requests(*wanted)), store.batches(requests(*wanted)), strict=True):
        assert {id(other.images), id(other.labels)} == {id(x) for x in locked[-2:]}
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert (one.start, one.step) == (other.start, other.step)
    assert len(locked) == 4
    store.read([0])
    assert len(locked) == 4


def test_without_labels_there_are_none(tmp_path: Path) -> None:
    save_images(tmp_path, 5)
    rows = ImageFolder(tmp_path).load("train")
    for store in (MemoryStore(rows, (4, 4), 1), ArrowStore(rows, (4, 4), 1, num_workers=0)):
        [batch] = store.batches(requests([0, 1]))
        assert batch.labels is None
        assert len(store) == len(rows)


def test_an_unreadable_image_is_named_by_both_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litdiffusion.data.stores.CHUNK", 3)
    rows = folder_dataset(tmp_path)
    paths = [row["image"]["path"] for row in rows.cast_column("image", datasets.Image(decode=False))]
    path, whole = paths[4], Path(paths[4]).read_bytes()
    Path(path).write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"cannot read image {path}") as in_memory:
        MemoryStore(rows, (8, 8), 3)
    for num_workers in (0, 1):
        batches = ArrowStore(rows, (8, 8), 3, num_workers).batches(requests([0, 1], [3, 4]))
        assert len(next(batches).images) == 2
        with pytest.raises(UserError) as in_worker:
            next(batches)
        assert str(in_worker.value) == str(in_memory.value)
        assert "\n" not in str(in_worker.value)
    # All of them are counted, also those of other chunks; and a repaired image is the one that it was.
    Path(paths[9]).write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"cannot read 2 images: {path}: .*; {paths[9]}: "):
        MemoryStore(rows, (8, 8), 3)
    monkeypatch.setattr("litdiffusion.data.fingerprint.SOME", 2)
    before = fingerprint(ArrowStore(rows, (8, 8), 3, 0), rows)
    Image.open(io.BytesIO(whole)).save(path, compress_level=0)
    assert changes(before, fingerprint(ArrowStore(rows, (8, 8), 3, 0), rows)) == []
    moved = rows.select([*range(1, len(rows)), 0])
    assert changes(before, fingerprint(ArrowStore(moved, (8, 8), 3, 0), moved)) == ["files", "labels", "some"]


def test_reading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    rows = folder_dataset(tmp_path)
    before = torch.get_rng_state()
    list(ArrowStore(rows, (8, 8), 3, num_workers=1).batches(requests([0], [1])))
    list(MemoryStore(rows, (8, 8), 3).batches(requests([0], [1])))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_read_ahead_of_an_endless_stream_and_let_go(tmp_path: Path) -> None:
    rows = folder_dataset(tmp_path)

    def endless() -> Iterator[Request]:
        step = 0
        while True:
            yield Request([step % len(rows)], 0, step)
            step += 1

    stream = ArrowStore(rows, (4, 4), 3, num_workers=2).batches(endless())
    assert [next(stream).step for _ in range(10)] == list(range(10))
    stream.close()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_workers_outlive_a_signal_to_every_process_of_a_run(tmp_path: Path, signum: signal.Signals) -> None:
    rows = folder_dataset(tmp_path)
    stream = ArrowStore(rows, (4, 4), 3, num_workers=1).batches(
        requests(*[[i % len(rows)] for i in range(20)])
    )
    assert next(stream).step == 0
    [worker] = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signum)
    assert [batch.step for batch in stream] == list(range(1, 20))


def test_a_worker_that_is_stuck_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litdiffusion.data.stores.BATCH_SECONDS", 1)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    rows = folder_dataset(tmp_path)
    stream = ArrowStore(rows, (4, 4), 3, num_workers=1).batches(requests(*[[0]] * 20))
    assert next(stream).step == 0
    [worker] = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGSTOP)  # as on a disk that does not answer
    with pytest.raises(RuntimeError) as error:
        list(stream)
    line = user_error(error.value)
    assert line is not None
    assert "is stuck (DataLoader timed out after 1 seconds): the same command continues" in line
    worker.join(5)
    assert worker.exitcode == -signal.SIGKILL  # or Python would wait for it at exit
