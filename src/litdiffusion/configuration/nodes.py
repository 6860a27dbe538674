"""The values and nodes of a configuration: each is checked where it is written, then a node builds one object.

A node is a mapping with ``_target_``, the class or function to call.
"""

import copy
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from litdiffusion.configuration.annotations import accepts, could_accept, hints_of, spelled
from litdiffusion.configuration.messages import dotted_items, needs_value, one_line, suggestion
from litdiffusion.errors import UserError

Supplied = Mapping[str, Collection[str]]

_SPECIAL = {"_target_", "_args_", "_convert_", "_partial_", "_recursive_"}
_LINK = re.compile(r"\$\{(?:oc\.select:)?([\w.]+)(?:,null)?\}")
_OPEN = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def require_values(cfg: DictConfig) -> None:
    """Check that every mandatory value is there, that no number is NaN, and that every interpolation resolves.

    NaN is refused everywhere, since it passes any comparison with a bound.

    Raises:
        UserError: naming the key.
    """
    for key, value in written(cfg):
        if value == MISSING:
            raise UserError(needs_value(key))
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{key}=nan: must be a number")
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except InterpolationKeyError as error:
        sought = str(error).partition("'")[2].partition("'")[0]
        keys = dict(dotted_items(OmegaConf.to_container(cfg, resolve=False))).keys() - {error.full_key}
        raise UserError(f"{one_line(error)}{suggestion(sought, keys, listed=0)}") from error
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error


