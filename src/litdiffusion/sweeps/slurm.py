"""Jobs as a Slurm array, through submitit: hand them in, and wait for each.

``handed_in.json`` in the sweep's folder says under which numbers they are in the cluster's hands. A sweep that is
repeated while some of them are still queued, or run, waits for those instead of handing them in again.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus

from litdiffusion.configuration.messages import one_line
from litdiffusion.files import write_text
from litdiffusion.redaction import redacted, redacted_override
from litdiffusion.sweeps.jobs import Job
from litdiffusion.sweeps.machine import SWEEP
from litdiffusion.sweeps.process import FAILED, FINISHED, Outcome, reason

HANDED_IN = "handed_in.json"
LOOK_SECONDS = 2.0


def run_array(
    task: Callable[..., JobReturn],
    cluster: str,
    parameters: Mapping[str, Any],
    folder: Path,
    jobs: Sequence[Job],
    begun: Callable[[Job], None],
    ended: Callable[[Job, Outcome], None],
) -> None:
    """Run jobs as one array; return when each has ended. An interruption leaves them to the cluster.

    Args:
        task: submitit's launcher, which runs on a node what Hydra has composed.
        cluster: ``slurm``, or ``local`` for processes of this machine.
        parameters: of ``hydra.launcher``.
        folder: of the sweep; its name is the sweep's.
        jobs: what to run.
        begun: called when a job is handed in.
        ended: called when a job has ended.
    """
    waiting, leaving = _with_the_cluster(folder, parameters, jobs)
    if waiting:
        numbers = ", ".join(f"{job.number} (Slurm's {handle.job_id})" for job, handle in waiting.items())
        print(f"{len(waiting)} of {len(jobs)} jobs are with the cluster already: {numbers}", flush=True)
    missing = [job for job in jobs if job not in waiting]
    if missing:
        handles = _hand_in(_executor(cluster, parameters), task, folder.name, missing)
        waiting |= dict(zip(missing, handles, strict=True))
        _note_handed_in(folder, waiting, leaving)
    for job in missing:
        begun(job)
    while waiting:
        for job, handle in list(waiting.items()):
            if handle.done():
                del waiting[job]
                ended(job, _outcome(handle))
                _forget_command(handle)
        if waiting:
            time.sleep(LOOK_SECONDS)
    for handle in leaving.values():
        if not _is_queued(handle.job_id):
            _forget_command(handle)


def _hand_in(executor: Any, task: Callable[..., JobReturn], sweep: str, jobs: Sequence[Job]) -> list[Any]:
    before = os.environ.get(SWEEP)
    os.environ[SWEEP] = sweep  # sbatch passes the environment on
    try:
        handles: list[Any] = executor.map_array(task, *zip(*map(_arguments, jobs), strict=True))
        return handles
    finally:
        os.environ.pop(SWEEP)
        if before is not None:
            os.environ[SWEEP] = before


def _note_handed_in(folder: Path, waiting: Mapping[Job, Any], leaving: Mapping[str, Any]) -> None:
    noted = {name: [handle.job_id, []] for name, handle in leaving.items()}
    noted |= {str(job.folder): [handle.job_id, _shown(job)] for job, handle in waiting.items()}
    write_text(folder / HANDED_IN, json.dumps(noted, indent=2) + "\n")


def _with_the_cluster(
    folder: Path, parameters: Mapping[str, Any], jobs: Sequence[Job]
) -> tuple[dict[Job, Any], dict[str, Any]]:
    """Return submitit's handles of what an earlier command has handed in and the queue still lists.

    Returns:
        those of the jobs asked for, and by folder those of the others: finished and about to leave, or asked for
        no longer.
    """
    import submitit

    try:
        noted: dict[str, Any] = json.loads((folder / HANDED_IN).read_text(encoding="utf-8"))
        handed_in = {name: (str(number), shown) for name, (number, shown) in noted.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none, or not ours
        return {}, {}
    asked = {(str(job.folder), *_shown(job)): job for job in jobs}
    waiting, leaving = {}, {}
    for name, (number, shown) in handed_in.items():
        handle: Any = submitit.SlurmJob(parameters["submitit_folder"], number, _tasks(parameters))
        if not _is_queued(number):
            _forget_command(handle)
        elif job := asked.get((name, *shown)):
            waiting[job] = handle
        else:
            leaving[name] = handle
    return waiting, leaving


def _forget_command(handle: Any) -> None:
    """Remove what a job was called with, as it was typed: it was needed for as long as it might be requeued."""
    handle.paths.submitted_pickle.unlink(missing_ok=True)


def _shown(job: Job) -> list[str]:
    return [redacted_override(text) for text in job.overrides]


def _tasks(parameters: Mapping[str, Any]) -> range:
    return range((parameters.get("nodes") or 1) * (parameters.get("tasks_per_node") or 1))


def _is_queued(number: str) -> bool:
    """Whether Slurm has a job still before it, or at work."""
    squeue = ["squeue", "--noheader", "--array", f"--jobs={number}", "--format=%T"]
    try:
        listed = subprocess.run(squeue, capture_output=True, text=True)
    except FileNotFoundError:
        return False
    return listed.returncode == 0 and bool(listed.stdout.strip())


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
    return list(job.overrides), "hydra.sweep.dir", job.number, name, Singleton.get_state()


def _outcome(handle: Any) -> Outcome:
    try:
        returned: JobReturn = handle.results()[0]
    except Exception:  # killed, or cut off: what it last said is in its log
        return Outcome(FAILED, redacted(reason(1, handle.stderr() or "")))
    if returned.status == JobStatus.FAILED:
        return Outcome(FAILED, redacted(one_line(returned._return_value)))
    return Outcome(FINISHED)
