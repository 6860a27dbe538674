"""The configuration: composed by Hydra, checked against the constructors, built node by node."""

from litdiffusion.configuration.entry import config_folder, entry_point
from litdiffusion.configuration.nodes import build, require_arguments, require_values

__all__ = ["entry_point", "config_folder", "build", "require_arguments", "require_values"]
