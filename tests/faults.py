"""make faults: interrupt real runs at random moments, repeat the command, compare with a run left in peace.

    python tests/faults.py [--times 25] [--seed 0] [--json PATH]

Half of the runs have two processes. Each is hit one to three times: by kill -9 of all its processes, kill -9 of one
of them, SIGTERM, SIGINT, or SIGUSR1 as Slurm sends it before a requeue, to all processes. The moments are drawn over
the whole length of the run, its start included: in the middle of an epoch, of a checkpoint, of a validation, of
sampling. Then it is repeated until it is finished. Its weights, averaged weights, optimizer state, logged numbers and
sample pictures must be those of the other run, bit for bit. Half of the runs are logged to W&B, offline, whose own
process is hit too, before the others or alone; its files must hold each row of numbers and each picture once.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from interrupted_runs import PATIENCE_SECONDS, differences, finish, kill, rows, start
from litdiffusion.runs.folder import RunFolder, shown_as
from litdiffusion.training.loggers.wandb import STEP
from offline_wandb import offline_history

PROCESSES = {1: [], 2: ["trainer=ddp_cpu"]}
WANDB = ["logger=wandb", "logger.wandb.mode=offline"]
KILL, KILL_ONE, KILL_WANDB = "kill -9", "kill -9 of one", "kill -9 of W&B's"
BLOWS = (KILL, "SIGTERM", "SIGINT", "SIGUSR1")


@dataclass
class Trial:
    processes: int
    blows: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.differs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every trial there")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    trials = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peaceful = {}
        for number in PROCESSES:
            began = time.monotonic()
            finish(folder / f"peace-{number}", *PROCESSES[number])
            peaceful[number] = time.monotonic() - began
        print(
            f"left in peace: {', '.join(f'{n} process(es) {s:.0f} s' for n, s in peaceful.items())}",
            flush=True,
        )
        for index in range(arguments.times):
            number = 1 + index % 2
            run_dir, with_wandb = folder / f"run-{index}", index % 4 < 2
            overrides = [*PROCESSES[number], *(WANDB if with_wandb else [])]
            blows = (*BLOWS, *([KILL_ONE] if number > 1 else []), *([KILL_WANDB] if with_wandb else []))
            trial = try_once(run_dir, Trial(number), blows, overrides, peaceful[number], moments)
            if not trial.differs:
                trial.differs = differences(folder / f"peace-{number}", run_dir)
            if with_wandb and not trial.differs:
                trial.differs = mistold(run_dir)
            trials.append(trial)
            outcome = "the same" if trial.passed else f"DIFFERS: {', '.join(trial.differs[:3])}"
            print(f"{index + 1:3}  {number} process(es)  {outcome:10}  {'; '.join(trial.blows)}", flush=True)
    failed = sum(not trial.passed for trial in trials)
    print(f"{len(trials) - failed} of {len(trials)} the same, bit for bit")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(trial) for trial in trials], indent=2) + "\n")
    sys.exit(failed > 0)


def try_once(
    run_dir: Path,
    trial: Trial,
    blows: Sequence[str],
    overrides: list[str],
    peaceful_seconds: float,
    moments: random.Random,
) -> Trial:
    """Hit a run one to three times and let it finish."""
    for _ in range(moments.randint(1, 3)):
        blow = moments.choice(blows)
        process = start(run_dir, *overrides)
        # Half of the time goes into starting up, which is a moment like any other, but not half of them.
        span = (0.0, 0.4) if moments.random() < 0.2 else (0.4, 1.0)
        time.sleep(moments.uniform(*span) * peaceful_seconds)
        if process.poll() is None:
            trial.blows.append(f"{blow} after step {last_row(run_dir)}")
            trial.differs += strike(process, blow, moments)
        else:
            process.communicate()
            if trial.blows:
                break
            shutil.rmtree(run_dir)  # a run that was never hit shows nothing: once more
            return try_once(run_dir, trial, blows, overrides, 0.8 * peaceful_seconds, moments)
    try:
        finish(run_dir, *overrides)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        trial.differs.append(f"could not be continued: {str(error)[-300:]}")
    return trial


def strike(process: subprocess.Popen[str], blow: str, moments: random.Random) -> list[str]:
    """Deal the blow, wait until every process of the run is gone, and return what was wrong with how they went."""
    if blow == KILL_WANDB or (blow != KILL_ONE and moments.random() < 0.5):
        for pid in wandb_processes(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[blow] if blow in signal.Signals.__members__ else signal.SIGKILL)
    if blow == KILL:
        kill(process)
        return []
    if blow == KILL_ONE:
        alive = members(process.pid)
        if alive:
            os.kill(moments.choice(alive), signal.SIGKILL)
    elif blow == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    elif blow != KILL_WANDB:  # as a terminal does, and Slurm
        os.killpg(process.pid, signal.Signals[blow])
    wrong = []
    try:
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        if "Traceback" in output:
            wrong.append(f"a traceback after {blow}")
        # One that has finished meanwhile ends with 0; one that was still starting had no handlers yet.
        if blow == KILL_WANDB:  # the training does not mind, unless it had not begun
            allowed = {0, 2}
        elif blow == KILL_ONE:
            allowed = {0, 2, -signal.SIGKILL}
        else:
            allowed = {0, 128 + signal.Signals[blow], -signal.Signals[blow]}
        if process.returncode not in allowed:
            wrong.append(f"exit code {process.returncode} after {blow}")
    except subprocess.TimeoutExpired:
        wrong.append(f"hung after {blow}")
        kill(process)
    deadline = time.monotonic() + 60
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    if members(process.pid):
        wrong.append(f"left processes behind after {blow}")
        os.killpg(process.pid, signal.SIGKILL)
    return wrong


def mistold(run_dir: Path) -> list[str]:
    """What W&B's files do not hold, of the numbers of ``metrics.csv`` and of the pictures, or hold beyond them."""
    due = {key: [int(row["step"]) for row in rows(run_dir) if row[key]] for key in ("train/loss", "val/loss")}
    for step, path in RunFolder(run_dir).pictures():
        due.setdefault(shown_as(path), []).append(step)
    history = offline_history(run_dir)
    told = {key: sorted({row[STEP] for row in history if key in row}) for key in due}
    return [
        f"W&B was told {key} at {told[key]}, of {due[key]}" for key in due if told[key] != sorted(due[key])
    ]


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    listed = subprocess.run(
        ["pgrep", "--pgroup", str(group), "python"], capture_output=True, text=True
    ).stdout
    return [int(word) for word in listed.split()]


def wandb_processes(group: int) -> list[int]:
    """What W&B writes with, in a group of its own."""
    parents = ",".join(map(str, members(group)))
    listed = subprocess.run(
        ["pgrep", "--parent", parents, "wandb-core"], capture_output=True, text=True
    ).stdout
    return [int(word) for word in listed.split()]


def last_row(run_dir: Path) -> str:
    try:
        return rows(run_dir)[-1]["step"]
    except (OSError, LookupError):
        return "0"


if __name__ == "__main__":
    main()
