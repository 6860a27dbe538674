"""How this process was launched: alone, or as one of several by torchrun, srun or Lightning. The environment says it.

A batch script, or a shell inside a Slurm job, is no task of srun: what it starts without srun is a run like any
other. Where torchrun has started the processes under srun, torchrun's variables count.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from litdiffusion.errors import UserError


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment for the duration of the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def process_rank() -> int:
    """Return this process's rank among those that torchrun, Lightning or srun started; 0 when it is alone."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or task_rank())


def num_started() -> int:
    """Return how many processes torchrun, or a launcher like it, has started together; 1 for one alone.

    Raises:
        UserError: the environment says something else.
    """
    said = os.environ.get("WORLD_SIZE") or "1"
    if not said.isdecimal():
        raise UserError(
            f"WORLD_SIZE={said}: the environment should say how many processes there are; unset it"
        )
    return int(said)


def num_tasks() -> int:
    """Return how many tasks srun has started together, this process being one of them; 0 where it has not."""
    if "RANK" in os.environ:
        return 0
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or 0)


def task_rank() -> int:
    """Return this task's rank among those that srun has started together; 0 when it is alone."""
    return int(os.environ["SLURM_PROCID"]) if num_tasks() > 1 else 0


def of_step(what: str) -> int:
    """Return "nodes" or "tasks_per_node" of the srun that has started this process: ``${slurm:nodes}``.

    Raises:
        UserError: srun has not started it, or has not put equally many tasks on each node.
    """
    if num_tasks() == 0:
        raise UserError(
            "trainer=slurm: this process was not started by srun; submit it with scripts/slurm/one_node.sbatch,"
            " or choose another trainer"
        )
    nodes, counts = int(os.environ["SLURM_STEP_NUM_NODES"]), os.environ["SLURM_STEP_TASKS_PER_NODE"]
    alike = re.fullmatch(r"(\d+)(\(x\d+\))?", counts)
    if alike is None:
        raise UserError(
            f"trainer=slurm: srun has put {counts} tasks on its nodes; ask for --ntasks-per-node=N, not --ntasks"
        )
    return {"nodes": nodes, "tasks_per_node": int(alike[1])}[what]
