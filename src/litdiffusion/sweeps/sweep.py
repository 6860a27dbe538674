"""A sweep: its jobs, which of them are unfinished, and what the sweeper gets to know of each."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from omegaconf import DictConfig, OmegaConf

from litdiffusion.configuration.resolvers import direction
from litdiffusion.configuration.sweeps import SweepCommand, current_sweep
from litdiffusion.errors import UserError
from litdiffusion.reporting.report import duration
from litdiffusion.runs.folder import absolute, writable_folder
from litdiffusion.runs.lock import RunLock, is_locked
from litdiffusion.sweeps.jobs import Job, make_job, program_of
from litdiffusion.sweeps.process import FAILED, FINISHED, RUNNING, SKIPPED, SUBMITTED, WAITING, Outcome
from litdiffusion.sweeps.ranking import goals, ranking, require_comparable
from litdiffusion.sweeps.table import Results
from litdiffusion.system.files import write_text
from litdiffusion.system.launch import num_started, num_tasks
from litdiffusion.system.processes import interruptible
from litdiffusion.system.redaction import redacted_override, without_secrets

BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


Perform = Callable[[Sequence[Job], Callable[[Job], None], Callable[[Job, Outcome], None]], int | None]
"""Runs jobs. It calls the first function when a job begins, or is found at work already, and the second when it has
ended; it returns the signal that has stopped it, if one has."""


KILLED_SWEEP_SECONDS = 60.0
"""How long a job of a killed sweep may take to save and stop; a folder in use for longer is another job's."""


class Sweep:
    """The jobs of one command.

    Args:
        config: of the sweep.
        loader: Hydra's.
        module: where the entry point was defined.
    """

    def __init__(self, config: DictConfig, loader: ConfigLoader, module: str) -> None:
        self._config, self._loader = config, loader
        self._command: SweepCommand = current_sweep()
        self._program = [*program_of(module), *self._command.options]
        self.folder = Path(absolute(config.hydra.sweep.dir))
        self.wants_traceback = self._command.wants_traceback
        self.results = Results(self.folder / "sweep.csv")
        self._lock = RunLock(self.folder, key="hydra.sweep.dir")
        self._searching = config.hydra.sweeper._target_ != BASIC_SWEEPER

    def jobs(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        """Return the jobs that the sweeper asks for, numbered from ``first``.

        Raises:
            UserError: this is one of several processes, or what is optimized does not compare the jobs.
        """
        self._hide_secrets()
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        if num_started() > 1 or num_tasks() > 1:
            raise UserError(
                "a sweep is started once, without torchrun or srun: its jobs start their own processes, as many as"
                " trainer.devices says"
            )
        self._goals = goals(self._config)
        jobs = [
            make_job(first + index, overrides, self._config, self._loader, self._program)
            for index, overrides in enumerate(job_overrides)
        ]
        require_comparable(self._config, [*self.results.outcomes, *jobs], self._searching)
        return jobs

    def run(self, jobs: Sequence[Job], perform: Perform, on_this_machine: bool = True) -> list[JobReturn]:
        """Run those of the jobs that are not finished.

        Args:
            jobs: of the sweep.
            perform: runs them.
            on_this_machine: whether jobs that begin run at once, and only one of a killed sweep can be at work in a
                job's folder.

        Raises:
            SystemExit: a signal has stopped the sweep; the code is 128 + the signal.
            UserError: the folder cannot be written, or another sweep is at work there.
        """
        writable_folder("hydra.sweep.dir", str(self.folder))
        self._lock.take()
        self._command.report = self._report
        if on_this_machine:
            self._await_jobs_of_killed_sweep(job for job in jobs if not job.is_finished())
        self._begun = RUNNING if on_this_machine else SUBMITTED
        with interruptible():
            signum = perform(self._left_of(jobs), self._note_begun, self._note_end)
        if signum:
            sys.exit(128 + signum)
        return [self._returned(job) for job in jobs]

    def _hide_secrets(self) -> None:
        """Mask secrets in the command, which Hydra's sweeper has written by now, before anything is refused."""
        written = self.folder / "multirun.yaml"
        if written.exists():
            cfg: Any = OmegaConf.to_container(self._config)
            typed = cfg["hydra"]["overrides"]["task"]
            cfg["hydra"]["overrides"]["task"] = [redacted_override(text) for text in typed]
            cfg["hydra"]["job"].pop("override_dirname", None)  # holds the same overrides
            write_text(written, OmegaConf.to_yaml(OmegaConf.create(without_secrets(cfg))))

    def _left_of(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs that are not finished, and say how many are."""
        left = [job for job in jobs if not job.is_finished()]
        finished = [job for job in jobs if job not in left]
        self.results.note({job: Outcome(WAITING if job in left else SKIPPED) for job in jobs})
        if finished:
            numbers = ", ".join(str(job.number) for job in finished)
            print(f"{len(finished)} of {len(jobs)} jobs are finished already: {numbers}", flush=True)
        return left

    def _await_jobs_of_killed_sweep(self, jobs: Iterable[Job]) -> None:
        """Wait for jobs of a killed sweep, which may be about to save or to finish."""
        deadline = time.monotonic() + KILLED_SWEEP_SECONDS
        for job in jobs:
            if is_locked(job.folder):
                print(f"Job {job.number}: waiting for a process to leave {job.folder}", flush=True)
            while is_locked(job.folder) and time.monotonic() < deadline:
                time.sleep(0.2)

    def _note_begun(self, job: Job) -> None:
        self.results.note({job: Outcome(self._begun)})
        print(f"{self._title(job)} {self._begun}: {job.folder}", flush=True)

    def _note_end(self, job: Job, outcome: Outcome) -> None:
        self.results.note({job: outcome})
        seconds = job.results().get("wall_seconds") if outcome.status == FINISHED else None
        spent = f" in {duration(seconds)}" if isinstance(seconds, int | float) else ""
        why = f": {outcome.reason}" if outcome.reason else ""
        print(f"{self._title(job)} {outcome.status}{spent}{why}", flush=True)

    def _title(self, job: Job) -> str:
        return f"Job {job.number} ({job.title})" if job.title else f"Job {job.number}"

    def _returned(self, job: Job) -> JobReturn:
        """Return a job's result to the sweeper. Hydra's own gets no failure, at which it would end the sweep."""
        returned = JobReturn(
            overrides=list(job.overrides), working_dir=str(Path.cwd()), status=JobStatus.COMPLETED
        )
        outcome = self.results.outcomes[job]
        if self._searching:
            try:
                if outcome.status == FAILED:
                    raise UserError(f"job {job.number}: {outcome.reason}")
                returned.return_value = job.value(self._goals)
            except UserError as error:
                returned.status, returned.return_value = JobStatus.FAILED, error
        return returned

    def _report(self) -> None:
        """Release the folder, and print the table."""
        self._lock.release()
        self._command.failed |= self.results.failed()
        available = {name for row in self.results.rows() for name in row}
        metric, line = ranking(self._config, list(self.results.outcomes), available)
        table = self.results.table(metric, direction(metric, _root_=self._config) == "maximize")
        print(
            f"\n{table}",
            *filter(None, [line]),
            f"{self.results.path} holds this table.",
            sep="\n",
            flush=True,
        )
