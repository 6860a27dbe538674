"""Sweeps of the real command: its jobs train."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import type_command

TINY = ("debug=tiny", "trainer.max_steps=2", "callbacks.sample_images=null")


def rows(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_sweep_trains_what_can_be_trained_and_repeats_the_rest(tmp_path: Path) -> None:
    command = (
        "train",
        "-m",
        *TINY,
        "target=epsilon",
        "schedule=linear,flow",
        f"hydra.sweep.dir={tmp_path}",
    )
    typed = type_command(*command)
    assert typed.code == 2, typed.err
    assert [row["status"] for row in rows(tmp_path)] == ["finished", "failed"]
    assert rows(tmp_path)[1]["reason"].startswith("target=epsilon")
    summary = json.loads((tmp_path / "0/summary.json").read_text())
    for metric in ("val_loss", "train_loss", "val_bits_per_dim", "images_per_second"):
        assert float(rows(tmp_path)[0][metric]) == summary[metric]
    overrides = (tmp_path / "0/overrides.txt").read_text().split()
    assert overrides == [*TINY, "target=epsilon", "schedule=linear", f"run_dir={tmp_path}/0"]

    started = (tmp_path / "0/provenance.json").read_bytes()
    typed = type_command(*command)
    assert typed.code == 2
    assert typed.out.startswith("1 of 2 jobs are finished already: 0\n")
    assert [row["status"] for row in rows(tmp_path)] == ["skipped-finished", "failed"]
    assert (tmp_path / "0/provenance.json").read_bytes() == started


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2])
def test_six_jobs_of_two_processes_each_of_which_one_crashes(tmp_path: Path, at_once: int) -> None:
    crash = {"optimizer.lr": "1e30", "trainer.gradient_clip_val": "null", "lr_scheduler.warmup_steps": "0"}
    command = [
        *(sys.executable, "-m", "litdiffusion.train", "-m", *TINY, "trainer=ddp_cpu", "trainer.max_steps=4"),
        *(f"{key}={value}" for key, value in crash.items() if key != "optimizer.lr"),
        *("seed=0,1,2", f"optimizer.lr=1e-3,{crash['optimizer.lr']}", "hydra/launcher=processes"),
        *(f"hydra.launcher.jobs={at_once}", f"hydra.sweep.dir={tmp_path}"),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert [row["status"] for row in rows(tmp_path)] == ["finished", "failed"] * 3
    for row in rows(tmp_path)[1::2]:
        assert "loss became" in row["reason"]
    assert len({row["val_loss"] for row in rows(tmp_path)[::2]}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["cpu", "ddp_cpu"])
def test_a_stopped_sweep_continues_where_it_was(tmp_path: Path, trainer: str) -> None:
    command = [
        *(
            sys.executable,
            "-m",
            "litdiffusion.train",
            "-m",
            *TINY,
            f"trainer={trainer}",
            "trainer.max_steps=300",
        ),
        *("seed=0,1", f"hydra.sweep.dir={tmp_path}", "callbacks.save_checkpoints.every_n_steps=1000"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "0/metrics.csv").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert [row["status"] for row in rows(tmp_path)] == ["stopped", "waiting"], output
    assert (tmp_path / "0/checkpoints/last.ckpt").exists()
    again = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert again.returncode == 0, again.stderr
    assert "Continuing from step" in again.stdout
    assert [row["status"] for row in rows(tmp_path)] == ["finished", "finished"]
