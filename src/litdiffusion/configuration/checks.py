"""Combinations that cannot work, found in the configuration alone: before data is read or anything is built."""

import math
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeGuard

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from litdiffusion.configuration.choices import check_choices, check_words
from litdiffusion.configuration.hardware import machine_memory, num_devices, resolve_hardware
from litdiffusion.configuration.nodes import arguments_of, check_nodes, locate
from litdiffusion.configuration.resolvers import is_sweep
from litdiffusion.configuration.sweeps import check_sweep
from litdiffusion.configuration.values import check_values
from litdiffusion.errors import UserError
from litdiffusion.system.launch import num_started, num_tasks

MAX_SEED = 2**63 - 1
"""What torch's generators and every file format take."""
FLOAT_BYTES = 4
"""Of a pixel as it is trained on, and drawn."""


def validate(cfg: DictConfig, supplied: Mapping[str, Collection[str]] | None = None) -> None:
    """Check a whole configuration, settle what this machine decides ("auto"), and resolve it, in place.

    ``supplied`` as in ``check_nodes``.

    Raises:
        UserError: the first thing that cannot work.
    """
    check_values(cfg)
    resolve_hardware(cfg)
    check_nodes(cfg, supplied)
    check_config(cfg)
    OmegaConf.resolve(cfg)


def check_config(cfg: DictConfig) -> None:
    """Check what no single constructor can see. Keys that a configuration lacks are not asked for.

    Raises:
        UserError: naming the keys and the way out.
    """
    if is_sweep():
        hydra_cfg = HydraConfig.get()
        check_sweep(hydra_cfg.overrides.task, hydra_cfg.sweeper.get("params") or ())
    for key, least, most in (
        *(("seed", 0, MAX_SEED), ("num_images", 1, None)),
        *(("batch_size", 1, None), ("frames", 2, None)),
    ):
        if key in cfg and cfg[key] is None:
            raise UserError(f"{key}=null: must be a whole number, at least {least}")
        _check_whole(cfg, key, least, most)
    if cfg.get("weights") not in (None, "ema", "raw"):
        raise UserError(f"weights={cfg.weights}: choose ema or raw")
    check_words(cfg)
    check_choices(cfg)
    _check_net(cfg)
    _check_image_shape(cfg)
    _check_target(cfg)
    _check_sampler(cfg)
    _check_variance(cfg)
    _check_length(cfg)
    _check_strategy(cfg)
    _check_optimizer(cfg)
    _check_batch(cfg)
    _check_memory(cfg)


def _check_net(cfg: DictConfig) -> None:
    net = arguments_of(cfg, "net")
    if not all(_is_whole(net.get(name)) for name in ("dim", "groups")):
        return
    mults = list(net.get("dim_mults", ()))
    if not mults or min(net["dim"], net["groups"], *mults) < 1:
        raise UserError("net: dim, groups and each of dim_mults must be at least 1, and dim_mults not empty")
    if net["dim"] % 2:
        raise UserError(
            f"net.dim={net['dim']}: must be even, for the sines and cosines of the time embedding"
        )
    init_dim = net.get("init_dim") or net["dim"]
    for width in (init_dim, net["dim"], *(net["dim"] * mult for mult in mults)):
        if width % net["groups"]:
            fitting = [
                str(groups)
                for groups in range(1, net["dim"] + 1)
                if _fits(groups, init_dim, net["dim"], mults)
            ]
            raise UserError(
                f"net.groups={net['groups']} does not divide a width of {width} channels (net.dim={net['dim']}, "
                f"net.dim_mults={mults}); these do: {', '.join(fitting)}"
            )
    halvings = len(mults) - 1
    for key, size in _image_sizes(cfg):
        if size % 2**halvings:
            below, above = size // 2**halvings * 2**halvings, -(-size // 2**halvings) * 2**halvings
            sizes = " or ".join(str(other) for other in (below, above) if other)
            raise UserError(
                f"{key}: {size} pixels cannot go through {halvings} halvings (net.dim_mults={mults}); "
                f"use {key}={sizes}, or fewer net.dim_mults"
            )


