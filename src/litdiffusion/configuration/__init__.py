"""The configuration: composed by Hydra, checked against the constructors, built node by node."""

from litdiffusion.configuration.checks import check_config, validate
from litdiffusion.configuration.entry import config_folder, entry_point
from litdiffusion.configuration.hardware import native_accelerator, native_precision, resolve_hardware
from litdiffusion.configuration.nodes import build, check_nodes
from litdiffusion.configuration.targets import check_targets
from litdiffusion.configuration.values import check_values

__all__ = [
    "entry_point",
    "config_folder",
    "validate",
    "check_values",
    "check_nodes",
    "check_config",
    "resolve_hardware",
    "native_accelerator",
    "native_precision",
    "build",
    "check_targets",
]
