"""Two stores of images with one interface: all decoded in memory, or decoded by workers from memory-mapped Arrow."""

import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import datasets
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from litdiffusion.data.decoding import UnreadableError, decode_column
from litdiffusion.errors import UserError
from litdiffusion.system.processes import STOP_SIGNALS, usable_cores

CHUNK = 256
"""Images decoded together by one thread."""

BATCH_SECONDS = 600
"""How long a worker process may take over a batch: a disk that never answers must not hold up a run for ever."""


class Request(NamedTuple):
    """The images of the next batch, and its position (see ``Batch``)."""

    indices: list[int]
    start: int
    step: int


class Batch(NamedTuple):
    """The rows of one global batch that fall to this process.

    Fields:
        images: [B, C, H, W]; uint8 from the loaders, float32 in [-1, 1] once on the device.
        labels: int64 [B], or None where the data set has none.
        start: position of row 0 in the global batch; for validation, in the validation set.
        step: index of the global batch in the training stream; for validation, index of the batch.
    """

    images: Tensor
    labels: Tensor | None
    start: int
    step: int


def to_float(images: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """Pixels 0..255 as float32 in [-1, 1], ``x / 127.5 - 1``; ``round((y + 1) * 127.5)`` is the exact inverse."""
    return images.to(torch.float32).div_(127.5).sub_(1.0)


class MemoryStore:
    """A small split, decoded once to one contiguous uint8 tensor [N, C, H, W]; a batch is one gather.

    Args:
        dataset: columns "image" and, where there are labels, "label".
        image_size: (height, width).
        channels: 1 or 3.
        pin_memory: page-locked batches, for a CUDA device.

    Raises:
        UnreadableError: some images cannot be read.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_size: tuple[int, int],
        channels: int,
        pin_memory: bool = False,
    ) -> None:
        size = len(dataset)
        self._pin_memory = pin_memory
        self.images = torch.empty((size, channels, *image_size), dtype=torch.uint8)
        self.labels = torch.empty(size, dtype=torch.int64) if "label" in dataset.column_names else None
        rows = dataset.with_format("arrow")

        def decode(first: int) -> Iterable[str]:
            try:
                batch = _read(rows, image_size, channels, slice(first, first + CHUNK))
            except UnreadableError as error:
                return error.args
            self.images[first : first + CHUNK] = batch.images
            if self.labels is not None and batch.labels is not None:
                self.labels[first : first + CHUNK] = batch.labels
            return ()

        # Pillow releases the interpreter lock while it decodes, so threads suffice.
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            try:
                unreadable = [each for chunk in pool.map(decode, range(0, size, CHUNK)) for each in chunk]
            finally:
                pool.shutdown(cancel_futures=True)
        if unreadable:
            raise UnreadableError(*unreadable)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, requests: Iterator[Request]) -> Iterator[Batch]:
        """One gather for each request."""
        batches = (self._gather(request) for request in requests)
        return map(_page_locked, batches) if self._pin_memory else batches

    def read(self, indices: list[int]) -> Batch:
        """Return a few images."""
        return self._gather(Request(indices, 0, 0))

    def _gather(self, request: Request) -> Batch:
        index = torch.tensor(request.indices, dtype=torch.int64)
        labels = None if self.labels is None else self.labels[index]
        return Batch(self.images[index], labels, request.start, request.step)


def _page_locked(batch: Batch) -> Batch:
    labels = None if batch.labels is None else batch.labels.pin_memory()
    return batch._replace(images=batch.images.pin_memory(), labels=labels)


class ArrowStore(Dataset[Batch | UserError]):
    """A large split, left in memory-mapped Arrow or in its files; worker processes decode ahead.

    Args:
        dataset: columns "image" and, where there are labels, "label".
        image_size: (height, width).
        channels: 1 or 3.
        num_workers: processes; 0 decodes in this one. No more are started than this process has cores.
        pin_memory: page-locked batches, for a CUDA device.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_size: tuple[int, int],
        channels: int,
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self._read = partial(_read, dataset.with_format("arrow"), image_size, channels)
        self._num_workers = min(num_workers, len(usable_cores()))
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, requests: Iterator[Request]) -> Iterator[Batch]:
        """Yield the batches in the order of the requests; worker processes read ahead.

        Raises:
            UserError: an image cannot be read.
        """
        loader = DataLoader(
            self,
            sampler=requests,
            batch_size=None,
            num_workers=self._num_workers,
            # Arrays pass through the worker's pipe. Tensors would need room in /dev/shm, and a socket below TMPDIR,
            # whose path may be too long for one.
            collate_fn=_as_arrays,
            worker_init_fn=_leave_signals_to_the_run,
            timeout=BATCH_SECONDS if self._num_workers else 0,
            # Otherwise the workers' seeds would be drawn from the global generator.
            generator=torch.Generator().manual_seed(0),
        )
        stream: Any = iter(loader)
        try:
            for sent in stream:
                if isinstance(sent, UserError):
                    raise sent
                images, labels, start, step = sent
                tensors = torch.from_numpy(images), None if labels is None else torch.from_numpy(labels)
                batch = Batch(*tensors, start, step)
                yield _page_locked(batch) if self._pin_memory else batch
        finally:
            if (
                self._num_workers
            ):  # at exit Python waits for its children, and one that is stuck ignores SIGTERM
                stream._shutdown_workers()
                for worker in stream._workers:
                    worker.kill()

    def read(self, indices: list[int]) -> Batch:
        """Return a few images, decoded here.

        Raises:
            UserError: an image cannot be read.
        """
        return self._read(indices)

    def __getitem__(self, request: Request) -> Batch | UserError:
        """Read a batch, in a worker. An error is returned: raised, it would arrive as the text of a traceback."""
        try:
            return self._read(*request)
        except UserError as error:
            return error


ImageStore = MemoryStore | ArrowStore


def _read(
    rows: datasets.Dataset,
    image_size: tuple[int, int],
    channels: int,
    where: slice | list[int],
    start: int = 0,
    step: int = 0,
) -> Batch:
    """Read and decode some rows of a data set in Arrow format."""
    table = rows[where]
    pixels = decode_column(table["image"], image_size, channels, partial(_row_number, rows, where))
    images = torch.from_numpy(pixels.copy())
    labels = torch.tensor(table["label"].to_pylist()) if "label" in table.column_names else None
    return Batch(images, labels, start, step)


def _row_number(rows: datasets.Dataset, where: slice | list[int], place: int) -> int:
    """Return a row's number in the data set that the rows were selected from."""
    index = range(len(rows))[where][place] if isinstance(where, slice) else where[place]
    origin = rows._indices  # the selected rows; the library has no public name for them
    return index if origin is None else origin.column(0)[index].as_py()


def _leave_signals_to_the_run(worker: int) -> None:
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def _as_arrays(read: Any) -> Any:
    return read if isinstance(read, UserError) else [e.numpy() if isinstance(e, Tensor) else e for e in read]
