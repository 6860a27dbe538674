"""FID during training, and the checkpoints that are kept beside the last."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import train_tiny
from litdiffusion import load_model
from litdiffusion.errors import UserError
from litdiffusion.training.callbacks import quality

QUALITY = (
    "callbacks=quality",
    "metrics=samples",
    "features@callbacks.measure_samples.features=pixels",
    "callbacks.measure_samples.num_images=20",
    "callbacks.measure_samples.every_n_steps=2",
    "callbacks.sample_images=null",
    "sampler.num_steps=3",
    "trainer.val_check_interval=2",
)


def fid_by_step(run_dir: Path) -> dict[int, float]:
    with (run_dir / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["val/fid"]) for row in csv.DictReader(file) if row.get("val/fid")}


def test_numbers_and_checkpoints(tmp_path: Path) -> None:
    cache = f"callbacks.measure_samples.cache={tmp_path / 'cache'}"
    kept = ("callbacks.save_checkpoints.best=val_fid", "callbacks.save_checkpoints.milestones=[1,3]")
    run_dir = train_tiny(tmp_path / "run", *QUALITY, *kept, cache, "trainer.max_steps=6")
    fid = fid_by_step(run_dir)
    assert list(fid) == [2, 4, 6]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["val_fid"] == pytest.approx(fid[6])
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "previous.ckpt", "best.ckpt", "step-0000001.ckpt", "step-0000003.ckpt"}
    steps = {name: load_model(run_dir / "checkpoints" / name).step for name in names}
    assert (steps["step-0000001.ckpt"], steps["step-0000003.ckpt"], steps["last.ckpt"]) == (1, 3, 6)
    assert steps["best.ckpt"] == min(fid, key=lambda step: fid[step])


def test_images_that_say_nothing_do_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drawing, steps = quality.sample_images, iter((-1.0, torch.nan, 0.0))
    monkeypatch.setattr(
        quality,
        "sample_images",
        lambda *args: drawing(*args) if (fill := next(steps)) == 0 else torch.full((20, 1, 8, 8), fill),
    )
    cache = f"callbacks.measure_samples.cache={tmp_path / 'cache'}"
    run_dir = train_tiny(tmp_path / "run", *QUALITY, cache, "trainer.max_steps=6")
    assert list(fid_by_step(run_dir)) == [6]
    warnings = [record.message for record in caplog.records if "no sample metrics" in record.message]
    assert warnings == ["step 2: no sample metrics: all 20 images are the same: there is nothing to compare"]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ("callbacks.save_checkpoints.best=val_fuid",),
            "best=val_fuid: not measured in this run; choose val_loss",
        ),
        (("callbacks.save_checkpoints.best=val_fid",), "best=val_fid: not measured in this run"),
        (
            ("callbacks.save_checkpoints.best=val_fid", "metrics=samples"),
            "best=val_fid: not measured in this run",
        ),
        (("callbacks.save_checkpoints.milestones=[0]",), r"milestones=\[0\]: each must be at least 1"),
        ((*QUALITY, "callbacks.measure_samples.num_images=1"), "num_images=1: must be at least 2"),
        (
            ("callbacks=quality",),
            "callbacks.measure_samples: no metric of generated images; add metrics=samples",
        ),
        (("callbacks=quality", "metrics=samples"), "features=fashion_mnist takes gray images of 28x28"),
    ],
)
def test_what_cannot_be_kept(overrides: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        train_tiny(tmp_path / "run", *overrides)
