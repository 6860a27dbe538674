"""Several processes are one run: the same data, noise, weights, numbers and pictures, whatever their number."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from interrupted_runs import COMMAND, differences, finish, finish_here, rows, start, wait_for

TWO = ["trainer=ddp_cpu"]
TO_ROUNDING = ["net.dropout=0", "trainer.precision=32-true"]
"""Dropout is drawn by each process for itself: it alone is not the same on two. Bfloat16 rounds too early."""
SHORT = [*TWO, *TO_ROUNDING, "trainer.max_steps=30"]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert isinstance(state, dict)
    return state


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    """The same run up to rounding: weights, averages, numbers, and pictures to a gray level or two."""
    torch.testing.assert_close(weights(one), weights(other), rtol=tolerance, atol=tolerance)
    first, second = rows(one), rows(other)
    assert [row.keys() for row in first] == [row.keys() for row in second]
    for mine, theirs in zip(first, second, strict=True):
        for name, cell in mine.items():
            assert (cell == "") == (theirs[name] == "")
            if cell:
                assert float(cell) == pytest.approx(float(theirs[name]), rel=50 * tolerance), name
    for picture in sorted((one / "samples").iterdir()):
        mine, theirs = (last_frame(run_dir / "samples" / picture.name) for run_dir in (one, other))
        assert mine.shape == theirs.shape, picture.name
        assert abs(mine - theirs).max() <= 2, picture.name


def last_frame(path: Path) -> np.ndarray:
    if path.suffix == ".npz":
        with np.load(path) as steps:
            return np.concatenate((steps["x"], steps["x0"])).astype(int)
    with Image.open(path) as picture:
        picture.seek(getattr(picture, "n_frames", 1) - 1)
        return np.asarray(picture.convert("L")).astype(int)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "alone"
    finish_here(run_dir, *TO_ROUNDING, "trainer.max_steps=30")
    return run_dir


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "together"
    output = finish(run_dir, *SHORT)
    assert output.count("Training 30 steps") == 1  # one of them speaks
    assert "training images, 0.1 MiB as pixels, decoded once into the memory of each of 2 processes" in output
    return run_dir


def test_two_processes_of_8_follow_one_of_16(alone: Path, together: Path) -> None:
    assert_close(alone, together, 1e-4)
    summary = json.loads((together / "summary.json").read_text())
    assert summary["images_seen"] == 30 * 16


def test_two_processes_lose_one_and_are_repeated(together: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, *SHORT)
    wait_for((run_dir / "checkpoints" / "previous.ckpt").exists, process)
    children = subprocess.run(["pgrep", "--parent", str(process.pid)], capture_output=True, text=True).stdout
    os.kill(int(children.split()[0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "error: another process of this run was lost" in output
    assert "Traceback" not in output
    assert "Continuing from step" in finish(run_dir, *SHORT)
    assert differences(together, run_dir) == []


def test_none_is_left_behind_when_the_first_is_killed_while_they_start(tmp_path: Path) -> None:
    process = start(tmp_path, *SHORT)
    children = ["pgrep", "--parent", str(process.pid), "--full", "litdiffusion.train"]
    wait_for(lambda: subprocess.run(children, capture_output=True).stdout, process)
    process.kill()
    process.communicate(timeout=60)  # until the last of them that could write there is gone


@pytest.mark.slow
def test_the_first_is_not_killed_because_the_other_has_left_before_it(tmp_path: Path) -> None:
    """Lightning, which has started the other one, looks every five seconds, and answers an exit code with SIGKILL."""
    process = start(tmp_path, *SHORT, "+callbacks.slow._target_=hold.SlowToLeave")
    wait_for((tmp_path / "checkpoints" / "last.ckpt").exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM after step" in output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_moves_to_another_number_of_processes(alone: Path, tmp_path: Path) -> None:
    """The first 14 steps on one, the rest on two."""
    free = [*TO_ROUNDING, "lr_scheduler.total_steps=30"]
    finish(tmp_path, *free, "trainer.max_steps=14")
    output = finish(tmp_path, *free, "trainer.max_steps=30", *TWO)
    assert "Continuing from step 14" in output
    assert_close(alone, tmp_path, 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_two_processes_interrupted_and_repeated_end_as_if_nothing_had_happened(
    signum: signal.Signals, tmp_path: Path
) -> None:
    finish(tmp_path / "peace", *TWO)
    process = start(tmp_path / "run", *TWO)
    table = tmp_path / "run" / "metrics.csv"
    wait_for(lambda: table.exists() and len(rows(tmp_path / "run")) >= 4, process)
    os.killpg(process.pid, signum)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (128 + signum if signum != signal.SIGKILL else -9), output
    assert "Continuing from step" in finish(tmp_path / "run", *TWO)
    assert differences(tmp_path / "peace", tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_trains_and_samples(alone: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def call(module: str, *overrides: str) -> str:
        done = subprocess.run(
            [*torchrun, module, *overrides], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run_dir = tmp_path / "run"
    call(
        "litdiffusion.train",
        *COMMAND,
        *TO_ROUNDING,
        "trainer.max_steps=30",
        f"run_dir={run_dir}",
        *TWO,
    )
    assert_close(alone, run_dir, 1e-4)

    checkpoint = f"ckpt={run_dir}/checkpoints/last.ckpt"
    arguments = [checkpoint, "num_images=7", "device=cpu", "seed=3", "sampler=ddim", "sampler.num_steps=5"]
    assert call("litdiffusion.sample", *arguments, f"out={tmp_path / 'two'}").count("Drew 7 images") == 1
    subprocess.run(
        [sys.executable, "-m", "litdiffusion.sample", *arguments, f"out={tmp_path / 'one'}"],
        env=environment,
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "two" / "grid.png").exists()
    images = [np.load(tmp_path / name / "samples.npz")["images"].astype(int) for name in ("one", "two")]
    assert images[0].shape == images[1].shape
    assert abs(images[0] - images[1]).max() <= 1

    measured = []
    for command in (torchrun, [sys.executable, "-m"]):
        out = tmp_path / f"measured by {len(command)}"
        cache = tmp_path / f"cache of {len(command)}"
        subprocess.run(
            [
                *(*command, "litdiffusion.evaluate", *arguments[:1], "num_images=31", *arguments[2:]),
                *("features=pixels", f"'out={out}'", f"'cache={cache}'"),
            ],
            env=environment,
            check=True,
            capture_output=True,
        )
        measured.append(json.loads((out / "metrics.json").read_text()))
    numbers = [{name: value for name, value in each.items() if name.startswith("val/")} for each in measured]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-3)
    assert measured[0]["bits_per_dim_images"] == measured[1]["bits_per_dim_images"]
