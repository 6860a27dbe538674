"""Training and sampling throughput, side by side with the blog's code and other libraries.

    python benchmarks/train_step.py [--quick] [--json PATH] [--markdown docs/benchmarks.md]

Every measurement has a process of its own, and the contenders take turns: A B C, A B C, ..., so that a machine
that slows down slows all of them. Medians over all steps of all rounds; the spread is the median absolute
deviation. ``--markdown`` replaces what stands between ``<!-- table -->`` and ``<!-- end of table -->``.
"""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from contenders import CONTENDERS, num_cores

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: one round, small batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="KEY")
    parser.add_argument("--json", type=Path, help="write every number there")
    parser.add_argument("--markdown", type=Path, help="replace the table in this file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.batch_size = 1, 16
    text = arguments.markdown.read_text(encoding="utf-8") if arguments.markdown else ""
    if arguments.markdown and not text.count(BEGIN) == text.count(END) == 1:
        parser.error(f"{arguments.markdown} needs one line {BEGIN} and one line {END}")

    present, absent = [], {}
    for key in arguments.only:
        why = CONTENDERS[key].absent()
        if why is None:
            present.append(key)
        else:
            absent[key] = why
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "rounds": arguments.rounds,
        "batch_size": arguments.batch_size,
        "hardware": hardware(),
        "contenders": measure(present, arguments.rounds, arguments.batch_size, arguments.quick),
        "input_images_per_second": input_speed(arguments.batch_size),
        "absent": absent,
    }
    table = markdown(report)
    print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        arguments.markdown.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def measure(keys: list[str], rounds: int, batch_size: int, quick: bool) -> dict[str, dict[str, Any]]:
    """Images per second of each contender: training and sampling, median and spread."""
    seconds: dict[str, dict[str, list[float]]] = {key: {"train": [], "sample": []} for key in keys}
    warmup, steps = (1, 2) if quick else (2, 4)
    for turn in range(rounds):
        for key in keys:
            print(f"round {turn + 1} of {rounds}: {CONTENDERS[key].title}", file=sys.stderr, flush=True)
            for what, times in run(key, batch_size, warmup, steps).items():
                seconds[key][what] += times
    return {
        key: {
            "title": CONTENDERS[key].title,
            **{what: speed(times, batch_size) for what, times in by_kind.items()},
            "seconds": by_kind,
        }
        for key, by_kind in seconds.items()
    }


def input_speed(batch_size: int) -> float:
    """Images per second that the input pipeline delivers when nobody else wants the cores."""
    return speed(run("input", batch_size, 10, 50)["batch"], batch_size)["images_per_second"]


def run(key: str, batch_size: int, warmup: int, steps: int) -> dict[str, list[float]]:
    """Measure in a fresh process; what it says goes on to stderr when it fails."""
    numbers = {"--batch-size": batch_size, "--warmup": warmup, "--steps": steps}
    program = str(Path(__file__).with_name("contenders.py"))
    command = [sys.executable, program, key, *(str(word) for pair in numbers.items() for word in pair)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr}")
    seconds: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def speed(seconds: list[float], batch_size: int) -> dict[str, float]:
    speeds = [batch_size / second for second in seconds]
    median = statistics.median(speeds)
    spread = statistics.median(abs(value - median) for value in speeds)
    return {"images_per_second": median, "median_absolute_deviation": spread}


def hardware() -> dict[str, Any]:
    from litdiffusion.configuration.hardware import native_precision

    return {
        "processor": processor(),
        "cores": num_cores(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": native_precision("cpu") == "bf16-mixed",
        "system": f"{platform.system()}, {' '.join(platform.libc_ver()) or 'no glibc'}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def markdown(report: dict[str, Any]) -> str:
    """The report as a table, with the machine under it."""
    rows = report["contenders"]
    base = next(iter(rows.values()))["train"]["images_per_second"] if rows else 1.0
    first = next(iter(rows.values()))["title"] if rows else ""
    lines = [
        f"| | training, images/s | against {first} | sampling step, images/s |",
        "|---|---:|---:|---:|",
    ]
    for row in rows.values():
        train, sample = row["train"], row["sample"]
        lines.append(
            f"| {row['title']} | {plus_minus(train)} | {train['images_per_second'] / base:.2f}x "
            f"| {plus_minus(sample)} |"
        )
    lines += [f"| {CONTENDERS[key].title} | skipped: {why} | | |" for key, why in report["absent"].items()]
    machine = report["hardware"]
    lines += [
        "",
        f"Our input pipeline alone: {report['input_images_per_second']:,.0f} images/s.",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['vector_instructions']}, "
        f"bfloat16 {'native' if machine['bfloat16'] else 'not native'}; {machine['system']}, "
        f"Python {machine['python']}, torch {machine['torch']}; batch {report['batch_size']}, "
        f"rounds: {report['rounds']}; {report['date']}: `{report['command']}`",
    ]
    return "\n".join(lines)


def plus_minus(value: dict[str, float]) -> str:
    return f"{value['images_per_second']:.1f} ± {value['median_absolute_deviation']:.1f}"


if __name__ == "__main__":
    main()
