"""Helper processes that go on when a run is asked to stop.

Slurm asks every process of a job, and W&B's own process (``wandb-core``), which holds what it has not written or sent
yet, drops it and exits at the first SIGINT or SIGTERM. It cannot be told otherwise: it installs handlers, which beats
whatever it inherits. So it is started where the kernel (Linux's seccomp) lets that one system call, for those two
signals, succeed without doing anything. They stay ignored, as inherited. The run tells its helpers when to end.
"""

import ctypes
import platform
import signal
import struct
import sys
from collections.abc import Callable
from threading import Thread

UNHEARD = (signal.SIGINT, signal.SIGTERM)

RT_SIGACTION = {"x86_64": (0xC000003E, 13), "aarch64": (0xC00000B7, 134)}
"""By machine: the kernel's name for its system calls, and the number of the one that installs a handler."""

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # instructions: load a word, jump if it equals, return
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16  # offsets into struct seccomp_data
ALLOW, PRETEND = 0x7FFF0000, 0x00050000  # let the call through; return 0 instead of it


def start_deaf(start: Callable[[], object]) -> None:
    """Call ``start``; the processes that it starts do not hear SIGINT and SIGTERM, and cannot learn to.

    Where the kernel is another than Linux's, or refuses, they can learn to. The filter is one of a thread, which ends
    here; to be called from the main thread, whose handlers change for a moment.
    """
    errors: list[BaseException] = []

    def run() -> None:
        _keep_dispositions()
        try:
            start()
        except BaseException as error:
            errors.append(error)

    heard = {signum: signal.signal(signum, signal.SIG_IGN) for signum in UNHEARD}
    try:
        thread = Thread(target=run)
        thread.start()
        thread.join()
    finally:
        for signum, handler in heard.items():
            signal.signal(signum, handler)
    if errors:
        raise errors[0]


def _keep_dispositions() -> None:
    """Have this thread, and what it starts, fail to notice that handlers for ``UNHEARD`` are not installed."""
    if sys.platform != "linux" or platform.machine() not in RT_SIGACTION:
        return
    architecture, rt_sigaction = RT_SIGACTION[platform.machine()]
    last = len(UNHEARD)
    # Each line: instruction, how many lines to skip if equal, if not, and a value.
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 0, 3 + last, architecture),
        (LOAD, 0, 0, NUMBER),
        (EQUAL, 0, 1 + last, rt_sigaction),
        (LOAD, 0, 0, ARGUMENT),
        *((EQUAL, last - i, 0, signum) for i, signum in enumerate(UNHEARD)),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, PRETEND),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # or only root might filter
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header)
