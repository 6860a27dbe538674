import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from litdiffusion.system.parent_death import PARENT, end_with_parent


@pytest.mark.skipif(sys.platform != "linux", reason="by a system call of Linux")
def test_a_process_is_asked_to_stop_when_its_parent_is_killed(tmp_path: Path) -> None:
    child = f"""
        import signal, sys, time
        from litdiffusion.system.parent_death import end_with_parent
        signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / "asked")!r}, "w"), sys.exit()))
        end_with_parent()
        print("ready", flush=True)
        time.sleep(60)
    """
    parent = f"""
        import os, subprocess, sys
        variables = {{**os.environ, {PARENT!r}: str(os.getpid())}}
        subprocess.run([sys.executable, "-c", {textwrap.dedent(child)!r}], env=variables)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 60
    while not (tmp_path / "asked").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_whose_parent_is_dead_already_does_not_begin(tmp_path: Path) -> None:
    code = "from litdiffusion.system.parent_death import end_with_parent; end_with_parent(); print('begun')"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    variables = {**os.environ, PARENT: str(dead.pid)}
    late = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert (late.returncode, late.stdout) == (128 + signal.SIGTERM, "")


def test_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PARENT, raising=False)
    before = dict(os.environ)
    end_with_parent()
    assert dict(os.environ) == before
