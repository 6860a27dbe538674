"""A process that shall not outlive the one that started it."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PARENT = "LITDIFFUSION_PARENT_PID"
"""Tells a process which one that is."""


def end_with_parent() -> None:
    """Have this process asked to stop when its parent dies without a word (``kill -9``), where Linux runs it.

    The job of a sweep would otherwise go on alone, and the repeated sweep would find its folder in use; and what
    Lightning starts for a run of several processes would wait half an hour for the first of them to answer.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it was faster
        sys.exit(128 + signal.SIGTERM)


@contextmanager
def children_end_with_this() -> Iterator[None]:
    """Have the processes that are started meanwhile end with this one, where they ask (``end_with_parent``)."""
    before = os.environ.get(PARENT)
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT, None)
        if before is not None:
            os.environ[PARENT] = before
