"""Checkpoint files: self-contained, inert, written whole.

A checkpoint is Lightning's dictionary (``state_dict``, ``optimizer_states``, ``global_step``, ...) and our
``model_config``: the resolved configuration of denoiser and sampler as plain values. It is only ever opened
under ``weights_only``, so opening one runs no code from it.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from litdiffusion.errors import UserError
from litdiffusion.files import whole_file


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written; the file at ``path`` is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            torch.save(checkpoint, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = str(error).splitlines()[0]
        raise UserError(
            f"checkpoint {path} could not be written ({reason}): free space or choose another run_dir"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: there is no such file, it is cut short or damaged, or it is not one of ours.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a litdiffusion checkpoint: it holds more than tensors and plain values"
        ) from error
    except Exception as error:  # a file that is no checkpoint can trip the reader in any way
        raise UserError(
            f"checkpoint {path} is cut short or damaged: use another, such as previous.ckpt beside it"
        ) from error
    if (
        not isinstance(checkpoint, dict)
        or not {"state_dict", "model_config", "data_config", "global_step"} <= checkpoint.keys()
    ):
        raise UserError(f"{path} is not a litdiffusion checkpoint: it has no model_config")
    return checkpoint
