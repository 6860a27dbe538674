"""The valid words nearest to one that was mistyped."""

from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from typing import Any

LEAST = 0.65
"""Likeness from which a word is worth mentioning: two of the three letters of "dmi" and "dim"."""


def nearest(word: str, words: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` of ``words``, best first; none where nothing is alike.

    Dotted words are compared by their last part too, so that ``batch_size`` finds ``datamodule.batch_size``.
    """
    scored = sorted(
        ((_likeness(word, other), other) for other in set(words)), key=lambda pair: (-pair[0], pair[1])
    )
    return [other for score, other in scored[:count] if score >= LEAST]


def suggestion(word: str, words: Iterable[str], listed: int = 20) -> str:
    """Return "; nearest: ..." and, where there are few, all the words: what follows "no such thing"."""
    words = sorted(set(words))
    close = nearest(word, words)
    text = f"; nearest: {', '.join(close)}" if close else ""
    if words and len(words) <= listed and len(words) > len(close):
        text += f"; there are: {', '.join(words)}"
    return text


def dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a tree of plain dicts and lists, inner nodes as well as leaves."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in items:
        key = f"{prefix}{name}"
        yield key
        yield from dotted_keys(child, f"{key}.")


def _likeness(word: str, other: str) -> float:
    parent, _, last = word.rpartition(".")
    other_parent, _, other_last = other.rpartition(".")
    part = SequenceMatcher(None, last, other_last).ratio()
    if parent == other_parent:
        return part
    if part < 0.75:
        return 0.0
    return 0.8 * part + 0.15 * SequenceMatcher(None, parent, other_parent).ratio()
