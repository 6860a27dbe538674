"""Time to quality: FID over seconds of training, of the blog's code, another library and our presets.

    python benchmarks/record.py [--folder logs/record] [--only KEY ...] [--markdown docs/benchmarks.md]

It trains one contender after the other on all cores of this machine, keeps the weights at fixed times, and scores
them: the FID of 5,000 images, drawn with 20 evaluations of the network, against the training images. It goes on where
it was stopped. Run nothing else on the machine while it trains.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "src"))

from litdiffusion.system.files import write_text  # noqa: E402
from recordkit.report import picture, table  # noqa: E402
from recordkit.scoring import PEERS, of_preset, score  # noqa: E402
from recordkit.snapshots import snapshots  # noqa: E402
from train_step import hardware  # noqa: E402

BEGIN, END = "<!-- record -->", "<!-- end of record -->"


class Limits(NamedTuple):
    """How far everyone trains, where its own recipe has not ended before, and how it is scored."""

    images: int = 120_000
    seconds: float = 2400.0
    times: tuple[float, ...] = (60.0, 180.0, 600.0, 1800.0)
    num_images: int = 5000
    overrides: tuple[str, ...] = ()


def peer(key: str) -> Callable[[Path, Limits], list[str]]:
    """The command that trains another code, or goes on with it."""

    def command(folder: Path, limits: Limits) -> list[str]:
        program = str(ROOT / "benchmarks" / "recordkit" / "peers.py")
        numbers = ["--images", limits.images, "--seconds", limits.seconds, "--times", *limits.times]
        return [program, key, str(folder), *map(str, numbers), "--data", str(data())]

    return command


def ours(experiment: str) -> Callable[[Path, Limits], list[str]]:
    """The command that trains a preset, with a callback that keeps weights."""

    def command(folder: Path, limits: Limits) -> list[str]:
        kept = "+callbacks.snapshots"
        return [
            *("-m", "litdiffusion.train", f"experiment={experiment}", f"run_dir={folder / 'run'}"),
            f"{kept}._target_=recordkit.snapshots.Snapshots",
            f"{kept}.folder={folder / 'snapshots'}",
            f"{kept}.times={list(limits.times)}",
            *limits.overrides,
        ]

    return command


class Contender(NamedTuple):
    title: str
    command: Callable[[Path, Limits], list[str]]
    preset: str | None = None


CONTENDERS = {
    "blog": Contender("the blog's code", peer("blog")),
    "ddpm_pytorch": Contender("denoising-diffusion-pytorch", peer("ddpm_pytorch")),
    "annotated": Contender("`experiment=annotated`", ours("annotated"), "annotated"),
    "quickstart": Contender("`experiment=quickstart`", ours("quickstart"), "quickstart"),
    "fashion_mnist": Contender("`experiment=fashion_mnist`", ours("fashion_mnist"), "fashion_mnist"),
}


def data() -> Path:
    return Path(os.environ.get("LITDIFFUSION_DATA", ROOT / "data")) / "fashion-mnist"


def run(command: list[str]) -> None:
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    print(shlex.join(["python", *command]), file=sys.stderr, flush=True)
    if code := subprocess.run([sys.executable, *command], env=environment, stdout=sys.stderr).returncode:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("logs/record"), help="where all is kept")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="KEY")
    parser.add_argument("--train-only", action="store_true", help="leave the scores to a later call")
    parser.add_argument("--quick", action="store_true", help="a smoke test: seconds of training, few images")
    parser.add_argument(
        "--markdown", type=Path, help="replace the table in this file, and the picture beside it"
    )
    arguments = parser.parse_args()
    limits = Limits()
    if arguments.quick:
        short = ("debug=tiny", "data=fashion_mnist", "net.dim_mults=[1,2]")
        limits = Limits(images=256, seconds=20.0, times=(1.0,), num_images=200, overrides=short)
    folder: Path = arguments.folder.absolute()
    for key in arguments.only:
        run(CONTENDERS[key].command(folder / key, limits))
    if arguments.train_only:
        return
    rows = []
    for key in arguments.only:
        experiment = CONTENDERS[key].preset
        load = (
            PEERS[key] if experiment is None else partial(of_preset, experiment, overrides=limits.overrides)
        )
        for path in snapshots(folder / key / "snapshots"):
            scores = folder / key / "scores" / path.stem
            rows.append({"key": key, **score(load, path, scores, limits.num_images, data())})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "rows": rows,
    }
    write_text(folder / "record.json", json.dumps(report, indent=2) + "\n")
    print(markdown(report, limits.times))
    if arguments.markdown:
        publish(report, limits.times, arguments.markdown)


def markdown(report: dict[str, Any], times: Sequence[float]) -> str:
    """The table, and under it the machine and the command."""
    titles = {key: contender.title for key, contender in CONTENDERS.items()}
    machine = report["hardware"]
    floor = report["rows"][0].get("val/fid_floor")
    return "\n".join(
        [
            table(titles, report["rows"], times),
            "",
            f"As many test images have an FID of {floor:.3f}." if floor else "There are fewer test images.",
            "",
            f"{machine['processor']}, {machine['cores']} cores, {machine['vector_instructions']}, "
            f"bfloat16 {'native' if machine['bfloat16'] else 'not native'}, torch {machine['torch']}; "
            f"{report['date']}: `{report['command']}`",
        ]
    )


def publish(report: dict[str, Any], times: Sequence[float], path: Path) -> None:
    """Replace the table in a page, and the picture that it shows."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    shown = "![FID over seconds of training, and over images seen](images/record.png)"
    write_text(path, f"{before}{BEGIN}\n{markdown(report, times)}\n\n{shown}\n{END}{after}")
    titles = {key: contender.title for key, contender in CONTENDERS.items()}
    picture(titles, report["rows"], path.parent / "images" / "record.png")


if __name__ == "__main__":
    main()
