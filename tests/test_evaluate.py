"""The evaluate command: what it reports of a checkpoint, and how it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from commands import run, train_tiny, type_command
from litdiffusion import load_model
from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.data.sources import Digits
from litdiffusion.errors import UserError
from litdiffusion.evaluation.bits_per_dim import bound_parts
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
    metrics = evaluate(classy, tmp_path, "num_images=12", "bits_per_dim_images=8", "batch_size=5")
    model = load_model(classy, device="cpu")
    datamodule = ImageDataModule(Digits(), 8, seed=0, num_val=8)
    datamodule.setup("validate")
    batch = datamodule.finish(next(iter(datamodule.val_dataloader())), training=False)
    parts = bound_parts(model.denoiser, batch.images, 0, None, "learned", batch.labels)
    assert metrics["val/bits_per_dim"] == pytest.approx(float(parts.total.mean()), rel=1e-4)
    assert metrics["val/bits_per_dim_prior"] == pytest.approx(float(parts.prior.mean()), rel=1e-4)
    assert metrics["val/bits_per_dim_decoder"] == pytest.approx(float(parts.decoder.mean()), rel=1e-4)
    assert (metrics["num_images"], metrics["bits_per_dim_images"], metrics["bits_per_dim_times"]) == (
        12,
        8,
        20,
    )
    # Without its labels the network would have given other numbers.
    unlabelled = bound_parts(model.denoiser, batch.images, 0, None, "learned")
    assert not torch.isclose(unlabelled.total, parts.total).any()


def test_the_variance_can_be_chosen_and_the_bound_left_out(classy: Path, tmp_path: Path) -> None:
    few = ("num_images=4", "bits_per_dim_times=5")
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


@pytest.mark.parametrize("started", [{"WORLD_SIZE": "2"}, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}])
def test_more_than_one_process_is_refused(
    started: dict[str, str], classy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="evaluate measures in one process"):
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


def test_a_sampler_is_refused_and_not_ignored(classy: Path, tmp_path: Path) -> None:
    typed = type_command("evaluate", f"ckpt={classy}", f"out={tmp_path / 'out'}", "sampler=ddim")
    assert typed.code == 2
    assert typed.err == "error: sampler: not a part of this configuration; evaluate has no use for it\n"


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
