"""Who has started the processes of a run, and how each of them leaves when the run was asked to stop."""

import os
import signal
import sys
import threading
from typing import NoReturn

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from litdiffusion.configuration.slurm import num_tasks


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
    """
    requeue = signal.getsignal(signum)
    if signum in (signal.SIGUSR1, signal.SIGUSR2) and callable(requeue):
        requeue(signum, None)
        sys.exit(0)  # the first task requeues; the others must not look like a failure meanwhile
    sys.exit(128 + signum)
