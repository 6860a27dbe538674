"""Where a run came from: code, versions, hardware.

Never the environment, nor the address that the code was cloned from: both may hold secrets.
"""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from litdiffusion.system.redaction import redacted_code
from litdiffusion.system.version_check import installed_version

PACKAGES = ("litdiffusion", "torch", "lightning", "hydra-core", "datasets", "wandb", "numpy")
MAX_DIFF = 200_000  # characters


def provenance(seed: int) -> dict[str, Any]:
    """Describe this start of a run."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "git": _git(),
        "python": sys.version.split()[0],
        "versions": {name: installed_version(name) for name in PACKAGES},
        "hardware": _hardware(),
    }


def _git() -> dict[str, str] | None:
    """Commit and uncommitted changes of the checkout that the code runs from; None outside of one."""
    folder = Path(__file__).parent

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *words], capture_output=True, text=True, timeout=20, check=True
        ).stdout

    try:
        # A package installed into an environment inside some other checkout is not that checkout's code.
        ask("ls-files", "--error-unmatch", Path(__file__).name)
        diff = redacted_code(ask("diff", "HEAD"))
        return {"commit": ask("rev-parse", "HEAD").strip(), "diff": diff[:MAX_DIFF]}
    except (OSError, subprocess.SubprocessError):
        return None


def _hardware() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(),
    }


def _processor() -> str:
    """The model name where Linux tells it, with the widest vector instructions torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
