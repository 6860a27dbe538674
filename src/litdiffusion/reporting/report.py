"""The paragraph that ends a run: what was trained, how well, and where its files are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litdiffusion.configuration.sweeps import typed

TRAINED = {
    "parameters": "({:,} parameters)",
    "steps": "for {:,} steps",
    "images_seen": "({:,} images)",
    "wall_seconds": "in {}",
    "device": "on {}",
    "precision": "at precision {}",
    "images_per_second": "({:,.0f} images/s)",
}
LOSSES = {"train_loss": "{:.4g} in training", "val_loss": "{:.4g} on held-out images"}
FILES = {
    "report": "the report ({})",
    "grid": "a grid of samples ({})",
    "gif": "the reverse process as a GIF ({})",
    "curves": "the curves ({})",
    "noised_strip": "the forward process as a strip ({})",
    "checkpoint": "the checkpoint ({})",
}
TEXTS = {"experiment", "device", "precision", *FILES}


def paragraph(summary: Mapping[str, object], run_dir: Path) -> str:
    """Describe a run on one line that ends with the command to sample from it.

    Args:
        summary: what ``summary.json`` holds. What is missing, or of another type, is left out.
        run_dir: the run folder, to which the paths are relative.
    """
    known: dict[str, Any] = {
        key: value
        for key, value in summary.items()
        if isinstance(value, str if key in TEXTS else int | float)
    }
    if "wall_seconds" in known:
        known["wall_seconds"] = duration(known["wall_seconds"])
    trained, losses, files = (
        [words.format(known[key]) for key, words in phrases.items() if key in known]
        for phrases in (TRAINED, LOSSES, FILES)
    )
    model = f"experiment {known['experiment']}" if "experiment" in known else "a model"
    sentences = [f"{' '.join(['Trained', model, *trained])}."]
    if losses:
        sentences.append(f"The loss ended at {' and '.join(losses)}.")
    if len(files) > 1:
        files = [", ".join(files[:-1]), files[-1]]
    sentences.append(f"Run folder: {run_dir}{', with ' * bool(files)}{' and '.join(files)}.")
    if "checkpoint" in known:
        command = [
            "python -m litdiffusion.sample",
            typed("ckpt", run_dir / known["checkpoint"]),
            "num_images=64",
        ]
        if isinstance(trust := summary.get("trust"), list):
            command.append(f"'trust=[{','.join(trust)}]'")  # zsh would look for a file
        sentences.append(f"Sample from it with: {' '.join(command)}")
    return " ".join(sentences)


def duration(seconds: float) -> str:
    """Return a time span in its two largest units: ``9 min 12 s``."""
    whole = round(seconds)
    for large, small, size, unit in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // unit} {small}"
    return f"{whole} s"
