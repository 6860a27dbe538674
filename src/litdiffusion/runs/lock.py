"""One job at a time in a run folder.

The kernel keeps the lock (``flock``), and drops it when the job dies, however it dies. The locked file names its
holder. Some network file systems have no locks, or keep them on each machine separately. Therefore the holder also
touches the file every few seconds, and a job on another machine watches whether that happens before it takes over.

``filelock`` has the first half of this alone: it neither names the holder nor sees one on another machine.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from litdiffusion.errors import UserError
from litdiffusion.system.files import WriteError

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
WATCH_SECONDS = 3 * BEAT_SECONDS
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

Holder = dict[str, str | int]
"""``host``, ``pid`` and ``started`` of a job."""

_held: set[int] = set()


def _close_in_child() -> None:
    """A forked worker that outlives a killed job must not keep its lock."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


class RunLock:
    """The right to write into a run folder.

    As a context it takes the lock where the folder exists already, and releases it in any case.

    Args:
        folder: the run folder.
        first: whether this is the first process of its job, which takes the lock; the others share it and do nothing.
        key: of the configuration that names the folder.
    """

    def __init__(self, folder: Path, first: bool = True, key: str = "run_dir") -> None:
        self.path = folder / ".lock"
        self._first, self._key = first, key
        self._descriptor: int | None = None
        self._released = Event()
        self._heartbeat: Thread | None = None

    def __enter__(self) -> "RunLock":
        if self.path.parent.is_dir():
            self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def take(self) -> bool:
        """Take the lock; return whether this call has taken it: False where it was ours already.

        Where the folder cannot be written, nothing is taken: what writes there says so.

        Raises:
            UserError: another job has it; the line names its host, process and start.
        """
        descriptor = self._open() if self._first and self._descriptor is None else None
        if descriptor is None:
            return False
        try:
            self._lock(descriptor)
            _write(descriptor, self.path)
        except BaseException:
            os.close(descriptor)
            raise
        _held.add(descriptor)
        self._descriptor = descriptor
        self._released.clear()
        self._heartbeat = Thread(target=self._beat, args=(descriptor,), daemon=True)
        self._heartbeat.start()
        return True

    def release(self) -> None:
        """Release the lock. The file stays, empty: removing it could remove the next holder's."""
        if self._descriptor is None or self._heartbeat is None:
            return
        self._released.set()
        self._heartbeat.join(BEAT_SECONDS)  # it may be stuck on a disk that does not answer
        with suppress(OSError):  # the folder may have become read-only meanwhile
            os.ftruncate(self._descriptor, 0)
        _held.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None

    def _open(self) -> int | None:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UserError(f"{self.path} is a link, which no run makes: remove it") from error
            if self.path.exists() and os.access(self.path.parent, os.W_OK):
                raise UserError(
                    f"{self.path} belongs to somebody else, who may be using this run_dir: choose another"
                ) from error
            return None

    def _lock(self, descriptor: int) -> None:
        """Take the kernel's lock, and make sure that no job on another machine is at work."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks = True
        except BlockingIOError:
            raise self._in_use(_read(descriptor, tries=20)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise WriteError.at(self.path, error) from error
            locks = False
            log.warning("%s: this file system has no locks; start no two jobs on it at once", self.path)
        before = _read(descriptor)
        if before is None or (locks and before.get("host") == socket.gethostname()):
            return  # released, or of a dead process: on this machine, a living one would have the kernel's lock
        log.info("%s names %s: waiting to see whether it is at work", self.path, _named(before))
        if _is_touched(descriptor):
            raise self._in_use(before)

    def _in_use(self, holder: Holder | None) -> UserError:
        return UserError(
            f"{self._key} {self.path.parent} is in use by {_named(holder)}: wait for that job, stop it, or choose"
            f" another {self._key}"
        )

    def _beat(self, descriptor: int) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a job on this machine, or on any where the file system's locks are shared, is at work in a folder."""
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _write(descriptor: int, path: Path) -> None:
    """Write host, process and time of start into the file.

    Raises:
        WriteError: the disk is full.
    """
    started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder: Holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError as error:
        raise WriteError.at(path, error) from error


def _read(descriptor: int, tries: int = 1) -> Holder | None:
    """Return the holder that the file names, or None; with several tries, wait for the holder to write its name."""
    for attempt in range(tries):
        time.sleep(0.05 if attempt else 0)
        with suppress(ValueError, RecursionError):
            holder = json.loads(os.pread(descriptor, 4096, 0))
            if isinstance(holder, dict):
                return holder
    return None


def _is_touched(descriptor: int) -> bool:
    before, deadline = os.fstat(descriptor).st_mtime_ns, time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(WATCH_SECONDS / 60)
        os.pread(descriptor, 1, 0)  # a network file system refreshes its times when a file is read
        if os.fstat(descriptor).st_mtime_ns != before:
            return True
    return False


def _named(holder: Holder | None) -> str:
    if holder is None:
        return "another job"
    host, pid, started = (str(holder.get(name, "unknown"))[:100] for name in ("host", "pid", "started"))
    return f"process {pid} on {host}, started {started}"
