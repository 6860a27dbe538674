"""Checkpoint files: self-contained, inert, written whole, verified when they are read.

A checkpoint is Lightning's dictionary (``state_dict``, ``optimizer_states``, ``global_step``, ...) and our
``model_config``: the resolved configuration of denoiser and sampler as plain values. It is only ever opened
under ``weights_only``, so opening one runs no code from it.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from litdiffusion.errors import UserError, short_text
from litdiffusion.system.files import WriteError, hardlink, whole_file

CONTENT = {"state_dict": dict, "model_config": dict, "data_config": dict, "global_step": int}
"""What every checkpoint holds."""


FORMAT = 2
"""Of checkpoints of this release; 0.1.0 wrote none."""

END = b"PK\x05\x06"
"""The first bytes of the record that closes a zip archive: 22 bytes and a comment."""


class DamagedCheckpointError(UserError):
    """A file that is not what was once written: cut short, or with bits flipped."""


def write_checkpoint(checkpoint: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write a checkpoint, whole or not at all.

    What ``path`` held becomes ``previous``, but not before the new one is whole: until then both are there.

    Raises:
        WriteError: the disk is full or the folder cannot be written; the file at ``path`` is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            with temporary.open("wb") as file:
                torch.save({**checkpoint, "format": FORMAT}, file)
            if previous is not None and path.exists():
                hardlink(path, previous)
    except WriteError:
        raise
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        raise WriteError.at(path, error) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        DamagedCheckpointError: it is cut short or damaged.
        UserError: there is no such file, it cannot be read, or it is not one of ours.
    """
    if not path.is_file():
        inside = path / "checkpoints" / "last.ckpt"
        way_out = f": that is a run folder, whose newest is {inside}" if inside.is_file() else ""
        raise UserError(f"there is no checkpoint at {path}{way_out}")
    try:
        if reason := verify(path):
            raise _damaged(path, reason)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a litdiffusion checkpoint: it holds more than tensors and plain values"
        ) from error
    except Exception as error:  # a file that is no checkpoint can trip the reader in any way
        raise _damaged(path, "it cannot be unpacked") from error
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(name), kind) for name, kind in CONTENT.items()
    ):
        raise UserError(f"{path} is not a litdiffusion checkpoint: it lacks {', '.join(CONTENT)}")
    if checkpoint.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path} was written by another release of litdiffusion, which this one cannot continue or"
            " sample from: use that release, or train anew"
        )
    return checkpoint


def verify(path: Path) -> str | None:
    """Return what is wrong with a file of ``torch.save``, or None: then it holds what was written.

    Such a file is a zip archive with the CRC-32 of each of its members, which ``torch.load`` does not compare.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members, size = archive.infolist(), path.stat().st_size
            with path.open("rb") as file:
                file.seek(-len(END) - 18 - len(archive.comment), 2)
                if file.read(len(END)) != END:
                    return "its end is missing"
            # torch.save packs nothing, so that nothing can expand; torch reads what is marked as a folder as empty.
            if any(
                member.compress_type != zipfile.ZIP_STORED or member.external_attr & 0x10
                for member in members
            ):
                return "its members are not those of a checkpoint"
            if sum(member.file_size for member in members) > size:
                return "its members are larger than the whole"
            bad = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # a damaged directory can trip the reader in any way
        return short_text(error)
    return None if bad is None else f"the checksum of {bad} does not fit"


def _damaged(path: Path, reason: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"checkpoint {path} is cut short or damaged ({reason}): use another, such as previous.ckpt beside it"
    )
