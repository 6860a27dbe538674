"""Sweeps on the command line: one folder for each job, and what a launcher reports at the end."""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from litdiffusion.errors import UserError

FOLDERS = ("run_dir", "out")
"""The key that says where a command writes: each configuration has one of them."""


@dataclass
class SweepCommand:
    """A command that runs jobs: what a launcher needs to know of it, and what the launcher reports.

    Args:
        options: options of the command line that the jobs need too, such as ``--config-dir DIR``.
        wants_traceback: whether the user has set HYDRA_FULL_ERROR.
        failed: whether a job has failed.
        report: called at the end of the sweep, also after an error.
    """

    options: list[str] = field(default_factory=list)
    wants_traceback: bool = False
    failed: bool = False
    report: Callable[[], None] | None = None


_CURRENT: ContextVar[SweepCommand] = ContextVar("sweep")


@contextmanager
def sweep_command(options: list[str], wants_traceback: bool) -> Iterator[SweepCommand]:
    """Make this the current command for launchers; call its report at the end."""
    command = SweepCommand(options, wants_traceback)
    token = _CURRENT.set(command)
    try:
        yield command
    finally:
        _CURRENT.reset(token)
        if command.report:
            command.report()


def current_sweep() -> SweepCommand:
    """Return the current command.

    Raises:
        UserError: there is none, since Hydra was not started by ``entry_point``.
    """
    command = _CURRENT.get(None)
    if command is None:
        raise UserError(
            "hydra/launcher=processes runs the entry points of litdiffusion alone; use another launcher"
        )
    return command


class OneFolder(Callback):
    """Resolve the folder of a sweep before its jobs are composed: ``${sweep_name:}`` needs the whole sweep."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Pass the folder to the jobs as an override."""
        folder = str(config.hydra.sweep.dir)
        config.hydra.sweep.dir = folder
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(folder)}")


def quoted(value: str) -> str:
    """Quote a value for Hydra's command line."""
    if re.fullmatch(r"[\w./-]+", value, re.ASCII):
        return value
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # OmegaConf's escape
    value = re.sub(r'(\\+)("|\Z)', r"\1\1\2", value).replace('"', r"\"")
    return f'"{value}"'


def typed(key: str, value: object) -> str:
    """Return ``key=value`` as it is typed at a shell's prompt."""
    return shlex.quote(f"{key}={quoted(str(value))}")


def require_own_folders(overrides: Iterable[str], params: Iterable[str] = ()) -> None:
    """Check a sweep's overrides, and the keys ``params`` that the sweeper's own configuration varies.

    Raises:
        UserError: one ``run_dir`` or ``out`` for several jobs.
        hydra.errors.OverrideParseException: an override cannot be read.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    varied = {override.key_or_group for override in parsed if override.is_sweep_override()} | set(params)
    # A choice of the group "sweep" varies its own parameters.
    varied |= {override.key_or_group for override in parsed if override.key_or_group == "sweep"}
    for override in parsed:
        text, key = str(override.input_line), override.key_or_group
        if key in FOLDERS and varied - {key} and "$" not in text:
            raise UserError(
                f"{text}: jobs that vary {', '.join(sorted(varied - {key}))} cannot share a folder; "
                f"leave {key} out, or write '{key}=DIR/${{hydra:job.num}}'"
            )
