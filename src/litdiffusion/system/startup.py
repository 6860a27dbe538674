"""What every entry point imports first: it ends the command where a release or the system will not do.

Until everything else is imported, a Ctrl-C ends the command at once, without a traceback out of the imports.
"""

import signal
import sys

from litdiffusion.errors import UserError
from litdiffusion.system.version_check import require_sound_versions, require_unix

_command = getattr(sys.modules["__main__"], "__spec__", None)
if (
    _command is not None
    and _command.name.startswith("litdiffusion.")  # python -m, not an import of a command
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    require_sound_versions()
    if _command is not None and _command.name == "litdiffusion.train":
        require_unix()
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
