import os

import pytest

from litdiffusion.errors import UserError
from litdiffusion.sweeps import machine
from litdiffusion.sweeps.machine import Share, environment, shares, visible_gpus


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: list(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_one_job_has_the_whole_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shares(1, on_gpu=True) == shares(1, on_gpu=False) == [Share()]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in environment(Share(), 1, "s", wants_traceback=False)


@pytest.mark.usefixtures("eight_cores")
def test_cores_are_divided_evenly() -> None:
    three = shares(3, on_gpu=False)
    assert [share.cores for share in three] == [(0, 1), (2, 3), (4, 5)]
    assert {share.gpus for share in three} == {None}


@pytest.mark.usefixtures("eight_cores")
def test_processes_of_a_job_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(num_processes: int) -> str:
        return environment(shares(2, False)[0], num_processes, "s", wants_traceback=False)["OMP_NUM_THREADS"]

    assert [threads(processes) for processes in (1, 2, 8)] == ["4", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [threads(processes) for processes in (1, 2)] == ["3", "2"], "who asks for fewer gets fewer"


def test_gpus_are_divided_by_the_names_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5,GPU-ab,7")
    first, second = shares(2, on_gpu=True)
    assert (first.gpus, second.gpus) == (("4", "5"), ("GPU-ab", "7"))
    assert environment(second, 1, "s", wants_traceback=False)["CUDA_VISIBLE_DEVICES"] == "GPU-ab,7"
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("jobs", "on_gpu", "line"),
    [
        (9, False, "hydra.launcher.jobs=9: this machine has 8 cores for them; use hydra.launcher.jobs=8"),
        (2, True, "hydra.launcher.jobs=2: this machine has 1 GPU for them; use hydra.launcher.jobs=1"),
        (0, False, "hydra.launcher.jobs=0: must be at least 1"),
    ],
)
def test_more_jobs_than_cores_or_gpus_are_refused(
    jobs: int, on_gpu: bool, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError) as refused:
        shares(jobs, on_gpu)
    assert str(refused.value) == line


def test_a_job_inherits_no_variables_of_other_process_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    leaks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    for name in (*leaks, "LITDIFFUSION_RUN_DIR", "TORCHELASTIC_RUN_ID", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MINE", "yes")
    variables = environment(Share(), 1, "seeds-1", wants_traceback=False)
    ours = {"MINE": "yes", "LITDIFFUSION_SWEEP": "seeds-1", "LITDIFFUSION_PARENT_PID": str(os.getpid())}
    assert ours.items() <= variables.items()
    assert variables.keys() - ours.keys() == os.environ.keys() - {
        *leaks,
        *("LITDIFFUSION_RUN_DIR", "TORCHELASTIC_RUN_ID", "HYDRA_FULL_ERROR", "MINE"),
    }
    assert environment(Share(), 1, "s", wants_traceback=True)["HYDRA_FULL_ERROR"] == "1"
