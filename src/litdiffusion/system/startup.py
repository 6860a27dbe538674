"""What every entry point imports first: it ends the command where a release or the system will not do.

Until the task begins, a Ctrl-C ends the command at once, without a traceback out of the imports. And no command ends
because nobody reads what it prints.
"""

import errno
import io
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from litdiffusion.errors import UserError
from litdiffusion.system.version_check import require_sound_versions, require_unix


class Output(io.FileIO):
    """Standard output or error. What cannot be written (the terminal is closed, ``| head`` has ended) is dropped."""

    is_complete = True

    def write(self, data: Any, /) -> int:
        """Write, or drop; a full disk is reported once."""
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 1 and self.is_complete and error.errno not in (errno.EPIPE, errno.EIO):
                self.is_complete = False
                print(f"warning: some of the output could not be written ({error.strerror})", file=sys.stderr)
            return len(data)


def outlive_the_terminal() -> None:
    """Open the null device in place of standard streams that are closed, and let no other end the command."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)  # None where it was closed
        encoding, errors = (before.encoding, before.errors) if before else (None, None)
        if before:
            with suppress(OSError):
                before.flush()
        buffer = io.BufferedWriter(Output(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, errors, line_buffering=True))


_command = getattr(sys.modules["__main__"], "__spec__", None)
if _command is not None and _command.name.startswith(
    "litdiffusion."
):  # python -m, not an import of a command
    outlive_the_terminal()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    require_sound_versions()
    if _command is not None and _command.name == "litdiffusion.train":
        require_unix()
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
