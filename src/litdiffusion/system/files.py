"""Atomic files: written under a temporary name, synced, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class WriteError(OSError):
    """A file could not be written. ``errno`` and ``strerror`` say why, ``filename`` says which, as it was meant."""

    @classmethod
    def at(cls, path: Path, error: BaseException) -> "WriteError":
        """Return the error for ``path``; its reason is the first system error behind ``error``."""
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno is not None):
            cause = cause.__cause__ or cause.__context__
        number, reason = (cause.errno, cause.strerror) if isinstance(cause, OSError) else (None, None)
        return cls(number, reason or " ".join(str(error).split()) or type(error).__name__, str(path))


UNFINISHED = ".litdiffusion-"
"""Prefix of the names of files that are being written, or were when their writer was killed."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, rename it to ``path``.

    A process killed at any moment leaves either the old file or the new one, never a part of one. The
    temporary name keeps the suffix, since several libraries choose the format by it.

    Raises:
        WriteError: the folder cannot be written, or the disk is full; ``path`` is then as it was.
    """
    try:
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f"{UNFINISHED}{path.stem}-", suffix=path.suffix
        )
    except OSError as error:
        raise WriteError.at(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename not in (None, name):  # of another file, which the block was reading
            raise
        raise WriteError.at(path, error) from error
    finally:
        with suppress(OSError):  # gone already, or on a disk that has become read-only
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def hardlink(path: Path, other: Path) -> None:
    """Make ``other`` a hard link to the file ``path``, or a copy where there are none; both are whole at any moment.

    Raises:
        WriteError: the folder cannot be written, or the disk is full.
    """
    temporary = other.with_name(f"{UNFINISHED}{other.name}")
    try:
        if other.exists() and other.samefile(path):  # a rename would do nothing, and leave the temporary name
            return
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        temporary.replace(other)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise WriteError.at(other, error) from error


def append_text(path: Path, text: str) -> None:
    """Write ``text`` at the end of ``path``; where that fails, the file is as it was.

    Raises:
        WriteError: the folder cannot be written, or the disk is full.
    """
    try:
        with path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                rest = memoryview(text.encode())
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise WriteError.at(path, error) from error


def _umask() -> int:
    """Return the umask: mkstemp makes private files, and a run folder is shared as the user wishes."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Sync a folder, or a rename in it would not survive a power cut; not every file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
