"""OmegaConf resolvers, registered on import: default folders of runs and sweeps, and what a search looks for.

``${new_run_dir:}`` and ``${new_run_name:}`` differ from run to run; ``${sweep_name:}`` and ``${digest:...}`` do not.
OmegaConf caches the former per configuration, like Hydra's ``${now:}``: all interpolations of one
run agree, and two runs composed in one process (a notebook) have different folders.
"""

import hashlib
import json
import os
import re
import secrets
import textwrap
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from litdiffusion.configuration.nodes import locate
from litdiffusion.errors import UserError
from litdiffusion.system.launch import of_step

_GROUP = re.compile(r"  - (?:override )?(\w+): (\S+)(?:\s+# (.*))?")
_KEY = re.compile(r"(\w+): (.+?)(?:\s+# (.*))?$")
"""Lines of ``train.yaml``: a group and its choice, a key and its value, and what a comment says of them."""

_INHERITED = "LITDIFFUSION_RUN_DIR"
"""Passes the folder on to the processes that Lightning starts for the other devices."""


def new_run_name() -> str:
    """Return ``<YYYY-mm-dd_HH-MM-SS>-<4 random hex digits>``: jobs that start in one second differ."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{secrets.token_hex(2)}"


def new_run_dir() -> str:
    """Return ``logs/<experiment, or "default">/<new run name>``; in a sweep, the folder Hydra gives the job.

    Raises:
        UserError: torchrun or srun has started several processes, and each would choose its own folder.
    """
    if is_sweep():
        return _job_dir()
    environment = os.environ
    if int(environment.get("LOCAL_RANK", 0)) > 0 and _INHERITED in environment:
        return environment[_INHERITED]
    torchrun = "TORCHELASTIC_RUN_ID" in environment and int(environment.get("WORLD_SIZE", 1)) > 1
    if torchrun or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError("run_dir: processes started by torchrun or srun need to be told; give run_dir=DIR")
    environment[_INHERITED] = f"logs/{chosen_experiment() or 'default'}/{new_run_name()}"
    return environment[_INHERITED]


def results_dir(ckpt: Any, name: str) -> str:
    """Return ``name`` in a checkpoint's run folder, beside it, or here; in a sweep, the job's folder."""
    if is_sweep():
        return _job_dir()
    if ckpt is None:
        return name
    folder = Path(str(ckpt)).expanduser().absolute().parent
    return str((folder.parent if folder.name == "checkpoints" else folder) / name)


def _job_dir() -> str:
    sweep = HydraConfig.get().sweep
    return f"{sweep.dir}/{sweep.subdir}"


def sweep_name(*, _root_: DictConfig) -> str:
    """Return ``<experiment, or "default">-<8 hex digits>``: the same for a repeated sweep, which so finds its jobs.

    The digits depend on which jobs there are and what each does, not on where they run or on the number of trials.
    """
    hydra = _root_.hydra
    decisive = [hydra.job.config_name, _plain(hydra.overrides.task), _plain(hydra.sweeper.get("params"))]
    return f"{chosen_experiment(hydra) or 'default'}-{digest(decisive)}"


def digest(value: object) -> str:
    """Return 8 hexadecimal digits of a hash of plain values, interpolations unresolved."""
    return hashlib.sha256(json.dumps(_plain(value)).encode()).hexdigest()[:8]


def _plain(value: object) -> object:
    return OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value


def chosen_experiment(hydra: Any = None) -> str | None:
    """Return the name of the experiment preset, several joined by "+"; None where none is chosen.

    ``hydra`` is Hydra's own part of the configuration; by default that of this job.
    """
    if hydra is None and not HydraConfig.initialized():
        return None
    hydra = hydra or HydraConfig.get()
    chosen = hydra.runtime.choices.get("experiment")
    # Hydra records a list of choices in the override alone.
    task: Any = _plain(hydra.overrides.task)  # unresolved: an override may hold any interpolation
    typed = [text for text in task if text.startswith("experiment=[")]
    if typed:
        chosen = OverridesParser.create().parse_override(typed[-1]).value()
    return "+".join(map(str, chosen)) if isinstance(chosen, ListConfig | list) else chosen


def experiment_tags() -> ListConfig:
    """Return the names of the chosen experiment presets, as tags for a dashboard."""
    chosen = chosen_experiment()
    return ListConfig(chosen.split("+") if chosen else [])


def direction(number: Any, *, _root_: DictConfig) -> Any:
    """Return ``maximize`` for a number of ``summary.json`` whose metric is better the higher, else ``minimize``.

    For a list of numbers, a list.
    """
    if isinstance(number, ListConfig):
        return ListConfig([direction(each, _root_=_root_) for each in number])
    return "maximize" if getattr(metric_of(number, _root_), "higher_is_better", False) else "minimize"


def metric_of(number: object, config: DictConfig) -> Any:
    """Return the class of the metric that a number of ``summary.json`` belongs to; None where it belongs to none."""
    name = str(number).removeprefix("val_")
    node = (config.get("metrics") or {}).get(name) or {}
    return locate(f"metrics.{name}", node["_target_"]) if "_target_" in node else None


def command_help(*, _root_: DictConfig) -> str:
    """Return what ``--help`` prints: groups and keys, each with what the command's file says of it."""
    hydra, loader = _root_.hydra, GlobalHydra.instance().config_loader()
    folder = next(source.path for source in hydra.runtime.config_sources if source.provider == "main")
    usage, groups, keys = [], ["Groups, GROUP=CHOICE:"], ["Keys, KEY=VALUE:"]
    for line in Path(folder, f"{hydra.job.config_name}.yaml").read_text(encoding="utf-8").splitlines():
        if (found := _GROUP.match(line)) and found[1] != "hydra":
            choices = ", ".join(each for each in loader.get_group_options(found[1]) if each != "default")
            groups += [
                _row(found[1] if found[2] == "null" else f"{found[1]}={found[2]}", found[3]),
                *([_row("", choices)] if choices else []),
            ]
        elif found := _KEY.match(line):
            keys.append(
                _row(found[1] if found[2].startswith(("$", "?")) else f"{found[1]}={found[2]}", found[3])
            )
        elif line.startswith("# ") and len(groups) == 1:
            usage.append(line[2:])
    more = "-m runs a sweep, --cfg job shows every key, --hydra-help all options."
    told = [usage, *(part for part in (groups, keys) if len(part) > 1)]
    return "\n\n".join(["\n".join(part) for part in told] + [more]).replace("$", "$$")


def _row(name: str, said: str | None) -> str:
    return textwrap.fill(
        f"  {name:27} {said or ''}".rstrip(), 79, subsequent_indent=" " * 30, break_on_hyphens=False
    )


def is_sweep() -> bool:
    """Whether this is a job of a Hydra multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


OmegaConf.register_new_resolver("new_run_name", new_run_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("new_run_dir", new_run_dir, use_cache=True, replace=True)
OmegaConf.register_new_resolver("results_dir", results_dir, replace=True)
OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
OmegaConf.register_new_resolver("digest", digest, replace=True)
OmegaConf.register_new_resolver("slurm", of_step, replace=True)
OmegaConf.register_new_resolver("experiment_tags", experiment_tags, replace=True)
OmegaConf.register_new_resolver("command_help", command_help, replace=True)
OmegaConf.register_new_resolver("direction", direction, replace=True)
