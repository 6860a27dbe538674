"""A process that must not outlive the one that started it."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PARENT = "LITDIFFUSION_PARENT_PID"
"""The variable that names the parent to a process that shall end with it."""


def end_with_parent() -> None:
    """On Linux, have the kernel send this process SIGTERM when its parent dies, by ``kill -9`` too.

    The job of a sweep would otherwise run on, and the repeated sweep would find its folder in use; and the processes
    that Lightning starts for a run would wait half an hour for the first of them to answer.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it has died already
        sys.exit(128 + signal.SIGTERM)


@contextmanager
def children_end_with_this() -> Iterator[None]:
    """Have the processes that are started in the block call ``end_with_parent`` on this one."""
    before = os.environ.get(PARENT)
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT, None)
        if before is not None:
            os.environ[PARENT] = before
