"""What no constructor can see, checked before anything is built or any data is read: how nodes fit together.

A constructor checks its own arguments, and ``nodes.build`` puts their keys in front of what it says.
"""

import math
import operator
import os
from typing import Any, TypeGuard

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from litdiffusion.configuration.allowlist import trusted_packages
from litdiffusion.configuration.hardware import machine_memory, num_devices, resolve_hardware
from litdiffusion.configuration.messages import needs_value, shown
from litdiffusion.configuration.nodes import Supplied, arguments_of, require_arguments, require_values
from litdiffusion.configuration.overrides import TRAINER
from litdiffusion.configuration.resolvers import is_sweep
from litdiffusion.configuration.sweeps import require_own_folders
from litdiffusion.errors import UserError
from litdiffusion.system.launch import num_started, num_tasks

MAX_SEED = 2**63 - 1
"""The largest seed that torch's generators and every file format take."""
FLOAT_BYTES = 4

BOUNDS: dict[str, tuple[int, int | None]] = {
    "seed": (0, MAX_SEED),
    "batch_size": (1, None),
    "frames": (2, None),
    "trainer.num_nodes": (1, None),
    "trainer.val_check_interval": (1, None),
    "trainer.accumulate_grad_batches": (1, None),
}
"""Whole numbers that no constructor of ours checks: the smallest and the largest value."""


def validate(cfg: DictConfig, supplied: Supplied | None = None) -> None:
    """Check a whole configuration, and replace "auto" by what this machine has, in place.

    ``supplied`` as in ``require_arguments``.

    Raises:
        UserError: the first thing that cannot work.
    """
    require_values(cfg)
    resolve_hardware(cfg)
    require_arguments(cfg, supplied)
    require_compatible(cfg)


def require_compatible(cfg: DictConfig) -> None:
    """Check what no single constructor can see. A configuration need not have every key.

    Raises:
        UserError: naming the keys and what would work.
    """
    if is_sweep():
        hydra_cfg = HydraConfig.get()
        require_own_folders(hydra_cfg.overrides.task, hydra_cfg.sweeper.get("params") or ())
    _require_numbers(cfg)
    _require_words(cfg)
    _require_choices(cfg)
    _require_image_shape(cfg)
    _require_length(cfg)
    _require_strategy(cfg)
    _require_processes(cfg)
    _require_memory(cfg)


def whole_number(key: str, value: Any, least: int, most: int | None = None) -> int:
    """Return a whole number of any type: Python's, NumPy's, or torch's.

    Raises:
        UserError: it is none, or out of bounds.
    """
    try:
        fits = not isinstance(value, bool) and least <= operator.index(value) <= (most or math.inf)
    except TypeError:
        fits = False
    if not fits:
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{key}={shown(value)}: must be a whole number, {bounds}")
    return operator.index(value)


def _require_numbers(cfg: DictConfig) -> None:
    for key, (least, most) in BOUNDS.items():
        value = OmegaConf.select(cfg, key)
        if value is None and key not in cfg:  # a dotted key never is: the trainer has defaults for null
            continue
        whole_number(key, value, least, most)


def _require_words(cfg: DictConfig) -> None:
    for key in ("paths.data", "data.path", "data.name"):
        if OmegaConf.select(cfg, key) == "":  # as a path, it would mean the current folder
            raise UserError(needs_value(key))
    if cfg.get("weights", "ema") not in ("ema", "raw"):
        raise UserError(f"weights={shown(cfg.weights)}: choose ema or raw")
    if "trust" in cfg:
        trusted_packages(cfg.trust)
    if "resume" in cfg and not (isinstance(cfg.resume, str) and cfg.resume):
        raise UserError(f"resume={shown(cfg.resume)}: choose auto, must, never, or the path of a checkpoint")
    root = OmegaConf.select(cfg, "trainer.default_root_dir")
    if root is not None and root != cfg.get("run_dir"):
        raise UserError(
            f"trainer.default_root_dir={root}: all files of a run go to run_dir; set that instead"
        )


