"""W&B's client: its mode, how its own process is started, and its errors as this project's."""

import os
import re
import secrets
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from litdiffusion.errors import UserError
from litdiffusion.system.files import write_text
from litdiffusion.system.processes import STOP_SIGNALS

FINISH_SECONDS = 600
"""How long the last upload of a run may take; what is missing is logged when the command is repeated."""

FLUSH_EVERY = 0.01
"""Seconds after which W&B's own process writes what was logged; what is not written is lost when it is killed."""


def require_sound(settings: Mapping[str, Any]) -> None:
    """Require that W&B takes these arguments of ``wandb.init``, and what the environment says.

    Raises:
        ValueError: naming the one that it does not take.
    """
    import wandb

    checked = wandb.Settings()
    for name, value in settings.items():
        try:
            setattr(checked, name if name in ("project", "entity") else f"run_{name}", value)
        except (ValueError, wandb.Error) as error:  # of pydantic
            raise ValueError(f"{name}={value}: {reason(error)}") from error
    for name in os.environ.keys() - {"WANDB_MODE"}:
        try:
            checked.update_from_env_vars({name: os.environ[name]})
        except (ValueError, wandb.Error) as error:
            raise UserError(f"{name}: {reason(error)}") from error  # without the value, which may be a secret


def settled_mode(mode: str, folder: Path) -> tuple[Literal["online", "offline", "disabled"], str | None]:
    """Return the mode that ``logger.wandb.mode`` means on this machine, and a notice for the user.

    Raises:
        UserError: online is asked for, and there is no account; or a mode that does not exist.
    """
    import wandb

    source, asked = "logger.wandb.mode", mode
    if mode == "auto" and os.environ.get("WANDB_MODE"):
        source, asked = "WANDB_MODE", os.environ["WANDB_MODE"]
    asked = {"dryrun": "offline", "run": "online"}.get(asked, asked)  # W&B's old names
    if asked == "disabled":
        return "disabled", None
    if asked == "offline":
        return "offline", None
    if asked not in ("auto", "online"):
        raise UserError(f"{source}={asked}: choose online, offline or disabled")
    if wandb.login(prompt=False, verify=False):
        return "online", None
    if asked != "auto":
        raise UserError(
            f"{source}={asked}: W&B has no account here; run `wandb login`, set WANDB_API_KEY, or use"
            " logger.wandb.mode=offline"
        )
    return "offline", (
        "W&B: this machine has no account (see `wandb login`), so the run is logged offline in"
        f" {folder}; upload it later with `wandb sync {folder}/offline-run-*`"
    )


def lasting_run_id(folder: Path) -> str:
    """Return the id of the folder's W&B run; a new one the first time.

    Raises:
        UserError: the file holds no id.
    """
    file = folder / "run_id"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, secrets.token_hex(4))
    run_id = file.read_text(errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,64}", run_id, re.ASCII):  # it becomes a part of file names
        raise UserError(f"{file} holds no id of a W&B run: remove it, and a new run is begun there")
    return run_id


def open_run(folder: Path, mode: Literal["online", "offline"], **settings: Any) -> Any:
    """Open, or continue, the W&B run of a folder.

    Raises:
        wandb.Error: W&B cannot be reached, or refuses; for the loss of its own process see ``losses``.
    """
    import wandb

    _start_out_of_reach()
    return wandb.init(
        id=lasting_run_id(folder),
        dir=str(folder.parent),
        resume="allow",
        **settings,
        settings=wandb.Settings(
            silent=True,
            mode=mode,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            # Addresses of repositories and commands may hold secrets; the run folder knows both without them.
            disable_git=True,
            x_disable_meta=True,
            x_transaction_log_flush_interval=FLUSH_EVERY,
        ),
    )


def leave() -> None:
    """End W&B's own process."""
    import wandb

    with suppress(OSError, SystemExit), losses():
        wandb.teardown()


@contextmanager
def files_in_order() -> Iterator[None]:
    """Turn an error of the file system into one that names the file.

    Raises:
        UserError: a file is in the way.
    """
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        raise UserError(f"logger.wandb: {reason(error)}: repair or remove it") from error


def reason(error: Exception) -> str:
    """Return what is wrong, and with which file; of pydantic's several lines, the one that says it."""
    if hasattr(error, "errors"):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} ({error.strerror})"
    return str(getattr(error, "strerror", None) or error)


@contextmanager
def losses() -> Iterator[None]:
    """Turn W&B's several errors for the loss of its process into one.

    Raises:
        ConnectionError: it has ended.
    """
    from wandb.sdk.lib.service.service_port_file import ServicePollForTokenError
    from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    before_its_address, before_its_answer = ServicePollForTokenError, WandbServiceConnectionError
    later = (HandleAbandonedError, MailboxClosedError, ConnectionError)
    try:
        yield
    except (before_its_address, before_its_answer, *later) as error:
        raise ConnectionError(
            f"the process that W&B writes with has ended ({str(error) or type(error).__name__})"
        ) from error


def _start_out_of_reach() -> None:
    """Start W&B's own process with SIGHUP, SIGUSR1 and SIGUSR2 blocked, which would end it.

    SIGINT and SIGTERM end it all the same: it installs handlers of its own for them.
    """
    import wandb
    from wandb.analytics.opentelemetry import opentelemetry_proxy

    opentelemetry_proxy.disable()  # or a process that ends as it starts leaves this one waiting for its own lock
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        wandb.setup()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
