"""One line for the user: exceptions of other libraries and of the disk, and what a misspelt word may mean."""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from typing import Any

from hydra.errors import MissingConfigException
from omegaconf.errors import (
    InterpolationResolutionError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from litdiffusion.errors import UserError
from litdiffusion.system.files import WriteError

PROCESS_LOST = "another process of this run was lost"
"""The beginning of a line that names no cause, since another process reports it."""

LEAST = 0.65
"""The least likeness of a word worth suggesting; "dmi" and "dim" share two of three letters."""
MARGIN = 0.1
"""How much less alike than the best a word may be."""

SAME = (
    {"T", "timesteps", "n_steps", "num_timesteps", "sampling_steps", "num_steps"},
    {"checkpoint", "resume", "ckpt"},
    {"cfg_scale", "guidance", "guidance_scale"},
    {"epochs", "max_epochs", "num_epochs", "max_steps"},
    {"gpus", "device", "devices"},
    {"labels", "num_classes"},
    {"learning_rate", "lr"},
    {"model", "net"},
    {"log_dir", "output_dir", "out", "run_dir"},
)
"""Words for one thing, here or elsewhere."""

_WAYS_OUT = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space, or have the quota raised",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
}
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors that only a disk causes, whichever call reports them."""

_EXTRAS = {
    "hydra/sweeper/optuna": ("optuna", "hydra-optuna-sweeper"),
    "hydra/sweeper/sampler/tpe": ("optuna", "hydra-optuna-sweeper"),
    "hydra/launcher/submitit_slurm": ("slurm", "hydra-submitit-launcher"),
}
"""Configurations that come with optional packages: the extra to install, and the package."""

_WORKER = re.compile(r"\ACaught \w+ in ")
_LOST_CONNECTION = re.compile(
    r"(?i)(?:gloo|nccl|c10d).*?"
    r"(connection (?:closed|reset|refused|lost)|timed? ?out|remote process exited|socket closed)"
)
"""What the other processes see of one that died."""
_RESOLVER = re.compile(r"\A\w+ raised while resolving interpolation: ")
_MISSING = re.compile(r"Missing mandatory value: (\S+)")
_NOISE = re.compile(
    r"\A(full_key|object_type|reference_type)\b|\ASee https?:|\A(Config s|S)earch path:|\Aprovider="
)


def user_error(error: BaseException) -> str | None:
    """Return the line for an error that the user can fix; None for a bug, which keeps its traceback.

    Such errors are ``UserError``, also as the cause of another exception, missing values, a file that cannot be
    written, and the loss of another process of the run or of one that decodes images.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return _of_user_error(cause)
        # By name, since Lightning is slow to import. What EarlyStopping finds missing is a plain RuntimeError.
        if type(cause).__name__ == "MisconfigurationException" or "conditioned on metric" in str(cause):
            return _flat(str(cause))
        if isinstance(cause, WriteError) or (isinstance(cause, OSError) and cause.errno in _DISK_ERRORS):
            return _not_written(cause)
        if isinstance(cause, RuntimeError) and str(cause).startswith("DataLoader"):
            return (
                f"a process that decodes images was lost or is stuck ({_flat(str(cause)).rstrip('. ')}): the same"
                " command continues; where memory ran out, with a smaller datamodule.num_workers"
            )
        if isinstance(cause, RuntimeError) and (lost := _LOST_CONNECTION.search(_flat(str(cause)))):
            return (
                f"{PROCESS_LOST} ({lost[1].lower()}); if it had something to say, that is"
                " above. The same command continues"
            )
        cause = cause.__cause__
    if isinstance(error, MissingMandatoryValue | InterpolationResolutionError):
        return one_line(error)
    return None


