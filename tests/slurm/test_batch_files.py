"""The batch files as they are shipped, on a real Slurm: whatever stops a job, its run ends as if nothing had."""

import re
import time
from pathlib import Path

import pytest

from interrupted_runs import COMMAND, differences, finish, has_come_to, rows
from offline_wandb import told_wandb
from slurm_world import Slurm, wait_until

pytestmark = pytest.mark.slurm

HELD = 25
"""A step at which a line is logged; in the middle of an epoch, between two checkpoints and two validations."""
HOLD = ("+callbacks.hold._target_=hold.Hold", f"+callbacks.hold.step={HELD}")
WORKERS = ("datamodule.memory_limit_mb=0", "datamodule.num_workers=1")
"""Slurm signals all processes of a job, so those that decode images as well."""
STOPPED, CONTINUING = "stopped by SIGTERM after", "Continuing from"
OFFLINE = ("logger=wandb", "logger.wandb.mode=offline")


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("peaceful") / "run"
    finish(run_dir)
    return run_dir


def wait_until_held(slurm: Slurm, job: str, run_dir: Path) -> None:
    wait_until(lambda: has_come_to(run_dir, HELD) or slurm.has_ended(job), f"step {HELD} of job {job}")
    time.sleep(0.5)  # W&B's process has been told after metrics.csv, and writes now


def assert_one_whole_wandb_run(run_dir: Path) -> None:
    """Every row of ``metrics.csv`` is in files of one run, once."""
    names = {file.stem for file in (run_dir / "wandb").glob("offline-run-*/*.wandb")}
    assert names == {f"run-{(run_dir / 'wandb' / 'run_id').read_text()}"}
    for key in ("train/loss", "val/loss"):
        assert told_wandb(run_dir, key) == [row["images_seen"] for row in rows(run_dir) if row[key]]


def test_requeued(slurm: Slurm, peaceful: Path, tmp_path: Path) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "output"
    job = slurm.submit("one_node.sbatch", [*COMMAND, *WORKERS, *OFFLINE, *HOLD, f"run_dir={run_dir}"], output)
    wait_until_held(slurm, job, run_dir)
    slurm.run("scontrol", "requeue", job)
    assert slurm.wait_for_end(job, output)["Restarts"] == "1"
    said = output.read_text()
    assert f"stopped by SIGTERM after step {HELD + 1}" in said
    assert f"Continuing from step {HELD + 1}" in said
    assert differences(peaceful, run_dir) == []
    assert_one_whole_wandb_run(run_dir)


@pytest.mark.parametrize("grace_seconds", [0, 60])
def test_preempted(slurm: Slurm, peaceful: Path, tmp_path: Path, grace_seconds: int) -> None:
    """Without grace, Slurm requeues the job itself; one that leaves within its grace has failed, as Slurm sees it."""
    run_dir, output = tmp_path / "run", tmp_path / "output"
    job = slurm.submit("one_node.sbatch", [*COMMAND, *HOLD, f"run_dir={run_dir}"], output)
    wait_until_held(slurm, job, run_dir)
    slurm.preempt(grace_seconds)
    assert slurm.wait_for_end(job, output)["Restarts"] == "1"
    assert f"Continuing from step {HELD + 1}" in output.read_text()
    assert differences(peaceful, run_dir) == []


def test_a_cancelled_job_is_not_requeued(slurm: Slurm, tmp_path: Path) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "output"
    job = slurm.submit("one_node.sbatch", [*COMMAND, *HOLD, f"run_dir={run_dir}"], output)
    wait_until_held(slurm, job, run_dir)
    slurm.run("scancel", job)
    wait_until(
        lambda: f"stopped by SIGTERM after step {HELD + 1}" in output.read_text(), "the end of the run"
    )
    time.sleep(5)
    assert (slurm.describe(job)["JobState"], slurm.describe(job)["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.slow  # Slurm looks at its clock twice a minute
def test_out_of_time(slurm: Slurm, peaceful: Path, tmp_path: Path) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "output"
    overrides = [*COMMAND, *WORKERS, *HOLD, f"run_dir={run_dir}"]
    job = slurm.submit("one_node.sbatch", overrides, output, ["--time=10", "--signal=USR1@60"])
    wait_until_held(slurm, job, run_dir)
    # Limits are whole minutes. This one is near enough to be announced next time, and far enough not to be over.
    slurm.set_time_limit(job, minutes=-(-(slurm.seconds_run(job) + 35) // 60))
    wait_until(lambda: slurm.describe(job)["Restarts"] == "1" or slurm.has_ended(job), "the requeue")
    slurm.set_time_limit(job, minutes=10)
    assert slurm.wait_for_end(job, output)["Restarts"] == "1"
    said = output.read_text()
    assert f"stopped by SIGUSR1 after step {HELD + 1}" in said
    assert f"Continuing from step {HELD + 1}" in said
    assert differences(peaceful, run_dir) == []


@pytest.mark.slow
def test_two_tasks_on_two_nodes_requeued(slurm: Slurm, tmp_path: Path) -> None:
    peaceful, run_dir, output = tmp_path / "peaceful", tmp_path / "run", tmp_path / "output"
    finish(peaceful, "trainer=ddp_cpu")
    two = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
    job = slurm.submit("many_nodes.sbatch", [*COMMAND, *OFFLINE, *HOLD, f"run_dir={run_dir}"], output, two)
    wait_until_held(slurm, job, run_dir)
    slurm.run("scontrol", "requeue", job)
    assert slurm.wait_for_end(job, output)["Restarts"] == "1"
    said = output.read_text()
    assert said.count("Training 60 steps") == 1  # one of them speaks
    [stopped], [continued] = (re.findall(rf"{words} step (\d+)", said) for words in (STOPPED, CONTINUING))
    assert HELD < int(stopped) == int(continued) < 60  # they agree upon a step now and then
    assert differences(peaceful, run_dir) == []
    assert_one_whole_wandb_run(run_dir)