def written(cfg: DictConfig | ListConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value by its dotted key, outer before inner; a mandatory one that is not there is ``MISSING``.

    Interpolations are left out: their values are written elsewhere.
    """
    for name in range(len(cfg)) if isinstance(cfg, ListConfig) else list(cfg):
        key = f"{prefix}{name}"
        if OmegaConf.is_missing(cfg, name):
            yield key, MISSING
        elif not OmegaConf.is_interpolation(cfg, name):
            yield key, cfg[name]
            if isinstance(cfg[name], DictConfig | ListConfig):
                yield from written(cfg[name], f"{key}.")


def require_arguments(cfg: DictConfig, supplied: Supplied | None = None) -> None:
    """Check every node's arguments against its target's signature: names, presence, types.

    Args:
        cfg: the configuration, not necessarily resolved. A node reached by interpolation is checked where it is
            written.
        supplied: for nodes (by dotted key) that code completes, the names of the arguments it passes to ``build``.

    Raises:
        UserError: the first argument that the constructor would not take.
    """
    for key, node in written(cfg):
        if isinstance(node, DictConfig) and "_target_" in node:
            _check(key, node, (supplied or {}).get(key, ()))


def build(node: DictConfig, name: str, **overrides: Any) -> Any:
    """Build the object that a node describes; ``overrides`` are further arguments, passed as they are.

    Raises:
        UserError: the constructor refused its arguments (``ValueError``, ``TypeError``), a package is missing, or
            Lightning found the configuration impossible. The line begins with the key: the argument's, where the
            constructor's text begins with ``argument=``, else the node's.
    """
    root = copy.deepcopy(
        node._get_root()
    )  # Hydra resolves interpolations in place, and an error tells where they led
    try:
        return instantiate(node, _convert_="all", **overrides)
    except InstantiationException as error:
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        mendable = (ValueError, TypeError, ImportError, MisconfigurationException)
        if cause is not None and not isinstance(cause, mendable):
            raise
        where = str(error).rpartition("full_key: ")[2].strip() if "full_key: " in str(error) else name
        raise UserError(_with_key(root, where, one_line(cause or error))) from cause


@contextmanager
def refused(node: str = "") -> Iterator[None]:
    """Show what a ``ValueError`` says of an argument, ``argument=value: ...``, with the node's key in front.

    Raises:
        UserError: in place of the ``ValueError``.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{node}.{error}" if node else str(error)) from error


def _with_key(root: Any, where: str, text: str) -> str:
    """Put the key in front of what a constructor says of an argument of the node at ``where``, or of the node."""
    refused, (name, _, rest) = OmegaConf.select(root, where), text.partition("=")
    if re.fullmatch(r"\w+(\.\w+)+", name):  # a constructor that names the key of another node
        return text
    if not (isinstance(refused, DictConfig) and takes(refused, name)):
        return f"{_where_written(root, where)}: {text}"
    return f"{_where_written(root, f'{where}.{name}')}={rest}"


def _where_written(root: Any, key: str) -> str:
    """Return the key of a value, or of the value that its interpolation, or that of a node around it, leads to."""
    parent, _, name = key.rpartition(".")
    parent = _where_written(root, parent) if parent else ""
    holder = OmegaConf.select(root, parent) if parent else root
    node = holder._get_node(name) if isinstance(holder, DictConfig) else None
    link = (
        _LINK.fullmatch(str(node._value())) if isinstance(node, Node) and node._is_interpolation() else None
    )
    if link:
        return _where_written(root, link[1])
    return f"{parent}.{name}" if parent else name


def locate(key: str, target: object) -> Callable[..., Any]:
    """Return the class or function that a ``_target_`` names.

    Raises:
        UserError: there is no such thing.
    """
    if isinstance(target, str):
        module, _, name = target.rpartition(".")
        try:
            found: Callable[..., Any] = resolve_name(target)
        except Exception:  # importing a user's module can fail in any way
            raise UserError(f"{key}._target_: cannot import {target}{_others(module, name)}") from None
        if callable(found):
            return found
    raise UserError(f"{key}._target_: {target} is neither a class nor a function")


def arguments_of(cfg: DictConfig, key: str) -> dict[str, Any]:
    """Return a node's arguments, with its target's defaults for those it does not name; {} where there is no node."""
    node = OmegaConf.select(cfg, key)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return {}
    signature = _signature(locate(key, node._target_))
    defaults = {
        name: parameter.default
        for name, parameter in (signature.parameters.items() if signature else ())
        if parameter.default is not parameter.empty
    }
    return defaults | {str(name): node[name] for name in node if name not in _SPECIAL}


def takes(node: DictConfig, name: str) -> bool:
    """Whether a node's target has an argument of this name."""
    try:
        signature = _signature(locate("", node._target_)) if "_target_" in node else None
    except UserError:
        return False
    return signature is not None and name in signature.parameters


def _check(key: str, node: DictConfig, supplied: Collection[str]) -> None:
    target = locate(key, node._target_)
    signature = _signature(target)
    if signature is None:
        return
    owner = getattr(target, "__qualname__", str(node._target_))
    parameters = {name: p for name, p in signature.parameters.items() if p.kind in _OPEN}
    anything = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    hints = hints_of(target, signature)
    names = [str(name) for name in node if name not in _SPECIAL]

    for name in names:
        if name not in parameters:
            if anything:
                continue
            raise UserError(f"{key}.{name}: {owner} takes no such argument{suggestion(name, parameters)}")
        if OmegaConf.is_missing(node, name):
            continue
        optional = parameters[name].default is None
        fault = _fault(f"{key}.{name}", node[name], hints.get(name, Any), optional)
        if fault is not None:
            raise UserError(f"{_where_written(node._get_root(), f'{key}.{name}')}: {fault} ({owner}.{name})")

    if not node.get("_partial_", False) and "_args_" not in node:
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and name not in names and name not in supplied:
                raise UserError(f"{key}.{name}: {owner} needs it; give it as +{key}.{name}=VALUE")


def _fault(key: str, value: Any, hint: Any, optional: bool) -> str | None:
    """Return what is wrong with a value for an annotation, or None."""
    if isinstance(value, DictConfig) and "_target_" in value:
        if value.get("_partial_", False) or could_accept(locate(key, value._target_), hint):
            return None
        return f"{value._target_} is not {spelled(hint)}"
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if (plain is None and optional) or accepts(plain, hint):
        return None
    return f"{'null' if plain is None else repr(plain)} is not {spelled(hint, plain)}"


def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):  # written in C, without a signature
        return None


def _others(module: str, name: str) -> str:
    try:
        public = [other for other in dir(resolve_name(module)) if not other.startswith("_")] if module else []
    except Exception:
        return ""
    return suggestion(name, public, listed=0)