def one_line(error: BaseException) -> str:
    """Return an exception's text without line breaks, links to manuals, and lists of folders."""
    if isinstance(error, UserError):
        return _of_user_error(error)
    mark = getattr(error, "problem_mark", None)
    if mark is not None:  # a file that is not YAML
        return f"{mark.name}, line {mark.line + 1}: {getattr(error, 'problem', 'not valid YAML')}"
    if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
        found = _MISSING.search(str(error))
        if found is not None:
            return needs_value(found[1])
    if isinstance(error, MissingConfigException) and error.missing_cfg_file in _EXTRAS:
        extra, package = _EXTRAS[error.missing_cfg_file]
        return f"{package} is not installed, which this needs: pip install 'litdiffusion[{extra}]'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        near = suggestion(choice, error.options)
        return f"{group}={choice}, which a configuration file asks for: no such choice{near}"
    text = _flat(str(error))
    if isinstance(error, OmegaConfBaseException):
        text = _RESOLVER.sub("", text)
        if error.full_key:
            text = f"{error.full_key}: {text}"
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}: {one_line(error.__cause__)}" if text else one_line(error.__cause__)
    return text or type(error).__name__


def shown(value: Any) -> Any:
    """Return a value as one writes it: null for None."""
    return "null" if value is None else value


def needs_value(key: str) -> str:
    """Return the line for a mandatory value that nobody gave."""
    return f"{key}: needs a value; give it as {key}=VALUE"


def _not_written(error: OSError) -> str:
    way_out = _WAYS_OUT.get(error.errno or 0, "when that is fixed")
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file"
    return f"{name} could not be written ({error.strerror}): {way_out}, and the same command continues"


def _of_user_error(error: UserError) -> str:
    text = str(error)
    if _WORKER.match(text):
        # A loader process sends its traceback as text; the last line is the error.
        text = text.strip().splitlines()[-1].partition("UserError: ")[2]
    return _flat(text)


def _flat(text: str) -> str:
    """Join lines, with commas where Hydra indents a list; leave out manuals and search paths."""
    lines: list[str] = []
    for line in text.splitlines():
        words = line.strip()
        if words and not _NOISE.match(words):
            lines.append(words + "," if line.startswith("\t") else words)
    return " ".join(lines).rstrip(",")


def nearest(word: str, words: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` of ``words``, best first, the rest nearly as good; none where nothing is alike.

    Dotted words are compared by their last part too, so that ``batch_size`` finds ``datamodule.batch_size``.
    """
    scored = sorted((-_likeness(word, other), other) for other in set(words))
    return [other for score, other in scored[:count] if -score >= max(LEAST, -scored[0][0] - MARGIN)]


def suggestion(word: str, words: Iterable[str], listed: int = 20) -> str:
    """Return "; nearest: ..." and, where there are few, all the words: what follows "no such thing"."""
    words = sorted(set(words))
    close = nearest(word, words)
    text = f"; nearest: {', '.join(close)}" if close else ""
    if words and len(words) <= listed and len(words) > len(close):
        text += f"; there are: {', '.join(words)}"
    return text


def dotted_items(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every inner node and leaf of a tree of plain containers, with its dotted key, outer before inner."""
    items = node.items() if isinstance(node, dict) else ()
    for name, child in enumerate(node) if isinstance(node, list | tuple) else items:
        key = f"{prefix}{name}"
        yield key, child
        yield from dotted_items(child, f"{key}.")


def _likeness(word: str, other: str) -> float:
    parent, _, last = word.rpartition(".")
    other_parent, _, other_last = other.rpartition(".")
    part = SequenceMatcher(None, last, other_last).ratio()
    if any({last, other_last} <= same for same in SAME):
        part = max(part, 0.95)
    elif set(re.split(r"[._]", word)) <= set(re.split(r"[._]", other)):  # "steps" and "trainer.max_steps"
        part = max(part, 0.7 + 0.2 * part)
    if parent == other_parent:
        return part
    if part < 0.75:
        return 0.0
    return 0.85 * part + 0.1 * SequenceMatcher(None, parent, other_parent).ratio()
