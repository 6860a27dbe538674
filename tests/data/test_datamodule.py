import itertools
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_worlds import save_images, small_copy
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from litdiffusion.data.data_order import DataOrder
from litdiffusion.data.datamodule import Batch, ImageDataModule, TrainLoader, ValidationLoader, to_float
from litdiffusion.data.sources import Digits, FashionMNIST, Hub, ImageFolder
from litdiffusion.data.stores import ArrowStore, MemoryStore
from litdiffusion.diffusion import Draws
from litdiffusion.errors import UserError

DIGITS = Digits(image_size=8)
STORE = MemoryStore(DIGITS.load("test"), (8, 8), 1)


def module(**options: Any) -> ImageDataModule:
    given = {"source": Digits(), "batch_size": 32, "seed": 0} | options
    return ImageDataModule(**given)


def take(loader: TrainLoader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def test_batches_are_uint8_rows_of_the_stream() -> None:
    data = module()
    data.prepare_data()
    data.setup("fit")
    assert (data.num_train, data.num_classes, data.image_shape) == (1498, 10, (1, 8, 8))
    store = MemoryStore(DIGITS.load("train"), (8, 8), 1)
    order = DataOrder(1498, seed=0)
    for step, batch in enumerate(take(data.train_dataloader(), 100)):  # two epochs and a bit
        index = order.batch(step, 32, 0, 32)
        assert batch.images.dtype == torch.uint8
        assert torch.equal(batch.images, store.images[index])
        assert batch.labels is not None
        assert store.labels is not None
        assert torch.equal(batch.labels, store.labels[index])
        assert (batch.start, batch.step) == (0, step)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("memory_limit_mb", "processes", "kind"),
    # 0.09 MiB, which each process of a machine holds
    [(1024, 1, MemoryStore), (1, 8, MemoryStore), (1, 16, ArrowStore), (0, 1, ArrowStore)],
)
def test_batches_are_page_locked_for_a_gpu(
    memory_limit_mb: int, processes: int, kind: type, device: str
) -> None:
    data = module(memory_limit_mb=memory_limit_mb)
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1, num_devices=processes)
    data.setup("fit")
    store = data._store("fit")
    assert isinstance(store, kind)
    assert store._pin_memory == (device == "cuda")


def test_the_stream_has_no_length_and_starts_afresh_each_time() -> None:
    data = module()
    data.setup("fit")
    loader = data.train_dataloader()
    assert not hasattr(loader, "__len__")
    first, again = take(loader, 3), take(loader, 3)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))


def test_a_batch_larger_than_the_data_set_is_full(tmp_path: Path) -> None:
    save_images(tmp_path, 6)
    data = module(source=ImageFolder(tmp_path, image_size=4), batch_size=50)
    data.setup()
    assert data.num_train < 6
    assert [len(batch.images) for batch in take(data.train_dataloader(), 3)] == [50, 50, 50]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 500), st.integers(0, 9))
def test_ranks_share_the_global_batch_and_any_step_can_be_resumed(
    world_size: int, share: int, step: int, seed: int
) -> None:
    batch_size = world_size * share
    order = DataOrder(len(STORE), seed)

    def rows(rank: int, ranks: int, first: int, count: int) -> list[Batch]:
        return take(TrainLoader(STORE, order, batch_size, rank, ranks, lambda: first), count)

    whole = rows(0, 1, step, 3)
    for i in range(3):
        shares = [rows(rank, world_size, step + i, 1)[0] for rank in range(world_size)]
        assert torch.equal(torch.cat([part.images for part in shares]), whole[i].images)
        assert [part.start for part in shares] == [rank * share for rank in range(world_size)]
        assert {part.step for part in shares} == {whole[i].step} == {step + i}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 299), st.integers(1, 80), st.integers(1, 5))
