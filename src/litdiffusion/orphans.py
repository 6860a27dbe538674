"""A process that shall not outlive the one that started it."""

import ctypes
import os
import signal
import sys

PARENT = "LITDIFFUSION_PARENT_PID"
"""Tells a process which one that is."""


def end_with_parent() -> None:
    """Have this process asked to stop when its parent dies without a word (``kill -9``), where Linux runs it.

    The job of a sweep would otherwise go on alone, and the repeated sweep would find its folder in use.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it was faster
        sys.exit(128 + signal.SIGTERM)
