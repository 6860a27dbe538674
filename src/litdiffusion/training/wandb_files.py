"""What W&B's client has written down of a run: its own files, which it has no reader for.

A file is a log in LevelDB's format (github.com/google/leveldb, doc/log_format.md): after a header of W&B's, records
in blocks of 32 KiB, each a protobuf message, or a part of one where a block ends.
"""

import json
import re
import struct
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
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

STARTS = "starts.json"
"""The file, beside W&B's, that says of each start of the run what it has told."""

Until = dict[str, int]
"""The last step at which a number or a picture was told, by its name. All before it has been told as well: what was
lost is told when the run is opened next."""


def told(folder: Path, run_id: str, but_for_seconds: float = 0.0) -> dict[int, set[str]]:
    """Return which numbers and pictures a run was told, by step: what its files hold, however they end.

    Args:
        folder: W&B's in the run folder.
        run_id: the run's; each of its starts has a file.
        but_for_seconds: what each start was told in its last seconds is left out, unless all has been sent since.

    Raises:
        OSError: a file cannot be read.
    """
    found: defaultdict[int, set[str]] = defaultdict(set)
    sent = _all_sent_until(folder)
    for file in sorted(folder.glob(f"*run-*/run-{run_id}.wandb")):
        rows = _rows(file)
        end = max(max(map(_time, rows), default=0.0) - but_for_seconds, sent)
        for row in rows:
            if _time(row) <= end:
                found[_step(row)] |= row.keys()
    return dict(found)


def note_all_sent(folder: Path) -> None:
    """Write down that what the run has been told so far has arrived."""
    write_text(folder / SENT, f"{time.time()}\n")


def starts(folder: Path, run_id: str, logged: Until) -> dict[str, Until]:
    """Return what each start of the run has told, by the name of its folder.

    Args:
        folder: W&B's in the run folder.
        run_id: the run's.
        logged: what had been logged when the training was resumed. A start that was killed, and whose files were
            removed before anybody had looked, has told as much, as far as anybody knows.

    Raises:
        OSError: a file cannot be read.
    """
    found = {}
    for name, noted in _noted(folder).items():
        if name.endswith(f"-{run_id}"):
            if (folder / name).exists():
                found[name] = _until(folder / name / f"run-{run_id}.wandb")
            else:
                found[name] = logged if noted is None else noted
    return found


def told_by_what_is_gone(folder: Path, starts: dict[str, Until]) -> Until:
    """Return what was told by files that are there no more: ``wandb sync --clean`` removes what it has sent."""
    return _latest(until for name, until in starts.items() if not (folder / name).exists())


def note_starts(folder: Path, starts: Mapping[str, Until | None]) -> None:
    """Write down what the starts of the run have told; None for one whose end nobody has seen yet."""
    write_text(folder / STARTS, json.dumps(starts, indent=1) + "\n")


def _noted(folder: Path) -> dict[str, Until | None]:
    """What has been written down, as far as it can be read: the folder may come from elsewhere."""
    if not (folder / STARTS).exists():
        return {}
    try:
        noted = json.loads((folder / STARTS).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return {
        name: until
        for name, until in (noted.items() if isinstance(noted, dict) else ())
        if re.fullmatch(r"[\w-]{1,100}", name, re.ASCII)
        and (until is None or (isinstance(until, dict) and all(type(step) is int for step in until.values())))
    }


def _until(file: Path) -> Until:
    return _latest(dict.fromkeys(row, _step(row)) for row in _rows(file))


def _latest(parts: Iterable[Until]) -> Until:
    latest: Until = {}
    for part in parts:
        for key, step in part.items():
            latest[key] = max(step, latest.get(key, step))
    return latest


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


def _rows(file: Path) -> list[dict[str, str]]:
    """The rows of a file that are of a step. A link is no file of W&B's, and may lead anywhere."""
    if file.is_symlink() or not file.is_file():
        return []
    now = file.stat()
    return _rows_as_of(file, now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=32)
def _rows_as_of(file: Path, size: int, changed: int) -> list[dict[str, str]]:
    return [
        row for row in _history(file.read_bytes()) if re.fullmatch(r"\d{1,18}", row.get(STEP, ""), re.ASCII)
    ]


def _step(row: dict[str, str]) -> int:
    return int(row[STEP])


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
