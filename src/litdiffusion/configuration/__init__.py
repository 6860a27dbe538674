"""The configuration: composed by Hydra, checked against the constructors, built node by node."""

from litdiffusion.configuration.allowlist import require_allowed
from litdiffusion.configuration.checks import require_compatible, validate
from litdiffusion.configuration.folder import config_folder
from litdiffusion.configuration.hardware import native_accelerator, native_precision, resolve_hardware
from litdiffusion.configuration.nodes import build, require_arguments, require_values

__all__ = [
    "config_folder",
    "validate",
    "require_values",
    "require_arguments",
    "require_compatible",
    "require_allowed",
    "resolve_hardware",
    "native_accelerator",
    "native_precision",
    "build",
]
