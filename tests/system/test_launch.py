"""What the processes of a Slurm job learn of each other, by the variables that srun sets (those of 22.05)."""

from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from commands import type_command
from litdiffusion.errors import UserError
from litdiffusion.slurm.cluster import SlurmTasks, cluster_environment
from litdiffusion.system.launch import num_tasks, of_step, process_rank

BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NUM_NODES": "2"}
TASK = {
    **BATCH_SCRIPT,
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
ONE_TASK = TASK | {
    "SLURM_NTASKS": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
}
TORCHRUN = {
    **TASK,
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "GROUP_RANK": "2",
    "TORCHELASTIC_RUN_ID": "x",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "tasks", "rank", "connects"),
    [
        ({}, 0, 0, type(None)),
        (BATCH_SCRIPT, 0, 0, LightningEnvironment),
        (ONE_TASK, 1, 0, LightningEnvironment),
        (TASK, 4, 3, SlurmTasks),
        (TORCHRUN, 0, 5, type(None)),
    ],
    ids=["a laptop", "a batch script", "one task", "a task of four", "torchrun started by srun"],
    indirect=["environment"],
)
def test_who_is_who(environment: None, tasks: int, rank: int, connects: type) -> None:
    assert num_tasks() == tasks
    assert process_rank() == rank
    found = cluster_environment()
    assert isinstance(found, connects)
    if isinstance(found, SlurmTasks):
        assert (found.global_rank(), found.world_size(), found.auto_requeue) == (3, 4, False)


@pytest.mark.parametrize(("counts", "per_node"), [("1", 1), ("4", 4), ("2(x8)", 2), ("16(x2)", 16)], ids=str)
def test_tasks_of_each_node(counts: str, per_node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TASK | {"SLURM_STEP_TASKS_PER_NODE": counts}).items():
        monkeypatch.setenv(name, value)
    assert of_step("tasks_per_node") == per_node
    assert of_step("nodes") == 2


@pytest.mark.parametrize("counts", ["2,1", "2(x2),1", "3,1(x2)"])
def test_uneven_tasks_are_refused(counts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TASK | {"SLURM_STEP_TASKS_PER_NODE": counts}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--ntasks-per-node"):
        of_step("tasks_per_node")


def test_trainer_slurm_outside_of_srun(tmp_path: Path) -> None:
    typed = type_command("train", "debug=tiny", "trainer=slurm", f"run_dir={tmp_path}")
    assert typed.code == 2
    assert "trainer=slurm" in typed.err
    assert "scripts/slurm/one_node.sbatch" in typed.err
    assert typed.err.count("\n") == 1


@pytest.mark.parametrize("environment", [TASK | {"SLURM_PROCID": "0"}], indirect=True)
def test_tasks_that_would_share_a_folder(environment: None, tmp_path: Path) -> None:
    typed = type_command("train", "debug=tiny", f"run_dir={tmp_path}")
    assert typed.code == 2
    assert "srun has started 4 tasks" in typed.err
    assert "trainer=slurm" in typed.err
