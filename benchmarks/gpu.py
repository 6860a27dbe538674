"""The GPU kit: one command, under eight minutes on one card, that runs whatever a GPU is needed for.

    make gpu                                      # or: python benchmarks/gpu.py
    PY=python3 WHEELS=DIR make gpu                # with that interpreter as it is, without a network
    make gpu ARGS=--dry-run                       # every part in small, on the CPU

Its parts run in order of their value, each under a limit of its own; one that fails does not stop the others. After
each, ``gpu.json`` and ``gpu.md`` in ``$OUT`` (default ``benchmarks/results``) hold what there is. Missing packages
come from the folder of wheels that ``WHEELS`` names (``make gpu-wheels`` fills one), Fashion-MNIST from the folder
that ``LITDIFFUSION_DATA`` names. docs/gpu.md says what the parts are.

Exit code: 0 if all parts held, 1 if not, 2 if there is no GPU or a package is missing.
"""

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpukit import report, speed
from gpukit.wheels import install_missing

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 465.0
"""From the start of this program to the end of its last part; what a part leaves goes to those after it."""
STARTED = time.monotonic()
TRAINING_SECONDS = 120.0
"""Of the quality part."""
AROUND_IT_SECONDS = 25.0
"""Before it, to start; after it, to validate, to draw and to sample."""
RESULTS = ("gpu.json", "gpu.md")
OTHER_FILES = (
    *("gpu-tests.log", "gpu-speed.log", "gpu-quality.log"),
    *("gpu-samples.png", "gpu-denoising.gif", "gpu-curves.png"),
)


@dataclass
class Kit:
    """What all parts share: where results go, what children see, and what is known so far."""

    out: Path
    dry_run: bool
    environment: dict[str, str]
    results: dict[str, Any]
    contest: speed.Contest | None = None
    deadline: float = STARTED + TOTAL_SECONDS

    def call(self, *words: str, log: str, seconds: float, **environment: str) -> int | None:
        """Run this interpreter with its output in a file; return its exit code, None if the time was not enough.

        Whatever it has started is ended with it.
        """
        marker = f"call-{os.getpid()}-{time.monotonic_ns()}"
        with (self.out / log).open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=self.environment | environment | {MARKER: marker},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            try:
                return process.wait(timeout=max(seconds, 1.0))
            except subprocess.TimeoutExpired:
                return None
            finally:
                process.kill()
                process.wait()
                end_all(marker)

    def save(self) -> None:
        """Write the JSON file and the page, each whole or not at all."""
        for name, text in zip(
            RESULTS, (json.dumps(self.results, indent=1) + "\n", report.page(self.results)), strict=True
        ):
            temporary = self.out / f".{name}"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.out / name)


MARKER = "LITDIFFUSION_GPU_CALL"
"""In the environment of all that a call starts, groups and sessions of their own included."""


def end_all(marker: str) -> None:
    """End every process that a call has started and left behind; Linux tells their environments."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARKER}={marker}\0".encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


@dataclass(frozen=True)
class Part:
    """A part of the kit.

    ``run(kit, seconds, part)`` fills in ``part["details"]`` as it goes, and returns whether it held and a sentence.
    """

    name: str
    limit: float
    run: Callable[[Kit, float, dict[str, Any]], tuple[bool, str]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="every part in small, on the CPU")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART")
    arguments = parser.parse_args()
    parts = [part for part in PARTS if arguments.only is None or part.name in arguments.only]
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # so that children end, too
    with tempfile.TemporaryDirectory(prefix="litdiffusion-gpu-") as folder:
        try:
            kit = prepare(Path(folder), arguments.dry_run, parts)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            if any(part.name == "speed" for part in parts):
                log = (kit.out / "gpu-speed.log").open("w", encoding="utf-8")
                kit.contest = speed.Contest(kit.dry_run, kit.environment, log)
            for part in parts:
                run(kit, part)
        finally:
            if kit.contest:
                kit.contest.end()
            print()
            for name, part in kit.results["parts"].items():
                print(f"{name:<8} {part['state']:<12} {part['summary']}")
            print(f"\n{kit.out / 'gpu.md'} has the details.")
    return 0 if all(part["state"] == "held" for part in kit.results["parts"].values()) else 1


def prepare(folder: Path, dry_run: bool, parts: list["Part"]) -> Kit:
    """Install what is missing, and look at what there is.

    Raises:
        OSError: there is no GPU, or something is missing still.
        subprocess.SubprocessError: a wheel cannot be installed, or the child does not answer.
    """
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / ("dry-run" if dry_run else ""))
    path = [str(ROOT / "src"), str(folder / "packages")]
    sys.path.append(path[-1])
    if wheels := os.environ.get("WHEELS"):
        try:
            installed = install_missing(Path(wheels), folder / "packages")
        except subprocess.SubprocessError as error:
            raise OSError(f"pip could not install the wheels in {wheels} (its message is above)") from error
        print(f"Installed from {wheels}: {', '.join(installed) or 'nothing, all is there'}", flush=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    if before := os.environ.get("PYTHONPATH"):
        path.append(before)
    environment["PYTHONPATH"] = os.pathsep.join(path)
    if data := os.environ.get("LITDIFFUSION_DATA"):
        environment["LITDIFFUSION_DATA"] = str(Path(data).absolute())  # the children run in the checkout
    environment["LITDIFFUSION_GPU_DRY_RUN"] = "1" if dry_run else ""
    if dry_run:
        environment["OMP_NUM_THREADS"] = "1"  # its processes share the cores
    looked = subprocess.run(
        [sys.executable, "-c", LOOK], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    if looked.returncode:
        why = (looked.stderr.strip() or "no reason given").splitlines()[-1]
        raise OSError(
            f"litdiffusion cannot be imported ({why}); name a folder of wheels: WHEELS=DIR make gpu"
        )
    machine = json.loads(looked.stdout.splitlines()[-1])
    if machine["card"] is None and not dry_run:
        raise OSError(
            "torch sees no CUDA GPU here; `make gpu ARGS=--dry-run` goes through the kit on the CPU"
        )
    results = {
        "machine": machine,
        "date": date.today().isoformat(),
        "commit": commit(),
        "dry_run": dry_run,
        "parts": {part.name: {"state": "not reached", "summary": "", "seconds": 0.0} for part in parts},
    }
    kit = Kit(out, dry_run, environment, results)
    out.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        if (out / name).is_file():
            (out / name).replace((out / name).with_stem("gpu.previous"))
    for name in OTHER_FILES:
        (out / name).unlink(missing_ok=True)
    kit.save()
    return kit


LOOK = """
import json, os, platform, torch
there, has_data = torch.cuda.is_available(), True
if there or os.environ["LITDIFFUSION_GPU_DRY_RUN"]:
    import litdiffusion.train, pytest
    from litdiffusion.data.fetch import default_folder
    from litdiffusion.data.sources.fashion_mnist import find_folder
    has_data = find_folder(default_folder()) is not None