def _check_image_shape(cfg: DictConfig) -> None:
    """Data, network and denoiser agree on what an image is."""
    data = arguments_of(cfg, "data")
    for key, name in (
        *(("net.channels", "channels"), ("net.out_channels", "channels")),
        *(("denoiser.channels", "channels"), ("denoiser.image_size", "image_size")),
    ):
        node, _, argument = key.partition(".")
        value, given = arguments_of(cfg, node).get(argument), data.get(name)
        if value is not None and given is not None and _sides(value) != _sides(given):
            raise UserError(
                f"{key}={value}: the images have data.{name}={given}; set data.{name}, and leave {key} to follow it"
            )


def _sides(size: Any) -> list[Any]:
    """Return [height, width] of what may be one number for both."""
    return list(size) if isinstance(size, ListConfig | list | tuple) else [size, size]


def _fits(groups: int, init_dim: int, dim: int, mults: list[int]) -> bool:
    return not any(width % groups for width in (init_dim, *(dim * mult for mult in mults), dim))


def _image_sizes(cfg: DictConfig) -> Iterator[tuple[str, int]]:
    size = arguments_of(cfg, "data").get("image_size")
    sides = size if isinstance(size, ListConfig | list | tuple) else [size]
    for side in sides:
        if _is_whole(side):
            if side < 1:
                raise UserError(f"data.image_size={size}: must be at least 1")
            yield "data.image_size", side


def _check_target(cfg: DictConfig) -> None:
    target = OmegaConf.select(cfg, "target._target_")
    defined = target is None or getattr(locate("target", target), "defined_at_zero_snr", True)
    if not defined and arguments_of(cfg, "schedule").get("zero_terminal_snr"):
        raise UserError(
            "target=epsilon with schedule.zero_terminal_snr=true: noise says nothing about the image where "
            "there is only noise; use target=v, or schedule.zero_terminal_snr=false"
        )


def _check_sampler(cfg: DictConfig) -> None:
    sampler = cfg.get("sampler")
    if isinstance(sampler, DictConfig) and "_target_" not in sampler:
        given = ", ".join(f"sampler.{name}" for name in map(str, sampler))
        raise UserError(f"{given}: an argument of which sampler? choose one with it, such as sampler=ddim")
    steps = arguments_of(cfg, "sampler").get("num_steps")
    most = arguments_of(cfg, "schedule").get("num_steps")
    if _is_whole(most) and most < 1:
        raise UserError(f"schedule.num_steps={most}: must be at least 1")
    if _is_whole(steps) and (steps < 1 or (_is_whole(most) and steps > most)):
        limit = f"from 1 to schedule.num_steps={most}" if _is_whole(most) else "at least 1"
        raise UserError(f"sampler.num_steps={steps}: must be {limit}")


def _check_variance(cfg: DictConfig) -> None:
    wanted = arguments_of(cfg, "sampler").get("variance") == "learned"
    if not wanted or "net" not in cfg:
        return
    # An argument says it, or, of a network that always learns one, an attribute of the class.
    declared = getattr(locate("net", cfg.net.get("_target_")), "learned_variance", False)
    if not arguments_of(cfg, "net").get("learned_variance", declared):
        raise UserError(
            "sampler.variance=learned: the network would learn none; add net.learned_variance=true, or use"
            " sampler.variance=beta_tilde"
        )


def _check_strategy(cfg: DictConfig) -> None:
    """Processes begin as copies of a command; and where each holds a part of the weights, nothing sees them all."""
    strategy = str(OmegaConf.select(cfg, "trainer.strategy"))
    if strategy.startswith("ddp_") and strategy.endswith(("spawn", "fork", "notebook")):
        raise UserError(f"trainer.strategy={strategy}: its processes are no commands of their own; use ddp")
    if "fsdp" not in strategy.lower():
        return
    if OmegaConf.select(cfg, "trainer.accelerator") not in ("gpu", "cuda"):
        raise UserError("trainer.strategy=fsdp: needs GPUs; use trainer=ddp_cpu on a processor")
    average = OmegaConf.select(cfg, "ema._target_")
    if average is not None and not str(average).endswith("no_average"):
        raise UserError("trainer=fsdp: weights that lie in parts cannot be averaged here; use ema=none")
    if OmegaConf.select(cfg, "callbacks.sample_images") is not None:
        raise UserError(
            "trainer=fsdp: weights that lie in parts cannot be sampled from here; use callbacks.sample_images=null,"
            " and the sample command afterwards"
        )
    if OmegaConf.select(cfg, "trainer.gradient_clip_val") is not None:
        raise UserError(
            "trainer.gradient_clip_val: fsdp cannot clip by the norm of all gradients; use"
            " trainer.gradient_clip_val=null"
        )


