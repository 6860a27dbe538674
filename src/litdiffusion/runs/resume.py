"""Whether a command starts a run, continues one, or is about to spoil somebody else's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from litdiffusion.errors import UserError
from litdiffusion.runs.checkpoint import read_checkpoint
from litdiffusion.runs.folder import RunFolder

FREE_TO_CHANGE = (
    "resume",
    "run_dir",
    "paths",
    "logger",
    "callbacks",
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
    "lr_scheduler.total_steps",
)
"""Keys (with all below them) that a continued run may change: they do not decide what is being trained."""


@dataclass(frozen=True)
class Resumption:
    """Where a run continues."""

    checkpoint: Path
    step: int


def find_resumption(run: RunFolder, config: dict[str, Any], resume: str) -> Resumption | None:
    """Return where to continue, or None to start afresh.

    Args:
        run: the run folder.
        config: the resolved configuration of this command.
        resume: ``auto`` continues where there is something to continue, ``must`` insists, ``never`` starts afresh
            in an empty folder only; anything else is the path of a checkpoint.

    Raises:
        UserError: the folder holds a run of another configuration, or what ``resume`` asks for cannot be had.
    """
    last = run.checkpoints / "last.ckpt"
    started = last.exists() or run.metrics.exists()
    if resume == "never":
        if started:
            raise UserError(f"run_dir {run.path} already holds a run: with resume=never choose a new run_dir")
        return None
    if started and run.config.exists():
        _check_same_run(run, config)
    if resume not in ("auto", "must"):
        path = Path(resume).expanduser().absolute()
        # A run that has begun from another one's checkpoint goes on from its own.
        return _from(last if last.exists() and path.parent != last.parent else path)
    if last.exists():
        return _from(last)
    if resume == "must":
        raise UserError(
            f"resume=must, but there is no checkpoint at {last}: check run_dir, or use resume=auto"
        )
    return None


def _from(path: Path) -> Resumption:
    return Resumption(path, int(read_checkpoint(path)["global_step"]))


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys that decide what is trained and differ, with both values."""
    before, after = _flat(old), _flat(new)
    keys = [key for key in {**before, **after} if not _is_free(key)]
    missing = "(absent)"
    return {
        key: (before.get(key, missing), after.get(key, missing))
        for key in keys
        if before.get(key, missing) != after.get(key, missing)
    }


def _check_same_run(run: RunFolder, config: dict[str, Any]) -> None:
    try:
        old = OmegaConf.to_container(OmegaConf.load(run.config))
    except Exception as error:
        raise UserError(
            f"{run.config} cannot be read: choose another run_dir, or remove the folder"
        ) from error
    assert isinstance(old, dict)
    changed = differences({str(key): value for key, value in old.items()}, config)
    if changed:
        shown = ", ".join(
            f"{key} was {before!r} and is {now!r}" for key, (before, now) in list(changed.items())[:3]
        )
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"run_dir {run.path} belongs to another configuration: {shown}{more};"
            " choose a new run_dir, or repeat the command as it was"
        )


def _is_free(key: str) -> bool:
    # The module node repeats, by interpolation, what is written elsewhere.
    key = key.removeprefix("module.")
    return any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    parts = [_flat(child, f"{prefix}.{key}" if prefix else str(key)) for key, child in value.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}
