"""Jobs of a sweep as a Slurm array. The cluster is played here; tests/slurm has a real one."""

import os
from dataclasses import replace
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

    def __init__(self, folder: Path, job_id: str, returned: JobReturn | Exception, said: str = "") -> None:
        self.job_id, self.paths = job_id, SimpleNamespace(submitted_pickle=folder / f"{job_id}.pkl")
        self.paths.submitted_pickle.touch()
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


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    return [
        Job(n, (f"seed={n}",), tmp_path / str(n), tmp_path / str(n) / "summary.json", ()) for n in (0, 2, 5)
    ]


class Array:
    """A cluster of which the test decides what becomes of each job."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, handles: list[Handle]) -> None:
        self.handed_in: list[tuple] = []
        self.begun: list[Job] = []
        self.outcomes: dict[int, Outcome] = {}
        self._handles = handles
        monkeypatch.setattr(slurm, "_executor", lambda cluster, parameters: self)
        monkeypatch.setattr(slurm, "LOOK_SECONDS", 0.0)

    def map_array(self, task, *arguments) -> list[Handle]:
        self.handed_in.extend(zip(*arguments, strict=True))
        return self._handles

    def run(self, folder: Path, jobs: list[Job]) -> None:
        parameters = {"submitit_folder": str(folder / "%j"), "nodes": 1, "tasks_per_node": 1}
        slurm.run_array(len, "slurm", parameters, folder, jobs, self.begun.append, self._ended)

    def _ended(self, job: Job, outcome: Outcome) -> None:
        self.outcomes[job.number] = outcome


def test_each_job_of_an_array_has_its_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    said = "Traceback (most recent call last):\n  a\nMemoryError: much\n"
    handles = [
        Handle(tmp_path, "7_0", returned(JobStatus.COMPLETED)),
        Handle(tmp_path, "7_1", returned(JobStatus.FAILED, UserError("seed=-1:\n  must be positive"))),
        Handle(tmp_path, "7_2", RuntimeError("Job 3 failed"), said),
    ]
    array = Array(monkeypatch, handles)
    array.run(tmp_path, jobs)
    assert [(overrides, number) for overrides, _, number, *_ in array.handed_in] == [
        *((["seed=0"], 0), (["seed=2"], 2), (["seed=5"], 5)),
    ]
    assert array.begun == jobs
    assert array.outcomes == {
        0: Outcome("finished"),
        2: Outcome("failed", "seed=-1: must be positive"),
        5: Outcome("failed", "MemoryError: much"),
    }
    assert not list(tmp_path.glob("*.pkl"))  # they held the commands as they were typed


def test_what_is_still_queued_is_waited_for_and_not_handed_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    import submitit

    handles = {n: Handle(tmp_path, f"7_{n}", returned(JobStatus.COMPLETED)) for n in range(3)}
    Array(monkeypatch, list(handles.values())).run(tmp_path, jobs)

    # Of these, Slurm has the second one only, and the sweep asks for something else in the third one's folder.
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\ncase $* in *=7_[12]*) echo PENDING;; *) exit 1;; esac\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def slurm_job(folder: str, job_id: str, tasks: range) -> Handle:
        assert (folder, list(tasks)) == (str(tmp_path / "%j"), [0])
        return Handle(tmp_path, job_id, returned(JobStatus.FAILED, UserError("of old")))

    monkeypatch.setattr(submitit, "SlurmJob", slurm_job)
    again = [*jobs[:2], replace(jobs[2], overrides=("seed=6",))]
    new = [Handle(tmp_path, f"8_{n}", returned(JobStatus.COMPLETED)) for n in range(2)]
    array = Array(monkeypatch, new)
    array.run(tmp_path, again)
    assert "1 of 3 jobs are with the cluster already: 2 (Slurm's 7_1)" in capsys.readouterr().out
    assert [number for _, _, number, *_ in array.handed_in] == [0, 5]
    assert array.begun == [again[0], again[2]]
    assert array.outcomes == {
        0: Outcome("finished"),
        2: Outcome("failed", "of old"),
        5: Outcome("finished"),
    }


def test_the_command_of_a_job_that_is_about_to_leave_the_queue_goes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    import submitit

    handles = [Handle(tmp_path, f"7_{n}", returned(JobStatus.COMPLETED)) for n in range(3)]
    Array(monkeypatch, handles).run(tmp_path, jobs)

    # The first job is finished, so that nobody asks for it; Slurm lists it once more, as COMPLETING.
    squeue, looked = tmp_path / "squeue", tmp_path / "looked"
    squeue.write_text(f"#!/bin/sh\ncase $* in *=7_0*) mkdir {looked} && echo COMPLETING;; *) exit 1;; esac\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(
        submitit, "SlurmJob", lambda folder, job_id, tasks: Handle(tmp_path, job_id, RuntimeError())
    )
    new = [Handle(tmp_path, f"8_{n}", returned(JobStatus.COMPLETED)) for n in range(2)]
    array = Array(monkeypatch, new)
    array.run(tmp_path, jobs[1:])
    assert looked.exists()
    assert [number for _, _, number, *_ in array.handed_in] == [2, 5]
    assert not list(tmp_path.glob("*.pkl"))
