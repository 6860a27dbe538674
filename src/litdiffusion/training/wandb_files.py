"""What W&B's client has written down of a run: its own files, which it has no reader for.

A file is a log in LevelDB's format (github.com/google/leveldb, doc/log_format.md): after a header of W&B's, records
in blocks of 32 KiB, each a protobuf message, or a part of one where a block ends.
"""

import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litdiffusion.files import write_text

BLOCK = 32 * 1024
OF_FILE, OF_RECORD = 7, 7
"""Bytes of the headers."""
WHOLE, LAST = 1, 4
"""Kinds of parts with which a record is complete."""

STEP = "trainer/global_step"

SENT = "all_sent_until"
"""The file, beside W&B's, that says when a start of the run has last waited for all to arrive."""

STARTS = "starts"
"""The file, beside W&B's, that names the folder of each start of the run."""


def told(folder: Path, run_id: str, but_for_seconds: float = 0.0) -> dict[int, set[str]]:
    """Return which numbers and pictures a run was told, by step: what its files hold, however they end.

    Args:
        folder: W&B's in the run folder.
        run_id: the run's; each of its starts has a file.
        but_for_seconds: what each start was told in its last seconds is left out, unless all has been sent since.
    """
    found: defaultdict[int, set[str]] = defaultdict(set)
    sent = _all_sent_until(folder)
    for file in sorted(folder.glob(f"*run-*/run-{run_id}.wandb")):
        if file.is_file():
            rows = list(_history(file.read_bytes()))
            end = max(max(map(_time, rows), default=0.0) - but_for_seconds, sent)
            for row in rows:
                if (step := row.get(STEP, "")).isdecimal() and _time(row) <= end:
                    found[int(step)] |= row.keys()
    return dict(found)


def note_all_sent(folder: Path) -> None:
    """Write down that what the run has been told so far has arrived."""
    write_text(folder / SENT, f"{time.time()}\n")


def note_start(folder: Path, name: str) -> None:
    """Write down that the run has been started, with files in a folder of this name."""
    write_text(folder / STARTS, "".join(f"{each}\n" for each in [*_starts(folder), name]))


def starts_are_gone(folder: Path) -> bool:
    """Whether files of a start have been removed since, as ``wandb sync --clean`` does when it has sent them."""
    return not all((folder / name).exists() for name in _starts(folder))


def _starts(folder: Path) -> list[str]:
    try:
        return (folder / STARTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _all_sent_until(folder: Path) -> float:
    try:
        return float((folder / SENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def _history(data: bytes) -> Iterator[dict[str, str]]:
    """The rows, each value as JSON, up to the end or to where a kill has cut the file."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    for record in _records(data):
        message: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # made when it is imported
        try:
            message.ParseFromString(record)
        except DecodeError:
            return
        if message.HasField("history"):
            items = message.history.item
            yield {(item.nested_key[0] if item.nested_key else item.key): item.value_json for item in items}


def _time(row: dict[str, str]) -> float:
    """When it was told, in seconds."""
    try:
        return float(row["_timestamp"])
    except (KeyError, ValueError):
        return 0.0


def _records(data: bytes) -> Iterator[bytes]:
    place, record = OF_FILE, b""
    while place + OF_RECORD <= len(data):
        if BLOCK - place % BLOCK < OF_RECORD:  # no header fits the rest of a block
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + OF_RECORD])
        place += OF_RECORD
        if place + length > len(data):
            return
        record += data[place : place + length]
        place += length
        if kind in (WHOLE, LAST):
            yield record
            record = b""
