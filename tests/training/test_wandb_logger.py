"""What reaches W&B's offline files, whatever ends and whenever."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from omegaconf import OmegaConf
from wandb.sdk.lib.service.service_port_file import ServicePollForTokenError

from commands import train_tiny
from litdiffusion.configuration import resolvers
from litdiffusion.configuration.nodes import build
from litdiffusion.errors import UserError
from litdiffusion.runs.metrics import MetricsTable, read_rows
from litdiffusion.system.processes import STOP_SIGNALS
from litdiffusion.training.loggers import WandB
from litdiffusion.training.loggers.base import close_loggers
from litdiffusion.training.loggers.wandb import STEP, WATERMARK
from offline_wandb import Logging, offline_history, offline_records

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ROWS = 11
"""Three lines of numbers, two validations, a strip, three grids and two GIFs reach W&B."""


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.mark.usefixtures("no_account")
def test_wandb_falls_to_offline_and_keeps_its_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = tmp_path / "run"
    callbacks = ["callbacks.monitor.every_n_steps=2", "callbacks.sample_images.every_n_steps=2"]
    train_tiny(run_dir, "logger=wandb", *callbacks)
    assert "offline" in caplog.text
    run_id = (run_dir / "wandb" / "run_id").read_text()
    train_tiny(run_dir, "logger=wandb", *callbacks, "trainer.max_steps=6")
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert {file.stem for file in files} == {f"run-{run_id}"}

    rows = offline_history(run_dir, awaited=ROWS)
    assert all("images_seen" in row for row in rows)
    by_key = {key: [row for row in rows if key in row] for row in rows for key in row}
    kinds = ("train/loss", "train/grad_norm", "train/lr", "train/images_per_second")
    for key in (*kinds, "val/loss", "val/loss_raw", "val/bits_per_dim"):
        assert by_key[key], key
    assert any(key.startswith("train/loss_t") for key in by_key)
    assert [row["images_seen"] for row in by_key["train/loss"]] == [32, 64, 96]
    for key in ("samples/grid", "samples/noised_strip", "samples/denoising"):
        assert by_key[key], key
    named = re.findall(
        r"`((?:train|val|samples)/\w+)`", README[README.index("| question |") :].partition("\n\n")[0]
    )
    assert len(named) > 8
    assert set(named) <= by_key.keys()
    updates = {
        item.key
        for file in files
        for record in offline_records(file)
        for config in (record.config, record.run.config)
        for item in config.update
    }
    assert {"schedule", "net", "seed"} <= updates


@pytest.mark.usefixtures("no_account")
def test_a_wandb_run_is_named_and_grouped_by_its_sweep_and_tagged_by_its_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITDIFFUSION_SWEEP", "a-sweep")
    monkeypatch.setenv("LITDIFFUSION_JOB", f"loss=l2 seed={'1' * 200}")
    for name, value in {"PROJECT": "a-project", "JOB_TYPE": "a-job", "TAGS": "yours"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setattr(resolvers, "chosen_experiment", lambda: "quickstart+mine")
    quick = ["trainer.max_steps=2", "callbacks.sample_images=null", "datamodule.num_val=0"]
    train_tiny(tmp_path, "logger=wandb", "logger.wandb.entity=us", *quick)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 20
    while not (runs := [record.run for record in offline_records(file) if record.run.run_id]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert runs[0].run_group == "a-sweep"
    assert list(runs[0].tags) == ["quickstart", "mine", "yours"]
    assert (runs[0].entity, runs[0].project, runs[0].job_type) == ("us", "a-project", "a-job")
    assert runs[0].display_name == f"loss=l2 seed={'1' * 115}", "as long as W&B takes it"


@pytest.mark.usefixtures("no_account")
def test_what_a_killed_run_has_logged_is_told_again_as_the_same_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = ("logger=wandb", "callbacks.monitor.every_n_steps=2", "callbacks.sample_images.every_n_steps=2")
    train_tiny(tmp_path, *often)

    def killed(logger: WandB) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(WandB, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tmp_path, *often, "trainer.max_steps=8")
    wandb.teardown()
    assert watermark(tmp_path) == 4
    train_tiny(tmp_path, *often, "trainer.max_steps=10")
    assert watermark(tmp_path) == 10
    rows = offline_history(tmp_path)
    logged = read_rows(tmp_path / "metrics.csv")
    for key in ("train/loss", "val/loss", "val/bits_per_dim"):
        told = {(row[STEP], row["images_seen"], row[key]) for row in rows if key in row}
        assert told == {(row["step"], row["images_seen"], row[key]) for row in logged if key in row}, key
    grids = [row["images_seen"] for row in rows if "samples/grid" in row]
    assert set(grids) == {32, 64, 96, 128, 160}
    assert grids.count(32) == 1  # before the watermark


@pytest.mark.usefixtures("no_account")
def test_what_wandb_has_sent_and_cleaned_away_is_not_told_again(tmp_path: Path) -> None:
    often = ("logger=wandb", "callbacks.monitor.every_n_steps=1", "callbacks.sample_images.every_n_steps=1")
    train_tiny(tmp_path, *often)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    shutil.rmtree(folder)  # wandb sync --clean
    train_tiny(tmp_path, *often, "trainer.max_steps=6")
    kept = offline_history(tmp_path)
    assert [row[STEP] for row in kept if "train/loss" in row] == [5, 6]
    assert [row[STEP] for row in kept if "samples/grid" in row] == [5, 6]
    assert not [row for row in kept if "samples/noised_strip" in row]


def test_a_run_that_was_stopped_is_no_success(tmp_path: Path) -> None:
    logger = WandB(str(tmp_path), mode="offline")
    logger.describe({})
    close_loggers([logger], 143)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [record.exit.exit_code for record in offline_records(file) if record.HasField("exit")] == [143]


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("tags", ["good", ""], "Tag at index 1 is empty"),
        ("tags", ["x" * 70], "is 70 characters"),
        ("project", "a/b", "cannot contain"),
        ("project", "p" * 129, "exceeded 128 characters"),
    ],
)
def test_a_setting_that_wandb_refuses_is_named(
    setting: str, value: object, reason: str, tmp_path: Path
) -> None:
    node = OmegaConf.create(
        {"_target_": "litdiffusion.training.loggers.WandB", "run_dir": str(tmp_path), setting: value}
    )
    with pytest.raises(UserError, match=re.escape(f"logger.wandb.{setting}={value}: ") + f".*{reason}"):
        build(OmegaConf.create({"logger": {"wandb": node}}).logger.wandb, "logger.wandb")


def test_a_variable_of_the_environment_that_wandb_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "soon")
    with pytest.raises(UserError, match="WANDB_INIT_TIMEOUT: Input should be a valid number"):
        WandB(str(tmp_path), mode="offline")


def test_a_closing_that_a_signal_interrupts_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    logger = WandB(str(tmp_path), mode="offline")
    logger.describe({"seed": 3})
    MetricsTable(tmp_path / "metrics.csv").append({"step": 5, "x": 1})
    logger.log_metrics({"x": 1}, step=5)
    with monkeypatch.context() as patched:
        patched.setattr(type(logger.experiment), "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logger.close()
    assert not (tmp_path / "wandb" / WATERMARK).exists()
    logger.close()
    assert {row["x"] for row in offline_history(tmp_path)} == {1}
    assert watermark(tmp_path) == 5


@pytest.mark.usefixtures("no_account")
def test_a_run_that_goes_on_with_wandb_brings_along_what_it_has_logged_without(tmp_path: Path) -> None:
    often = ("callbacks.monitor.every_n_steps=1", "callbacks.sample_images.every_n_steps=1")
    train_tiny(tmp_path, *often, "trainer.max_steps=3")
    train_tiny(tmp_path, *often, "logger=wandb")
    kept = offline_history(tmp_path)
    logged = read_rows(tmp_path / "metrics.csv")
    for key in ("train/loss", "val/loss"):
        assert [(row[STEP], row[key]) for row in kept if key in row] == [
            (row["step"], row[key]) for row in logged if key in row
        ]
    pictures = [(row["images_seen"], row[STEP]) for row in kept if "samples/grid" in row]
    assert pictures == [(16, 1), (32, 2), (48, 3), (64, 4)]  # at 3 it ended before


LOGGING = """
import sys
from pathlib import Path
from offline_wandb import Logging
logging = Logging(Path(sys.argv[1]))

