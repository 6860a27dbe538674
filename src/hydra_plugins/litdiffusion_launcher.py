"""``hydra/launcher=processes``: every job of a sweep is a fresh process, with the results of all of them gathered.

Hydra looks for plugins in this namespace package and imports each at every start; so what only a sweep needs
is imported inside of the methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class ProcessesConf:
    """The launcher's configuration. ``jobs``: how many run at a time, each with its share of the cores or GPUs."""

    _target_: str = "hydra_plugins.litdiffusion_launcher.ProcessLauncher"
    jobs: int = 1


ConfigStore.instance().store(
    group="hydra/launcher", name="processes", node=ProcessesConf, provider="litdiffusion"
)


class ProcessLauncher(Launcher):
    """Runs ``python -m ENTRY_POINT <overrides> run_dir=<folder>`` for every job that is not finished already.

    A job that fails does not end the sweep. A signal to the sweep ends its jobs, which save what they have.
    """

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take over the configuration of the sweep."""
        from litdiffusion.sweeps.sweep import Sweep

        self._sweep = Sweep(config, hydra_context.config_loader, task_function.__module__)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs, numbered from ``initial_job_idx``; return what the sweeper wants to know of each.

        Raises:
            SystemExit: a signal has stopped the sweep; the code is 128 + the signal.
            UserError: the machine has fewer cores or GPUs than jobs.
        """
        from litdiffusion.sweeps.machine import shares
        from litdiffusion.sweeps.runner import Runner

        jobs = self._sweep.jobs(job_overrides, initial_job_idx)
        places = shares(self.jobs, any(job.on_gpu for job in jobs))
        runner = Runner(places, self._sweep.folder.name, self._sweep.wants_traceback)
        return self._sweep.run(jobs, runner.run)
