"""The kit's speed part: training and sampling of ours and of others, measured in turns.

Each contender is a process (``worker.py``). All build and compile at once, from the kit's start on; then they take
turns, A B C, A B C, ..., one at a time, so that a card that slows down slows all of them.
"""

import json
import os
import re
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
SHARE_OF_WARMUP = 0.5
"""Of the part's time: who has not compiled by then takes no turn."""
ANSWER_SECONDS = 60.0
ABSENT = "absent:"
"""How the last word of a contender begins that has nothing to measure here, since its package is missing."""


@dataclass(frozen=True)
class Task:
    """What one contender is measured at."""

    contender: str
    network: str
    batch_size: int
    compiled: bool
    device: str


def tasks(dry_run: bool) -> list[Task]:
    """In order of value."""
    if dry_run:
        return [
            Task("ours", "tiny", 16, True, "cpu"),
            Task("ddpm_pytorch", "tiny", 16, False, "cpu"),
            Task("diffusers", "tiny", 16, False, "cpu"),
        ]
    return [
        Task(contender, network, batch_size, compiled, "cuda")
        for network, batch_size in (("blog", 128), ("cifar10", 512), ("blog", 1024), ("cifar10", 128))
        for contender in ("ours", "ddpm_pytorch", "diffusers")
        for compiled in (False, True)
        # Compiling is what takes time: the others are measured without it at two of the four settings alone.
        if compiled or contender == "ours" or (network, batch_size) in (("blog", 128), ("cifar10", 512))
    ]


class Contest:
    """The contenders, each in a process that builds and compiles from now on."""

    def __init__(self, dry_run: bool, environment: dict[str, str], log: IO[str]) -> None:
        wanted = tasks(dry_run)
        self.rounds = 1 if dry_run else ROUNDS
        threads = max(2, (os.cpu_count() or 1) // max(1, sum(task.compiled for task in wanted)))
        environment = {**environment, "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
        self.matmul = Worker({"contender": "matmul", "device": wanted[0].device}, environment, log)
        self.workers = [Worker(asdict(task), environment, log) for task in wanted]

    def measure(self, seconds: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Take the turns that the time allows; ``save`` is given what there is after each."""
        deadline = time.monotonic() + seconds
        result: dict[str, Any] = {}

        def write() -> None:
            rates = [turn["tflops"] for turn in self.matmul.turns]
            peak = max(rates, default=None)
            result.update(
                matmul_tflops=peak,
                matmul_fault=self.matmul.fault,
                measurements=[summary(worker, peak) for worker in self.workers],
            )
            save(result)

        warm = time.monotonic() + SHARE_OF_WARMUP * seconds
        for worker in [self.matmul, *self.workers]:
            worker.wait_until_ready(warm)
        write()
        for command in ["time", "profile", *["time"] * (self.rounds - 1)]:
            if command == "time":
                self.matmul.ask(command, deadline)
            for worker in self.workers:
                if command == "time" or worker.task["contender"] == "ours":
                    worker.ask(command, deadline)
                    write()
        return result

    def end(self) -> None:
        """End the processes."""
        for worker in [self.matmul, *self.workers]:
            worker.end()


class Worker:
    """A contender's process, and what it has answered."""

    def __init__(self, task: dict[str, Any], environment: dict[str, str], log: IO[str]) -> None:
        self.task = task
        self.about: dict[str, Any] = {}
        self.turns: list[dict[str, Any]] = []
        self.profile: dict[str, Any] | None = None
        self.fault: str | None = None
        self._longest = 0.0
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
        self._said: list[str] = []
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

    def ask(self, command: str, deadline: float) -> None:
        """Give it a turn, if there is time for one as long as its last; keep what it answers."""
        begun = time.monotonic()
        if self.fault is not None or begun + self._longest > deadline:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its end says why
        answer = self._answer(min(deadline, begun + ANSWER_SECONDS))
        if answer is None:
            if self.fault is None and begun + ANSWER_SECONDS < deadline:
                self.fault = f"no answer within {ANSWER_SECONDS:.0f} s"
            self.end()
            return
        self._longest = max(self._longest, time.monotonic() - begun)
        if command == "profile":
            self.profile = answer
        else:
            self.turns.append(answer)

    def end(self) -> None:
        """End the process, and hear it out."""
        self._process.kill()
        self._process.wait()
        self._listener.join(timeout=5)

    def _answer(self, deadline: float) -> dict[str, Any] | None:
        while True:
            try:
                answer: dict[str, Any] = json.loads(self._lines.get(timeout=0.2))
                return answer
            except Empty:
                if self._process.poll() is not None and self._lines.empty():
                    self._listener.join(timeout=5)
                    self.fault = last_words(self._said) or f"ended with code {self._process.returncode}"
                    return None
                if time.monotonic() > deadline:
                    return None

    def _read(self, lines: Iterator[str]) -> None:
        for line in lines:
            self._lines.put(line)

    def _keep(self, lines: Iterator[str], log: IO[str]) -> None:
        name = " ".join(str(value) for value in self.task.values())
        for line in lines:
            self._said = [*self._said[-200:], line.strip()]
            log.write(f"[{name}] {line}")


def last_words(said: list[str]) -> str | None:
    """Return the line that says why a process has ended: that of its error, if there is one, else the last."""
    errors = [line for line in said if re.match(rf"[\w.]*(Error|Exception)\b|{ABSENT}", line)]
    words = errors or [line for line in said if line]
    return words[-1] if words else None


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
            busy = worker.profile["busy_ms"]
            idle = None if busy is None else max(0.0, 1 - busy / step)
            found["profile"] = {**worker.profile, "step_ms": step, "idle_share": idle}
    return found
