"""The classes and functions that a checkpoint from elsewhere may name: networks and their mathematics."""

import importlib
import inspect
import sys
from collections.abc import Iterable
from typing import Any

from hydra.utils import get_object
from omegaconf import OmegaConf
from torch import nn

from litdiffusion.configuration.messages import dotted_items, one_line
from litdiffusion.errors import UserError

OURS = ("litdiffusion.diffusion", "litdiffusion.nn")
"""Packages whose public classes and functions may be called: none of them touches files or the network."""

TORCH_LAYERS = ("torch.nn",)
"""Packages of which only ``nn.Module`` classes may be built."""

_LIBRARIES = {"torch", "numpy", "lightning", "hydra", "omegaconf", "yaml", "datasets", "submitit"}
NEVER_TRUSTED = sys.stdlib_module_names | _LIBRARIES | {"litdiffusion", "hydra_plugins", "pip", "cloudpickle"}
"""Packages with functions that load pickles, fetch code or start processes."""

DEEPEST, LONGEST = 32, 10_000
"""Limits on nesting and on the number of values: a few bytes of a pickle can expand to far more."""


def require_allowed(
    cfg: Any,
    ours: Iterable[str] = OURS,
    layers: Iterable[str] = TORCH_LAYERS,
    kind: type | None = None,
    trust: Iterable[str] = (),
) -> None:
    """Check every ``_target_``, at any depth, before anything is built.

    A target is a module's path and one name in it. The named object must be defined in an allowed package, not
    just be reachable through one (``litdiffusion.nn.unet.torch.hub.load``). Allowed are the classes and functions
    of ``ours`` and of the packages in ``trust`` (with ``kind``, only subclasses of it), and each ``nn.Module`` of
    ``layers``. No other package is imported.

    Raises:
        UserError: a target that is not allowed, an interpolation (a checkpoint's values are resolved), more than
            a configuration holds, or a package that cannot be trusted.
    """
    trusted = trusted_packages(trust)
    ours, layers = (*ours, *trusted), tuple(layers)
    plain = OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg
    for number, (key, value) in enumerate(dotted_items(plain)):
        if number >= LONGEST:
            raise UserError(f"{key[:80]}: this holds more than {LONGEST} values, which is no configuration")
        if key.count(".") >= DEEPEST:
            raise UserError(f"{key[:80]}...: nested more than {DEEPEST} deep, which is no configuration")
        if isinstance(value, str) and "${" in value:
            raise UserError(
                f"{key}: {value!r} is an interpolation, which a foreign configuration may not hold"
            )
        if key.rpartition(".")[2] == "_target_" and not _is_allowed(value, ours, layers, kind):
            raise UserError(f"{key}: {_refusal(value, (*ours, *layers), trusted)}")


def trusted_packages(trust: Any) -> tuple[str, ...]:
    """Return the packages that the user trusts: a list of names, or one name.

    Raises:
        UserError: one is no package's name, or one of ``NEVER_TRUSTED``.
    """
    names = (trust,) if isinstance(trust, str) else tuple(trust) if isinstance(trust, Iterable) else (trust,)
    for name in names:
        if not _is_dotted(name):
            raise UserError(
                f"trust: {name!r} is no package's name; give a list of them, as in trust=[mypackage]"
            )
        if name.partition(".")[0] in NEVER_TRUSTED:
            raise UserError(
                f"trust: {name} cannot be trusted: it does more than define models; name the one that defines yours"
            )
    return names


def _refusal(target: Any, allowed: tuple[str, ...], trusted: tuple[str, ...]) -> str:
    """Return why a target is refused, and how to allow it where there is a way."""
    refusal = (
        f"{target!r} is not allowed in a checkpoint, which may build only what {', '.join(allowed)} define"
    )
    if not _is_dotted(target) or "." not in target or target.partition(".")[0] in NEVER_TRUSTED:
        return refusal
    path, package = target.rpartition(".")[0], target.partition(".")[0]
    if not _inside(path, trusted):
        return f"{refusal}; if you trust all code of {package}, add trust=[{package}]"
    try:
        importlib.import_module(path)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and str(error.name).startswith(f"{package}.")
        return f"{refusal if missing else target}; {path} cannot be imported ({one_line(error)})"
    return refusal


def _is_dotted(name: Any) -> bool:
    return isinstance(name, str) and "__" not in name and all(map(str.isidentifier, name.split(".")))


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
