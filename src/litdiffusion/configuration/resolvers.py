"""``${new_run_dir:}`` and ``${new_run_name:}``: where a run lives when nobody says so. Registered on import.

Cached by OmegaConf per configuration, like Hydra's ``${now:}``: all interpolations of one run agree, and two
runs composed in one process (a notebook) do not share a folder.
"""

import os
import secrets
from datetime import datetime

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import ListConfig, OmegaConf

from litdiffusion.errors import UserError

_INHERITED = "LITDIFFUSION_RUN_DIR"
"""Tells the processes that Lightning starts for the other devices which folder their parent chose."""


def new_run_name() -> str:
    """Return ``<YYYY-mm-dd_HH-MM-SS>-<4 random hex digits>``: jobs that start in one second differ."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{secrets.token_hex(2)}"


def new_run_dir() -> str:
    """Return ``logs/<experiment, or "default">/<new run name>``; in a sweep, the folder Hydra gives the job.

    Raises:
        UserError: several processes were started from outside, each of which would choose its own.
    """
    if is_sweep():
        sweep = HydraConfig.get().sweep
        return f"{sweep.dir}/{sweep.subdir}"
    environment = os.environ
    if int(environment.get("LOCAL_RANK", 0)) > 0 and _INHERITED in environment:
        return environment[_INHERITED]
    torchrun = "TORCHELASTIC_RUN_ID" in environment and int(environment.get("WORLD_SIZE", 1)) > 1
    if torchrun or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError("run_dir: processes started by torchrun or srun need to be told; give run_dir=DIR")
    environment[_INHERITED] = f"logs/{_experiment()}/{new_run_name()}"
    return environment[_INHERITED]


def is_sweep() -> bool:
    """Whether this is a job of a Hydra multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _experiment() -> str:
    chosen = HydraConfig.get().runtime.choices.get("experiment") if HydraConfig.initialized() else None
    return "+".join(chosen) if isinstance(chosen, ListConfig | list) else chosen or "default"


OmegaConf.register_new_resolver("new_run_name", new_run_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("new_run_dir", new_run_dir, use_cache=True, replace=True)