def _check_length(cfg: DictConfig) -> None:
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
    for name, whole in (
        ("max_time", None),
        ("limit_train_batches", 1),
        ("overfit_batches", 0),
        ("fast_dev_run", 0),
    ):
        given = trainer.get(name)
        one_batch = name == "limit_train_batches" and type(given) is int
        if given is not None and (given != whole or one_batch):
            raise UserError(
                f"trainer.{name}={trainer[name]}: a run's length is counted in steps, or it could not be continued;"
                " use trainer.max_steps"
            )
    for name in ("val_check_interval", "accumulate_grad_batches"):
        _check_whole(cfg, f"trainer.{name}", 1)
    clip = trainer.get("gradient_clip_val")
    if isinstance(clip, int | float) and clip <= 0:
        raise UserError(f"trainer.gradient_clip_val={clip}: must be positive; null does not clip")
    max_steps = trainer.get("max_steps")
    if not _is_whole(max_steps) or max_steps < 1:
        raise UserError(
            f"trainer.max_steps={'null' if max_steps is None else max_steps}: a run needs an end; "
            "give a number of steps, at least 1"
        )


def _check_optimizer(cfg: DictConfig) -> None:
    """What torch's optimizers accept, and what then ends a training at its first steps."""
    lr = arguments_of(cfg, "optimizer").get("lr")
    if isinstance(lr, int | float) and not 0 <= lr < math.inf:
        raise UserError(f"optimizer.lr={lr}: must be a finite number, at least 0")


def _check_batch(cfg: DictConfig) -> None:
    _check_whole(cfg, "datamodule.batch_size", 1)
    batch_size = OmegaConf.select(cfg, "datamodule.batch_size")
    trainer = cfg.get("trainer")
    if batch_size is None or not isinstance(trainer, DictConfig):
        return
    _check_whole(cfg, "trainer.num_nodes", 1)
    processes = num_devices(trainer.get("devices", 1), str(trainer.get("accelerator", "cpu")))
    processes *= trainer.get("num_nodes", 1)
    _check_started(processes, trainer.get("num_nodes", 1))
    if batch_size % processes:
        rounded = -(-batch_size // processes) * processes
        raise UserError(
            f"datamodule.batch_size={batch_size}: the global batch must divide among {processes} processes "
            f"(trainer.devices x trainer.num_nodes); use datamodule.batch_size={rounded}"
        )


def _check_started(processes: int, num_nodes: int) -> None:
    """The launcher must have started all processes of one run: not several runs in one folder, nor a part of one."""
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
            f"trainer.num_nodes={num_nodes}: start the command by torchrun or srun on every node (scripts/slurm), or"
            " it waits for the others for ever"
        )


def _check_memory(cfg: DictConfig) -> None:
    """A process that asks for far more memory than there is would be ended without a word."""
    data = arguments_of(cfg, "data")
    shape = [data.get("channels"), *_sides(data.get("image_size"))]
    image_bytes = FLOAT_BYTES * math.prod(size for size in shape if _is_whole(size))
    memory = machine_memory() * (OmegaConf.select(cfg, "trainer.num_nodes") or 1)
    keys = ["datamodule.batch_size", "batch_size", "callbacks.sample_images.num_images"]
    if "sampler" in cfg:  # what draws images returns them all; "evaluate" has them batch by batch
        keys.append("num_images")
    for key in keys:
        number = OmegaConf.select(cfg, key)
        if _is_whole(number) and number * image_bytes > memory:
            raise UserError(
                f"{key}={number}: the images alone would take {number * image_bytes / 2**30:,.0f} GiB of memory, of"
                f" which there are {memory / 2**30:,.0f}; use fewer"
            )


def _check_whole(cfg: DictConfig, key: str, least: int, most: int | None = None) -> None:
    value = OmegaConf.select(cfg, key)
    if value is None or (_is_whole(value) and least <= value and (most is None or value <= most)):
        return
    bounds = f"at least {least}" if most is None else f"from {least} to {most}"
    raise UserError(f"{key}={value}: must be a whole number, {bounds}")


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
