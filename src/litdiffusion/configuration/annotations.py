"""Whether a plain value from a configuration fits a constructor's annotation.

beartype checks single values. This module handles where YAML and Python differ: a list may stand for a tuple or
any other sequence, an int for a float, and a string for a member of an enumeration; a bool is never a number.
"""

import collections.abc
import inspect
import types
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable
from beartype.roar import BeartypeException

from litdiffusion.configuration.messages import suggestion

_NUMBERS_WIDEN = BeartypeConf(is_pep484_tower=True)
_LISTS = (
    list,
    tuple,
    collections.abc.Sequence,
    collections.abc.Collection,
    collections.abc.Iterable,
    collections.abc.MutableSequence,
)


def hints_of(target: Callable[..., Any], signature: inspect.Signature) -> dict[str, Any]:
    """Return the annotations by parameter, and "return"; those that cannot be resolved are left out."""
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    scope = getattr(function, "__globals__", {})
    annotations = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    annotations["return"] = signature.return_annotation
    hints: dict[str, Any] = {}
    for name, annotation in annotations.items():
        if annotation is inspect.Signature.empty:
            continue
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            hints.update(get_type_hints(holder, scope, include_extras=True))
        except Exception:  # names imported for type checkers alone, or syntax of a later Python
            continue
    return hints


def accepts(value: Any, hint: Any) -> bool:
    """Whether a plain value (as YAML has them) fits the annotation; True where beartype cannot tell."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or (isinstance(value, dict) and "_target_" in value):
        return True  # nodes are checked separately
    if origin is Annotated:
        return accepts(value, arguments[0]) and _bearable(value, hint)
    if origin in (Union, types.UnionType):
        return any(accepts(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if isinstance(value, list) and (origin or hint) in _LISTS:
        return _accepts_list(value, origin, arguments)
    if isinstance(value, dict):
        return _bearable({}, hint) or not _is_plain_class(hint)
    if isinstance(value, bool) and hint in (int, float, complex):
        return False
    if isinstance(value, str) and inspect.isclass(hint) and issubclass(hint, Enum):
        return value in hint.__members__ or value in {member.value for member in hint}
    return _bearable(value, hint)


def could_accept(target: Callable[..., Any], hint: Any) -> bool:
    """Whether what a class or function returns could fit the annotation; False only between unrelated classes."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(could_accept(target, argument) for argument in get_args(hint))
    built = (
        target if inspect.isclass(target) else hints_of(target, inspect.signature(target)).get("return", Any)
    )
    wanted = get_origin(hint) or hint
    if not (_is_plain_class(wanted) and _is_plain_class(built)):
        return True
    return issubclass(built, wanted) or issubclass(wanted, built)


def spelled(hint: Any, value: Any = None) -> str:
    """Return an annotation in words: "an int", "one of 'a', 'b'"; with ``value``, the nearest choice as well."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        conditions = ", ".join(map(repr, arguments[1:]))
        return f"{spelled(arguments[0], value)} with {conditions}"
    if origin in (Union, types.UnionType):
        literals = [argument for argument in arguments if get_origin(argument) is Literal]
        words = [spelled(argument, value) for argument in arguments if argument not in literals]
        if literals:
            words.append(
                _spelled_choices([choice for literal in literals for choice in get_args(literal)], value)
            )
        return " or ".join(words)
    if origin is Literal:
        return _spelled_choices(list(arguments), value)
    if hint is None or hint is type(None):
        return "null"
    name = (
        hint.__name__
        if inspect.isclass(hint) and not arguments
        else str(hint).replace("collections.abc.", "")
    )
    name = name.replace("typing.", "")
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _spelled_choices(choices: list[Any], value: Any) -> str:
    near = suggestion(value, map(str, choices), listed=0) if isinstance(value, str) else ""
    return f"one of {', '.join(map(repr, choices))}{near}"


def _accepts_list(value: list[Any], origin: Any, arguments: tuple[Any, ...]) -> bool:
    if not arguments:
        return True
    if origin is tuple and arguments[-1] is not Ellipsis:
        return len(value) == len(arguments) and all(map(accepts, value, arguments))
    return all(accepts(item, arguments[0]) for item in value)


def _is_plain_class(hint: Any) -> bool:
    return inspect.isclass(hint) and hint not in (Any, object) and not getattr(hint, "_is_protocol", False)


def _bearable(value: Any, hint: Any) -> bool:
    try:
        return bool(is_bearable(value, hint, conf=_NUMBERS_WIDEN))
    except BeartypeException:
        return True
