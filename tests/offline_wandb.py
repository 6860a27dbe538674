"""What W&B's real client has written, offline, and a run that has it written."""

import json
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from wandb.proto import wandb_internal_pb2

from litdiffusion.training.loggers import CSVLogger, WandB

BLOCK, HEADER = 32 * 1024, 7


class Logging:
    """Logs as a training does, to ``metrics.csv`` and to W&B."""

    def __init__(self, run_dir: Path) -> None:
        self.wandb = WandB(str(run_dir), mode="offline")
        self.loggers = CSVLogger(str(run_dir / "metrics.csv")), self.wandb
        self.picture = run_dir / "picture.png"
        Image.new("L", (2, 2)).save(self.picture)
        self.wandb.describe({"seed": 3})

    def rows(self, steps: Iterable[int]) -> None:
        for step in steps:
            for logger in self.loggers:
                logger.log_metrics({"x": step, "images_seen": step}, step=step)

    def show(self, step: int) -> None:
        self.wandb.log_picture(self.picture, step=step, images_seen=step)


def offline_records(file: Path) -> Iterator[Any]:
    """Read W&B's offline file: LevelDB's log format, one protobuf a record; the last one may be cut short."""
    data, place, record = file.read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # no header fits the rest of a block
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        if place + HEADER + length > len(data):
            return
        record += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            record = b""
            yield message


def offline_history(run_dir: Path, awaited: int = 0) -> list[dict[str, Any]]:
    """The rows that a run has told W&B; W&B's own process writes ``awaited`` of them in its own time."""
    deadline = time.monotonic() + 20
    while len(rows := _history(run_dir)) < awaited and time.monotonic() < deadline:
        time.sleep(0.1)
    return rows


def _history(run_dir: Path) -> list[dict[str, Any]]:
    rows = []
    for file in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        for record in offline_records(file):
            if record.HasField("history"):
                rows.append(
                    {
                        (item.nested_key[0] if item.nested_key else item.key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
    return rows


def told_wandb(run_dir: Path, key: str) -> list[str]:
    """Where, in images seen, the run has told W&B this number; each place once, however often it was told there."""
    return sorted({str(row["images_seen"]) for row in offline_history(run_dir) if key in row}, key=int)
