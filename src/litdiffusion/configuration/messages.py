"""Exceptions of Hydra, OmegaConf, YAML and the disk as one line for the person at the keyboard."""

import errno
import os
import re

from hydra.errors import MissingConfigException
from omegaconf.errors import (
    InterpolationResolutionError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from litdiffusion.configuration.nearest import suggestion
from litdiffusion.errors import UserError
from litdiffusion.system.files import WriteError

PROCESS_LOST = "another process of this run was lost"
"""How the line begins that says no more than this: the cause is for another process to say."""

_WAYS_OUT = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space, or have the quota raised",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
}
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What a system call reports for a disk alone, whoever has made it."""

_EXTRAS = {
    "hydra/sweeper/optuna": ("optuna", "hydra-optuna-sweeper"),
    "hydra/sweeper/sampler/tpe": ("optuna", "hydra-optuna-sweeper"),
    "hydra/launcher/submitit_slurm": ("slurm", "hydra-submitit-launcher"),
}
"""Configurations that come with packages, the extras that install them, and their names."""

_WORKER = re.compile(r"\ACaught \w+ in ")
_LOST_CONNECTION = re.compile(
    r"(?i)(?:gloo|nccl|c10d).*?"
    r"(connection (?:closed|reset|refused|lost)|timed? ?out|remote process exited|socket closed)"
)
"""What is left of a process that died: its peers' connections."""
_RESOLVER = re.compile(r"\A\w+ raised while resolving interpolation: ")
_MISSING = re.compile(r"Missing mandatory value: (\S+)")
_NOISE = re.compile(
    r"\A(full_key|object_type|reference_type)\b|\ASee https?:|\A(Config s|S)earch path:|\Aprovider="
)


def user_error(error: BaseException) -> str | None:
    """Return the line of an error that the user can mend, or None: then it is a bug, and wants its traceback.

    Counted in: ``UserError``, also as the cause of another exception, values that the configuration lacks, a file
    that cannot be written, and a process of the run, or one that decodes its images, that was killed.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return _of_user_error(cause)
        if isinstance(cause, WriteError) or (isinstance(cause, OSError) and cause.errno in _DISK_ERRORS):
            return _not_written(cause)
        if isinstance(cause, RuntimeError) and str(cause).startswith("DataLoader worker"):
            return (
                f"a process that decodes images was lost ({_flat(str(cause)).rstrip('. ')}): the same command"
                " continues; where memory ran out, with a smaller datamodule.num_workers"
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
    """Return an exception's text without line breaks, references to manuals, or lists of folders."""
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


def needs_value(key: str) -> str:
    """Return the line for a mandatory value that nobody gave."""
    return f"{key}: needs a value; give it as {key}=VALUE"


def _not_written(error: OSError) -> str:
    way_out = _WAYS_OUT.get(error.errno or 0, "when that is mended")
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file"
    return f"{name} could not be written ({error.strerror}): {way_out}, and the same command continues"


def _of_user_error(error: UserError) -> str:
    text = str(error)
    if _WORKER.match(text):
        # Loader processes send their traceback along as text; its last line is the error itself.
        text = text.strip().splitlines()[-1].partition("UserError: ")[2]
    return _flat(text)


def _flat(text: str) -> str:
    """Join lines; what Hydra indents as a list becomes one, and what follows "Search path" goes."""
    lines: list[str] = []
    for line in text.splitlines():
        words = line.strip()
        if words and not _NOISE.match(words):
            lines.append(words + "," if line.startswith("\t") else words)
    return " ".join(lines).rstrip(",")
