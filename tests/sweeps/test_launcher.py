"""Sweeps of a command that needs no time, through Hydra and back."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import pytest
from hydra import compose, initialize_config_dir

from litdiffusion.evaluation import BitsPerDim
from litdiffusion.runs.lock import RunLock, is_locked
from litdiffusion.sweeps.jobs import Job
from litdiffusion.sweeps.process import Outcome, RunningJob
from litdiffusion.sweeps.sweep import Sweep


def statuses(sweeps) -> list[str]:
    return [row["status"] for row in sweeps.table()]


def meanwhile(condition: Callable[[], bool], *signals: int) -> threading.Thread:
    """Send this process signals once something is the case, as a shell or a cluster would."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for signum in signals:
            os.kill(os.getpid(), signum)
            time.sleep(0.2)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_every_job_is_a_process_with_its_folder(sweeps) -> None:
    code, out, err = sweeps("-m", "seed=1,0", "experiment=small", "hydra.verbose=false")
    assert (code, err) == (0, "")
    starts = sweeps.starts()
    assert list(starts) == ["0", "1"]
    for job, seed in (("0", 1), ("1", 0)):
        (folder,) = Path("logs/sweeps").glob(f"small-????????/{job}")
        (start,) = starts[job]
        expected = [f"seed={seed}", "experiment=small", f"run_dir={folder.absolute()}"]
        assert start["given"] == [
            "hydra.verbose=false",
            *expected,
            f"hydra.job.num={job}",
            "hydra.mode=RUN",
        ]
        assert start["environment"]["LITDIFFUSION_SWEEP"] == folder.parent.name
        assert start["environment"]["LITDIFFUSION_JOB"] == f"seed={seed}", "the name on a dashboard"
    assert "job of seed 1\n" in out
    assert [(row["seed"], row["val_loss"]) for row in sweeps.table()] == [("1", "0.5"), ("0", "1.0")]


def test_a_failed_job_does_not_end_the_sweep_and_is_all_that_is_repeated(sweeps) -> None:
    command = ("-m", "behaviour=refused,bug,killed,good")
    code, out, _ = sweeps(*command)
    assert code == 2
    expected = {
        "refused": ("failed", "behaviour=refused: choose another"),
        "bug": ("failed", "ValueError: a bug"),
        "killed": ("failed", "killed by SIGKILL, as the system does when memory runs out"),
    }
    reasons = {row["behaviour"]: (row["status"], row["reason"]) for row in sweeps.table()}
    assert reasons == {**expected, "good": ("finished", "")}
    table = out.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in table[:5]] == ["job", "3", "0", "1", "2"], "the best first"
    assert table[2].endswith("  behaviour=refused: choose another")

    code, out, _ = sweeps(*command, "hydra.launcher.jobs=2")
    assert code == 2
    assert out.startswith("1 of 4 jobs are finished already: 3\n")
    reasons = {row["behaviour"]: (row["status"], row["reason"]) for row in sweeps.table()}
    assert reasons == {**expected, "good": ("skipped-finished", "")}
    assert [len(starts) for starts in sweeps.starts().values()] == [2, 2, 2, 1]
    assert sweeps.table()[3]["val_loss"] == "1.0"


def test_the_folder_is_a_function_of_the_sweep(sweeps) -> None:
    def name(*overrides: str) -> str:
        with initialize_config_dir(str(sweeps.folder / "configs"), version_base="1.3"):
            return compose("train", list(overrides), return_hydra_config=True).hydra.sweep.dir

    same = [name("seed=1"), name("seed=1"), name("seed=1", "hydra.sweeper.max_batch_size=2")]
    assert len(set(same)) == 1
    assert re.fullmatch(r"logs/sweeps/default-[0-9a-f]{8}", same[0])
    assert name("seed=1", "experiment=small").startswith("logs/sweeps/small-")
    others = [name("seed=2"), name("seed=1", "sweep=seeds"), name("seed=1", "sweep=more_seeds")]
    assert len({*same, *others}) == 4


def test_the_table_holds_how_a_job_stands_while_it_runs(sweeps) -> None:
    """Whoever reads it after the sweep was killed sees which jobs may still be at work."""
    seen = []
    ended = RunningJob.outcome

    def look(self: RunningJob) -> Outcome | None:
        seen.append(statuses(sweeps))
        return ended(self)

    with mock.patch.object(RunningJob, "outcome", look):
        sweeps("-m", "seed=0,1")
    assert seen[0] == ["running", "waiting"]
    assert seen[-1] == ["finished", "running"]
    assert statuses(sweeps) == ["finished", "finished"]