def test_validation_shows_each_image_once_over_all_ranks(size: int, batch_size: int, world_size: int) -> None:
    store = MemoryStore(DIGITS.load("test").select(range(size)), (8, 8), 1)
    seen = []
    for rank in range(world_size):
        loader = ValidationLoader(store, batch_size, rank, world_size)
        batches = list(loader)
        assert len(loader) == len(batches)
        for batch in batches:
            rows = torch.arange(batch.start, batch.start + len(batch.images))
            assert torch.equal(batch.images, store.images[rows])
            assert set((rows // batch_size).tolist()) == {batch.step}
            seen += rows.tolist()
    assert sorted(seen) == list(range(size))


def test_validation_is_the_first_images_of_the_test_split(caplog: pytest.LogCaptureFixture) -> None:
    data = module(num_val=100)
    data.setup("validate")
    loader = data.val_dataloader()
    assert isinstance(loader, ValidationLoader)
    batches = list(loader)
    assert [len(b.images) for b in batches] == [32, 32, 32, 4]
    assert torch.equal(torch.cat([b.images for b in batches]), STORE.images[:100])
    everything = module(num_val=10_000)
    assert "asked for" not in caplog.text
    everything.setup("fit")
    assert sum(len(b.images) for b in everything.val_dataloader()) == 299
    assert "299 held-out images, all of them measured, where 10,000 were asked for" in caplog.text


def test_without_validation_all_images_are_trained_on(tmp_path: Path) -> None:
    save_images(tmp_path / "folder", 12)
    (tmp_path / "one").mkdir()
    save_images(tmp_path / "one", 1)
    images = {"image": [str(path) for path in sorted((tmp_path / "folder").iterdir())]}
    features = datasets.Features(image=datasets.Image())
    datasets.Dataset.from_dict(images, features=features).to_parquet(tmp_path / "table.parquet")
    sizes = {"channels": 3, "image_size": 4}
    folder, one = (ImageFolder(tmp_path / name, **sizes) for name in ("folder", "one"))
    for source, count in (
        (Digits(), 1797),
        (folder, 12),
        (one, 1),
        (Hub(str(tmp_path / "table.parquet"), **sizes), 12),
    ):
        data = module(source=source, num_val=0)
        data.setup("fit")
        assert (data.num_train, data.num_held_out, data.val_dataloader()) == (count, 0, [])
        assert data.held_out_fingerprint() is None
    small_copy(tmp_path / "fashion")
    data = module(source=FashionMNIST(tmp_path / "fashion"), num_val=0)
    data.setup("fit")
    assert data.num_train == 20  # its test split is no part of what it is trained on
    assert data.held_out_fingerprint() is not None


def test_finishing_flips_by_position_and_scales(tmp_path: Path) -> None:
    save_images(tmp_path, 40, size=(6, 6))
    data = module(source=ImageFolder(tmp_path, image_size=6, channels=3, flip=True), batch_size=24, seed=5)
    data.setup("fit")
    batch = take(data.train_dataloader(), 2)[1]
    finished = data.finish(batch, training=True)
    coins = Draws.at(5, "flip", 1, start=0, stop=24).uniform("coin") < 0.5
    assert 0 < int(coins.sum()) < 24
    for image, raw, flipped in zip(finished.images, batch.images, coins, strict=True):
        assert torch.equal(image, to_float(raw.flip(-1) if flipped else raw))
    assert finished.images.dtype == torch.float32
    part = Batch(batch.images[9:20], None, 9, 1)  # the rows of another process meet the same coins
    assert torch.equal(data.finish(part, training=True).images, finished.images[9:20])
    assert torch.equal(data.finish(batch, training=False).images, to_float(batch.images))


def test_a_source_that_must_not_be_mirrored_is_not() -> None:
    data = module()
    data.setup("fit")
    [batch] = take(data.train_dataloader(), 1)
    assert torch.equal(data.finish(batch, training=True).images, to_float(batch.images))


def test_large_sets_give_the_same_batches_through_arrow(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save_images(tmp_path / name, 20, size=(12, 10))
    source = ImageFolder(tmp_path, image_size=[8, 6], channels=1)
    small, large = (
        module(source=source, batch_size=16),
        module(source=source, batch_size=16, memory_limit_mb=0),
    )
    for data in (small, large):
        data.setup("fit")
    assert isinstance(small._train, MemoryStore)
    assert isinstance(large._train, ArrowStore)
    for one, other in zip(
        take(small.train_dataloader(), 6) + list(small.val_dataloader()),
        take(large.train_dataloader(), 6) + list(large.val_dataloader()),
        strict=True,
    ):
        assert torch.equal(one.images, other.images)
        assert one.labels is not None
        assert other.labels is not None
        assert torch.equal(one.labels, other.labels)
        assert one[2:] == other[2:]


def test_setup_loads_once_and_only_what_the_stage_needs() -> None:
    data = module()
    data.setup("validate")
    with pytest.raises(RuntimeError, match="setup"):
        data.train_dataloader()
    validation = data._val
    data.setup("fit")
    training = data._train
    data.setup("fit")
    data.setup(None)
    assert data._val is validation
    assert data._train is training


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("num_val", -1), ("num_workers", -1), ("memory_limit_mb", -1)]
)
def test_values_out_of_range_are_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: must be at least"):
        module(**{name: value})


class Recorder(LightningModule):
    """One weight, and a list of what Lightning handed over."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_batches: list[Batch] = []
        self.val_batches: list[Batch] = []

    def training_step(self, batch: Batch) -> Tensor:
        self.train_batches.append(batch)
        return (self.weight - batch.images.mean()) ** 2

    def validation_step(self, batch: Batch) -> None:
        self.val_batches.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        **options,
    )


def test_lightning_resumes_the_stream_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    save_images(tmp_path / "images", 40, size=(6, 6))
    source = ImageFolder(tmp_path / "images", image_size=6, holdout=0.2)

    def run(steps: int, checkpoint: Path | None = None) -> tuple[Recorder, Trainer]:
        model = Recorder()
        fit = trainer(
            max_steps=steps, val_check_interval=3, accumulate_grad_batches=2, num_sanity_val_steps=1
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(DataLoader|dataloader|worker|IterableDataset).*")
            fit.fit(
                model,
                datamodule=module(source=source, batch_size=8),
                ckpt_path=checkpoint,
                weights_only=False,
            )
        return model, fit

    whole, _ = run(7)
    assert [batch.step for batch in whole.train_batches] == list(range(14))
    assert all(isinstance(batch, Batch) for batch in whole.train_batches + whole.val_batches)
    assert whole.train_batches[0].images.dtype == torch.float32
    reference = module(source=source, batch_size=8)
    reference.setup()
    expected = [reference.finish(batch, training=True) for batch in take(reference.train_dataloader(), 14)]
    plain = [reference.finish(batch, training=False) for batch in reference.val_dataloader()]
    for seen, wanted in zip(whole.train_batches, expected, strict=True):
        assert torch.equal(seen.images, wanted.images)
    for i, seen in enumerate(whole.val_batches[1:]):  # the first is the sanity check
        assert torch.equal(seen.images, plain[i % len(plain)].images)

    part, fit = run(3)
    fit.save_checkpoint(tmp_path / "part.ckpt")
    rest, _ = run(7, tmp_path / "part.ckpt")
    assert [batch.step for batch in part.train_batches + rest.train_batches] == list(range(14))
    for seen, wanted in zip(rest.train_batches, expected[6:], strict=True):
        assert torch.equal(seen.images, wanted.images)


def test_an_uneven_share_of_the_batch_is_refused() -> None:
    data = module(batch_size=33)
    data.trainer = trainer(devices=2, strategy="ddp", max_steps=1)
    with pytest.raises(UserError, match=r"batch_size=33 .* among 2 processes; take 32") as error:
        data.setup("fit")
    assert "\n" not in str(error.value)


def test_fashion_mnist_for_real(fashion_mnist_folder: Path) -> None:
    data = module(source=FashionMNIST(fashion_mnist_folder), batch_size=128)
    data.setup("fit")
    assert (data.num_train, data.num_classes, data.image_shape) == (60_000, 10, (1, 28, 28))
    seen = torch.cat(
        [batch.labels for batch in take(data.train_dataloader(), 469) if batch.labels is not None]
    )
    assert torch.bincount(seen[:60_000]).tolist() == [6000] * 10
    assert [len(batch.images) for batch in data.val_dataloader()] == [128] * 8
