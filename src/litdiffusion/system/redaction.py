"""Secrets are masked in whatever is written or sent.

They are recognised by their key, by the environment variable that holds them, or by their form.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

MASK = "***"

ANY_KEY = re.compile(
    r"key|token|secret|passw|passphrase|credential|authorization|(^|[_-])(pass|auth|bearer|cookie|dsn|pwd)([_-]|$)",
    re.IGNORECASE,
)
"""Keys whose texts are masked in run folders and on dashboards."""

SECRET_KEY = re.compile(
    r"secret|passw|credential|(^|[_-])(api|access|private|auth|ssh)[_-]?key|token$|^key$", re.IGNORECASE
)
"""The same, where a name like ``key_norm`` or ``token_mixer`` is more likely an argument of a network."""

SHORTEST = 8
"""A shorter value of an environment variable would match by chance in other text."""

_FORMS = (
    (re.compile(r"(?<=://)[^/\s:@]+(:[^/\s@]*)?(?=@)"), MASK),  # the user and password of an address
    (re.compile(r"(?<=[Bb]earer )(?=\S*\d)[\w.~+/=-]{16,}"), MASK),
    (
        re.compile(
            r"\b(?:gh[opsur]_|github_pat_|glpat-|hf_|sk-|xox[abprs]-|AKIA|local-|wandb_v1_)[A-Za-z0-9_-]{16,}"
        ),
        MASK,
    ),
    (
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
        ),
        MASK,
    ),
)
_ASSIGNED = re.compile(
    r"""((?:[\w.-]*(?:api_?key|access_?key|private_?key|secret|token|passw(?:or)?d|passphrase|credential)s?)["']?\s*[:=]\s*)"""
    r"""(?:"[^"\n]+"|'[^'\n]+'|(?<=:\s)[^\s"'(){}\[\],$]{8,}[ \t]*$)""",
    re.IGNORECASE | re.MULTILINE,
)
"""``api_key = "..."`` in code, ``token: ...`` at the end of a line of YAML; no call, and no annotation."""


def redacted(text: str) -> str:
    """Return ``text`` without the secrets that this machine's environment holds, or that are known by their form."""
    for secret in _of_environment():
        text = text.replace(secret, MASK)
    for form, mask in _FORMS:
        text = form.sub(mask, text)
    return text


def redacted_code(text: str) -> str:
    """Return source code, or a change to it, without what it assigns to names of secrets either."""
    return _ASSIGNED.sub(rf"\1{MASK}", redacted(text))


def without_secrets(value: Any, names: re.Pattern[str] = ANY_KEY, hidden: bool = False) -> Any:
    """Return plain values (of mappings, lists, texts and numbers) with every secret text masked.

    Args:
        value: what is to be written.
        names: keys below which every text, and every long number, is a secret.
        hidden: this value lies below such a key.
    """
    if isinstance(value, Mapping):
        return {
            key: without_secrets(child, names, hidden or names.search(str(key)) is not None)
            for key, child in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(child, names, hidden) for child in value]
    if hidden and isinstance(value, int | float) and len(str(value)) >= SHORTEST:
        return MASK
    if not isinstance(value, str):
        return value
    return MASK if hidden and value else redacted(value)


class RedactedLog(logging.Filter):
    """Masks secrets in log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Format the record, mask it, and let it through."""
        record.msg, record.args = redacted(record.getMessage()), None
        return True


REDACTED_LOG = RedactedLog()


def redact_tracebacks() -> None:
    """Mask secrets in the traceback that Python prints of an uncaught exception."""

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

    sys.excepthook = say


def redacted_override(text: str) -> str:
    """Return ``key=value`` as it was typed, the value masked where the key, or one in ``{...}``, names a secret."""
    key, equals, value = text.partition("=")
    names = re.split(r"[^\w-]+", key)
    if "{" in value:
        names += re.findall(r"[\w.-]+(?=[\"']?\s*:)", value)
    return redacted(f"{key}={MASK}" if equals and any(map(ANY_KEY.search, names)) else text)


def _of_environment() -> list[str]:
    """Return secrets of the environment, longest first, or one that contains another would be masked in part."""
    found = {
        value
        for name, value in os.environ.items()
        if ANY_KEY.search(name) and name != "PWD" and len(value) >= SHORTEST  # the working directory
    }
    return sorted(found, key=len, reverse=True)
