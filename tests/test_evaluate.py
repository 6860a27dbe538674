"""The evaluate command: what it reports of a checkpoint, and how it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import run, train_tiny
from litdiffusion import load_model
from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.data.sources import Digits
from litdiffusion.data.stores import to_float
from litdiffusion.errors import UserError
from litdiffusion.evaluation import generated
from litdiffusion.evaluation.bits_per_dim import bound_parts
from litdiffusion.evaluation.distances import Gaussian, frechet_distance
from litdiffusion.reporting.images import to_uint8
from litdiffusion.system.launch import num_started

CLASSY = ("net.num_classes=10", "net.learned_variance=true", "schedule.num_steps=20")


@pytest.fixture(scope="module")
def classy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = train_tiny(tmp_path_factory.mktemp("runs") / "classy", *CLASSY, "callbacks.sample_images=null")
    return run_dir / "checkpoints" / "last.ckpt"


def evaluate(ckpt: Path, out: Path, *overrides: str) -> dict[str, Any]:
    run("evaluate", f"ckpt={ckpt}", f"out={out}", "device=cpu", *overrides)
    return json.loads((out / "metrics.json").read_text())


def test_the_bound_is_reported_with_its_parts(classy: Path, tmp_path: Path) -> None:
    metrics = evaluate(classy, tmp_path, "num_held_out=12", "bits_per_dim_images=8", "batch_size=5")
    model = load_model(classy, device="cpu")
    datamodule = ImageDataModule(Digits(), 8, seed=0, num_val=8)
    datamodule.setup("validate")
    batch = datamodule.finish(next(iter(datamodule.val_dataloader())), training=False)
    parts = bound_parts(model.denoiser, batch.images, 0, None, "learned", batch.labels)
    assert metrics["val/bits_per_dim"] == pytest.approx(float(parts.total.mean()), rel=1e-4)
    assert metrics["val/bits_per_dim_prior"] == pytest.approx(float(parts.prior.mean()), rel=1e-4)
    assert metrics["val/bits_per_dim_decoder"] == pytest.approx(float(parts.decoder.mean()), rel=1e-4)
    assert (metrics["num_held_out"], metrics["bits_per_dim_images"], metrics["bits_per_dim_times"]) == (
        12,
        8,
        20,
    )
    # Without its labels the network would have given other numbers.
    unlabelled = bound_parts(model.denoiser, batch.images, 0, None, "learned")
    assert not torch.isclose(unlabelled.total, parts.total).any()


def test_the_variance_can_be_chosen_and_the_bound_left_out(classy: Path, tmp_path: Path) -> None:
    few = ("num_held_out=4", "bits_per_dim_times=5")
    kinds = ("null", "learned", "beta", "beta_tilde")
    asked, learned, beta, beta_tilde = (
        evaluate(classy, tmp_path / kind, *few, f"bits_per_dim_variance={kind}")["val/bits_per_dim"]
        for kind in kinds
    )
    assert asked == learned
    assert len({learned, beta, beta_tilde}) == 3
    without = evaluate(classy, tmp_path / "without", *few, "bits_per_dim_images=0")
    assert not [name for name in without if "bits" in name]
    assert without["val/loss"] > 0


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("bits_per_dim_images=-1", "bits_per_dim_images=-1: must be at least 0"),
        ("bits_per_dim_images=null", "bits_per_dim_images: null is not an int"),
        ("bits_per_dim_images=1.5", "bits_per_dim_images: 1.5 is not an int"),
        (
            "bits_per_dim_times=1",
            "bits_per_dim_times=1: must be at least 2, or null for all times",
        ),
        ("bits_per_dim_times=all", "bits_per_dim_times: 'all' is not an int"),
        ("bits_per_dim_variance=betta", "bits_per_dim_variance: 'betta' is not .*'beta'"),
    ],
)
def test_what_cannot_be_measured_is_refused(override: str, reason: str, classy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{reason}"):
        evaluate(classy, tmp_path / "out", override)
    assert not (tmp_path / "out").exists()


def test_tasks_that_srun_starts_are_refused(
    classy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(UserError, match="start torchrun instead"):
        evaluate(classy, tmp_path / "out")


@pytest.mark.parametrize("said", ["abc", "-1", "1.5"])
def test_a_number_of_processes_that_is_none(
    said: str, classy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", said)
    with pytest.raises(UserError, match=f"WORLD_SIZE={said}: "):
        evaluate(classy, tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert num_started() == 1


DRAW = ("num_held_out=0", "num_images=40", "sampler=ddim", "sampler.num_steps=3", "features=pixels")


def test_generated_images_are_drawn_once_and_measured(classy: Path, tmp_path: Path) -> None:
    cache = f"cache={tmp_path / 'cache'}"
    out = tmp_path / "out"
    metrics = evaluate(classy, out, *DRAW, cache)
    images = load_model(classy, device="cpu").sample(40, "ddim", num_steps=3, seed=0, batch_size=64)
    with np.load(out / "samples.npz") as archive:
        drawn = torch.from_numpy(archive["images"]).permute(0, 3, 1, 2)
    assert (drawn.int() - to_uint8(images).int()).abs().max() <= 3  # in bfloat16, where that is native
    train, test = (
        torch.cat([batch.images for batch in whole(split)]).flatten(1) for split in ("train", "test")
    )
    drew, real = (to_float(each).double() for each in (drawn.flatten(1), train))
    expected = frechet_distance(Gaussian.of(drew), Gaussian.of(real))
    assert metrics["val/fid"] == pytest.approx(expected, rel=1e-5)
    floor = to_float(test[torch.arange(40) * len(test) // 40]).double()
    assert metrics["val/fid_floor"] == pytest.approx(
        frechet_distance(Gaussian.of(floor), Gaussian.of(real)), rel=1e-5
    )
    assert metrics["val/kid_std_error"] > 0
    assert {"val/precision", "val/recall", "val/density", "val/coverage", "val/copying"} <= metrics.keys()
    recorded = {
        "num_images": 40,
        "biased": True,
        "split": "train",
        "sampler": "DDIM",
        "num_steps": 3,
        "seed": 0,
    }
    assert recorded.items() <= metrics.items()
    assert metrics["network_evaluations"] == 3
    with Image.open(out / "nearest.png") as picture:
        assert picture.width > picture.height  # sixteen pairs, one above the other

    # The same request is answered from what is there, on both sides.
    stamps = {
        path: path.stat().st_mtime_ns for path in (out / "samples.npz", *(tmp_path / "cache").iterdir())
    }
    assert len(stamps) == 3
    assert without_time(evaluate(classy, out, *DRAW, cache)) == without_time(metrics)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert evaluate(classy, out, *DRAW, cache, "seed=1")["val/fid"] != metrics["val/fid"]
    recorded = json.loads((out / "samples.json").read_text())
    (out / "samples.json").write_text(json.dumps(recorded | {"model_hash": "of another training"}))
    assert without_time(evaluate(classy, out, *DRAW, cache)) == without_time(metrics)
    assert (out / "samples.npz").stat().st_mtime_ns != stamps[out / "samples.npz"]  # drawn anew
    (out / "samples.json").unlink()
    with pytest.raises(UserError, match=r"holds a samples.npz that is not of this command"):
        evaluate(classy, out, *DRAW, cache)


def without_time(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key != "wall_seconds"}


def whole(split: str) -> Any:
    return ImageDataModule(Digits(), 64, seed=0).in_order(split)


def test_what_is_drawn_survives_an_interruption(
    classy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated, "PART", 16)
    whole_run = evaluate(classy, tmp_path / "whole", *DRAW)
    drawing = generated.sample_images
    calls: list[int] = []

    def stopped(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs["first"])
        if calls == [0, 16]:
            raise KeyboardInterrupt
        return drawing(*args, **kwargs)

    monkeypatch.setattr(generated, "sample_images", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(classy, tmp_path / "out", *DRAW)
    assert [path.name for path in (tmp_path / "out" / "parts").iterdir()] == ["0000000.npy"]
    again = evaluate(classy, tmp_path / "out", *DRAW)
    assert calls == [0, 16, 16, 32]
    assert without_time(again) == without_time(whole_run)
    assert not (tmp_path / "out" / "parts").exists()


def test_black_images_are_refused_as_soon_as_they_are_drawn(
    classy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated, "sample_images", lambda *args, **kwargs: -torch.ones(40, 1, 8, 8))
    for _ in range(2):  # drawn, and read again
        with pytest.raises(UserError, match=r"^all 40 images are the same: there is nothing to compare"):
            evaluate(classy, tmp_path / "out", *DRAW)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_images_from_anywhere(tmp_path: Path) -> None:
    """The test split, as another tool writes it: its distance from the training images is the floor."""
    pixels = torch.cat([batch.images for batch in whole("test")]).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "x.npz", arr_0=pixels)
    run(
        "evaluate",
        f"images={tmp_path / 'x.npz'}",
        "data=digits",
        "features=pixels",
        f"out={tmp_path / 'out'}",
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["val/fid"] == metrics["val/fid_floor"]
    assert metrics["val/copying"] == pytest.approx(0.5, abs=0.1)
    assert metrics["num_images"] == len(pixels)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ((), "give either ckpt=FILE, a model to measure, or images=FILE"),
        (("ckpt=a", "images=b"), "give either"),
        (("images=nowhere.npz",), "images=.*nowhere.npz: there is no such file"),
        (("ckpt=CKPT", "sampler=ddim"), "sampler: no images are drawn; say how many, as in num_images=5000"),
        (("ckpt=CKPT", "num_images=4"), "features=fashion_mnist takes gray images of 28x28, and these are"),
        (
            ("ckpt=CKPT", "num_images=4", "features=pixels"),
            "metrics.density: 5 nearest neighbours need more images",
        ),
    ],
)
def test_requests_that_cannot_be_met(
    overrides: tuple[str, ...], reason: str, classy: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"^{reason}"):
        run("evaluate", *(each.replace("CKPT", str(classy)) for each in overrides), f"out={tmp_path / 'out'}")


def test_data_of_other_classes_is_refused(classy: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            Image.new("L", (8, 8)).save(folder / "1.png")
    folder_of_two = (
        "data=image_folder",
        f"data.path={tmp_path / 'data'}",
        "data.image_size=8",
        "data.channels=1",
    )
    with pytest.raises(UserError, match=r"2 classes.*10"):
        evaluate(classy, tmp_path / "out", *folder_of_two)
