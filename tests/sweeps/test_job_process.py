import io
import os
import pty
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest

from litdiffusion.configuration.messages import PROCESS_LOST
from litdiffusion.sweeps.jobs import Job
from litdiffusion.sweeps.machine import Share
from litdiffusion.sweeps.process import Outcome, RunningJob, reason

TRACEBACK = """
{0}Traceback (most recent call last):
{0}  File "a.py", line 1, in <module>
{0}    f()
{0}KeyError: 'first'
{0}
{0}During handling of the above exception, another exception occurred:
{0}
{0}Traceback (most recent call last):
{0}  File "a.py", line 3, in <module>
{0}ValueError: second
{0}with a second line
"""


@pytest.mark.parametrize(
    ("code", "output", "line"),
    [
        (2, "Training\nerror: seed: too small\nbye\n", "seed: too small"),
        (2, "error: one\n\r 50%|##  |\rerror: two", "two"),
        (1, TRACEBACK.format(""), "ValueError: second"),
        (1, TRACEBACK.format("[rank1]: "), "ValueError: second"),
        (2, TRACEBACK.format("") + "error: seed: too small\n", "seed: too small"),
        (2, f"error (process 3): its rows\nerror: {PROCESS_LOST} (...)\n", "its rows"),
        (2, TRACEBACK.format("") + f"error: {PROCESS_LOST} (...)\n", "ValueError: second"),
        (2, f"error: {PROCESS_LOST} (...)\n", f"{PROCESS_LOST} (...)"),
        (-9, "", "killed by SIGKILL, as the system does when memory runs out"),
        (-9, TRACEBACK.format("[rank1]: "), "killed by SIGKILL; before that: ValueError: second"),
        (-11, "\n", "killed by SIGSEGV"),
        (143, "saved\n", "stopped by SIGTERM"),
        (-60, "", "killed by signal 60"),
        (3, "almost\n there \n\n", "exit code 3; its last line: there"),
        (3, "", "exit code 3"),
    ],
)
def test_the_reason_in_one_line(code: int, output: str, line: str) -> None:
    assert reason(code, output) == line


def running(tmp_path: Path, code: str, streams: tuple[object, object] | None = None) -> RunningJob:
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(code))
    job = Job(0, (), tmp_path, tmp_path / "x.json", (sys.executable, str(script)))
    return RunningJob(job, dict(os.environ), Share(), streams)


def ended(process: RunningJob) -> Outcome:
    deadline = time.monotonic() + 60
    while (outcome := process.outcome()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return outcome


def test_the_output_of_a_job_is_passed_on(tmp_path: Path) -> None:
    streams = io.StringIO(), io.StringIO()
    code = "import sys; print('ä', sys.stdout.isatty(), flush=True); sys.exit('error: wrong')"
    assert ended(running(tmp_path, code, streams)) == Outcome("failed", "wrong")
    assert [stream.getvalue() for stream in streams] == ["ä False\n", "error: wrong\n"]


def test_at_a_terminal_a_job_has_a_terminal_of_its_own(tmp_path: Path) -> None:
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (33, 77))
    with os.fdopen(writer, "w") as terminal:
        code = "import os, sys; print(*os.get_terminal_size(1), sys.stderr.isatty(), end='\\r\\n')"
        assert ended(running(tmp_path, code, (terminal, terminal))) == Outcome("finished")
        assert os.read(reader, 100) == b"77 33 True\r\r\n", "as the job itself would have written there"
    os.close(reader)


def test_a_job_is_in_a_session_of_its_own(tmp_path: Path) -> None:
    out = io.StringIO()
    ended(running(tmp_path, "import os; print(os.getsid(0) == os.getpid())", (out, out)))
    assert out.getvalue() == "True\n"


def test_only_the_output_of_this_start_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "output.log").write_text("error: of yesterday\n")
    assert ended(running(tmp_path, "import sys; sys.exit(1)")) == Outcome("failed", "exit code 1")
    assert (tmp_path / "output.log").read_text() == "error: of yesterday\n"


def test_nothing_outlives_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litdiffusion.sweeps.process.GRACE_SECONDS", 0.2)
    code = """
        import os, signal, subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open("child", "w").write(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    monkeypatch.chdir(tmp_path)
    assert ended(running(tmp_path, code)).reason.startswith("killed by SIGKILL")
    pid, deadline = int((tmp_path / "child").read_text()), time.monotonic() + 60
    while _lives(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
