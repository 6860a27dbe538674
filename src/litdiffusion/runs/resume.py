"""Whether a command starts a run, continues one, or would overwrite a run of another configuration."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from litdiffusion.data.fingerprint import Fingerprint, changes
from litdiffusion.errors import UserError
from litdiffusion.runs.checkpoint import DamagedCheckpointError, read_checkpoint
from litdiffusion.runs.folder import RunFolder, read_json
from litdiffusion.system.redaction import without_secrets

log = logging.getLogger(__name__)

FREE_TO_CHANGE = (
    "resume",
    "run_dir",
    "project",
    "trust",
    "optimized_metric",
    "paths",
    "logger",
    "callbacks",
    "metrics",
    "module.metrics",
    "sampler",
    "data.path",
    "datamodule.num_workers",
    "datamodule.memory_limit_mb",
    "trainer.max_steps",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.val_check_interval",
    "trainer.limit_val_batches",
    "trainer.precision",
    "trainer.deterministic",
    "trainer.default_root_dir",
    "trainer.log_every_n_steps",
    "trainer.profiler",
    "lr_scheduler.total_steps",
)
"""Keys (with all below them) that a continued run may change: they do not decide what is being trained."""


@dataclass(frozen=True)
class Resumption:
    """Where a run continues, and the newer checkpoint that it cannot continue from, if that is damaged."""

    checkpoint: Path
    step: int
    model_config: dict[str, Any]
    weights: dict[str, tuple[int, ...]]  # the shape of each, the averaged ones included
    optimizer: str | None  # the name of its class, where the checkpoint says it
    nonfinite: frozenset[str]  # the weights that are not finite
    damaged: Path | None = None

    def require_same_model(self, config: dict[str, Any]) -> None:
        """Require that the checkpoint is of the model that this configuration describes.

        Raises:
            UserError: it is not.
        """
        changed = differences(self.model_config, {name: config.get(name) for name in self.model_config})
        if changed:
            raise UserError(
                f"checkpoint {self.checkpoint} is of another model: {_listed(changed)}; repeat the checkpoint's own"
                " choices, or start in a new run_dir"
            )

    def require_fitting(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Require weights of the checkpoint's names and shapes, all of them finite, and an optimizer of its class.

        The optimizer's settings may be others; those of another release of torch are.

        Raises:
            UserError: what was built from this configuration does not fit the checkpoint.
        """
        present = _shapes(module.state_dict())
        for name in {**present, **self.weights}:
            before, now = self.weights.get(name), present.get(name)
            if before != now:
                raise UserError(
                    f"checkpoint {self.checkpoint} does not fit this configuration: {name} was {_spelled(before)} and"
                    f" is {_spelled(now)}; repeat the checkpoint's choices (net, ema, noise_levels), or start in a"
                    " new run_dir"
                )
        if self.nonfinite & dict(module.named_parameters()).keys():
            raise UserError(
                f"checkpoint {self.checkpoint} holds a weight that is infinite or NaN: use an earlier one"
            )
        if self.optimizer not in (None, kind := type(optimizer).__name__):
            raise UserError(
                f"checkpoint {self.checkpoint} holds the state of {self.optimizer}, and optimizer._target_ is {kind}:"
                " repeat the checkpoint's own"
            )


def find_resumption(run: RunFolder, config: dict[str, Any], resume: str) -> Resumption | None:
    """Return where to continue, or None to start afresh.

    Args:
        run: the run folder.
        config: the resolved configuration of this command.
        resume: ``auto`` continues where there is something to continue, ``must`` insists, ``never`` starts afresh
            in an empty folder only; anything else is the path of a checkpoint.

    Raises:
        UserError: the folder holds a run of another configuration, or what ``resume`` names cannot be used.
    """
    saved = any(path.exists() for path in _saved(run))
    started = saved or run.metrics.exists()
    if resume == "never":
        if started:
            raise UserError(f"run_dir {run.path} already holds a run: with resume=never choose a new run_dir")
        return None
    if run.config.exists():
        _require_same_run(run, config, started)
    if resume not in ("auto", "must"):
        path = Path(resume).expanduser().absolute()
        if not path.exists():
            raise UserError(
                f"resume={resume}: there is no checkpoint at {path}; or choose auto, must or never"
            )
        # A run that has begun from another one's checkpoint goes on from its own.
        if path.parent == run.checkpoints or not saved:
            return _from(path)
    if saved:
        return _newest(run)
    if resume == "must":
        raise UserError(
            f"resume=must, but there is no checkpoint in {run.checkpoints}: check run_dir, or use resume=auto"
        )
    return None


def set_damaged_aside(resumption: Resumption) -> None:
    """Move the damaged checkpoint out of the way, to ``damaged.ckpt``; say so.

    Otherwise the next checkpoint would make the damaged file the previous one, and push out the good one.
    """
    damaged, good = resumption.damaged, resumption.checkpoint
    if damaged is None:
        return
    kept = damaged.with_name("damaged.ckpt")
    damaged.replace(kept)
    log.warning(
        "%s is damaged: continuing from %s beside it, at step %d (the damaged file is kept as %s)",
        damaged,
        good.name,
        resumption.step,
        kept.name,
    )