card = torch.cuda.get_device_properties(0) if there else None
print(json.dumps({
    "card": card.name if there else None,
    "memory_gib": round(card.total_memory / 2**30, 1) if there else None,
    "has_data": has_data,
    "cuda": torch.version.cuda, "torch": torch.__version__, "python": platform.python_version(),
}))
"""
"""What a child finds on this machine; where there is nothing to do, it does not wait for imports."""


def commit() -> str | None:
    """The commit of this checkout, where git can tell."""
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def run(kit: Kit, part: Part) -> None:
    """Run a part if there is time for it, and write down what came of it."""
    entry = kit.results["parts"][part.name]
    seconds = min(part.limit, kit.deadline - time.monotonic())
    if seconds < 10:
        entry["summary"] = f"the {TOTAL_SECONDS:.0f} s of all parts were over"
        return
    print(f"{part.name}: at most {seconds:.0f} s ...", flush=True)
    entry.update(state="failed", summary="it was interrupted", details={})
    start = time.monotonic()
    try:
        held, entry["summary"] = part.run(kit, seconds, entry)
        entry["state"] = "held" if held else "failed"
    except Exception as error:  # whatever is wrong with one part, the others are wanted
        entry["summary"] = f"{type(error).__name__}: {error}"
    finally:
        entry["seconds"] = round(time.monotonic() - start, 1)
        try:
            kit.save()
        except OSError as error:  # a disk that is full now may be enough for what comes
            print(f"warning: {error}", flush=True)


# ------------------------------------------------------------------------------------------------------- tests


def run_tests(kit: Kit, seconds: float, part: dict[str, Any]) -> tuple[bool, str]:
    """The tests marked ``gpu``."""
    words = ["-m", "pytest", "-m", "gpu", "tests/gpu", "-v", "--color=no", "-p", "no:cacheprovider"]
    if find_spec("pytest_timeout"):
        words.append("--timeout=110")  # one that hangs leaves time for the others
    if find_spec("xdist") and not kit.dry_run:
        words += ["--numprocesses=4", "--dist=worksteal"]
    code = kit.call(*words, log="gpu-tests.log", seconds=seconds, COLUMNS="300")
    text = (kit.out / "gpu-tests.log").read_text(encoding="utf-8")
    outcomes = read_outcomes(text)
    reasons = re.findall(r"^((?:FAILED|ERROR|SKIPPED) .*)$", text, flags=re.MULTILINE)
    part["details"] = {"outcomes": outcomes, "reasons": reasons}
    counts = {word: list(outcomes.values()).count(word) for word in ("passed", "failed", "error", "skipped")}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "no test has run"
    if not outcomes:
        part["details"]["reasons"] = text.strip().splitlines()[-3:]
    if code is None:
        told += f"; the others were not reached in {seconds:.0f} s"
    return code == 0 and counts["passed"] > 0, told


def read_outcomes(text: str) -> dict[str, str]:
    """What became of each test, from the lines that ``pytest -v`` prints, with several processes or one."""
    name, outcome = r"(?P<name>tests/\S+::.+?)", r"(?P<outcome>PASSED|FAILED|ERROR|SKIPPED)"
    alone = rf"^{name} {outcome}\b.*$"
    among_several = rf"^\[gw\d+\] \[ *\d+%\] {outcome} {name}\s*$"
    found = {}
    for pattern in (alone, among_several):
        for match in re.finditer(pattern, text, flags=re.MULTILINE):
            found[match["name"]] = match["outcome"].lower()
    return found


# ------------------------------------------------------------------------------------------------------- speed


def run_speed(kit: Kit, seconds: float, part: dict[str, Any]) -> tuple[bool, str]:
    """Training and sampling beside others."""

    def save(details: dict[str, Any]) -> None:
        part["details"] = details
        kit.save()

    assert kit.contest is not None
    details = kit.contest.measure(seconds, save)
    measured = [each for each in details["measurements"] if each["turns"]]
    absent = [each for each in details["measurements"] if (each["fault"] or "").startswith(speed.ABSENT)]
    failed = [
        each
        for each in details["measurements"]
        if each not in absent and (each["fault"] or not each["turns"])
    ]
    told = f"{len(measured)} of {len(details['measurements'])} measured"
    if absent:
        told += f", {len(absent)} absent ({absent[0]['fault'].removeprefix(speed.ABSENT).strip()})"
    if failed:
        told += f"; {len(failed)} not, first {report.title(failed[0])}: {failed[0]['fault'] or 'no time for a turn'}"
    return bool(measured) and not failed, told


# ----------------------------------------------------------------------------------------------------- quality


def run_quality(kit: Kit, seconds: float, part: dict[str, Any]) -> tuple[bool, str]:
    """``experiment=fashion_mnist`` for two minutes, or as long as there is time for, and samples of it.

    The number of steps has to be known before, since the learning rate falls over it: a short run tells the speed.
    """
    deadline = time.monotonic() + seconds - 5.0
    common = ["experiment=fashion_mnist", "datamodule.batch_size=64", "logger=csv"]
    if kit.dry_run:
        common += ["debug=tiny", "data=fashion_mnist", "trainer=cpu"]

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"

        def command(name: str, *words: str) -> None:
            module = f"litdiffusion.{name}"
            code = kit.call("-m", module, *words, log="gpu-quality.log", seconds=deadline - time.monotonic())
            if code is None:
                raise TimeoutError(f"{module} was not done in time")
            if code:
                lines = (kit.out / "gpu-quality.log").read_text(encoding="utf-8").strip().splitlines()
                raise RuntimeError(f"{module}: {lines[-1] if lines else f'exit code {code}'}")

        if kit.dry_run:
            steps = 20
        else:
            short = ["trainer.max_steps=200", "callbacks.sample_images=null", "datamodule.num_val=0"]
            command("train", *common, *short, f"run_dir={folder}/short")
            speed_seen = read_json(Path(folder) / "short" / "summary.json")["images_per_second"]
            training = min(TRAINING_SECONDS, deadline - time.monotonic() - AROUND_IT_SECONDS)
            if training < 20:
                raise TimeoutError("too little time was left to train")
            steps = int(training * speed_seen / 64)
        command(
            "train",
            *common,
            f"trainer.max_steps={steps}",
            f"trainer.val_check_interval={max(steps // 4, 1)}",
            f"callbacks.sample_images.every_n_steps={steps}",
            f"run_dir={run_dir}",
        )
        number = 16 if kit.dry_run else 100
        drawn = ["sampler=dpmpp_2m", "sampler.num_steps=20", f"num_images={number}", "seed=0"]
        command("sample", f"ckpt={run_dir}/checkpoints/last.ckpt", *drawn, f"out={folder}/drawn")

        summary = read_json(run_dir / "summary.json")
        with (run_dir / "metrics.csv").open(encoding="utf-8") as file:
            val_losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
        pictures = {
            "gpu-samples.png": Path(folder) / "drawn" / "grid.png",
            "gpu-denoising.gif": run_dir / "samples" / "denoising.gif",
            "gpu-curves.png": run_dir / "curves.png",
        }
        for name, path in pictures.items():
            shutil.copyfile(path, kit.out / name)
    part["details"] = {"summary": summary, "val_losses": val_losses, "pictures": list(pictures)}
    told = (
        f"{summary['images_seen']:,} images at {summary['images_per_second']:,.0f}/s,"
        f" validation loss {val_losses[0]:.4f} -> {val_losses[-1]:.4f}; look at gpu-samples.png"
    )
    return val_losses[-1] < val_losses[0], told


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


PARTS = (
    Part("tests", 125.0, run_tests),
    Part("speed", 145.0, run_speed),
    Part("quality", 180.0, run_quality),
)

if __name__ == "__main__":
    sys.exit(main())
