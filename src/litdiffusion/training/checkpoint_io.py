"""How Lightning's checkpoints reach the disk: whole or not at all, and back under ``weights_only``."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from litdiffusion.runs.checkpoint import read_checkpoint, write_checkpoint


class WholeCheckpointIO(TorchCheckpointIO):
    """Write under a temporary name, sync, rename; read with one clear line about what is wrong."""

    previous: Path | None = None
    """Where the next checkpoint moves the one whose place it takes."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``."""
        write_checkpoint(checkpoint, Path(path), self.previous)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read the checkpoint at ``path``, never running code from it."""
        return read_checkpoint(Path(path))
