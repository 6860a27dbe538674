"""Quality against evaluations of the network: samplers at several numbers of steps, on finished runs.

    python benchmarks/samplers.py RUN [RUN ...] [--folder logs/samplers] [--markdown docs/benchmarks.md]

Each row is a call of ``litdiffusion.evaluate`` (printed, so that it can be repeated): 5,000 images are drawn and
compared with the training images. What is measured already is not measured again. The seconds are medians of three
rounds in which all rows take turns; run nothing else meanwhile.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "src"))

from litdiffusion.configuration.hardware import native_autocast  # noqa: E402
from litdiffusion.data.arrays import read_images  # noqa: E402
from litdiffusion.data.stores import to_float  # noqa: E402
from litdiffusion.inference import load_model  # noqa: E402
from litdiffusion.reporting.images import grid, save  # noqa: E402
from litdiffusion.system.files import write_text  # noqa: E402
from litdiffusion.system.memory import keep_freed_memory  # noqa: E402
from train_step import hardware  # noqa: E402

BEGIN, END = "<!-- samplers -->", "<!-- end of samplers -->"
TITLES = {"ddpm": "DDPM", "ddim": "DDIM", "heun": "Heun", "dpmpp_2m": "DPM-Solver++(2M)"}
EVALUATIONS = (5, 10, 20, 50)
SHOWN = 100
"""Images in the picture of a row."""


class Case(NamedTuple):
    """A run, and how it is sampled from; ``num_steps`` None for all steps of the schedule."""

    run: Path
    sampler: str
    num_steps: int | None

    @property
    def experiment(self) -> str:
        summary = json.loads((self.run / "summary.json").read_text(encoding="utf-8"))
        return str(summary["experiment"])

    @property
    def folder(self) -> Path:
        return Path(self.experiment) / f"{self.sampler}-{self.num_steps or 'T'}"

    def overrides(self) -> list[str]:
        steps = [] if self.num_steps is None else [f"sampler.num_steps={self.num_steps}"]
        return [f"sampler={self.sampler}", *steps]


def cases(runs: Sequence[Path]) -> Iterator[Case]:
    """DDPM at T; the others at few evaluations. Heun takes two for each step but the last."""
    for run in runs:
        for evaluations in EVALUATIONS:
            yield Case(run, "ddim", evaluations)
            yield Case(run, "heun", (evaluations + 1) // 2)
            yield Case(run, "dpmpp_2m", evaluations)
        yield Case(run, "ddpm", None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--folder", type=Path, default=Path("logs/samplers"))
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument(
        "--spacing", help="of the times, for all samplers but DDPM; default: the samplers' own"
    )
    parser.add_argument("--inception", type=Path, metavar="WEIGHTS", help="FID by Inception features, too")
    parser.add_argument(
        "--markdown", type=Path, help="replace the table in this file, and the pictures beside it"
    )
    arguments = parser.parse_args()
    keep_freed_memory()
    rows = []
    for case in cases(arguments.runs):
        rows.append(measure(case, arguments))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    for row, seconds in zip(rows, durations(list(cases(arguments.runs)), arguments), strict=True):
        row["seconds_per_64"] = seconds
    report = {"command": shlex.join(["python", *sys.argv]), "hardware": hardware(), "rows": rows}
    write_text(arguments.folder / "samplers.json", json.dumps(report, indent=2) + "\n")
    print(markdown(report))
    if arguments.markdown:
        publish(report, arguments.markdown)


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw and measure the images of a row, unless that has been done."""
    out = arguments.folder.absolute() / case.folder
    checkpoint = case.run.absolute() / "checkpoints" / "last.ckpt"
    spacing = [f"sampler.spacing={arguments.spacing}"] if arguments.spacing and case.num_steps else []
    command = [f"ckpt={checkpoint}", f"num_images={arguments.num_images}", *case.overrides(), *spacing]
    numbers = evaluate([*command, "num_held_out=0", f"out={out}"])
    row = {**numbers, "run": case.experiment, "sampler": case.sampler, "samples": str(out / "samples.npz")}
    if arguments.inception:
        images = [
            f"images={out / 'samples.npz'}",
            "features=inception",
            f"features.weights={arguments.inception}",
        ]
        row["inception_fid"] = evaluate([*images, f"out={out / 'inception'}"])["val/fid"]
    return row