def _require_choices(cfg: DictConfig) -> None:
    """Each group builds one object; loggers, callbacks and metrics are any number of them."""
    sampler = cfg.get("sampler")
    if isinstance(sampler, DictConfig) and "_target_" not in sampler:
        given = ", ".join(f"sampler.{name}" for name in map(str, sampler))
        raise UserError(f"{given}: an argument of which sampler? choose one with it, such as sampler=ddim")
    if HydraConfig.initialized():
        for override in OverridesParser.create().parse_overrides(HydraConfig.get().overrides.task):
            group, choice = str(override.key_or_group), override.value()
            if isinstance(choice, list) and _is_node(cfg.get(group)):
                names = ",".join(map(str, choice))
                raise UserError(f"{group}=[{names}]: choose one; to try each in turn: -m {group}={names}")
    leave_out = "null leaves one out"
    way_out = {
        "logger": "logger={} chooses one that comes with it",
        "callbacks": leave_out,
        "metrics": leave_out,
    }
    for group, advice in way_out.items():
        for name, node in (cfg.get(group) or {}).items():
            if node is not None and not _is_node(node):
                raise UserError(
                    f"{group}.{name}: needs a _target_, the class to build; {advice.format(name)}"
                )


def _require_image_shape(cfg: DictConfig) -> None:
    """Data, network and denoiser agree on the shape of an image."""
    data = arguments_of(cfg, "data")
    for node, argument, name in (
        *(("net", "channels", "channels"), ("net", "out_channels", "channels")),
        *(("denoiser.inner", "channels", "channels"), ("denoiser.inner", "image_size", "image_size")),
    ):
        value, given = arguments_of(cfg, node).get(argument), data.get(name)
        if value is not None and given is not None and _sides(value) != _sides(given):
            raise UserError(
                f"{node}.{argument}={value}: the images have data.{name}={given}; set data.{name}, which"
                f" {node}.{argument} follows by default"
            )


def _require_length(cfg: DictConfig) -> None:
    """A run's length is a number of steps: it means the same on any data set and any number of devices."""
    trainer = cfg.get("trainer")
    if not isinstance(trainer, DictConfig) or "optimizer" not in cfg:
        return
    if trainer.get("max_epochs") not in (None, -1):
        batch_size = OmegaConf.select(cfg, "datamodule.batch_size")
        raise UserError(
            f"trainer.max_epochs={trainer.max_epochs}: a run's length is counted in steps; give "
            f"trainer.max_steps = epochs x training images / batch size ({batch_size}) instead"
        )
    for name, (harmless, way_out) in TRAINER.items():
        given = trainer.get(name)
        if given is not None and str(given) not in harmless:
            raise UserError(f"trainer.{name}={given}: {way_out}")
    clip = trainer.get("gradient_clip_val")
    if isinstance(clip, int | float) and clip <= 0:
        raise UserError(f"trainer.gradient_clip_val={clip}: must be positive; null does not clip")
    max_steps = trainer.get("max_steps")
    if not _is_whole(max_steps) or max_steps < 1:
        raise UserError(
            f"trainer.max_steps={shown(max_steps)}: a run needs an end; give a number of steps, at least 1"
        )


def _require_strategy(cfg: DictConfig) -> None:
    """Each process runs the command itself; and under FSDP no process holds all the weights."""
    strategy = str(OmegaConf.select(cfg, "trainer.strategy"))
    if strategy.startswith("ddp_") and strategy.endswith(("spawn", "fork", "notebook")):
        raise UserError(f"trainer.strategy={strategy}: its processes do not run the command; use ddp")
    if "fsdp" not in strategy.lower():
        return
    average = OmegaConf.select(cfg, "ema._target_")
    faults = {
        "trainer.strategy=fsdp: needs GPUs; use trainer=ddp_cpu on a CPU": (
            OmegaConf.select(cfg, "trainer.accelerator") not in ("gpu", "cuda")
        ),
        "trainer=fsdp: cannot average weights that are divided among processes; use ema=none": (
            average is not None and not str(average).endswith("no_average")
        ),
        "trainer=fsdp: cannot sample from weights that are divided among processes; use"
        " callbacks.sample_images=null, and the sample command afterwards": (
            OmegaConf.select(cfg, "callbacks.sample_images") is not None
        ),
        "trainer.gradient_clip_val: fsdp cannot clip by the norm of all gradients; use"
        " trainer.gradient_clip_val=null": OmegaConf.select(cfg, "trainer.gradient_clip_val") is not None,
    }
    for line, found in faults.items():
        if found:
            raise UserError(line)


