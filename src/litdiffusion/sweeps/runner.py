"""Jobs one after the other, or several at once; signals to the sweep are passed on to them."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from litdiffusion.sweeps.jobs import Job
from litdiffusion.sweeps.machine import JOB, Share, environment
from litdiffusion.sweeps.process import FAILED, Outcome, RunningJob
from litdiffusion.system.processes import handling, stop_signals

LOOK_SECONDS = 0.1
PATIENCE = 3
"""At the third Ctrl-C the jobs are killed. Other signals do not count: Slurm and a closing terminal repeat theirs."""


class Runner:
    """Run jobs, each in its share of the machine.

    Args:
        places: one for each job that runs at a time. Where there is one, its jobs write to the terminal.
        sweep: the name of the sweep.
        wants_traceback: whether the user has set HYDRA_FULL_ERROR.
    """

    def __init__(self, places: Sequence[Share], sweep: str, wants_traceback: bool = False) -> None:
        self._places, self._sweep, self._wants_traceback = places, sweep, wants_traceback
        self._running: dict[Share, RunningJob] = {}
        self._signals: list[int] = []

    def run(
        self, jobs: Sequence[Job], begun: Callable[[Job], None], ended: Callable[[Job, Outcome], None]
    ) -> int | None:
        """Run the jobs; return the signal that stopped them before the last was started or had ended, if one did.

        Args:
            jobs: in the order in which they shall start.
            begun: called when a job starts.
            ended: called when a job has ended.
        """
        waiting = list(jobs)
        with handling(stop_signals(), self._forward):
            while self._running or (waiting and not self._signals):
                for place in self._places:
                    if waiting and not self._signals and place not in self._running:
                        job = waiting.pop(0)
                        begun(job)
                        self._start(job, place, ended)
                self._look(ended)
        return self._signals[0] if self._signals else None

    def _start(self, job: Job, place: Share, ended: Callable[[Job, Outcome], None]) -> None:
        variables = environment(place, job.num_processes, self._sweep, self._wants_traceback) | {
            JOB: job.title
        }
        terminal = (sys.stdout, sys.stderr) if len(self._places) == 1 else None
        try:
            job.note_start()
            started = self._running[place] = RunningJob(job, variables, place, terminal)
        except OSError as error:
            ended(job, Outcome(FAILED, f"{job.folder} cannot be written ({error.strerror})"))
            return
        if self._signals and not started.signals:  # it came while the job was being started
            started.ask_to_stop(self._signals[-1])

    def _look(self, ended: Callable[[Job, Outcome], None]) -> None:
        """Report a job that has ended; where none has, wait a little."""
        for place, job in list(self._running.items()):
            outcome = job.outcome()
            if outcome is not None:
                del self._running[place]
                ended(job.job, outcome)
                return
        time.sleep(LOOK_SECONDS)

    def _forward(self, signum: int, frame: FrameType | None) -> None:
        self._signals.append(signum)
        for job in list(self._running.values()):
            if self._signals.count(signal.SIGINT) < PATIENCE:
                job.ask_to_stop(signum)
            else:
                job.kill()
