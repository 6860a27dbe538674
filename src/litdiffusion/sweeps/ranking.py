"""Which number ranks the runs of a sweep: one that means the same in all of them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig

from litdiffusion.configuration.messages import suggestion
from litdiffusion.configuration.resolvers import metric_of
from litdiffusion.errors import UserError
from litdiffusion.evaluation import HeldOutLoss
from litdiffusion.runs.resume import flat
from litdiffusion.sweeps.jobs import Job

OTHER_NUMBERS = ("train_loss", "steps", "images_seen", "images_per_second", "wall_seconds", "parameters")
"""Numbers of ``summary.json`` that are no metric's."""

OF_TRAINING = "data.flip"
"""What a metric's images do not depend on, though it is below one of its keys."""


def goals(config: DictConfig) -> list[str]:
    """Return what ``optimized_metric`` names; nothing for null.

    Raises:
        UserError: ``summary.json`` has no such number.
    """
    named = config.get("optimized_metric")
    names = [] if named is None else list(named) if isinstance(named, ListConfig) else [named]
    known = (*_metrics(config), *OTHER_NUMBERS)
    for name in names if "run_dir" in list(config) else ():  # `in config` would resolve it
        if name not in known:
            raise UserError(
                f"optimized_metric={name}: no number of summary.json{suggestion(str(name), known)}"
            )
    return names


def require_comparable(config: DictConfig, jobs: Sequence[Job], searched: bool) -> None:
    """Require that what is to be optimized means the same in all runs.

    Raises:
        UserError: it does not, or a search has no goal.
    """
    names = goals(config)
    free = next((name for name in _metrics(config) if not differing(name, config, jobs)), None)
    instead = f"; use {free}" if free else ""
    if searched and not names:
        raise UserError(f"optimized_metric=null: a search needs to know what to optimize{instead}")
    for name in names:
        if keys := differing(name, config, jobs):
            raise UserError(
                f"optimized_metric={name}: not comparable between runs that differ in {', '.join(keys)}{instead}"
            )


def ranking(config: DictConfig, jobs: Sequence[Job], available: Collection[str]) -> tuple[str | None, str]:
    """Return the number to sort runs by, and a line that says so; None where none compares them.

    That is ``optimized_metric``, or else the first of ``metrics`` that compares the runs and is ``available``.
    """
    why_not = ""
    for name in goals(config) or _metrics(config):
        if keys := differing(name, config, jobs):
            why_not += f"; {name} does not compare runs that differ in {', '.join(keys)}"
        elif name in available:
            return name, f"Sorted by {name}, the best first{why_not}."
    return None, f"Not sorted{why_not}." if why_not else ""


def differing(number: str, config: DictConfig, jobs: Sequence[Job]) -> list[str]:
    """Return the keys in which the jobs of a sweep differ and on which the meaning of a number depends."""
    metric = HeldOutLoss if number == "train_loss" else metric_of(number, config)
    keys = (*getattr(metric, "depends_on", ()), f"metrics.{number.removeprefix('val_')}")
    varied = dict.fromkeys(key for job in jobs for key in job.varied)
    if typed := [key for key in varied if any(_is_at(key, other) for other in keys)]:
        return typed
    # A preset may vary anything, and a checkpoint be of any data.
    settled = [flat(found) for job in jobs if (found := job.config or job.results())]
    return [key for key in keys if len({_part(each, key) for each in settled}) > 1]


def _metrics(config: DictConfig) -> list[str]:
    return [f"val_{name}" for name, node in (config.get("metrics") or {}).items() if node is not None]


def _is_at(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") and key != OF_TRAINING


def _part(settings: Mapping[str, Any], key: str) -> str:
    return repr({name: value for name, value in settings.items() if _is_at(name, key)})
