"""Entry points: Hydra's command line, with one line and exit code 2 for every error that the user can fix.

By itself Hydra prints a traceback or several lines and exits with 1. With ``HYDRA_FULL_ERROR`` it raises instead,
so that is set here. If the user has set it, the traceback is printed before the line.
"""

import functools
import logging
import os
import sys
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from litdiffusion.configuration import config_folder
from litdiffusion.configuration.messages import PROCESS_LOST, one_line, user_error
from litdiffusion.configuration.overrides import CommandLine, find_fault, require_effect
from litdiffusion.configuration.resolvers import is_sweep
from litdiffusion.configuration.sweeps import require_own_folders, sweep_command
from litdiffusion.errors import UserError
from litdiffusion.system.launch import environment_variable, process_rank
from litdiffusion.system.parent_death import end_with_parent
from litdiffusion.system.processes import interruptible
from litdiffusion.system.redaction import REDACTED_LOG, redact_tracebacks, redacted
from litdiffusion.system.version_check import require_sound_versions

USER_ERROR, INTERRUPTED = 2, 130
OTHERS_WAIT_SECONDS = 5.0
"""How long every process but the first waits before it reports its error."""


def entry_point(
    config_name: str, config_dir: Path | None = None
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make ``task(cfg)`` a command that composes ``config_name`` of ``config_dir`` (the package's by default).

    Exit codes: 0; 1 for a bug, with its traceback; 2 for an error that the user can fix, with one line
    ``error: ...`` on stderr; 130 when interrupted. In a sweep the other jobs still run, and the exit code is 2.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(task)
        def main() -> None:
            warnings.filterwarnings("ignore", category=UserWarning, module=r"hydra\.")
            wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
            job = _Job(task, wants_traceback)
            end_with_parent()
            redact_tracebacks()
            try:
                require_sound_versions()
                with environment_variable("HYDRA_FULL_ERROR", "1"):
                    _run(job, config_name, str(config_dir or config_folder()))
            except KeyboardInterrupt:
                sys.exit(INTERRUPTED)
            except SystemExit as leaving:
                # Lightning handles an interruption itself and exits with 1.
                sys.exit(INTERRUPTED if isinstance(leaving.__context__, KeyboardInterrupt) else leaving.code)
            except UserError as error:
                if process_rank() == 0:  # the command line is the same for all
                    complain(one_line(error), wants_traceback)
                sys.exit(USER_ERROR)
            if job.failed:
                sys.exit(USER_ERROR)

        return main

    return decorate


class _Job:
    """The function that Hydra calls: once, or once for each job of a sweep."""

    def __init__(self, task: Callable[[DictConfig], None], wants_traceback: bool) -> None:
        self.task, self.wants_traceback = task, wants_traceback
        self.failed = False

    def __call__(self, cfg: DictConfig) -> None:
        if process_rank() > 0:
            logging.disable(logging.INFO)
        # Else a log file on a full disk would print a traceback on the terminal.
        logging.raiseExceptions = False
        for handler in logging.getLogger().handlers:
            handler.addFilter(REDACTED_LOG)
        try:
            with interruptible():
                self.task(cfg)
        except Exception as error:
            line = user_error(error) or _deleted(error)
            if line is None:
                raise
            if not is_sweep():
                complain(line, self.wants_traceback)
                raise SystemExit(USER_ERROR) from None
            if not _in_this_process():
                raise UserError(line) from error  # the sweeper reports it and counts a failed trial
            self.failed = True
            complain(f"job {_job_title()}: {line}", self.wants_traceback)


def _run(job: _Job, config_name: str, config_dir: str) -> None:
    """Run Hydra; an error before any job has started is a mistake in the command or the configuration.

    Raises:
        UserError: the command line or a file of the configuration is at fault.
    """
    arguments = _parse_command_line()
    sweeping = ("hydra.mode=MULTIRUN", "sweep=", "+sweep=")
    multirun = arguments.multirun or any(text.startswith(sweeping) for text in arguments.overrides)
    multirun = multirun and "hydra.mode=RUN" not in arguments.overrides  # as in the jobs of a sweep
    command = CommandLine(
        config_dir=str(Path(arguments.config_path or config_dir).resolve()),
        config_name=arguments.config_name or config_name,
        overrides=[text for text in arguments.overrides if text != "hydra.mode=MULTIRUN"],
        multirun=multirun,
        extra_dir=arguments.config_dir and str(Path(arguments.config_dir).resolve()),
    )

    @functools.wraps(job.task)  # Hydra names the job after the task's file
    def task(cfg: DictConfig) -> None:
        job(cfg)

    try:
        if arguments.package and not arguments.cfg:
            raise UserError(
                f"--package={arguments.package}: shows a part of the configuration, with --cfg job"
            )
        if process_rank() == 0:  # Lightning gives the processes that it starts a hydra.run.dir of its own
            require_effect(command)
        if multirun:
            require_own_folders(arguments.overrides)
        with sweep_command(_options(arguments), job.wants_traceback) as sweep:
            hydra.main(version_base="1.3", config_path=config_dir, config_name=config_name)(task)()
        job.failed |= sweep.failed
    except UserError:
        raise
    except Exception as error:
        line = _explained(error, command)
        if line is None:
            raise
        raise UserError(line) from error


def _explained(error: Exception, command: CommandLine) -> str | None:
    """Return the line for an error in composing the configuration, or None for a bug."""
    # Only what a job raised, here or in another process, comes out of JobReturn.return_value.
    if any(frame.name == "return_value" for frame in traceback.extract_tb(error.__traceback__)):
        return None
    is_yaml = type(error).__module__.startswith("yaml.")
    if not is_yaml and not isinstance(
        error, HydraException | OmegaConfBaseException | ValueError | OSError | AssertionError
    ):
        return None
    try:
        fault = find_fault(command)
    except Exception:  # then the text of the error itself has to do
        fault = None
    return fault or one_line(error)


def _parse_command_line() -> Namespace:
    """Parse the command line as Hydra will, and move the options to its end.

    Hydra's own parser refuses overrides on both sides of an option (``a=1 -m b=1,2``).

    Raises:
        UserError: an option that does not exist.
    """
    with redirect_stderr(StringIO()) as complaint:
        try:
            arguments = get_args_parser().parse_intermixed_args()
        except SystemExit as leaving:
            if not leaving.code:
                raise
            text = complaint.getvalue().strip().splitlines()[-1].partition("error: ")[2]
            raise UserError(
                f"{text}; overrides are written key=value, without dashes; --help lists the options"
            ) from None
    options = list(sys.argv[1:])
    for override in arguments.overrides:
        options.remove(override)
    sys.argv[1:] = [*arguments.overrides, *options]
    return arguments


def _options(arguments: Namespace) -> list[str]:
    """Return the options that say where the configuration is, for the processes of a sweep."""
    given = {name: getattr(arguments, name) for name in ("config_path", "config_name", "config_dir")}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value]


def _in_this_process() -> bool:
    """Whether the jobs of a sweep run in this process, one after the other, by Hydra's own sweeper and launcher."""
    hydra_cfg = HydraConfig.get()
    own = "hydra._internal.core_plugins."
    return all(str(node._target_).startswith(own) for node in (hydra_cfg.sweeper, hydra_cfg.launcher))


def _job_title() -> str:
    hydra_cfg = HydraConfig.get()
    return f"{hydra_cfg.job.num} ({' '.join(hydra_cfg.overrides.task)})"


def _deleted(error: Exception) -> str | None:
    """Return the line for a key that the task needs and that the command line deleted (``~key``)."""
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        for text in HydraConfig.get().overrides.task:
            if text.startswith("~") and str(error.full_key) in text:
                return f"{error.full_key}: needed here, and deleted by {text}"
    return None


def complain(line: str, with_traceback: bool = False) -> None:
    """Print one line on stderr; with ``with_traceback``, the traceback of the current exception before it.

    The processes of a run usually fail for the same reason, so the first one reports it. The others wait before
    they report theirs: Lightning and torchrun end them as soon as the first one exits. (srun does not.)
    """
    rank = process_rank()
    if rank > 0:
        if line.startswith(PROCESS_LOST):
            return
        time.sleep(OTHERS_WAIT_SECONDS)
    if with_traceback:
        print(redacted(traceback.format_exc()), file=sys.stderr)
    who = f" (process {rank})" if rank else ""
    print(f"error{who}: {redacted(line)}", file=sys.stderr, flush=True)
