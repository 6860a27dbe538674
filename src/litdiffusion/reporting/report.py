"""The end of a run in one paragraph: what was trained, how well, and where everything lies."""

from collections.abc import Mapping
from pathlib import Path

from litdiffusion.configuration.sweeps import typed

PICTURES = {
    "grid": "a grid of samples",
    "gif": "the reverse process as a GIF",
    "curves": "the curves",
    "noised_strip": "the forward process as a strip",
    "checkpoint": "the checkpoint",
}


def paragraph(summary: Mapping[str, object], run_dir: Path) -> str:
    """Tell a run in plain words, on one line, the command that samples from it last.

    Args:
        summary: any of ``experiment``, ``steps``, ``images_seen``, ``wall_seconds``, ``images_per_second``,
            ``train_loss``, ``val_loss``, ``parameters``, ``device``, ``precision``, ``trust`` and the paths
            ``checkpoint``, ``grid``, ``gif``, ``curves``, ``noised_strip``; what is missing goes unsaid.
        run_dir: the run folder; paths within it are given relative to it.
    """
    sentences = [_trained(summary), _losses(summary), _places(summary, run_dir)]
    checkpoint = summary.get("checkpoint")
    if checkpoint is not None:
        options = {"ckpt": checkpoint, "num_images": 64, "out": run_dir / "sampled"}
        command = " ".join(["python -m litdiffusion.sample", *(typed(*option) for option in options.items())])
        trust = summary.get("trust")
        if isinstance(trust, list) and trust:
            command += f" 'trust=[{','.join(trust)}]'"
        sentences.append(f"Sample from it with: {command}")
    return " ".join(sentence for sentence in sentences if sentence)


def duration(seconds: float) -> str:
    """Say a time span in its two largest units: ``9 min 12 s``."""
    whole = round(seconds)
    for large, small, size, unit in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // unit} {small}"
    return f"{whole} s"


def _trained(summary: Mapping[str, object]) -> str:
    name, parameters = summary.get("experiment"), _number(summary, "parameters")
    what = "a model" if name is None else f"experiment {name}"
    if parameters is not None:
        what += f" ({parameters:,.0f} parameters)"
    spans = []
    if (steps := _number(summary, "steps")) is not None:
        spans.append(f"for {steps:,.0f} steps")
    if (images := _number(summary, "images_seen")) is not None:
        spans.append(f"on {images:,.0f} images" if not spans else f"({images:,.0f} images)")
    if (seconds := _number(summary, "wall_seconds")) is not None:
        spans.append(f"in {duration(seconds)}")
    if (device := summary.get("device")) is not None:
        spans.append(f"on {device}")
    if (precision := summary.get("precision")) is not None:
        spans.append(f"at precision {precision}")
    if (speed := _number(summary, "images_per_second")) is not None:
        spans.append(f"({speed:,.0f} images/s)")
    return " ".join(["Trained", what, *spans]) + "."


def _losses(summary: Mapping[str, object]) -> str:
    train, held_out = _number(summary, "train_loss"), _number(summary, "val_loss")
    said = []
    if train is not None:
        said.append(f"{train:.4g} in training")
    if held_out is not None:
        said.append(f"{held_out:.4g} on held-out images")
    return f"The loss ended at {' and '.join(said)}." if said else ""


def _places(summary: Mapping[str, object], run_dir: Path) -> str:
    places = [
        f"{name} ({_within(Path(str(summary[key])), run_dir)})"
        for key, name in PICTURES.items()
        if summary.get(key) is not None
    ]
    if not places:
        return f"Everything lies in {run_dir}."
    listed = places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"
    return f"It left in {run_dir}: {listed}."


def _within(path: Path, run_dir: Path) -> Path:
    return path.relative_to(run_dir) if path.is_relative_to(run_dir) else path


def _number(summary: Mapping[str, object], key: str) -> float | None:
    value = summary.get(key)
    return float(value) if isinstance(value, int | float) else None
