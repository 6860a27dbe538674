"""A running job: a process group of its own, its output, and how it ended."""

import codecs
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import TextIOBase
from threading import Thread
from typing import Any, TextIO

from litdiffusion.configuration.messages import PROCESS_LOST
from litdiffusion.sweeps.jobs import Job
from litdiffusion.sweeps.machine import Share, bind
from litdiffusion.system.redaction import redacted

TAIL_CHARACTERS = 2**16
GRACE_SECONDS = 5.0
"""How long what a job leaves behind (a logger's process, the last of its output) may take to finish."""

_ERROR = re.compile(r"error(?: \(process \d+\))?: ")

FINISHED, SKIPPED, FAILED, STOPPED, WAITING = "finished", "skipped-finished", "failed", "stopped", "waiting"
RUNNING, SUBMITTED = "running", "submitted"


Stream = TextIO | TextIOBase
"""Where a job's output is passed on to: ``sys.stdout``, or its replacement."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended, or why it has not been started."""

    status: str
    reason: str = ""


def _no_link(path: str, flags: int) -> int:
    """Open a file, but no symbolic link: a run folder may come from elsewhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class RunningJob:
    """A job that has been started in a new session, so that a Ctrl-C reaches the sweep alone.

    Args:
        job: the job.
        variables: its environment.
        share: the cores it is kept on.
        terminal: two streams that its two are passed on to; None to write both into ``output.log`` in its folder.
    """

    def __init__(
        self, job: Job, variables: Mapping[str, str], share: Share, terminal: tuple[Stream, Stream] | None
    ) -> None:
        self.job = job
        self.signals: set[int] = set()
        self._echoes = [_Echo(stream) for stream in terminal] if terminal else []
        self._log = None if terminal else job.folder / "output.log"
        self._log_start = self._log.stat().st_size if self._log and self._log.exists() else 0
        with ExitStack() as ours:
            ends: list[Any]
            if self._log:
                file = ours.enter_context(open(self._log, "ab", opener=_no_link))
                ends = [file, file]
            else:
                ends = [echo.writer for echo in self._echoes]
                for echo in self._echoes:
                    ours.callback(echo.start)
            self._process = subprocess.Popen(
                job.command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=ends[0],
                stderr=ends[1],
                start_new_session=True,
            )
        with suppress(ProcessLookupError):
            bind(self._process.pid, share)

    def ask_to_stop(self, signum: int) -> None:
        """Send a signal to the job's first process: it saves and stops, and the others with it."""
        self.signals.add(signum)
        self._process.send_signal(signum)

    def kill(self) -> None:
        """End the job and all that it has started."""
        self.signals.add(signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def outcome(self) -> Outcome | None:
        """Return how the job ended, with nothing of it left running; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        self._end_group()
        for echo in self._echoes:
            echo.finish()
        if code == 0 or (self.signals and self.job.is_finished()):  # it had ended when the signal came
            return Outcome(FINISHED)
        signum = -code if code < 0 else code - 128
        if signum in self.signals:
            return Outcome(STOPPED, f"by {signal.Signals(signum).name}; the same command continues it")
        return Outcome(FAILED, redacted(reason(code, self._tail())))

    def _end_group(self) -> None:
        """End what outlives the first process, such as the others of a killed run: it holds cores and GPUs."""
        deadline = time.monotonic() + GRACE_SECONDS
        with suppress(ProcessLookupError, PermissionError):
            while time.monotonic() < deadline:
                os.killpg(self._process.pid, 0)
                time.sleep(0.05)
            os.killpg(self._process.pid, signal.SIGKILL)

    def _tail(self) -> str:
        if self._log is None:
            return "\n".join(echo.tail for echo in self._echoes)
        with self._log.open("rb") as file:
            file.seek(max(self._log_start, file.seek(0, os.SEEK_END) - TAIL_CHARACTERS))
            return file.read().decode("utf-8", errors="replace")


def reason(code: int, output: str) -> str:
    """Return in one line why a process has ended with ``code``, from the end of its output.

    That is its last line ``error: ...``, or else the exception of its last traceback; a signal is named in any case.
    The loss of another process of the run is the reason only where there is no other.
    """
    lines = [re.sub(r"\A\[rank\d+\]: ", "", line.rstrip()) for line in re.split(r"[\r\n]+", output)]
    errors = [line[match.end() :] for line in lines if (match := _ERROR.match(line))]
    causes = [text for text in errors if not text.startswith(PROCESS_LOST)]
    said = causes[-1] if causes else _raised(lines) or (errors[-1] if errors else "")
    if code < 0 or code > 128:
        name, ended = _signal_name(-code if code < 0 else code - 128), "killed" if code < 0 else "stopped"
        hint = ", as the system does when memory runs out" if name == "SIGKILL" and not said else ""
        return f"{ended} by {name}{hint}" + (f"; before that: {said}" if said else "")
    return said or f"exit code {code}" + (f"; its last line: {last}" if (last := _last(lines)) else "")


def _raised(lines: list[str]) -> str:
    """Return the line that names the exception of the last traceback."""
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    after = lines[starts[-1] + 1 :] if starts else []
    return next((line for line in after if line and not line[0].isspace()), "")


def _last(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


class _Echo:
    """A pipe for a job's output, which is passed on to ``stream`` at once; the last of it is kept.

    It is a pseudo-terminal where the stream is a terminal, so that a progress bar moves.
    """

    def __init__(self, stream: Stream) -> None:
        self.tail = ""
        self._stream = stream
        self._reader, self.writer = _terminal_like(stream) if stream.isatty() else os.pipe()
        self._thread = Thread(target=self._pass_on, daemon=True)

    def start(self) -> None:
        """Close this process's copy of the writing end, and start reading."""
        os.close(self.writer)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the last of the output."""
        self._thread.join(GRACE_SECONDS)

    def _pass_on(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := self._read():
            text = decoder.decode(chunk)
            self.tail = (self.tail + text)[-TAIL_CHARACTERS:]
            with suppress(OSError, ValueError):  # the terminal may have been closed; the job goes on
                self._stream.write(text)
                self._stream.flush()
        os.close(self._reader)

    def _read(self) -> bytes:
        try:
            return os.read(self._reader, 2**16)
        except OSError:  # a pseudo-terminal without a writer
            return b""


def _terminal_like(stream: Stream) -> tuple[int, int]:
    """Return the two ends of a new pseudo-terminal of the same size, which passes the output on unchanged."""
    import pty
    import termios

    reader, writer = pty.openpty()
    with suppress(OSError, ValueError, termios.error):
        termios.tcsetwinsize(writer, termios.tcgetwinsize(stream.fileno()))
    modes = termios.tcgetattr(writer)
    modes[1] &= ~termios.OPOST
    termios.tcsetattr(writer, termios.TCSANOW, modes)
    return reader, writer
