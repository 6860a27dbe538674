"""The share of a machine's cores or GPUs that each of several jobs gets."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from litdiffusion.errors import UserError
from litdiffusion.system.parent_death import PARENT
from litdiffusion.system.processes import usable_cores

T = TypeVar("T")

SWEEP = "LITDIFFUSION_SWEEP"
"""The variable that holds the name of a job's sweep: the group of its run on a dashboard."""

JOB = "LITDIFFUSION_JOB"
"""The variable that says what is special about a job: the name of its run on a dashboard."""

OF_ANOTHER_GROUP = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "LITDIFFUSION_RUN_DIR", "HYDRA_FULL_ERROR"),
)
"""Variables, with all that begin with TORCHELASTIC_, that describe a group of processes which a job is not in."""


@dataclass(frozen=True)
class Share:
    """Cores and GPUs, by their names; None for all of them."""

    cores: tuple[int, ...] | None = None
    gpus: tuple[str, ...] | None = None


def shares(jobs: int, on_gpu: bool) -> list[Share]:
    """Divide this machine among ``jobs`` jobs that run at once, all alike; what does not divide stays idle.

    Raises:
        UserError: more jobs than GPUs, or than cores.
    """
    if jobs < 1:
        raise UserError(f"hydra.launcher.jobs={jobs}: must be at least 1")
    if jobs == 1:
        return [Share()]
    if on_gpu:
        return [Share(gpus=part) for part in _divided(visible_gpus(), jobs, "GPU")]
    return [Share(cores=part) for part in _divided(usable_cores(), jobs, "core")]


def environment(share: Share, num_processes: int, sweep: str, wants_traceback: bool) -> dict[str, str]:
    """Return the environment of a job: this process's own, but for what belongs to another group of processes.

    Args:
        share: what the job may use.
        num_processes: how many processes share its cores.
        sweep: the name of the sweep.
        wants_traceback: whether the user has set HYDRA_FULL_ERROR.
    """
    variables = {name: value for name, value in os.environ.items() if not _is_of_another_group(name)}
    variables |= {SWEEP: sweep, PARENT: str(os.getpid())}
    if wants_traceback:
        variables["HYDRA_FULL_ERROR"] = "1"
    if share.gpus is not None:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
    if share.cores is not None:
        threads = max(1, len(share.cores) // num_processes)
        chosen = os.environ.get("OMP_NUM_THREADS", "")
        variables["OMP_NUM_THREADS"] = str(min(threads, int(chosen)) if chosen.isdecimal() else threads)
    return variables


def visible_gpus(variables: Mapping[str, str] = os.environ) -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = variables.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name.strip() for name in chosen.split(",") if name.strip()]


def bind(pid: int, share: Share) -> None:
    """Restrict a new process, and all that it starts, to the share's cores, where the system can."""
    if share.cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(pid, share.cores)


def _divided(parts: Sequence[T], jobs: int, name: str) -> list[tuple[T, ...]]:
    if jobs > len(parts):
        raise UserError(
            f"hydra.launcher.jobs={jobs}: this machine has {len(parts)} {name}{'s' * (len(parts) != 1)} for them;"
            f" use hydra.launcher.jobs={max(1, len(parts))}"
        )
    size = len(parts) // jobs
    return [tuple(parts[size * job : size * (job + 1)]) for job in range(jobs)]


def _is_of_another_group(name: str) -> bool:
    return name in OF_ANOTHER_GROUP or name.startswith("TORCHELASTIC_")