def when_told():
    print("ready", flush=True)
    input()
"""


@contextmanager
def process_that_logs(run_dir: Path, script: str) -> Iterator[subprocess.Popen[str]]:
    """Have it done in a process of its own, and wait for the end, at which nothing complains."""
    environment = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, "-c", LOGGING + script, str(run_dir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield process
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert "Exception ignored" not in errors


def await_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def signal_wandb(pid: int, signum: signal.Signals) -> None:
    """Send a signal to W&B's process, which writes for another."""
    found = subprocess.run(["pgrep", "--parent", str(pid), "wandb-core"], capture_output=True, text=True)
    assert found.stdout
    for child in found.stdout.split():
        os.kill(int(child), signum)


def assert_told(run_dir: Path, steps: Iterable[int], pictures: Iterable[int]) -> None:
    """Each at least once, and each start of the run that has told something its configuration."""
    logged = offline_history(run_dir)
    assert {(row[STEP], row["x"]) for row in logged if "x" in row} == {(step, step) for step in steps}
    assert {row["images_seen"] for row in logged if "samples/grid" in row} == set(pictures)
    assert watermark(run_dir) == max([*steps, *pictures])
    for file in (run_dir / "wandb").glob("offline-run-*/run-*.wandb"):
        records = list(offline_records(file))
        if any(record.HasField("history") for record in records):
            assert {item.key for record in records for item in record.config.update} >= {"seed"}


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_wandb_outlives_a_signal_to_every_process_of_a_run(tmp_path: Path, signum: signal.Signals) -> None:
    """As Slurm sends it."""
    logging = Logging(tmp_path)
    logging.rows(range(20))
    time.sleep(0.5)  # what it was told before is written by now
    signal_wandb(os.getpid(), signum)
    logging.show(20)
    logging.rows([20])
    logging.wandb.close()
    assert_told(tmp_path, range(21), [20])


