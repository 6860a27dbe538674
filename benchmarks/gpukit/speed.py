"""The kit's speed part: training and sampling of ours and of others, measured in turns.

Each contender is a process (``worker.py``). All build and compile at once; then they take turns, A B C, A B C, ...,
one at a time, so that a card that slows down slows all of them.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import IO, Any

ROUNDS = 3
SHARE_OF_WARMUP = 0.6
"""Of the time that there is: who has not compiled by then takes no turn."""
ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class Task:
    """What one contender is measured at."""

    contender: str
    network: str
    batch_size: int
    compiled: bool
    device: str


def tasks(dry_run: bool) -> list[Task]:
    """In order of value. The others are measured compiled alone: that is the best that they offer."""
    if dry_run:
        return [
            Task("ours", "tiny", 16, True, "cpu"),
            Task("ddpm_pytorch", "tiny", 16, False, "cpu"),
            Task("diffusers", "tiny", 16, False, "cpu"),
        ]
    return [
        Task(contender, network, batch_size, compiled, "cuda")
        for network, batch_size in (("blog", 128), ("cifar10", 512), ("blog", 1024), ("cifar10", 128))
        for contender, compiled in (
            ("ours", False),
            ("ours", True),
            ("ddpm_pytorch", True),
            ("diffusers", True),
        )
    ]


def measure(
    dry_run: bool,
    seconds: float,
    environment: dict[str, str],
    log: IO[str],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Take all measurements that the time allows; ``save`` is given what there is after each turn."""
    deadline = time.monotonic() + seconds
    wanted = tasks(dry_run)
    threads = str(max(1, (os.cpu_count() or 1) // max(1, sum(task.compiled for task in wanted))))
    environment = {**environment, "TORCHINDUCTOR_COMPILE_THREADS": threads}
    matmul = Worker({"contender": "matmul", "device": wanted[0].device}, environment, log)
    workers = [Worker(asdict(task), environment, log) for task in wanted]
    result: dict[str, Any] = {"matmul_tflops": None, "measurements": []}

    def write() -> None:
        result["measurements"] = [summary(worker, result["matmul_tflops"]) for worker in workers]
        save(result)

    try:
        warm = time.monotonic() + SHARE_OF_WARMUP * seconds
        for worker in [matmul, *workers]:
            worker.wait_until_ready(warm)
        write()
        rates = []
        for command in ["time", "profile", *["time"] * (0 if dry_run else ROUNDS - 1)]:
            if command == "time":
                rates.append(matmul.ask(command, deadline).get("tflops"))
                result["matmul_tflops"] = max((rate for rate in rates if rate), default=None)
            for worker in workers:
                if command == "time" or worker.task["contender"] == "ours":
                    worker.ask(command, deadline)
                    write()
    finally:
        for worker in [matmul, *workers]:
            worker.end()
    return result


class Worker:
    """A contender's process, and what it has answered."""

    def __init__(self, task: dict[str, Any], environment: dict[str, str], log: IO[str]) -> None:
        self.task = task
        self.about: dict[str, Any] = {}
        self.turns: list[dict[str, Any]] = []
        self.profile: dict[str, Any] | None = None
        self.fault: str | None = None
        self._lines: Queue[str] = Queue()
        program = str(Path(__file__).with_name("worker.py"))
        self._process = subprocess.Popen(
            [sys.executable, program, json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._last_words: list[str] = []
        Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        self._listener = Thread(target=self._keep, args=(self._process.stderr, log), daemon=True)
        self._listener.start()

    def wait_until_ready(self, deadline: float) -> None:
        """Wait for what it says when it has warmed up; end it where it has not by then."""
        answer = self._answer(deadline)
        if answer is None:
            self.fault = self.fault or "not reached: it was still building and compiling"
            self.end()
        else:
            self.about = answer

    def ask(self, command: str, deadline: float) -> dict[str, Any]:
        """Give it a turn, if there is time; keep and return what it answers, nothing where it does not."""
        if self.fault is not None or time.monotonic() > deadline:
            return {}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its end says why
        answer = self._answer(min(deadline, time.monotonic() + ANSWER_SECONDS))
        if answer is None:
            self.fault = self.fault or "no answer in time"
            self.end()
            return {}
        if command == "profile":
            self.profile = answer
        else:
            self.turns.append(answer)
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self, deadline: float) -> dict[str, Any] | None:
        while True:
            try:
                answer: dict[str, Any] = json.loads(self._lines.get(timeout=0.2))
                return answer
            except Empty:
                if self._process.poll() is not None and self._lines.empty():
                    self._listener.join(timeout=5)
                    words = [line for line in self._last_words if line.strip()]
                    self.fault = words[-1] if words else f"ended with code {self._process.returncode}"
                    return None
                if time.monotonic() > deadline:
                    return None

    def _read(self, lines: Iterator[str]) -> None:
        for line in lines:
            self._lines.put(line)

    def _keep(self, lines: Iterator[str], log: IO[str]) -> None:
        name = " ".join(str(value) for value in self.task.values())
        for line in lines:
            self._last_words = [*self._last_words[-20:], line.strip()]
            log.write(f"[{name}] {line}")


def summary(worker: Worker, peak: float | None) -> dict[str, Any]:
    """What a contender's turns come to: medians, rates, and the share of the matrix product's rate."""
    found = {**worker.task, **worker.about, "fault": worker.fault, "turns": worker.turns}
    found.pop("ready", None)
    if worker.turns:
        forward = worker.about["forward_gflop_per_image"]
        for what, passes in (("train", 3), ("sample", 1)):  # the backward pass costs two forward ones
            seconds = [turn[f"{what}_seconds"] for turn in worker.turns]
            speed = worker.task["batch_size"] / statistics.median(seconds)
            found[f"{what}_images_per_second"] = speed
            found[f"{what}_tflops"] = passes * forward * speed / 1e3
            found[f"{what}_of_peak"] = found[f"{what}_tflops"] / peak if peak else None
            found[f"{what}_peak_gib"] = worker.turns[-1][f"{what}_peak_gib"]
        if worker.profile:
            step = statistics.median(turn["train_seconds"] for turn in worker.turns) * 1e3
            idle = max(0.0, 1 - worker.profile["busy_ms"] / step)
            found["profile"] = {**worker.profile, "step_ms": step, "idle_share": idle}
    return found
