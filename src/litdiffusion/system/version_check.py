"""Releases of other packages, and systems, that will not do: looked up by name, before any is imported."""

import re
import signal
from importlib.metadata import PackageNotFoundError, version

from litdiffusion.errors import UserError

KNOWN_BAD = {
    "lightning": {"2.6.2": "a malicious upload", "2.6.3": "a malicious upload"},
}
"""Releases, by package, and what is wrong with them."""

REPLACEMENT = {"lightning": "lightning>=2.6.6"}


def require_sound_versions() -> None:
    """Refuse releases that are known to be malicious, or not to work together.

    Raises:
        UserError: a release that is known to be bad, or two that do not work together.
    """
    for package, releases in KNOWN_BAD.items():
        installed = installed_version(package)
        if installed in releases:
            raise UserError(
                f"{package} {installed} is {releases[installed]}: replace it by"
                f" `pip install '{REPLACEMENT[package]}'`, and change the passwords and keys that this machine holds"
            )
    hydra, omegaconf = installed_version("hydra-core"), installed_version("omegaconf")
    if hydra and omegaconf and _numbers(hydra) < (1, 4) and _numbers(omegaconf) >= (2, 4):
        raise UserError(
            f"hydra-core {hydra} does not work with omegaconf {omegaconf}: `pip install 'omegaconf>=2.3,<2.4'`"
        )


def require_unix() -> None:
    """Refuse to train on a system without the file locks and signals that a run relies on.

    Raises:
        UserError: such as Windows.
    """
    try:
        import fcntl  # noqa: F401

        found = hasattr(signal, "SIGUSR1")
    except ImportError:
        found = False
    if not found:
        raise UserError(
            "training runs on Linux and macOS (on Windows, in WSL); load_model, sample and evaluate run anywhere"
        )


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(release: str) -> tuple[int, ...]:
    """Return the numbers that a release begins with: (2, 4, 0) for 2.4.0.dev1."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", release)[0].split("."))  # type: ignore[index]
