"""Jobs of a sweep as a Slurm array. The cluster is played here; tests/slurm has a real one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus

from litdiffusion.configuration import config_folder
from litdiffusion.errors import UserError
from litdiffusion.sweeps import slurm
from litdiffusion.sweeps.jobs import Job
from litdiffusion.sweeps.process import Outcome

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")


def launcher(*overrides: str) -> dict:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", ["hydra/launcher=slurm", *overrides], return_hydra_config=True)
    return cfg.hydra.launcher


def test_the_array_has_a_task_for_each_device() -> None:
    from hydra_plugins.litdiffusion_slurm import SlurmLauncher

    cfg = launcher("trainer=ddp_cpu", "trainer.num_nodes=3", "hydra.launcher.partition=gpu")
    assert cfg._target_ == f"{SlurmLauncher.__module__}.{SlurmLauncher.__qualname__}"
    assert (cfg.nodes, cfg.tasks_per_node, cfg.partition) == (3, 2, "gpu")
    assert launcher().tasks_per_node == 1


class Handle:
    """A job of submitit's that is done when it is looked at for the third time."""

    def __init__(self, returned: JobReturn | Exception, said: str = "") -> None:
        self._returned, self._said, self._looks = returned, said, 0

    def done(self) -> bool:
        self._looks += 1
        return self._looks > 2

    def results(self) -> list[JobReturn]:
        if isinstance(self._returned, Exception):
            raise self._returned
        return [self._returned]

    def stderr(self) -> str:
        return self._said


def returned(status: JobStatus, value: object = None) -> JobReturn:
    result = JobReturn(status=status)
    result.return_value = value
    return result


def test_each_job_of_an_array_has_its_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = [
        Handle(returned(JobStatus.COMPLETED)),
        Handle(returned(JobStatus.FAILED, UserError("seed=-1:\n  must be positive"))),
        Handle(RuntimeError("Job 3 failed"), "Traceback (most recent call last):\n  a\nMemoryError: much\n"),
    ]
    handed_in: list[tuple] = []

    def map_array(task, *arguments) -> list[Handle]:
        handed_in.extend(zip(*arguments, strict=True))
        return handles

    monkeypatch.setattr(slurm, "_executor", lambda cluster, parameters: SimpleNamespace(map_array=map_array))
    monkeypatch.setattr(slurm, "LOOK_SECONDS", 0.0)
    jobs = [Job(n, (f"seed={n}",), tmp_path, tmp_path / "summary.json", ()) for n in (0, 2, 5)]
    begun: list[Job] = []
    outcomes: dict[int, Outcome] = {}
    slurm.run_array(
        len, "slurm", {}, "s", jobs, begun.append, lambda job, end: outcomes.update({job.number: end})
    )
    assert [(overrides, number) for overrides, _, number, *_ in handed_in] == [
        *((["seed=0"], 0), (["seed=2"], 2), (["seed=5"], 5)),
    ]
    assert begun == jobs
    assert outcomes == {
        0: Outcome("finished"),
        2: Outcome("failed", "seed=-1: must be positive"),
        5: Outcome("failed", "MemoryError: much"),
    }
