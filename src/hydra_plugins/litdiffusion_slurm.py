"""``hydra/launcher=slurm``: submitit's Slurm arrays, with the promises of ``hydra/launcher=processes``.

Nothing finished runs again, a job that fails does not end the sweep, and the results of all jobs are gathered.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from hydra.core.utils import JobReturn

with suppress(ImportError):  # the extra "slurm" is not installed: its configuration is missing as well
    from hydra_plugins.hydra_submitit_launcher import submitit_launcher

    class SlurmLauncher(submitit_launcher.SlurmLauncher):  # type: ignore[misc]  # it has no types
        """Submits the jobs that are not finished as one array, and waits for them."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """Run jobs, numbered from ``initial_job_idx``; return what the sweeper wants to know of each."""
            from litdiffusion.slurm.array import run_array
            from litdiffusion.sweeps.sweep import Sweep

            sweep = Sweep(self.config, self.hydra_context.config_loader, self.task_function.__module__)
            perform = partial(run_array, self, self._EXECUTOR, self.params, sweep.folder)
            return sweep.run(sweep.jobs(job_overrides, initial_job_idx), perform, on_this_machine=False)