def require_same_data(run: RunFolder, fingerprint: Fingerprint) -> None:
    """Require that a run continues with the images that it began with.

    Raises:
        UserError: the images have changed.
    """
    if not run.data.exists():
        return
    before: Fingerprint = read_json(run.data, dict)
    changed = changes(before, fingerprint)
    if "images" in changed:
        what = f"{before['images']} images then, {fingerprint['images']} now"
    else:
        what = (
            f"other {' and '.join(dict.fromkeys('pixels' if name == 'some' else name for name in changed))}"
        )
    if changed:
        raise UserError(
            f"the training data is not what run_dir {run.path} began with ({what}): restore it, or choose a"
            " new run_dir (there, resume=PATH goes on from a checkpoint of this run)"
        )


def _saved(run: RunFolder) -> tuple[Path, Path]:
    """The checkpoints of a run, the newer one first."""
    return run.checkpoints / "last.ckpt", run.checkpoints / "previous.ckpt"


def _newest(run: RunFolder) -> Resumption:
    """Continue from the newer checkpoint that is whole.

    Raises:
        UserError: none is.
    """
    last, previous = _saved(run)
    if not last.exists():
        return _from(previous)
    try:
        return _from(last)
    except DamagedCheckpointError as error:
        if not previous.exists():
            raise UserError(f"{error}; or choose a new run_dir") from error
    try:
        return _from(previous, damaged=last)
    except DamagedCheckpointError as error:
        raise UserError(
            f"{last} and {previous.name} beside it are both cut short or damaged: put a copy of either in its"
            " place, or choose a new run_dir"
        ) from error


def _from(path: Path, damaged: Path | None = None) -> Resumption:
    checkpoint = read_checkpoint(path)
    weights = checkpoint["state_dict"]
    return Resumption(
        path,
        int(checkpoint["global_step"]),
        checkpoint["model_config"],
        _shapes(weights),
        checkpoint.get("optimizer"),
        frozenset(name for name, value in weights.items() if not torch.isfinite(value).all()),
        damaged,
    )


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys that decide what is trained and differ, with both values."""
    before, after = flat(old), flat(new)
    keys = [key for key in {**before, **after} if not _is_free(key)]
    missing = "(absent)"
    return {
        key: (before.get(key, missing), after.get(key, missing))
        for key in keys
        if before.get(key, missing) != after.get(key, missing)
    }


def _require_same_run(run: RunFolder, config: dict[str, Any], started: bool) -> None:
    before = read_config(run.config)
    if (
        not {"run_dir", "module", "datamodule", "paths"} <= before.keys()
    ):  # a run's begins and ends with these
        raise UserError(
            f"run_dir {run.path}: its config.yaml is cut short, or not of a run: put back a copy, or choose another"
            f" run_dir (with resume={run.last_checkpoint} it continues from there)"
        )
    changed = differences(before, without_secrets(config))
    if changed and started:
        raise UserError(
            f"run_dir {run.path} belongs to another configuration: {_listed(changed)};"
            " choose a new run_dir, or repeat the command as it was"
        )


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of a run; interpolations stay text.

    Raises:
        UserError: it is not plain YAML, or uses aliases, by which a few lines can expand to gigabytes.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(file, yaml.SafeLoader)):
                raise ValueError("references")
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if not isinstance(config, dict):
            raise ValueError("no mapping")
    except Exception as error:  # YAML and OmegaConf raise many things
        raise UserError(f"{path} cannot be read: put back a copy, or choose another run_dir") from error
    return {str(key): value for key, value in config.items()}


def _is_free(key: str) -> bool:
    # The module node repeats, by interpolation, what is written elsewhere.
    key = key.removeprefix("module.")
    return any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keys joined by dots; an empty mapping is a value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    parts = [flat(child, f"{prefix}.{key}" if prefix else str(key)) for key, child in value.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


def _listed(changed: dict[str, tuple[Any, Any]]) -> str:
    """Name the first few; a value that several nodes share by interpolation appears once, under its shortest key."""
    listed: dict[str, tuple[Any, Any]] = {}
    for key in sorted(changed, key=lambda key: key.count(".")):
        name = key
        if key.count(".") > 1:
            name = key.removeprefix("denoiser.").removeprefix("inner.").removeprefix("objective.")
        if not any(f".{name}".endswith(f".{other}") for other in listed):
            listed[name] = changed[key]
    shown = ", ".join(
        f"{key} was {before!r} and is {now!r}" for key, (before, now) in list(listed.items())[:3]
    )
    return f"{shown} and {len(listed) - 3} more" if len(listed) > 3 else shown


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {str(name): tuple(value.shape) for name, value in state_dict.items()}


def _spelled(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"
