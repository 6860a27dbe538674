"""What every entry point imports first.

With a release installed that is known to be bad, the command ends here, before that release is imported. And until
all the rest is imported, a Ctrl-C ends the command at once, not with a traceback out of somebody's imports.
"""

import signal
import sys

from litdiffusion.errors import UserError
from litdiffusion.system.version_check import require_sound_versions

_command = getattr(sys.modules["__main__"], "__spec__", None)
if (
    _command is not None
    and _command.name.startswith("litdiffusion.")  # python -m, and nobody who imports a command
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    require_sound_versions()
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
