"""A seal on checkpoint files: a digest of everything in the file, kept in the file itself.

PyTorch's reader does not look at the checksums of its own format, so a flipped bit in a weight goes unseen. A file
that ``torch.save`` has written is a zip archive, and ends with the length and the text of a comment, which is empty.
The seal becomes that comment: the file stays one that ``torch.load`` and any zip tool read.
"""

import hashlib
import zipfile
from pathlib import Path
from typing import BinaryIO

NAME = b"litdiffusion sha256 "
SEAL_SIZE = len(NAME) + 64
END = b"PK\x05\x06"
END_SIZE = 22
"""Of the record that closes an archive, its last two bytes the length of the comment."""

CHUNK = 2**20


def seal(path: Path) -> None:
    """Seal a file that ``torch.save`` has just written.

    Raises:
        OSError: the disk is full.
        ValueError: it is no such file.
    """
    with path.open("rb+") as file:
        size = file.seek(0, 2)
        if not _is_end(_tail(file, END_SIZE), comment=0):
            raise ValueError(f"{path} is not an archive that ends without a comment")
        file.seek(size - 2)
        file.write(SEAL_SIZE.to_bytes(2, "little") + NAME)
        digest = _digest(file, size + len(NAME))
        file.seek(size + len(NAME))
        file.write(digest)


def fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file, or None: then every byte of it is as it was written.

    A file without a seal, as anybody's ``torch.save`` leaves it, is checked as far as its own checksums go.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        tail = _tail(file, END_SIZE + SEAL_SIZE)
        name, digest = tail[END_SIZE:][: len(NAME)], tail[END_SIZE:][len(NAME) :]
        if name == NAME and _is_end(tail[:END_SIZE], comment=SEAL_SIZE):
            same = _digest(file, size - 64) == digest
            return None if same else "its digest is not the one it was written with"
        if not _is_end(tail[-END_SIZE:], comment=0):
            return "its end is missing"
        return _fault_of_members(file, size)


def _fault_of_members(file: BinaryIO, size: int) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            # What is not packed cannot unfold: torch.save packs nothing.
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                return "its parts are compressed, as no checkpoint's are"
            if sum(member.file_size for member in members) > size:
                return "its parts are larger than the whole"
            bad = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # a damaged directory can trip the reader in any way
        return " ".join(str(error).split()) or type(error).__name__
    return None if bad is None else f"the checksum of {bad} does not fit"


def _tail(file: BinaryIO, count: int) -> bytes:
    file.seek(max(0, file.seek(0, 2) - count))
    return file.read(count)


def _is_end(record: bytes, comment: int) -> bool:
    return len(record) == END_SIZE and record[:4] == END and int.from_bytes(record[-2:], "little") == comment


def _digest(file: BinaryIO, count: int) -> bytes:
    """Of the first ``count`` bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    file.seek(0)
    while count > 0 and (chunk := file.read(min(CHUNK, count))):
        digest.update(chunk)
        count -= len(chunk)
    return digest.hexdigest().encode()