def test_what_wandb_was_told_as_its_process_ended_is_told_again(tmp_path: Path) -> None:
    """In the middle of a run, and at its end."""
    script = """
logging.rows(range(10))
when_told()
logging.rows(range(10, 20))
logging.show(19)
when_told()
logging.rows([20])
when_told()
logging.rows(range(21, 30))
when_told()
logging.wandb.close()
"""
    with process_that_logs(tmp_path, script) as process:
        # It stands still, so that it takes nothing up any more; then it ends. So does the next one.
        for signum in (signal.SIGSTOP, signal.SIGKILL) * 2:
            await_ready(process)
            signal_wandb(process.pid, signum)
            go_on(process)
    assert_told(tmp_path, range(30), [19])


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_wandb_whose_process_ends_before_the_run_is_open(tmp_path: Path, seconds: float) -> None:
    with process_that_logs(tmp_path, "logging.rows(range(3)); logging.wandb.close()") as process:
        deadline = time.monotonic() + 60
        find = ["pgrep", "--parent", str(process.pid), "wandb-core"]
        while not (found := subprocess.run(find, capture_output=True, text=True).stdout.split()):
            assert time.monotonic() < deadline
        time.sleep(seconds)
        os.kill(int(found[0]), signal.SIGKILL)
    assert_told(tmp_path, range(3), [])


def test_a_row_of_the_very_step_at_which_the_run_was_closed_is_not_lost(tmp_path: Path) -> None:
    """A run that is stopped in a validation is closed, and validates at the same step when it goes on."""
    table = MetricsTable(tmp_path / "metrics.csv")

    def log_row(logger: WandB | None, key: str) -> None:
        table.append({"step": 7, key: 1.0, "images_seen": 7})
        if logger:
            logger.log_metrics({key: 1.0, "images_seen": 7}, step=7)

    def begin() -> WandB:
        logger = WandB(str(tmp_path), mode="offline")
        logger.resume_at(7, 1)
        logger.describe({"seed": 3})
        return logger

    first = begin()
    log_row(first, "train/loss")
    first.close()
    assert not first.is_behind
    log_row(None, "val/loss")  # killed before W&B was told
    assert first.is_behind
    begin().close()
    told = [[key for key in row if "/loss" in key] for row in offline_history(tmp_path)]
    assert sorted(told) == [["train/loss"], ["val/loss"]]


def test_a_dashboard_that_was_given_up_is_whole_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's process ends, and another cannot be started at once."""
    logging, init, refusals = Logging(tmp_path), wandb.init, iter(range(2))

    def refused(**settings: object) -> object:
        if next(refusals, None) is None:
            return init(**settings)
        raise ConnectionResetError("Connection lost")

    logging.rows(range(5))
    time.sleep(0.5)  # what it was told before is written by now
    signal_wandb(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(wandb, "init", refused)
    logging.rows(range(5, 8))
    logging.show(7)
    assert logging.wandb._given_up
    logging.wandb.close()
    assert_told(tmp_path, range(8), [7])


def test_wandb_whose_process_ends_twice_before_the_run_is_open_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = wandb.init

    def killed(**settings: object) -> object:
        signal_wandb(os.getpid(), signal.SIGKILL)
        return init(**settings)

    monkeypatch.setattr(wandb, "init", killed)
    with pytest.raises(UserError, match="the process that W&B writes with has ended"):
        Logging(tmp_path)
    wandb.teardown()


def test_a_trainer_that_asks_for_the_dashboard_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **settings: pytest.fail("opened"))
    logger = WandB(str(tmp_path), mode="offline")
    logger.experiment.log({"x": 1})
    assert not (tmp_path / "wandb").exists()


