"""What a configuration from elsewhere (a checkpoint someone sent) may build: networks and their mathematics."""

import importlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from hydra.utils import get_object
from omegaconf import OmegaConf
from torch import nn

from litdiffusion.errors import UserError

OURS = ("litdiffusion.diffusion", "litdiffusion.nn")
"""Whatever these packages define at the top of a module may be built: they touch neither files nor network."""

TORCH_LAYERS = ("torch.nn",)
"""Of these, modules alone."""

DEEPEST, LONGEST = 32, 10_000
"""No configuration is nested deeper, or has more values; a few bytes of a pickle can hold far more."""


def check_targets(
    cfg: Any, ours: Iterable[str] = OURS, layers: Iterable[str] = TORCH_LAYERS, kind: type | None = None
) -> None:
    """Check every ``_target_`` of plain values, however deep, before anything is built from them.

    A target is a module's path and one name in it. What it names must have been defined in an allowed package,
    not just be reachable through one (``litdiffusion.nn.unet.torch.hub.load``): any class or function of
    ``ours`` (with ``kind``, only classes of that kind), any ``nn.Module`` of ``layers``.

    Raises:
        UserError: a target that is not allowed, an interpolation (a checkpoint's values are resolved), or more
            than a configuration holds.
    """
    plain = OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg
    for number, (key, value) in enumerate(_leaves(plain)):
        if number >= LONGEST:
            raise UserError(f"{key[:80]}: this holds more than {LONGEST} values, which is no configuration")
        if isinstance(value, str) and "${" in value:
            raise UserError(
                f"{key}: {value!r} is an interpolation, which a foreign configuration may not hold"
            )
        if key.rpartition(".")[2] == "_target_" and not _is_allowed(value, tuple(ours), tuple(layers), kind):
            raise UserError(
                f"{key}: {value!r} is not allowed in a checkpoint, which may build only what "
                f"{', '.join((*ours, *layers))} define"
            )


def _is_allowed(target: Any, ours: tuple[str, ...], layers: tuple[str, ...], kind: type | None) -> bool:
    if not isinstance(target, str):
        return False
    path, _, name = target.rpartition(".")
    if not _inside(path, (*ours, *layers)) or "__" in target:
        return False
    try:
        found = getattr(importlib.import_module(path), name)
        if get_object(target) is not found:  # Hydra goes its own way from a name to an object
            return False
    except Exception:  # nothing of this name
        return False
    home = getattr(found, "__module__", None)
    if not isinstance(home, str) or getattr(found, "__qualname__", None) != getattr(found, "__name__", ""):
        return False
    if _inside(home, ours):
        if kind is not None:
            return inspect.isclass(found) and issubclass(found, kind)
        return inspect.isclass(found) or inspect.isfunction(found)
    return _inside(home, layers) and inspect.isclass(found) and issubclass(found, nn.Module)


def _inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _leaves(value: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield what holds nothing further, and every container that stands where a target's name should."""
    if depth > DEEPEST:
        raise UserError(f"{prefix[:80]}...: nested more than {DEEPEST} deep, which is no configuration")
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    empty = True
    for name, child in items:
        empty = False
        key = f"{prefix}{name}"
        if name == "_target_" or not isinstance(child, dict | list | tuple):
            yield key, child
        else:
            yield from _leaves(child, f"{key}.", depth + 1)
    if empty:
        yield prefix, None
