"""What the machine can do: accelerators, their number, and bfloat16."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig

from litdiffusion.configuration.messages import shown, suggestion
from litdiffusion.errors import UserError

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true", "32", "bf16", "16", "64")
"""The precisions that training supports: none keeps the weights in half precision, which loses small updates."""
FP16 = ("16-mixed", "16")


def native_accelerator() -> str:
    """Return the best this machine has: "gpu" (CUDA), "mps" or "cpu"."""
    if torch.cuda.is_available():
        return "gpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def native_precision(accelerator: str) -> str:
    """Return "bf16-mixed" where the hardware computes in bfloat16 itself, else "32-true".

    Emulated bfloat16 (older GPUs, processors without its instructions) is slower than float32.
    """
    if accelerator in ("gpu", "cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator == "cpu":
        # Older releases of torch cannot tell.
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    else:
        native = False
    return "bf16-mixed" if native else "32-true"


def resolve_hardware(cfg: DictConfig) -> None:
    """Replace "auto" in ``trainer.accelerator`` and ``trainer.precision`` by what this machine has, in place.

    Raises:
        UserError: a precision that does not exist, an accelerator or devices that are not there, or float16 on a
            processor.
    """
    trainer = cfg.get("trainer")
    if not isinstance(trainer, DictConfig):
        return
    accelerator = str(trainer.get("accelerator", "auto"))
    if accelerator == "auto":
        accelerator = native_accelerator()
        _replace(trainer, "accelerator", accelerator)
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={accelerator}: this machine has no CUDA GPU; use trainer=cpu")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.accelerator=mps: this machine has no Apple GPU; use trainer=cpu")
    if accelerator == "tpu" and find_spec("torch_xla") is None:
        raise UserError("trainer.accelerator=tpu: this machine has no TPU; use trainer=cpu")

    precision = str(trainer.get("precision", "32-true"))
    if precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision={precision}: training does not work in it{suggestion(precision, PRECISIONS)}"
        )
    if precision == "auto":
        _replace(trainer, "precision", native_precision(accelerator))
    if accelerator == "cpu" and precision in FP16:
        raise UserError(
            f"trainer.precision={precision}: float16 needs a GPU; on a processor use trainer.precision=auto"
        )
    num_devices(trainer.get("devices", "auto"), accelerator)


def machine_memory() -> int:
    """Return how much memory this machine has, in bytes; where the system does not say, no limit."""
    if not hasattr(os, "sysconf"):  # Windows
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def num_devices(devices: Any, accelerator: str) -> int:
    """Return how many devices ``trainer.devices`` means on each node, as Lightning reads it.

    Raises:
        UserError: more than there are, or none.
    """
    there = {"gpu": torch.cuda.device_count(), "cuda": torch.cuda.device_count(), "mps": 1}.get(accelerator)
    if isinstance(devices, ListConfig | list) or (isinstance(devices, str) and "," in devices):
        listed = (
            [part for part in devices.split(",") if part.strip()] if isinstance(devices, str) else devices
        )
        indices = [_whole(part) for part in listed]
        if there is not None and any(index >= there for index in indices):
            raise UserError(f"trainer.devices={list(indices)}: this machine's are 0 to {there - 1}")
        count = len(indices)
    elif devices in ("auto", "-1", -1, None):
        return 1 if there is None else there
    else:
        count = _whole(devices)
    if count < 1:
        raise UserError(f"trainer.devices={devices}: at least one device is needed; use trainer.devices=auto")
    if there is not None and count > there:
        raise UserError(f"trainer.devices={devices}: this machine has {there}; use trainer.devices={there}")
    return count


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not str(value).strip().isdecimal():
        raise UserError(f"trainer.devices={value!r}: not a number of devices; use a number, a list, or auto")
    return int(value)


def _replace(node: DictConfig, name: str, value: str) -> None:
    if name in node:
        node[name] = value


def torch_device(name: str | int | torch.device | None) -> torch.device:
    """Return the device that ``device=NAME`` means; ``auto`` is the best there is, a number one of the GPUs.

    Each of the processes that torchrun has started on a machine gets a GPU of its own for ``auto``.

    Raises:
        UserError: there is no such device, or none that computes.
    """
    if name == "auto":
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        name = {"gpu": own}.get(native_accelerator(), native_accelerator())
    try:
        device = torch.device(shown(name))
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(
            f"device={shown(name)}: this machine has no such device; use device=auto or device=cpu"
        ) from error
    return device


@contextmanager
def native_autocast(device: torch.device) -> Iterator[str]:
    """Compute in bfloat16 where the device does so natively, as ``trainer.precision=auto`` does; yield its name."""
    precision = native_precision(device.type)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        yield precision
