"""What a configuration from elsewhere (a checkpoint someone sent) may build: networks and their mathematics."""

import importlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from litdiffusion.errors import UserError

OURS = ("litdiffusion.diffusion", "litdiffusion.nn")
"""Whatever these packages define at the top of a module may be built: they touch neither files nor network."""

TORCH_LAYERS = ("torch.nn",)
"""Of these, modules alone."""


def check_targets(cfg: Any, ours: Iterable[str] = OURS, layers: Iterable[str] = TORCH_LAYERS) -> None:
    """Check every ``_target_`` of plain values, however deep, before anything is built from them.

    A target is a module's path and one name in it. What it names must have been defined in an allowed package,
    not just be reachable through one (``litdiffusion.nn.unet.torch.hub.load``): any class or function of
    ``ours``, any ``nn.Module`` of ``layers``.

    Raises:
        UserError: a target that is not allowed, or an interpolation: a checkpoint's values are resolved.
    """
    plain = OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg
    for key, value in _leaves(plain):
        if isinstance(value, str) and "${" in value:
            raise UserError(
                f"{key}: {value!r} is an interpolation, which a foreign configuration may not hold"
            )
        if key.rpartition(".")[2] == "_target_" and not _is_allowed(value, tuple(ours), tuple(layers)):
            raise UserError(
                f"{key}: {value!r} is not allowed in a checkpoint, which may build only what "
                f"{', '.join((*ours, *layers))} define"
            )


def _is_allowed(target: Any, ours: tuple[str, ...], layers: tuple[str, ...]) -> bool:
    if not isinstance(target, str):
        return False
    path, _, name = target.rpartition(".")
    if not _inside(path, (*ours, *layers)):
        return False
    try:
        found = getattr(importlib.import_module(path), name)
    except (ImportError, AttributeError):
        return False
    home = getattr(found, "__module__", None)
    if not isinstance(home, str) or getattr(found, "__qualname__", None) != getattr(found, "__name__", ""):
        return False
    if _inside(home, ours):
        return inspect.isclass(found) or inspect.isfunction(found)
    return _inside(home, layers) and inspect.isclass(found) and issubclass(found, nn.Module)


def _inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    for name, child in items:
        key = f"{prefix}{name}"
        if name == "_target_" or not isinstance(child, dict | list | tuple):
            yield key, child
        else:
            yield from _leaves(child, f"{key}.")
