"""Jobs as a Slurm array, through submitit: hand them in, and wait for each."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus

from litdiffusion.configuration.messages import one_line
from litdiffusion.redaction import redacted
from litdiffusion.sweeps.jobs import Job
from litdiffusion.sweeps.machine import SWEEP
from litdiffusion.sweeps.process import FAILED, FINISHED, Outcome, reason

LOOK_SECONDS = 2.0


def run_array(
    task: Callable[..., JobReturn],
    cluster: str,
    parameters: Mapping[str, Any],
    sweep: str,
    jobs: Sequence[Job],
    begun: Callable[[Job], None],
    ended: Callable[[Job, Outcome], None],
) -> None:
    """Run jobs as one array; return when each has ended. An interruption leaves them to the cluster.

    Args:
        task: submitit's launcher, which runs on a node what Hydra has composed.
        cluster: ``slurm``, or ``local`` for processes of this machine.
        parameters: of ``hydra.launcher``.
        sweep: the name of the sweep.
        jobs: what to run.
        begun: called when a job is handed in.
        ended: called when a job has ended.
    """
    if not jobs:
        return
    before = os.environ.get(SWEEP)
    os.environ[SWEEP] = sweep  # sbatch passes the environment on
    try:
        handles = _executor(cluster, parameters).map_array(task, *zip(*map(_arguments, jobs), strict=True))
    finally:
        os.environ.pop(SWEEP)
        if before is not None:
            os.environ[SWEEP] = before
    waiting = dict(zip(jobs, handles, strict=True))
    for job in jobs:
        begun(job)
    while waiting:
        for job, handle in list(waiting.items()):
            if handle.done():
                del waiting[job]
                ended(job, _outcome(handle))
        if waiting:
            time.sleep(LOOK_SECONDS)


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
