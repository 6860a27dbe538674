"""Answers what runs no job (--help, --cfg, --info, tab completion) before torch is imported, which takes seconds.

Entry points import this before torch.
"""

import sys

from litdiffusion.configuration.entry import entry_point

QUESTIONS = {
    "-h",
    "--help",
    "--hydra-help",
    "--version",
    "-c",
    "--cfg",
    "-i",
    "--info",
    "-sc",
    "--shell-completion",
}

_command = getattr(sys.modules["__main__"], "__spec__", None)
if (
    _command is not None
    and _command.name.startswith("litdiffusion.")  # python -m, not an import of a command
    and QUESTIONS & {argument.partition("=")[0] for argument in sys.argv[1:]}
):
    entry_point(_command.name.rpartition(".")[2])(lambda cfg: None)()
    sys.exit()
