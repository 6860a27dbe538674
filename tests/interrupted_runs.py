"""Real runs in processes of their own, to be killed, stopped, repeated and compared bit for bit.

What ``tests/runs/test_interruption.py`` and ``tests/faults.py`` share.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from commands import type_command

COMMAND = [
    "debug=tiny",
    "trainer.max_steps=60",
    "trainer.val_check_interval=7",
    "callbacks.save_checkpoints.every_n_steps=7",
    "callbacks.monitor.every_n_steps=5",
    "+callbacks.rates._target_=lightning.pytorch.callbacks.LearningRateMonitor",
    "+trainer.log_every_n_steps=4",  # its rows, some of them at steps with a validation and a checkpoint
    "net.dropout=0.1",
    "net.self_condition=true",
]
"""A run with everything random in it, and something of every kind about to happen at any moment."""

PATIENCE_SECONDS = 300


def start(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start, or repeat, a run; it and the processes that it starts are a group of their own."""
    command = [sys.executable, "-m", "litdiffusion.train", *COMMAND, f"run_dir={run_dir}", *overrides]
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # for hold.py
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
        start_new_session=True,
    )


def finish(run_dir: Path, *overrides: str) -> str:
    """Run to the end and return what was said."""
    process = start(run_dir, *overrides)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    return output


def finish_here(run_dir: Path, *overrides: str) -> str:
    """Do the same in this process, which has its libraries imported."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        typed = type_command("train", *COMMAND, f"run_dir={run_dir}", *overrides)
    finally:
        torch.set_num_threads(threads)
    assert typed.code == 0, typed
    return typed.out + typed.err


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 the run with all its processes: a machine that loses its power."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run never came so far"
        time.sleep(0.005)


def rows(run_dir: Path) -> list[dict[str, str]]:
    """The logged numbers, but for those of the clock."""
    with (run_dir / "metrics.csv").open() as file:
        return [
            {name: cell for name, cell in row.items() if "per_second" not in name}
            for row in csv.DictReader(file)
        ]


def has_come_to(run_dir: Path, step: int) -> bool:
    """Whether this step has logged a row, or a later one has."""
    return (run_dir / "metrics.csv").exists() and int(rows(run_dir)[-1]["step"]) >= step


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs do not share: weights, averages, optimizer, callbacks, numbers, pictures."""
    first, second = (
        _leaves(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)) for run in (one, other)
    )
    found = [f"checkpoint{key}" for key in first.keys() ^ second.keys()]
    for key in first.keys() & second.keys():
        # Where Lightning resumes at a step with a validation, it counts that validation's batches again.
        if "val_loop" in key or "run_dir" in key or key.endswith(("/folder", "images_per_second")):
            continue
        value, there = first[key], second[key]
        same = torch.equal(value, there) if isinstance(value, torch.Tensor) else value == there
        found += [] if same else [f"checkpoint{key}"]
    found += [] if rows(one) == rows(other) else ["metrics.csv"]
    pictures = sorted(path.name for path in (one / "samples").iterdir())
    for name in pictures:
        there = other / "samples" / name
        same = there.exists() and (one / "samples" / name).read_bytes() == there.read_bytes()
        found += [] if same else [f"samples/{name}"]
    return found


def _leaves(value: Any, place: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {place: value}
    return {k: v for key, child in items for k, v in _leaves(child, f"{place}/{key}").items()}
