"""Batches for Lightning: the same images in the same order on any number of processes, and after a resume."""

import itertools
import logging
from collections.abc import Callable, Iterator
from functools import cache

import datasets
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import LightningDataModule
from torch import Tensor

from litdiffusion.data.data_order import DataOrder
from litdiffusion.data.fingerprint import Fingerprint, fingerprint
from litdiffusion.data.sources import Source
from litdiffusion.data.sources.base import Split
from litdiffusion.data.stores import ArrowStore, Batch, ImageStore, MemoryStore, Request, to_float
from litdiffusion.diffusion.draws import Draws
from litdiffusion.errors import UserError
from litdiffusion.system.processes import rank_and_number

__all__ = ["Batch", "ImageDataModule", "TrainLoader", "ValidationLoader", "to_float"]

log = logging.getLogger(__name__)

FEW = 16
"""Held-out images behind the fingerprint in a checkpoint."""


class TrainLoader:
    """The endless training stream from global batch ``first_step()`` on: this process's rows of each batch.

    It has no length: a number of steps ends the training, and an epoch only changes the permutation.
    """

    def __init__(
        self,
        store: ImageStore,
        order: DataOrder,
        batch_size: int,
        rank: int,
        world_size: int,
        first_step: Callable[[], int],
    ) -> None:
        self._store = store
        self._order = order
        self._batch_size = batch_size
        self._start = batch_size * rank // world_size
        self._stop = batch_size * (rank + 1) // world_size
        self._first_step = first_step

    def __iter__(self) -> Iterator[Batch]:
        return self._store.batches(self._request(step) for step in itertools.count(self._first_step()))

    def _request(self, step: int) -> Request:
        indices = self._order.batch(step, self._batch_size, self._start, self._stop)
        return Request(indices.tolist(), self._start, step)


class ValidationLoader:
    """Every image once, in the order of the data set; each process takes a share of each batch."""

    def __init__(self, store: ImageStore, batch_size: int, rank: int, world_size: int) -> None:
        self._store = store
        self._requests = []
        for step, first in enumerate(range(0, len(store), batch_size)):
            rows = min(batch_size, len(store) - first)
            start, stop = first + rows * rank // world_size, first + rows * (rank + 1) // world_size
            if start < stop:  # the last batch may have fewer rows than there are processes
                self._requests.append(Request(list(range(start, stop)), start, step))

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        return self._store.batches(iter(self._requests))


