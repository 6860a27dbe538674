"""A run that is killed or asked to stop, and then repeated, ends as if nothing had happened."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import run

COMMAND = [
    "debug=tiny",
    "trainer.max_steps=60",
    "trainer.val_check_interval=7",
    "callbacks.save_checkpoints.every_n_steps=7",
    "callbacks.monitor.every_n_steps=5",
    "net.dropout=0.1",
    "net.self_condition=true",
]


def start(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "litdiffusion.train", *COMMAND, f"run_dir={run_dir}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finish(run_dir: Path, *overrides: str) -> str:
    process = start(run_dir, *overrides)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run never came so far"
        time.sleep(0.005)


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as file:
        return [
            {name: cell for name, cell in row.items() if "per_second" not in name}
            for row in csv.DictReader(file)
        ]


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {place: value}
    return {k: v for key, child in items for k, v in leaves(child, f"{place}/{key}").items()}


def assert_same_run(one: Path, other: Path) -> None:
    first, second = (
        leaves(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)) for run in (one, other)
    )
    assert first.keys() == second.keys()
    for key, value in first.items():
        # Counters that Lightning keeps for its own loggers, which this project does not use.
        if key.startswith("/loops") or "run_dir" in key or key.endswith(("/folder", "/images_per_second")):
            continue
        same = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        assert same, key
    assert rows(one) == rows(other)
    for name in ("grid.png", "denoising.gif", "step-0000010.png", "step-0000050.png"):
        assert (one / "samples" / name).read_bytes() == (other / "samples" / name).read_bytes(), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish(run_dir)
    return run_dir


def test_killed_and_repeated(uninterrupted: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for((tmp_path / "checkpoints" / "previous.ckpt").exists, process)
    process.kill()
    process.communicate()
    assert "Continuing from step" in finish(tmp_path)
    assert_same_run(uninterrupted, tmp_path)


def test_asked_to_stop_twice_and_repeated(uninterrupted: Path, tmp_path: Path) -> None:
    for signum, seen in ((signal.SIGTERM, 3), (signal.SIGINT, 8)):
        process = start(tmp_path)
        table = tmp_path / "metrics.csv"
        wait_for(lambda table=table, seen=seen: table.exists() and len(rows(tmp_path)) >= seen, process)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signum, output
        assert f"stopped by {signal.Signals(signum).name} after step" in output
        assert "Traceback" not in output
    assert "Continuing from step" in finish(tmp_path)
    assert_same_run(uninterrupted, tmp_path)


def test_a_finished_run_is_left_alone(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in sorted(uninterrupted.rglob("*")) if path.is_file()}
    run("train", *COMMAND, f"run_dir={uninterrupted}")
    after = {path: path.read_bytes() for path in sorted(uninterrupted.rglob("*")) if path.is_file()}
    assert "This run is finished" in capsys.readouterr().out
    assert before == after


def test_continued_for_longer(tmp_path: Path) -> None:
    tiny = ["debug=tiny", "lr_scheduler=constant", "callbacks.sample_images=null", "datamodule.num_val=0"]
    run("train", *tiny, "trainer.max_steps=12", f"run_dir={tmp_path / 'at once'}")
    run("train", *tiny, "trainer.max_steps=7", f"run_dir={tmp_path / 'in two'}")
    run("train", *tiny, "trainer.max_steps=12", f"run_dir={tmp_path / 'in two'}")
    first, second = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("at once", "in two")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