def watermark(run_dir: Path) -> int:
    return int((run_dir / "wandb" / WATERMARK).read_text().split()[0])


def starts_of(run_dir: Path) -> int:
    return len(list((run_dir / "wandb").glob("offline-run-*")))


OFTEN = ("callbacks.monitor.every_n_steps=1", "callbacks.sample_images.every_n_steps=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("runs") / "finished", *OFTEN)


@pytest.fixture
def untold(finished: Path, tmp_path: Path) -> Path:
    """A finished run of which W&B knows nothing."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.usefixtures("no_account")
def test_a_finished_run_that_is_repeated_tells_wandb_what_it_lacks(
    untold: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a kill in its last moments, when all is written but W&B has not been told all."""
    for picture in (untold / "samples").iterdir():
        os.utime(picture)  # as a copy of the folder may have it
    for _ in range(2):
        train_tiny(untold, *OFTEN, "logger=wandb")
        assert "This run is finished, at step 4" in capsys.readouterr().out
        assert starts_of(untold) == 1  # the second time there is nothing to tell
    told_of = offline_history(untold)
    logged = read_rows(untold / "metrics.csv")
    for key in ("train/loss", "val/loss"):
        assert [(row[STEP], row[key]) for row in told_of if key in row] == [
            (row["step"], row[key]) for row in logged if key in row
        ]
    for key, steps in {"noised_strip": [0], "grid": [1, 2, 3, 4], "denoising": [4]}.items():
        assert [row[STEP] for row in told_of if f"samples/{key}" in row] == steps
    assert {row["images_seen"] for row in told_of if row[STEP] == 4} == {64}


@pytest.mark.usefixtures("no_account")
def test_a_finished_run_stays_one_whatever_hinders_its_dashboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    train_tiny(tmp_path, "logger=wandb")
    (tmp_path / "wandb" / WATERMARK).unlink()
    (tmp_path / "wandb" / WATERMARK).mkdir()
    for mode, reason in (("offline", f"{tmp_path}/wandb/{WATERMARK}"), ("online", "W&B has no account here")):
        train_tiny(tmp_path, "logger=wandb", f"logger.wandb.mode={mode}")
        assert "This run is finished" in capsys.readouterr().out
        [record] = [record for record in caplog.records if reason in record.message]
        assert record.levelname == "WARNING"


@pytest.mark.usefixtures("no_account")
def test_a_run_is_not_finished_before_its_dashboard_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a sweep, which leaves finished jobs alone, repeats it."""

    def killed(logger: WandB) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(WandB, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tmp_path, "logger=wandb")
    wandb.teardown()
    assert (tmp_path / "samples" / "grid.png").exists()
    assert not (tmp_path / "summary.json").exists()
    train_tiny(tmp_path, "logger=wandb")
    assert (tmp_path / "summary.json").exists()
    told_of = offline_history(tmp_path)
    for key in ("samples/grid", "samples/denoising", "val/loss"):
        assert {row[STEP] for row in told_of if key in row} == {4}, key


@pytest.mark.usefixtures("no_account")
def test_pictures_that_wandb_lacks_are_told_of_where_only_the_end_is_repeated(untold: Path) -> None:
    """Killed while the last pictures were drawn: no step is left to train."""
    (untold / "summary.json").unlink()
    train_tiny(untold, *OFTEN, "logger=wandb")
    told_of = offline_history(untold)
    for key, steps in {"noised_strip": [0], "grid": [1, 2, 3, 4], "denoising": [4]}.items():
        assert [row[STEP] for row in told_of if f"samples/{key}" in row] == steps


@pytest.mark.usefixtures("no_account")
def test_pictures_that_cannot_be_shown_are_left_out(untold: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged, link = (untold / "samples" / f"step-000000{step}.png" for step in (1, 2))
    film = untold / "samples" / "denoising.gif"
    for file in (damaged, film):
        file.write_bytes(file.read_bytes()[: len(file.read_bytes()) * 7 // 10])
    elsewhere = link.rename(untold.parent / "elsewhere.png")
    link.symlink_to(elsewhere)
    for _ in range(2):
        train_tiny(untold, *OFTEN, "logger=wandb")
        for file in (damaged, film):
            assert f"{file} is damaged, and not shown" in caplog.text
        assert starts_of(untold) == 1
    assert not [row for row in offline_history(untold) if "samples/denoising" in row]
    assert [row[STEP] for row in offline_history(untold) if "samples/grid" in row] == [3, 4]


@pytest.mark.usefixtures("no_account")
def test_odd_files_where_wandb_writes_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "wandb"
    folder.write_text("not a folder")
    with pytest.raises(UserError, match=rf"logger.wandb: {folder}.* \(.*\): repair or remove it"):
        train_tiny(tmp_path, "logger=wandb")
    folder.unlink()
    (folder / "run_id").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"logger.wandb: {folder}/run_id \(.*\): repair or remove it"):
        train_tiny(tmp_path, "logger=wandb")
    (folder / "run_id").rmdir()
    for text in ("", "{", "4.5 1", "4", "1 2 3", "9" * 5000, "\xff"):  # as if nothing had been told
        (folder / WATERMARK).write_text(text, encoding="latin-1")
        assert WandB(str(tmp_path), mode="offline")._watermark() == (-1, 0)
    train_tiny(tmp_path, "logger=wandb")
    assert watermark(tmp_path) == 4
    assert {row[STEP] for row in offline_history(tmp_path) if "val/loss" in row} == {4}


def test_a_dashboard_whose_process_cannot_live_here_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(**kwargs: object) -> None:
        raise ServicePollForTokenError("wandb-core exited with code -9")

    monkeypatch.setattr(wandb, "init", killed)
    logger = WandB(str(tmp_path), mode="offline")
    with pytest.raises(UserError, match=r"has ended \(wandb-core exited with code -9\), twice; logger=csv"):
        logger.describe({})


def test_a_dashboard_that_cannot_be_reached_again_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = WandB(str(tmp_path), mode="offline")
    opened = []

    def lost(*args: object, **kwargs: object) -> None:
        raise ConnectionResetError("Connection lost")

    def unreachable(**kwargs: object) -> None:
        opened.append(kwargs)
        raise wandb.Error("no network")

    logger._experiment, logger._described = SimpleNamespace(log=lost), True
    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setattr(wandb, "teardown", lost)
    for step in range(3):
        logger.log_metrics({"x": step}, step=step)
    assert [kwargs["settings"].finish_timeout for kwargs in opened] == [
        600
    ]  # by itself W&B would wait for ever
    assert [record.levelname for record in caplog.records if "no network" in record.message] == ["WARNING"]


@pytest.mark.usefixtures("no_account")
def test_a_dashboard_whose_files_cannot_be_finished_hides_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def lost(*args: object) -> None:
        raise ConnectionResetError("Connection lost")

    for step, finish in enumerate((full, lost)):  # or both: its process has ended, and none can be started
        logger = WandB(str(tmp_path), mode="offline")
        logger.describe({})
        MetricsTable(tmp_path / "metrics.csv").append({"step": step, "x": 1})  # which W&B lacks
        with monkeypatch.context() as patched:
            patched.setattr(logger, "_experiment", SimpleNamespace(finish=finish))
            patched.setattr(wandb, "init", full)
            logger.close()
        [record] = [record for record in caplog.records if "No space left on device" in record.message]
        assert record.levelname == "WARNING"
        caplog.clear()


def test_wandb_may_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train_tiny(tmp_path, "logger=wandb", "callbacks.sample_images.num_images=1")
    assert not (tmp_path / "wandb").exists()
    assert (tmp_path / "metrics.csv").exists()


@pytest.mark.usefixtures("no_account")
@pytest.mark.parametrize(
    ("mode", "environment", "named"),
    [("online", None, "logger.wandb.mode=online"), ("auto", "online", "WANDB_MODE=online")],
)
def test_online_without_an_account_is_one_line_and_no_question(
    mode: str, environment: str | None, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)

    def asked(*args: object) -> str:
        pytest.fail("a question at a prompt")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("getpass.getpass", asked)
    with pytest.raises(UserError, match=f"{named}: .*`wandb login`.*logger.wandb.mode=offline"):
        train_tiny(tmp_path / "run", "logger=wandb", f"logger.wandb.mode={mode}")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_account")
def test_a_word_that_wandb_does_not_know_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(UserError, match="WANDB_MODE=offlin: choose online, offline or disabled"):
        train_tiny(tmp_path / "run", "logger=wandb")


def test_what_wandb_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: object) -> None:
        raise wandb.errors.AuthenticationError("the key is not valid")

    monkeypatch.setattr(wandb, "login", lambda **options: True)
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"logger\.wandb: the key is not valid; .*offline"):
        train_tiny(tmp_path / "run", "logger=wandb", "logger.wandb.mode=online")
