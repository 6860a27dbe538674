"""Who has started the processes of a run, and how each of them leaves when the run was asked to stop."""

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from litdiffusion.configuration.slurm import num_tasks, task_rank

SLURM_SECONDS = 10.0
"""For an answer of Slurm's, while a job is asked to leave."""


class SlurmTasks(SLURMEnvironment):
    """The tasks that srun has started. Who requeues the job is its batch script, never Lightning."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    @staticmethod
    def _validate_srun_variables() -> None:
        """``srun --ntasks=2`` will do: the configuration has counted the tasks of each node."""


def cluster_environment() -> ClusterEnvironment | None:
    """Return what connects the processes, or None: then Lightning finds out."""
    if TorchElasticEnvironment.detect():
        return None
    if num_tasks() > 1:
        return SlurmTasks()
    # One task of a job may start processes of its own. Lightning would wait for srun to do it.
    return LightningEnvironment() if "SLURM_NTASKS" in os.environ else None


def leave_in_peace() -> None:
    """Have Lightning watch the processes no longer that it has started from this one: the run is over.

    As soon as it sees that one has left with an exit code, as after a signal, it kills all of them, this one first
    of all, even while this one still closes its loggers.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


def leave(signum: int) -> NoReturn:
    """End this process of a run that has saved its state, in the way that its caller expects.

    submitit installs a handler that requeues the job and leaves; it runs now, when there is something to continue.
    Everybody else, ``scripts/slurm`` among them, reads 128 + the signal from the exit code, as a shell does.

    Slurm sends SIGTERM to a job that makes room for another. One that leaves by itself within its partition's
    ``GraceTime`` counts as failed: it has to be requeued as one that is out of time. The first task finds out; the
    others leave with the lower of the two codes, since srun returns the highest.
    """
    if signum == signal.SIGTERM and "SLURM_STEP_NUM_TASKS" in os.environ:
        if task_rank() > 0:
            sys.exit(128 + signal.SIGUSR1)
        if _has_to_make_room():
            signum = signal.SIGUSR1
    if signum in (signal.SIGUSR1, signal.SIGUSR2):
        for announced in (signal.SIGUSR1, signal.SIGUSR2):
            requeue = signal.getsignal(announced)
            if callable(requeue):
                with suppress(subprocess.CalledProcessError):  # somebody else was faster
                    requeue(announced, None)
                sys.exit(0)  # the first task requeues; the others must not look like a failure meanwhile
    sys.exit(128 + signum)


def _has_to_make_room() -> bool:
    """Whether Slurm is about to preempt this job: one that it has requeued, or somebody cancelled, runs no longer."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # for one of its jobs, the number is that of the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    show = ["scontrol", "show", "job", job, "--oneliner"]
    try:
        answer = subprocess.run(show, capture_output=True, text=True, timeout=SLURM_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "JobState=RUNNING" in answer and re.search(r"\bPreemptTime=\d", answer) is not None