def test_the_jobs_of_an_interrupted_array_are_still_submitted(
    sweeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(jobs: Sequence[Job], begun: Callable[[Job], None], ended: object) -> None:
        begun(jobs[0])
        raise KeyboardInterrupt

    run = Sweep.run
    monkeypatch.setattr(
        Sweep, "run", lambda self, jobs, perform: run(self, jobs, interrupted, on_this_machine=False)
    )
    code, out, _ = sweeps("-m", "seed=0,1")
    assert code == 130
    assert statuses(sweeps) == ["submitted", "waiting"]
    assert "\n0    submitted  0" in out, "the table is printed"


def test_a_job_may_be_given_its_folder(sweeps) -> None:
    assert sweeps("-m", "seed=3,4", "run_dir='a b, c/${hydra:job.num}'").code == 0
    assert {path.name for path in Path("a b, c").iterdir()} == {"0", "1"}
    given = sweeps.starts()["1"][0]["given"]
    assert [text for text in given if text.startswith("run_dir")] == [f'run_dir="{Path.cwd()}/a b, c/1"']


def test_several_at_once_share_the_cores(sweeps) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    code, out, _ = sweeps("-m", "seed=0,1,2", "hydra.launcher.jobs=2")
    assert code == 0
    assert "job of seed" not in out
    half = len(cores) // 2
    for start in sweeps.starts().values():
        assert start[0]["cores"] in (cores[:half], cores[half : 2 * half])
        assert start[0]["environment"]["OMP_NUM_THREADS"] == str(half)
    assert [path.read_text() for path in sorted(sweeps.folder.rglob("output.log"))] == [
        f"job of seed {seed}\n" for seed in range(3)
    ]


def test_more_jobs_than_cores_are_refused(sweeps) -> None:
    cores = len(os.sched_getaffinity(0))
    code, out, err = sweeps("-m", "seed=0,1", f"hydra.launcher.jobs={cores + 1}")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: hydra.launcher.jobs={cores + 1}: this machine has {cores} core")
    assert sweeps.starts() == {}


def test_two_sweeps_do_not_share_a_folder(sweeps) -> None:
    Path("there").mkdir()
    with RunLock(Path("there")):
        code, out, err = sweeps("-m", "seed=0,1", "hydra.sweep.dir=there")
    assert (code, out) == (2, "")
    assert err.startswith(
        f"error: hydra.sweep.dir {Path('there').absolute()} is in use by process {os.getpid()}"
    )
    assert sweeps.starts() == {}


def test_a_job_that_outlives_a_killed_sweep_is_waited_for(sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RunLock(Path("there/1"))
    lock.path.parent.mkdir(parents=True)
    lock.take()
    looks = []

    def is_locked_for_a_while(folder: Path) -> bool:
        locked = is_locked(folder)
        if locked:
            looks.append(folder)
        if len(looks) == 3:
            Path("there/1/left").touch()
            lock.release()
        return locked

    monkeypatch.setattr("litdiffusion.sweeps.sweep.is_locked", is_locked_for_a_while)
    code, out, _ = sweeps("-m", "seed=0,1", "hydra.sweep.dir=there")
    assert code == 0
    assert len(looks) == 3
    assert f"Job 1: waiting for a process to leave {Path('there/1').absolute()}\n" in out
    assert Path("there/1/starts").stat().st_mtime_ns > Path("there/1/left").stat().st_mtime_ns


def test_torchrun_does_not_start_sweeps(sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = sweeps("-m", "seed=0,1")
    assert code == 2
    assert "without torchrun" in err
    assert sweeps.starts() == {}


@pytest.mark.parametrize(("signum", "at_once"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_stops_the_jobs_and_starts_no_others(sweeps, signum: int, at_once: int) -> None:
    command = ("-m", "behaviour=patient", "seed=0,1,2", f"hydra.launcher.jobs={at_once}")
    handler = signal.getsignal(signum)
    thread = meanwhile(lambda: len(list(sweeps.folder.rglob("met"))) == at_once, signum)
    code = sweeps(*command).code
    thread.join()
    assert code == 128 + signum
    assert signal.getsignal(signum) == handler
    assert statuses(sweeps) == ["stopped"] * at_once + ["waiting"] * (3 - at_once)
    assert sweeps.table()[0]["reason"] == f"by {signal.Signals(signum).name}; the same command continues it"
    if at_once == 2:
        [there] = sweeps.folder.glob("logs/sweeps/*")
        folder = there / sweeps.table()[2]["run_dir"]  # relative, so that the sweep may be moved
        folder.mkdir()
        (folder / "met").touch()
        assert sweeps(*command).code == 0
        assert statuses(sweeps) == ["finished"] * 3


def test_a_job_that_the_sweep_kills_has_been_stopped(sweeps) -> None:
    """By the third Ctrl-C; a cluster or a closed terminal may repeat its signals."""
    signals = [signal.SIGHUP, signal.SIGTERM, signal.SIGTERM, *[signal.SIGINT] * 3]
    thread = meanwhile(lambda: len(list(sweeps.folder.rglob("met"))) == 1, *signals)
    code = sweeps("-m", "behaviour=deaf", "seed=0,1").code
    thread.join()
    assert code == 128 + signal.SIGHUP
    assert statuses(sweeps) == ["stopped", "waiting"]
    assert sweeps.table()[0]["reason"] == "by SIGKILL; the same command continues it"
    [heard] = sweeps.folder.rglob("heard")
    assert heard.read_text().split() == [str(int(signum)) for signum in signals[:-1]]


def test_a_job_that_is_stopped_when_it_has_written_its_results_has_finished(sweeps) -> None:
    thread = meanwhile(lambda: len(list(sweeps.folder.rglob("met"))) == 1, signal.SIGTERM)
    code = sweeps("-m", "behaviour=leaving", "seed=0,1").code
    thread.join()
    assert code == 128 + signal.SIGTERM
    assert statuses(sweeps) == ["finished", "waiting"]
    assert sweeps.table()[0]["val_loss"]


def test_sweeps_of_other_commands(sweeps) -> None:
    assert sweeps("-m", "seed=0,1", "ckpt=a.ckpt", config_name="sample").code == 0
    assert [row["steps"] for row in sweeps.table()] == ["2", "2"]
    code, _, err = sweeps("-m", "seed=0,1", "ckpt=a.ckpt", "out=here", config_name="sample")
    assert code == 2
    assert "out=here: jobs that vary seed cannot share a folder" in err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, at import
def test_optuna_learns_the_results_and_asks_again_for_the_same(sweeps) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    command = (
        "sweep=optuna",
        "+hydra.sweeper.params.behaviour='choice(good,fine,bug)'",
        "hydra.sweeper.n_trials=3",
    )
    code, _, _ = sweeps(*command)
    rows = sweeps.table()
    assert len(rows) == 3
    assert {row["status"] for row in rows} == {"finished", "failed"}
    assert code == 2
    (results,) = sweeps.folder.rglob("optimization_results.yaml")
    best = min(float(row["val_bits_per_dim"]) for row in rows if row["val_bits_per_dim"])
    assert f"best_value: {best}" in results.read_text()
    sweeps(*command)
    assert [row["optimizer.lr"] for row in sweeps.table()] == [row["optimizer.lr"] for row in rows]
    assert {row["status"] for row in sweeps.table()} == {"skipped-finished", "failed"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, at import
def test_optuna_and_the_table_ask_the_metric_which_way_is_better(
    sweeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    monkeypatch.setattr(BitsPerDim, "higher_is_better", True)
    code, out, _ = sweeps("sweep=optuna", "hydra.sweeper.n_trials=3")
    assert code == 0
    losses = [float(row["val_bits_per_dim"]) for row in sweeps.table()]
    (results,) = sweeps.folder.rglob("optimization_results.yaml")
    assert f"best_value: {max(losses)}" in results.read_text()
    header, *lines = out[out.index("\njob  status") + 1 :].splitlines()[:4]
    shown = [float(line[header.index("val_bits_per_dim") :].split()[0]) for line in lines]
    assert shown == pytest.approx(sorted(losses, reverse=True), rel=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Optuna's own, at import
@pytest.mark.parametrize("command", [("sweep=optuna", "hydra.sweeper.n_trials=1"), ("-m", "seed=0,1")])
def test_a_goal_that_no_run_has_is_refused(sweeps, command: tuple[str, ...]) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    code, out, err = sweeps(*command, "optimized_metric=fid")
    assert code == 2
    assert "Job 0" not in out
    assert "error: optimized_metric=fid: no number of summary.json; there are: images_per_second" in err
    assert sweeps.starts() == {}


def test_a_sweeper_that_is_not_installed_is_named(sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = sweeps.folder / "configs/sweep/optuna.yaml"
    preset.write_text(preset.read_text().replace("sweeper: optuna", "sweeper: absent"))
    monkeypatch.setattr(
        "litdiffusion.configuration.messages._EXTRAS",
        {"hydra/sweeper/absent": ("optuna", "hydra-optuna-sweeper")},
    )
    code, _, err = sweeps("sweep=optuna")
    assert code == 2
    assert err == (
        "error: hydra-optuna-sweeper is not installed, which this needs: pip install 'litdiffusion[optuna]'\n"
    )


@pytest.mark.parametrize("processes", ["1", "2"])
def test_what_hydra_writes_of_a_sweep_holds_no_secret(
    sweeps, monkeypatch: pytest.MonkeyPatch, processes: str
) -> None:
    """It writes before anything is refused, such as a sweep on two processes."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    code = sweeps("-m", "seed=0,1", "+api_key=abc123456", "+hub.token=xyz123456").code
    assert code == (0 if processes == "1" else 2)
    [written] = sweeps.folder.rglob("multirun.yaml")
    assert "api_key" in written.read_text()
    assert "abc123456" not in written.read_text()
    assert "xyz123456" not in written.read_text()