class ImageDataModule(LightningDataModule):
    """Images of a source as batches for training and validation.

    Args:
        source: where the images come from.
        batch_size: size of the global batch, all processes together; divisible by their number.
        seed: decides the order and the flips.
        num_val: validation uses the first ``num_val`` images of the test split; 0 switches it off, and no image is
            held out of the training split for it.
        num_workers: processes that decode images, for a split too large for memory.
        memory_limit_mb: a split is held in memory, by each process, where that takes a machine at most so many MiB.

    Raises:
        ValueError: a value is out of range.
        UserError: the data cannot be had or read (in ``setup``).
    """

    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        num_val: int = 1024,
        num_workers: int = 2,
        memory_limit_mb: int = 1024,
    ) -> None:
        super().__init__()
        counts = {"num_val": num_val, "num_workers": num_workers, "memory_limit_mb": memory_limit_mb}
        for name, value, least in (("batch_size", batch_size, 1), *((*item, 0) for item in counts.items())):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        self.source = source
        self.source.hold_out = num_val > 0
        self.batch_size = batch_size
        self.seed = seed
        self.num_val = num_val
        self.num_workers = num_workers
        self.memory_limit_mb = memory_limit_mb
        self._train: ImageStore | None = None
        self._val: ImageStore | None = None
        self._fingerprint: Fingerprint = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W); known before any data is read."""
        return (self.source.channels, *self.source.image_size)

    @property
    def num_classes(self) -> int | None:
        """Number of classes after ``setup``; None where the images carry no labels."""
        return None if self.source.class_names is None else len(self.source.class_names)

    @property
    def num_train(self) -> int:
        """Number of training images, after ``setup``."""
        return len(self._store("fit"))

    @property
    def num_held_out(self) -> int:
        """Number of held-out images, after ``setup``: ``num_val``, or as many as there are."""
        return len(self._store("validate")) if self.num_val else 0

    def prepare_data(self) -> None:
        """Download what is missing (Lightning calls this on one process of each machine)."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Load the splits of a stage that are not loaded yet."""
        self._shares()
        if stage in (None, "fit") and self._train is None:
            train = self.source.load("train")
            self._train = self._open(train, "training")
            self._fingerprint = fingerprint(self._train, train)
        if stage in (None, "fit", "validate") and self._val is None and self.num_val > 0:
            test = self.source.load("test")
            if self.num_val > len(test):
                few = f"{len(test):,} held-out images, all of them measured, where {self.num_val:,} were asked for"
                log.warning("%s: %s", self.source.name, few)
            self._val = self._open(test.select(range(min(self.num_val, len(test)))), "validation")

    def train_dataloader(self) -> TrainLoader:
        """Return the endless stream; it begins at the trainer's step, so that a resumed run continues mid-epoch."""
        rank, world_size = self._shares()
        store = self._store("fit")
        order = DataOrder(len(store), self.seed)
        return TrainLoader(store, order, self.batch_size, rank, world_size, self._first_step)

    def val_dataloader(self) -> ValidationLoader | list[ValidationLoader]:
        """Return the held-out images, unflipped, in fixed order; an empty list where ``num_val`` is 0."""
        if self.num_val == 0:
            return []
        return ValidationLoader(self._store("validate"), self.batch_size, *self._shares())

    def in_order(self, split: Split) -> ValidationLoader:
        """Return every image of a split once, in order; each process gets a share of each batch."""
        return ValidationLoader(self._whole(split)[0], self.batch_size, *self._shares())

    def read(self, split: Split, indices: list[int]) -> UInt8[Tensor, "images channels h w"]:
        """Return some images of a split."""
        return self._whole(split)[0].read(indices).images

    def split_fingerprint(self, split: Split) -> Fingerprint:
        """Return the fingerprint of all images of a split."""
        return fingerprint(*self._whole(split))

    def examples(self, count: int) -> Float[Tensor, "count channels h w"]:
        """Return the first training images in [-1, 1], unflipped, on the CPU, after ``setup``."""
        store = self._store("fit")
        return self.finish(store.read(list(range(min(count, len(store))))), training=False).images

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the training images, after ``setup``: the same on every process."""
        return self._fingerprint

    def held_out_fingerprint(self) -> Fingerprint | None:
        """Return the fingerprint of the first few images of the test split; None where all images are trained on."""
        test = self.source.load("test")
        if len(test) == 0:
            return None
        few = test.select(range(min(FEW, len(test))))
        _, height, width = self.image_shape
        return fingerprint(MemoryStore(few, (height, width), self.image_shape[0]), few)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Flip and scale the batch on its device (a hook of Lightning)."""
        return self.finish(batch, training=self.trainer is not None and bool(self.trainer.training))

    def finish(self, batch: Batch, *, training: bool) -> Batch:
        """Mirror a random half of the images (in training, where the source allows it) and scale to [-1, 1].

        Whether a row is mirrored depends on (seed, step, position in the global batch) alone.
        """
        images = batch.images
        if training and self.source.flip:
            stop = batch.start + len(images)
            draws = Draws.at(
                self.seed, "flip", batch.step, start=batch.start, stop=stop, device=images.device
            )
            mirrored = (draws.uniform("coin") < 0.5)[:, None, None, None]
            images = torch.where(mirrored, images.flip(-1), images)
        return batch._replace(images=to_float(images))

    def _first_step(self) -> int:
        if self.trainer is None:
            return 0
        return int(self.trainer.global_step) * int(self.trainer.accumulate_grad_batches)

    def _shares(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes.

        Raises:
            UserError: the global batch cannot be shared evenly.
        """
        if self.trainer is None:
            return rank_and_number()
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        if self.batch_size % world_size:
            near = max(world_size, round(self.batch_size / world_size) * world_size)
            raise UserError(
                f"datamodule.batch_size={self.batch_size} is the global batch and cannot be shared evenly "
                f"among {world_size} processes; take {near}"
            )
        return rank, world_size

    @cache  # noqa: B019  # as long-lived as the splits it holds
    def _whole(self, split: Split) -> tuple[ImageStore, datasets.Dataset]:
        dataset = self.source.load(split)
        return self._open(dataset, split), dataset

    def _store(self, stage: str) -> ImageStore:
        store = self._train if stage == "fit" else self._val
        if store is None:
            raise RuntimeError(f"call setup({stage!r}) first")
        return store

    def _open(self, dataset: datasets.Dataset, role: str) -> ImageStore:
        """Choose memory or Arrow by the size of the decoded pixels."""
        channels, height, width = self.image_shape
        size = len(dataset)
        if size == 0:
            raise UserError(f"{self.source.name} has no {role} images")
        megabytes = size * channels * height * width / 2**20
        # Each process of this machine has its own copy.
        copies = 1 if self.trainer is None else self.trainer.num_devices
        in_memory = megabytes * copies <= self.memory_limit_mb
        memory = "memory" if copies == 1 else f"the memory of each of {copies} processes"
        how = f"decoded once into {memory}" if in_memory else "decoded as they are needed"
        log.info("%s: %d %s images, %.1f MiB as pixels, %s", self.source.name, size, role, megabytes, how)
        pin = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        if in_memory:
            return MemoryStore(dataset, (height, width), channels, pin)
        return ArrowStore(dataset, (height, width), channels, self.num_workers, pin)
