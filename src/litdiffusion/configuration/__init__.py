"""The configuration: composed by Hydra, checked against the constructors, built node by node."""

from pathlib import Path

from litdiffusion.errors import UserError


def config_folder() -> Path:
    """Return the folder of the configuration: inside an installed package, or beside ``src`` in a checkout.

    Raises:
        UserError: there is neither.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parents[1] / "configs"):
        if folder.is_dir():
            return folder
    raise UserError(f"{package / 'configs'}: the configuration is missing; install litdiffusion again")
