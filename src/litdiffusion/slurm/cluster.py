"""How a run's processes are connected under Slurm, and the exit code of a run that was asked to stop."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from typing import NoReturn

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from litdiffusion.system.launch import num_tasks, task_rank

SLURM_SECONDS = 10.0
"""How long ``scontrol`` and ``squeue`` may take to answer."""


class SlurmTasks(SLURMEnvironment):
    """The tasks that srun has started. The batch script requeues the job, never Lightning."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    @staticmethod
    def _validate_srun_variables() -> None:
        """``srun --ntasks=2`` will do: the configuration has counted the tasks of each node."""


def cluster_environment() -> ClusterEnvironment | None:
    """Return Lightning's description of the processes that were started together, or None: then it finds out."""
    if TorchElasticEnvironment.detect():
        return None
    if num_tasks() > 1:
        return SlurmTasks()
    # One task of a job may start processes of its own. Lightning would wait for srun to do it.
    return LightningEnvironment() if "SLURM_NTASKS" in os.environ else None


def leave(signum: int) -> NoReturn:
    """Exit from a run that has saved its state, with the exit code that its launcher expects.

    submitit installs a signal handler that requeues the job and exits; it is called here, after the checkpoint is
    written. Every other launcher, ``scripts/slurm`` among them, expects 128 + the signal, as of a shell.

    Slurm sends SIGTERM to a job that it preempts. One that exits by itself within its partition's ``GraceTime``
    counts as failed, so it has to be requeued like one that is out of time. The first task asks Slurm; the others
    exit with the lower of the two codes, since srun returns the highest.
    """
    if signum == signal.SIGTERM and "SLURM_STEP_NUM_TASKS" in os.environ:
        if task_rank() > 0:
            sys.exit(128 + signal.SIGUSR1)
        if _is_preempted():
            signum = signal.SIGUSR1
    if signum in (signal.SIGUSR1, signal.SIGUSR2):
        for announced in (signal.SIGUSR1, signal.SIGUSR2):
            requeue = signal.getsignal(announced)
            if callable(requeue):
                with suppress(subprocess.CalledProcessError):  # another process has requeued it
                    requeue(announced, None)
                sys.exit(0)  # the first task requeues; the others must not look like a failure meanwhile
    sys.exit(128 + signum)


def _is_preempted() -> bool:
    """Whether Slurm is preempting this job; one that was requeued or cancelled is no longer RUNNING."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # for one of its jobs, the number is that of the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    show = ["scontrol", "show", "job", job, "--oneliner"]
    try:
        answer = subprocess.run(show, capture_output=True, text=True, timeout=SLURM_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "JobState=RUNNING" in answer and re.search(r"\bPreemptTime=\d", answer) is not None