def evaluate(overrides: list[str]) -> dict[str, Any]:
    """What ``litdiffusion.evaluate`` writes for ``overrides``, the last of which says where."""
    metrics = Path(overrides[-1].removeprefix("out=")) / "metrics.json"
    if not metrics.exists():
        command = [sys.executable, "-m", "litdiffusion.evaluate", *overrides]
        environment = {"PYTHONPATH": str(ROOT / "src")} | os.environ
        print(shlex.join(["python", *command[1:]]), file=sys.stderr, flush=True)
        if code := subprocess.run(command, stdout=subprocess.DEVNULL, env=environment).returncode:
            sys.exit(code)
    found: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
    return found


def durations(all_cases: list[Case], arguments: argparse.Namespace) -> list[float]:
    """Seconds for 64 images of each row."""
    models = {run: load_model(run / "checkpoints" / "last.ckpt") for run in arguments.runs}
    seconds: list[list[float]] = [[] for _ in all_cases]
    spacing = {"spacing": arguments.spacing} if arguments.spacing else {}
    for turn in range(3):
        for case, found in zip(all_cases, seconds, strict=True):
            if turn and case.num_steps is None:
                continue  # a thousand steps are long enough to be measured once
            with native_autocast(torch.device("cpu")):
                start = time.perf_counter()
                models[case.run].sample(64, sampler=case.sampler, num_steps=case.num_steps, **spacing)
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]


def markdown(report: dict[str, Any]) -> str:
    """A line for each row, and the machine and the command under them."""
    has_inception = any("inception_fid" in row for row in report["rows"])
    head = ["run", "sampler", "steps", "evaluations", "FID", *(["FID, Inception"] if has_inception else [])]
    head.append("seconds per 64 images")
    lines = [_line(head), _line(["---", "---", *["---:"] * (len(head) - 2)])]
    for row in report["rows"]:
        cells = [f"`{row['run']}`", TITLES[row["sampler"]], row["num_steps"], row["network_evaluations"]]
        cells.append(f"{row['val/fid']:.2f}")
        if has_inception:
            cells.append(f"{row['inception_fid']:.1f}" if "inception_fid" in row else "")
        lines.append(_line([*cells, f"{row['seconds_per_64']:.2f}"]))
    machine = report["hardware"]
    floors = sorted({f"{row['val/fid_floor']:.3f}" for row in report["rows"] if row.get("val/fid_floor")})
    return "\n".join(
        [
            *lines,
            "",
            f"As many test images have an FID of {', '.join(floors)}. "
            f"{machine['processor']}, {machine['cores']} cores, {machine['vector_instructions']}, "
            f"bfloat16 {'native' if machine['bfloat16'] else 'not native'}, torch {machine['torch']}: "
            f"`{report['command']}`",
        ]
    )


def publish(report: dict[str, Any], page: Path) -> None:
    """Replace the table in a page, and the pictures that it shows."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    shown = "![FID over evaluations of the network](images/samplers.png)\n\nThe best row, and the worst:\n"
    shown += "".join(f"\n![the {name} row](images/samplers_{name}.png)" for name in ("best", "worst"))
    write_text(page, f"{before}{BEGIN}\n{markdown(report)}\n\n{shown}\n{END}{rest.split(END)[1]}")
    images = page.parent / "images"
    plot(report["rows"], images / "samplers.png")
    for name, row in zip(("best", "worst"), extremes(report["rows"]), strict=True):
        drawn = read_images(Path(row["samples"]))
        save(grid(to_float(drawn[:SHOWN]), columns=20), images / f"samplers_{name}.png")


def extremes(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of the least and the greatest FID."""
    by_fid = sorted(rows, key=lambda row: float(row["val/fid"]))
    return by_fid[0], by_fid[-1]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """FID over evaluations, a panel for each run."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure = Figure(figsize=(3.2 * len(runs) + 0.6, 3.2), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for run, axes in zip(runs, panels, strict=True):
        for sampler, title in TITLES.items():
            found = [row for row in rows if (row["run"], row["sampler"]) == (run, sampler)]
            x = [row["network_evaluations"] for row in found]
            axes.plot(x, [row["val/fid"] for row in found], marker="o", markersize=4, label=title)
        axes.set(title=run, xscale="log", yscale="log", xlabel="evaluations of the network")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    panels[0].set_ylabel("FID")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
