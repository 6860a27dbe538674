"""Jobs as a Slurm array, through submitit: submit them, and wait for each.

``handed_in.json`` in the sweep's folder holds the submitted jobs by their Slurm numbers. A sweep that is repeated
while some of its jobs are still queued, or run, waits for those instead of submitting them again.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus

from litdiffusion.configuration.messages import one_line
from litdiffusion.configuration.sweeps import quoted
from litdiffusion.errors import UserError, short_text
from litdiffusion.slurm.cluster import SLURM_SECONDS
from litdiffusion.sweeps.jobs import Job
from litdiffusion.sweeps.machine import JOB, SWEEP
from litdiffusion.sweeps.process import FAILED, FINISHED, Outcome, reason
from litdiffusion.system.files import write_text
from litdiffusion.system.launch import environment_variable
from litdiffusion.system.redaction import redacted, redacted_override

HANDED_IN = "handed_in.json"
LOOK_SECONDS = 2.0
QUEUE_SECONDS = 30.0

_NUMBER = re.compile(r"\d+(_\d+)?")
_Noted = tuple[str, tuple[str, ...]]
"""A job's folder, and its overrides as they are shown."""


def run_array(
    task: Callable[..., JobReturn],
    cluster: str,
    parameters: Mapping[str, Any],
    folder: Path,
    jobs: Sequence[Job],
    begun: Callable[[Job], None],
    ended: Callable[[Job, Outcome], None],
) -> None:
    """Run jobs as one array; return when each has ended. An interruption leaves them queued or running.

    Args:
        task: submitit's launcher, which runs on a node and composes the job by Hydra.
        cluster: submitit's name for the scheduler: ``slurm``.
        parameters: of ``hydra.launcher``.
        folder: of the sweep; its name is the sweep's.
        jobs: what to run.
        begun: called when a job is submitted, or found in the queue.
        ended: called when a job has ended.
    """
    waiting, others = _submitted_before(folder, parameters, jobs)
    if waiting:
        numbers = ", ".join(f"{job.number} (Slurm's {handle.job_id})" for job, handle in waiting.items())
        print(f"{len(waiting)} of {len(jobs)} jobs are already queued or running: {numbers}", flush=True)
    missing = [job for job in jobs if job not in waiting]
    if missing:
        handles = _submit(_executor(cluster, parameters), task, folder.name, missing)
        waiting |= dict(zip(missing, handles, strict=True))
        _write_numbers(folder, waiting, others)
    for job in waiting:
        begun(job)
    queue = _Queue()
    while waiting:
        for job, handle in list(waiting.items()):
            done = handle.done()
            if done or queue.has_lost(handle.job_id):
                del waiting[job]
                ended(job, _outcome(handle) if done else _without_result(handle))
                _forget_command(handle)
        if waiting:
            time.sleep(LOOK_SECONDS)
    if others:
        with suppress(UserError):  # a repeated command looks again
            listed = _listed()
            for number in others.keys() - listed:
                _forget_command(_handle(parameters, number))


class _Queue:
    """The jobs that Slurm lists, asked for every ``QUEUE_SECONDS``.

    A job that was killed leaves no result, and submitit learns of that only where the cluster has accounting.
    """

    def __init__(self) -> None:
        self._listed: list[frozenset[str]] = []
        self._asked = time.monotonic()

    def has_lost(self, number: str) -> bool:
        """Whether a job was missing twice in a row: it has ended, and its result would be there by now."""
        if time.monotonic() - self._asked > QUEUE_SECONDS:
            self._asked = time.monotonic()
            with suppress(UserError):  # it is asked again later
                self._listed = [*self._listed[-1:], _listed()]
        return len(self._listed) == 2 and not any(number in listed for listed in self._listed)


def _submit(executor: Any, task: Callable[..., JobReturn], sweep: str, jobs: Sequence[Job]) -> list[Any]:
    with environment_variable(SWEEP, sweep):  # sbatch passes the environment on
        handles: list[Any] = executor.map_array(task, *zip(*map(_arguments, jobs), strict=True))
    return handles


def _write_numbers(folder: Path, waiting: Mapping[Job, Any], others: Mapping[str, _Noted]) -> None:
    noted = {**others, **{handle.job_id: _noted(job) for job, handle in waiting.items()}}
    write_text(folder / HANDED_IN, json.dumps(noted, indent=2) + "\n")


