"""``hydra/launcher=slurm`` on a real Slurm: a sweep is one array, a job told to stop is requeued and goes on, and
a repeated command waits for what it finds in the queue.
"""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from interrupted_runs import COMMAND, differences, finish, has_come_to
from slurm_world import PATIENCE_SECONDS, TESTS, Slurm, wait_until

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

HELD, HELD_LATER, NEVER = 25, 30, 1000
"""Steps at which a line is logged, and one that there is not."""


def typed(sweep: Path, second_held: int) -> list[str]:
    """A sweep of two jobs, which wait for a signal: the first in its middle, the second after ``second_held``."""
    return [
        *(sys.executable, "-m", "litdiffusion.train", "-m", *COMMAND),
        *("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", f"hydra.sweep.dir={sweep}"),
        *("+callbacks.hold._target_=hold.Hold", f"+callbacks.hold.step={HELD},{second_held}"),
    ]


def begin(slurm: Slurm, sweep: Path, output: Path, second_held: int = NEVER) -> subprocess.Popen[str]:
    command = typed(sweep, second_held)
    with output.open("w") as file:
        return subprocess.Popen(
            command, env=slurm.environment, cwd=TESTS.parent, stdout=file, stderr=file, text=True
        )


def wait_for_the_middle(
    sweep: Path, started: subprocess.Popen[str], output: Path, second: int = HELD
) -> None:
    """Both jobs have come so far that a signal finds them at their steps, not at their imports."""
    wait_until(
        lambda: (
            (has_come_to(sweep / "0", HELD) and has_come_to(sweep / "1", second))
            or started.poll() is not None
        ),
        f"step {HELD} of the first job and {second} of the second",
    )
    assert started.poll() is None, output.read_text()


def array_in_the_queue(slurm: Slurm) -> str:
    [array] = {line.partition("_")[0] for line in slurm.run("squeue", "--noheader", "--format=%i").split()}
    return array


def table(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_is_killed_and_repeated_and_its_jobs_are_told_to_stop(slurm: Slurm, tmp_path: Path) -> None:
    peaceful, sweep, output = tmp_path / "peaceful", tmp_path / "sweep", tmp_path / "output"
    finish(peaceful)
    started = begin(slurm, sweep, output, HELD_LATER)
    wait_for_the_middle(sweep, started, output, HELD_LATER)
    started.kill()
    started.wait()
    started = begin(slurm, sweep, output, HELD_LATER)
    wait_until(
        lambda: "jobs are already queued or running" in output.read_text() or started.poll() is not None,
        "the repeated sweep",
    )
    array = array_in_the_queue(slurm)
    waits_for = f"2 of 2 jobs are already queued or running: 0 (Slurm's {array}_0), 1 (Slurm's {array}_1)"
    assert waits_for in output.read_text()
    slurm.run("scancel", "--signal=USR2", array)  # what submitit asks for before the time limit
    assert started.wait(PATIENCE_SECONDS) == 0, output.read_text()

    for number, held in (("0", HELD), ("1", HELD_LATER)):
        logs = (sweep / ".submitit").rglob(f"*_{number}_0_log.*")
        said = "".join(path.read_text() for path in logs)
        assert f"stopped by SIGUSR2 after step {held + 1}" in said
        assert f"Continuing from step {held + 1}" in said
        assert slurm.describe(f"{array}_{number}")["Restarts"] == "1"
        assert differences(peaceful, sweep / number) == []
    assert not list((sweep / ".submitit").rglob("*.pkl"))  # as it was typed
    assert [row["status"] for row in table(sweep)] == ["finished", "finished"]


def test_a_job_that_is_killed_is_listed_as_failed(slurm: Slurm, tmp_path: Path) -> None:
    """This Slurm keeps no accounts, so that only the queue says that a job is gone."""
    sweep, output = tmp_path / "sweep", tmp_path / "output"
    started = begin(slurm, sweep, output)
    wait_for_the_middle(sweep, started, output)
    slurm.run("scancel", "--signal=KILL", f"{array_in_the_queue(slurm)}_0")
    assert started.wait(PATIENCE_SECONDS) == 2, output.read_text()
    assert [row["status"] for row in table(sweep)] == ["failed", "finished"]
    assert not list((sweep / ".submitit").rglob("*.pkl"))


@pytest.mark.parametrize("grace_seconds", [0, 60])
def test_a_job_that_is_preempted_goes_on(slurm: Slurm, tmp_path: Path, grace_seconds: int) -> None:
    """With time to leave, it is not Slurm that requeues it."""
    sweep, output = tmp_path / "sweep", tmp_path / "output"
    started = begin(slurm, sweep, output)
    wait_for_the_middle(sweep, started, output)
    array = array_in_the_queue(slurm)
    slurm.preempt(grace_seconds)
    assert started.wait(PATIENCE_SECONDS) == 0, output.read_text()
    said = "".join(path.read_text() for path in (sweep / ".submitit").rglob("*_0_0_log.*"))
    assert f"stopped by SIGTERM after step {HELD + 1}" in said
    assert slurm.describe(f"{array}_0")["Restarts"] == "1"
    assert [row["status"] for row in table(sweep)] == ["finished", "finished"]