def _require_processes(cfg: DictConfig) -> None:
    """The processes that were started are exactly those of the run, and they share the global batch evenly."""
    trainer, batch_size = cfg.get("trainer"), OmegaConf.select(cfg, "datamodule.batch_size")
    if batch_size is None or not isinstance(trainer, DictConfig):
        return
    num_nodes = trainer.get("num_nodes", 1)
    processes = num_nodes * num_devices(trainer.get("devices", 1), str(trainer.get("accelerator", "cpu")))
    if num_tasks() > 1 and num_tasks() != processes:
        raise UserError(
            f"srun has started {num_tasks()} tasks, but trainer.devices x trainer.num_nodes is {processes}:"
            " use trainer=slurm, or srun --ntasks=1"
        )
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if by_torchrun and num_started() != processes:
        raise UserError(
            f"torchrun has started {num_started()} processes, but trainer.devices x trainer.num_nodes is {processes}:"
            " choose trainer=ddp or ddp_cpu, trainer.devices as torchrun's --nproc-per-node and trainer.num_nodes as"
            " its --nnodes"
        )
    by_hand = os.environ.keys() & {"MASTER_ADDR", "NODE_RANK", "LSB_JOBID"}
    if num_nodes > 1 and not (by_torchrun or by_hand or num_tasks() > 1):
        raise UserError(
            f"trainer.num_nodes={num_nodes}: start the command by torchrun or srun on every node (scripts/slurm);"
            " a single process would wait for the others forever"
        )
    num_val = OmegaConf.select(cfg, "datamodule.num_val")
    if _is_whole(num_val) and 0 < num_val < processes:
        raise UserError(
            f"datamodule.num_val={num_val}: each of {processes} processes measures at least one image; use"
            f" datamodule.num_val={processes}, or 0"
        )
    if batch_size > 0 and batch_size % processes:
        rounded = -(-batch_size // processes) * processes
        raise UserError(
            f"datamodule.batch_size={batch_size}: the global batch must divide among {processes} processes "
            f"(trainer.devices x trainer.num_nodes); use datamodule.batch_size={rounded}"
        )


def _require_memory(cfg: DictConfig) -> None:
    """The images of a batch fit into memory: the kernel kills a process that asks for far more, without a word."""
    data = arguments_of(cfg, "data")
    shape = [data.get("channels"), *_sides(data.get("image_size"))]
    image_bytes = FLOAT_BYTES * math.prod(size for size in shape if _is_whole(size))
    memory = machine_memory() * (OmegaConf.select(cfg, "trainer.num_nodes") or 1)
    keys = ["datamodule.batch_size", "batch_size", "callbacks.sample_images.num_images"]
    if "sampler" in cfg:  # "sample" holds all images at once, "evaluate" one batch
        keys.append("num_images")
    for key in keys:
        number = OmegaConf.select(cfg, key)
        if _is_whole(number) and number * image_bytes > memory:
            raise UserError(
                f"{key}={number}: the images alone would take {number * image_bytes / 2**30:,.0f} GiB of memory, of"
                f" which there are {memory / 2**30:,.0f}; use fewer"
            )


def _sides(size: Any) -> list[Any]:
    """Return [height, width] of what may be one number for both."""
    return list(size) if isinstance(size, ListConfig | list | tuple) else [size, size]


def _is_node(value: Any) -> bool:
    return isinstance(value, DictConfig) and "_target_" in value


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
