"""One job at a time in a run folder, and no lock that outlives its job."""

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from commands import type_command
from disks import unwritable
from litdiffusion.errors import UserError
from litdiffusion.runs import lock as locks
from litdiffusion.runs.lock import RunLock, is_locked

HOLD = """
import multiprocessing, sys, time
from pathlib import Path
from litdiffusion.runs.lock import RunLock

lock = RunLock(Path(sys.argv[1]))
lock.take()
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
worker.start()
print(worker.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A run folder that a job on another machine has left, or is at work in."""
    holder = {"host": "another-machine", "pid": 7, "started": "2026-01-01 00:00:00"}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    return tmp_path


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.5)


@pytest.fixture
def no_kernel_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_the_second_job_is_told_who_the_first_is(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        typed = type_command("train", "debug=tiny", f"run_dir={tmp_path}")
        assert typed.code == 2
        [line] = typed.err.splitlines()
        for part in (str(tmp_path), f"process {os.getpid()} on {socket.gethostname()}, started 20"):
            assert part in line
        assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    with RunLock(tmp_path) as after:
        assert after._descriptor is not None


def test_a_lock_that_is_taken_twice_by_its_job_is_taken_once(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    assert lock.take()
    assert not lock.take()
    lock.release()
    lock.release()
    assert (tmp_path / ".lock").read_bytes() == b""
    assert lock.take()
    lock.release()


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as lock:
        assert not (tmp_path / "run").exists()
        (tmp_path / "run").mkdir()
        assert lock.take()
        with pytest.raises(UserError, match="in use"), RunLock(tmp_path / "run"):
            pytest.fail("two jobs in one folder")


def test_the_other_processes_of_a_job_share_its_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path), RunLock(tmp_path, first=False) as shared:
        assert not shared.take()
    with RunLock(tmp_path):
        pass


def test_kill_9_frees_the_lock_though_a_worker_lives_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    with pytest.raises(UserError, match=f"process {process.pid} on "):
        RunLock(tmp_path).take()
    process.kill()
    process.wait()
    os.kill(worker, 0)  # it is still there
    deadline = time.monotonic() + 5
    while is_locked(tmp_path):  # the worker may have been forked, and not yet have let go
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with RunLock(tmp_path) as lock:
        assert lock._descriptor is not None
    os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.usefixtures("fast")
def test_what_a_dead_job_elsewhere_has_left_is_taken_over(elsewhere: Path) -> None:
    with RunLock(elsewhere):
        assert json.loads((elsewhere / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.usefixtures("fast")
def test_a_living_job_elsewhere_is_noticed_by_its_heart(elsewhere: Path) -> None:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(elsewhere / ".lock")

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(UserError, match="process 7 on another-machine"):
            RunLock(elsewhere).take()
    finally:
        stop.set()
        heart.join()


@pytest.mark.usefixtures("fast", "no_kernel_locks")
def test_without_locks_of_the_kernel_it_says_so_and_goes_by_the_heart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), RunLock(tmp_path):
        assert "this file system has no locks" in caplog.text
        with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()}"):
            RunLock(tmp_path).take()
    with RunLock(tmp_path) as after:
        assert after._descriptor is not None


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 10_000, '{"host": 3}'])
@pytest.mark.usefixtures("fast")
def test_nonsense_in_the_file_is_no_obstacle(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock").write_text(content)
    with RunLock(tmp_path) as lock:
        assert lock._descriptor is not None


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match="is a link"):
        RunLock(run).take()
    assert precious.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_left_to_say_so_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with unwritable(run):
        assert not RunLock(run).take()


def test_another_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"\.lock"):
        RunLock(tmp_path).take()


def test_a_disk_that_does_not_answer_does_not_hold_up_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, answered = threading.Event(), threading.Event()
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(os, "utime", lambda descriptor: (begun.set(), answered.wait(60)))
    lock = RunLock(tmp_path)
    lock.take()
    assert begun.wait(60)
    lock.release()
    assert lock._heartbeat is not None
    assert lock._heartbeat.is_alive()  # it was not waited for
    assert not is_locked(tmp_path)
    answered.set()