def _submitted_before(
    folder: Path, parameters: Mapping[str, Any], jobs: Sequence[Job]
) -> tuple[dict[Job, Any], dict[str, _Noted]]:
    """Return submitit's handles of the jobs that an earlier command has submitted and the queue still lists.

    Returns:
        the handles of ``jobs``, and by number what is noted of the others: those that have ended, and those that are
        not among ``jobs``.

    Raises:
        UserError: ``squeue`` fails.
    """
    try:
        noted: dict[str, Any] = json.loads((folder / HANDED_IN).read_text(encoding="utf-8"))
        handed_in = {number: (str(name), tuple(map(str, shown))) for number, (name, shown) in noted.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # there is no such file, or not one of ours
        return {}, {}
    asked = dict(zip(map(_noted, jobs), jobs, strict=True))
    waiting, others = {}, {}
    listed = _listed(tries=5)
    for number, of_job in handed_in.items():
        if not _NUMBER.fullmatch(number):  # it becomes part of a path
            continue
        if number not in listed:
            _forget_command(_handle(parameters, number))
        elif job := asked.get(of_job):
            waiting[job] = _handle(parameters, number)
        else:
            others[number] = of_job
    return waiting, others


def _handle(parameters: Mapping[str, Any], number: str) -> Any:
    """Return submitit's handle of a job that an earlier command has submitted."""
    import submitit

    tasks = (parameters.get("nodes") or 1) * (parameters.get("tasks_per_node") or 1)
    return submitit.SlurmJob(parameters["submitit_folder"], number, range(tasks))


def _forget_command(handle: Any) -> None:
    """Remove the files that hold the job's command unmasked: they are needed only while it may be requeued."""
    handle.paths.submitted_pickle.unlink(missing_ok=True)
    for result in handle.paths.folder.glob(f"{handle.job_id}_*_result.pkl"):
        result.unlink(missing_ok=True)


def _noted(job: Job) -> _Noted:
    return str(job.folder), tuple(redacted_override(text) for text in job.overrides)


def _listed(tries: int = 1) -> frozenset[str]:
    """Return the numbers of this user's jobs that are queued or running.

    Raises:
        UserError: ``squeue`` fails.
    """
    squeue = ["squeue", "--me", "--all", "--noheader", "--array", "--format=%i"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        answer = subprocess.run(
            squeue, env=environment, capture_output=True, text=True, check=True, timeout=SLURM_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        if tries > 1:
            time.sleep(LOOK_SECONDS)
            return _listed(tries - 1)
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else one_line(error)
        raise UserError(
            f"hydra/launcher=slurm: squeue does not say which jobs are queued ({short_text(said)});"
            " repeat the command when it does"
        ) from error
    return frozenset(answer.stdout.split())


def _executor(cluster: str, parameters: Mapping[str, Any]) -> Any:
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    own = {"submitit_folder", "max_num_timeout"}
    limits = {f"{cluster}_max_num_timeout": parameters["max_num_timeout"]} if cluster == "slurm" else {}
    executor = submitit.AutoExecutor(folder=parameters["submitit_folder"], cluster=cluster, **limits)
    common = {field.name for field in fields(BaseQueueConf)}
    executor.update_parameters(
        **{
            key if key in common else f"{cluster}_{key}": value
            for key, value in parameters.items()
            if key not in own
        }
    )
    return executor


def _arguments(job: Job) -> tuple[Any, ...]:
    """Return what submitit's launcher is called with on the node."""
    name = f"job_id_for_{job.number}"
    overrides = [*job.overrides, f"+hydra.job.env_set.{JOB}={quoted(job.title)}"]
    return overrides, "hydra.sweep.dir", job.number, name, Singleton.get_state()


def _outcome(handle: Any) -> Outcome:
    try:
        returned: JobReturn = handle.results()[0]
    except Exception:  # killed, or cut off
        return _without_result(handle)
    if returned.status == JobStatus.FAILED:
        return Outcome(FAILED, redacted(one_line(returned._return_value)))
    return Outcome(FINISHED)


def _without_result(handle: Any) -> Outcome:
    """Return the outcome of a job without a result; the reason is in its log."""
    return Outcome(FAILED, redacted(reason(1, handle.stderr() or "")))
