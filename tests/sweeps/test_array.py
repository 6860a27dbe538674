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
from litdiffusion.slurm import array as slurm_array
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
        self.job_id, self.paths = (
            job_id,
            SimpleNamespace(folder=folder, submitted_pickle=folder / f"{job_id}_submitted.pkl"),
        )
        self.paths.submitted_pickle.touch()
        (folder / f"{job_id}_0_result.pkl").touch()
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
        Job(
            n,
            (f"seed={n}",),
            tmp_path / str(n),
            tmp_path / str(n) / "summary.json",
            (),
            varied={"seed": str(n)},
        )
        for n in (0, 2, 5)
    ]


def play_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """Put a ``squeue`` before the real one, if there is one, that answers by a line of shell."""
    squeue = folder / "squeue"
    squeue.write_text(f"#!/bin/sh\n{answer}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


class Array:
    """A cluster of which the test decides what becomes of each job."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, handles: list[Handle]) -> None:
        self.handed_in: list[tuple] = []
        self.begun: list[Job] = []
        self.outcomes: dict[int, Outcome] = {}
        self._handles = handles
        monkeypatch.setattr(slurm_array, "_executor", lambda cluster, parameters: self)
        monkeypatch.setattr(slurm_array, "LOOK_SECONDS", 0.0)

    def map_array(self, task, *arguments) -> list[Handle]:
        self.handed_in.extend(zip(*arguments, strict=True))
        return self._handles

    def run(self, folder: Path, jobs: list[Job]) -> None:
        parameters = {"submitit_folder": str(folder / "%j"), "nodes": 1, "tasks_per_node": 1}
        slurm_array.run_array(len, "slurm", parameters, folder, jobs, self.begun.append, self._ended)

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
    named = [[f"seed={n}", f"+hydra.job.env_set.LITDIFFUSION_JOB='seed={n}'"] for n in (0, 2, 5)]
    assert [overrides for overrides, *_ in array.handed_in] == named
    assert [number for _, _, number, *_ in array.handed_in] == [0, 2, 5]
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

    # Of these, Slurm has two; the sweep asks for something else in the folder of one of them.
    play_squeue(tmp_path, monkeypatch, "printf '7_1\\n7_2\\n'")

    def slurm_job(folder: str, job_id: str, tasks: range) -> Handle:
        assert (folder, list(tasks)) == (str(tmp_path / "%j"), [0])
        return Handle(tmp_path, job_id, returned(JobStatus.FAILED, UserError("of old")))

    monkeypatch.setattr(submitit, "SlurmJob", slurm_job)
    again = [*jobs[:2], replace(jobs[2], overrides=("seed=6",))]
    new = [Handle(tmp_path, f"8_{n}", returned(JobStatus.COMPLETED)) for n in range(2)]
    array = Array(monkeypatch, new)
    array.run(tmp_path, again)
    assert "1 of 3 jobs are already queued or running: 2 (Slurm's 7_1)" in capsys.readouterr().out
    assert [number for _, _, number, *_ in array.handed_in] == [0, 5]
    assert array.begun == [again[1], again[0], again[2]]
    assert array.outcomes == {
        0: Outcome("finished"),
        2: Outcome("failed", "of old"),
        5: Outcome("finished"),
    }


def test_a_job_not_asked_for_meanwhile_is_waited_for_when_it_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    import submitit

    handles = [Handle(tmp_path, f"7_{n}", returned(JobStatus.COMPLETED)) for n in range(2)]
    Array(monkeypatch, handles).run(tmp_path, jobs[:2])
    play_squeue(tmp_path, monkeypatch, "echo 7_1")
    monkeypatch.setattr(
        submitit,
        "SlurmJob",
        lambda folder, number, tasks: Handle(tmp_path, number, returned(JobStatus.COMPLETED)),
    )
    Array(monkeypatch, [Handle(tmp_path, "8_0", returned(JobStatus.COMPLETED))]).run(tmp_path, jobs[2:])
    array = Array(monkeypatch, [])
    array.run(tmp_path, jobs[1:2])
    assert array.handed_in == []
    assert array.outcomes == {2: Outcome("finished")}


def test_a_folders_older_job_is_waited_for_when_it_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    """Of two commands for the same folder both jobs are kept in mind."""
    import submitit

    other = [replace(jobs[0], overrides=("seed=9",))]
    play_squeue(tmp_path, monkeypatch, "printf '7_0\\n8_0\\n'")
    monkeypatch.setattr(
        submitit,
        "SlurmJob",
        lambda folder, number, tasks: Handle(tmp_path, number, returned(JobStatus.FAILED, UserError(number))),
    )
    for number, asked in (("7_0", jobs[:1]), ("8_0", other)):
        Array(monkeypatch, [Handle(tmp_path, number, returned(JobStatus.COMPLETED))]).run(tmp_path, asked)
    for number, asked in (("7_0", jobs[:1]), ("8_0", other)):
        array = Array(monkeypatch, [])
        array.run(tmp_path, asked)
        assert array.handed_in == []
        assert array.outcomes == {0: Outcome("failed", number)}


def test_a_job_that_leaves_the_queue_without_a_result_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    """As after scancel or kill -9, where the cluster keeps no accounts that submitit could ask."""
    lost = Handle(tmp_path, "7_1", returned(JobStatus.COMPLETED), "error: of its last words\n")
    fine = Handle(tmp_path, "7_0", returned(JobStatus.COMPLETED))
    fine.done, lost.done = lambda: True, lambda: False
    monkeypatch.setattr(slurm_array, "QUEUE_SECONDS", -1.0)
    asked = tmp_path / "asked"
    answer = f"echo >> {asked}; case $(wc -l < {asked}) in 1|3) echo 7_1;; 5) exit 1;; esac"
    play_squeue(tmp_path, monkeypatch, answer)
    array = Array(monkeypatch, [fine, lost])
    array.run(tmp_path, jobs[:2])
    assert array.outcomes == {0: Outcome("finished"), 2: Outcome("failed", "of its last words")}
    assert (
        len(asked.read_text().splitlines()) == 6
    )  # missing for the second time, or Slurm would not say, but: 4, 6


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            "echo slurm_load_jobs error: Unable to contact >&2; exit 1",
            "slurm_load_jobs error: Unable to contact",
        ),
        ("exec sleep 60", "Command .*squeue.* timed out after 0.2 seconds"),
    ],
)
def test_nothing_is_done_while_slurm_does_not_say_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[Job], answer: str, said: str
) -> None:
    monkeypatch.setattr(slurm_array, "SLURM_SECONDS", 0.2)
    handles = [Handle(tmp_path, f"7_{n}", returned(JobStatus.COMPLETED)) for n in range(3)]
    Array(monkeypatch, handles).run(tmp_path, jobs)
    commands = [Handle(tmp_path, f"7_{n}", RuntimeError()).paths.submitted_pickle for n in range(3)]
    play_squeue(tmp_path, monkeypatch, answer)
    array = Array(monkeypatch, [])
    with pytest.raises(UserError, match=rf"squeue does not say .*\({said}\)"):
        array.run(tmp_path, jobs)
    assert array.handed_in == []
    assert all(path.exists() for path in commands)


@pytest.mark.parametrize(
    "written", ['{"../../elsewhere": ["0", []]}', '{"7_0/../8": ["0", ["seed=0"]]}', "[1]", '{"7_0": 1}', "{"]
)
def test_what_is_noted_may_come_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[Job], written: str
) -> None:
    import submitit

    (tmp_path / "handed_in.json").write_text(written)
    play_squeue(tmp_path, monkeypatch, "echo 7_0")
    monkeypatch.setattr(submitit, "SlurmJob", lambda *arguments: pytest.fail(str(arguments)))
    array = Array(monkeypatch, [Handle(tmp_path, "9_0", returned(JobStatus.COMPLETED))])
    array.run(tmp_path, jobs[:1])
    assert array.outcomes == {0: Outcome("finished")}


def test_the_command_of_a_job_that_is_about_to_leave_the_queue_goes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    import submitit

    handles = [Handle(tmp_path, f"7_{n}", returned(JobStatus.COMPLETED)) for n in range(3)]
    Array(monkeypatch, handles).run(tmp_path, jobs)

    # The first job is finished, so that nobody asks for it; Slurm lists it once more, as COMPLETING.
    looked = tmp_path / "looked"
    play_squeue(tmp_path, monkeypatch, f"mkdir {looked} 2> /dev/null && echo 7_0 || true")
    monkeypatch.setattr(
        submitit, "SlurmJob", lambda folder, job_id, tasks: Handle(tmp_path, job_id, RuntimeError())
    )
    new = [Handle(tmp_path, f"8_{n}", returned(JobStatus.COMPLETED)) for n in range(2)]
    array = Array(monkeypatch, new)
    array.run(tmp_path, jobs[1:])
    assert looked.exists()
    assert [number for _, _, number, *_ in array.handed_in] == [2, 5]
    assert not list(tmp_path.glob("*.pkl"))
