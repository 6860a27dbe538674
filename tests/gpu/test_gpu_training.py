"""Training on a GPU: as on the CPU, in half precision, interrupted, and under each strategy."""

import math
from pathlib import Path

import pytest
import torch
from gpu_world import DRY_RUN, ON_DEVICE, needs_gpu, not_in_a_dry_run

from commands import run
from interrupted_runs import differences, finish, finish_here, has_come_to, kill, rows, start, wait_for

pytestmark = needs_gpu

FLOAT32 = "trainer.precision=32-true"
QUICK = ["callbacks.sample_images=null", "callbacks.progress=null"]


def losses(run_dir: Path, name: str = "train/loss") -> list[float]:
    return [float(row[name]) for row in rows(run_dir) if row.get(name)]


def assert_follows(one: Path, other: Path) -> None:
    """The first step to rounding; then rounding grows, since Adam divides small gradients by their size."""
    first, second = losses(one), losses(other)
    assert len(first) == len(second) > 10
    assert second[0] == pytest.approx(first[0], rel=1e-5)
    assert second == pytest.approx(first, rel=2e-3)
    assert losses(other, "val/loss") == pytest.approx(losses(one, "val/loss"), rel=2e-3)


EVERY_STEP = [FLOAT32, *QUICK, "callbacks.monitor.every_n_steps=1", "trainer.max_steps=20"]


@pytest.fixture(scope="module")
def on_the_cpu(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "cpu"
    run("train", *tiny, *EVERY_STEP, "trainer=cpu", f"run_dir={run_dir}")
    return run_dir


def test_it_follows_the_loss_of_the_cpu(tiny: list[str], on_the_cpu: Path, tmp_path: Path) -> None:
    run("train", *tiny, *EVERY_STEP, ON_DEVICE, f"run_dir={tmp_path}")
    assert_follows(on_the_cpu, tmp_path)


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("16-mixed", marks=not_in_a_dry_run)])
def test_it_trains_in_half_precision(precision: str, tiny: list[str], tmp_path: Path) -> None:
    """Every number is finite (a loss that is not ends the run), and the loss falls."""
    options = [
        *QUICK,
        f"trainer.precision={precision}",
        "net.attention=[linear,full]",
        "net.self_condition=true",
    ]
    run("train", *tiny, ON_DEVICE, *options, "trainer.max_steps=60", f"run_dir={tmp_path}")
    found = losses(tmp_path)
    assert all(math.isfinite(loss) for loss in found)
    assert found[-1] < 0.9 * found[0]
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(weight).all()) for weight in state.values())


def test_killed_and_repeated_it_is_bit_for_bit_the_same(tiny: list[str], tmp_path: Path) -> None:
    """With ``trainer.deterministic=true``, dropout and self-conditioning included, in this card's own precision."""
    steps = 24 if DRY_RUN else 120
    options = [*tiny, ON_DEVICE, "trainer.deterministic=true", f"trainer.max_steps={steps}"]
    options += ["lr_scheduler.total_steps=120", "callbacks.sample_images.every_n_steps=20"]
    end = finish_here if DRY_RUN else finish
    end(tmp_path / "peace", *options)
    process = start(tmp_path / "run", *options)
    wait_for(lambda: has_come_to(tmp_path / "run", 10), process)
    kill(process)
    assert "Continuing from step" in end(tmp_path / "run", *options)
    assert differences(tmp_path / "peace", tmp_path / "run") == []


def test_ddp_on_one_device_follows_the_loss_of_the_cpu(
    tiny: list[str], on_the_cpu: Path, tmp_path: Path
) -> None:
    strategy = "trainer=ddp_cpu" if DRY_RUN else "trainer=ddp"
    plain = ["net.dropout=0", "net.self_condition=false", "callbacks.save_checkpoints.every_n_steps=5"]
    plain += ["trainer.val_check_interval=10"]  # as debug=tiny has them
    finish(tmp_path, *tiny, *EVERY_STEP, strategy, "trainer.devices=1", *plain)
    assert_follows(on_the_cpu, tmp_path)


@not_in_a_dry_run
def test_fsdp_on_one_device_follows_a_plain_run_and_continues(tiny: list[str], tmp_path: Path) -> None:
    """In bfloat16, where Lightning's own setting for FSDP rounds images and schedule as well (2e-4 of the loss)."""
    options = [
        *tiny,
        *EVERY_STEP,
        "trainer.precision=bf16-mixed",
        "ema=none",
        "trainer.gradient_clip_val=null",
    ]
    options += ["lr_scheduler.total_steps=40", "net.dropout=0", "net.self_condition=false"]
    finish(tmp_path / "plain", *options, "trainer=gpu")
    finish(tmp_path / "fsdp", *options, "trainer=fsdp", "trainer.devices=1")
    plain, fsdp = losses(tmp_path / "plain"), losses(tmp_path / "fsdp")
    assert fsdp[0] == pytest.approx(plain[0], rel=1e-4)
    assert fsdp == pytest.approx(plain, rel=2e-2)
    output = finish(tmp_path / "fsdp", *options, "trainer=fsdp", "trainer.devices=1", "trainer.max_steps=30")
    assert "Continuing from step 20" in output
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "fsdp"))
