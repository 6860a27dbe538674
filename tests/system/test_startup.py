"""No command ends because its terminal has gone, or because nobody reads what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from litdiffusion.system.startup import outlive_the_terminal
outlive_the_terminal()
import os, subprocess, sys
file = open("file", "w")
for stream in (sys.stdout, sys.stderr):
    for _ in range(3):
        print("x" * 100, file=stream, flush=True)
subprocess.run([sys.executable, "-c", "import sys; print(1); print(2, file=sys.stderr)"])
file.write("all is written")
"""


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ("{} | true", ""),
        ("{} 2>&1 >/dev/null | true", ""),
        ("{} 2>&1 | (read line; exit)", ""),
        ("{} <&- >&- 2>&-", ""),
        ("{} >/dev/full 2>&1", ""),
        ("{} 2>/dev/full >/dev/null", ""),
        ("{} >/dev/full", "warning: some of the output could not be written (No space left on device)\n"),
    ],
)
def test_output_that_cannot_be_written_is_dropped(tmp_path: Path, shell: str, said: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = f"set -o pipefail; {shell.format(f'{sys.executable} program.py')}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "all is written"
    assert done.stderr.count("warning") == (1 if said else 0)
    assert said in done.stderr


def test_a_closed_terminal_is_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    reader, writer = os.openpty()
    process = subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path, stdout=writer, stderr=writer)
    os.close(writer)
    os.close(reader)
    assert process.wait(60) == 0
    assert (tmp_path / "file").read_text() == "all is written"
