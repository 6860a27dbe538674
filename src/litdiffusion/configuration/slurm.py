"""What Slurm tells the tasks that srun starts: their number, their nodes, and the rank of each.

A batch script or a shell inside a job is no task of srun: a run started there without srun is an ordinary run. If
torchrun has started the processes, its variables decide.
"""

import os
import re

from omegaconf import OmegaConf

from litdiffusion.errors import UserError


def num_tasks() -> int:
    """Return how many tasks srun has started together with this one; 0 if srun has not started this process."""
    if "RANK" in os.environ:
        return 0
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or 0)


def task_rank() -> int:
    """Return this task's number among those that srun has started together; 0 when it is alone."""
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


def require_tasks(processes: int) -> None:
    """Check that the tasks of srun are the processes of one run, not several runs in one folder.

    Raises:
        UserError: they are not.
    """
    if num_tasks() > 1 and num_tasks() != processes:
        raise UserError(
            f"srun has started {num_tasks()} tasks, but trainer.devices x trainer.num_nodes is {processes}:"
            " use trainer=slurm, or srun --ntasks=1"
        )


OmegaConf.register_new_resolver("slurm", of_step, replace=True)
