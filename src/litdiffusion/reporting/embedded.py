"""The pictures of a run folder as data URIs."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from litdiffusion.reporting.gif import pick_frames
from litdiffusion.reporting.steps import read_steps
from litdiffusion.runs.folder import RunFolder

FEW = 6
"""Up to this many runs are shown with all their pictures as they are; of more, there are fewer and smaller ones."""
MAX_FRAMES, MAX_THUMBNAILS = 24, 300


def pictures(folder: RunFolder, number: int, whole: bool) -> dict[str, Any]:
    """Return pictures of a run as data URIs: samples over training, the forward and the reverse process.

    Args:
        folder: of the run.
        number: how many runs are shown.
        whole: whether the two processes are shown.
    """
    few = number <= FEW
    most = MAX_FRAMES if few else min(6, max(2, MAX_THUMBNAILS // number))
    drawn = {
        step: path
        for step, path in folder.pictures()
        if path.suffix == ".png" and path.stem != "noised_strip"
    }
    grids = sorted(drawn.items())
    chosen = pick_frames(len(grids) - 1, most) if len(grids) > 1 else range(len(grids))
    found: dict[str, Any] = {
        "samples": [{"step": grids[i][0], "picture": _picture(grids[i][1], few)} for i in chosen]
    }
    if whole:
        strip, steps, gif = (
            folder.samples / each for each in ("noised_strip.png", "denoising.npz", "denoising.gif")
        )
        if strip.is_file():
            found["forward"] = _picture(strip, few)
        if steps.is_file():
            found["reverse"] = [
                {"t": round(t, 4), "x": _encoded(x, "PNG"), "x0": _encoded(x0, "PNG")}
                for t, x, x0 in read_steps(steps)
            ]
        elif gif.is_file():
            found["gif"] = _data_uri(gif.read_bytes(), "gif")
    return found


def _picture(path: Path, few: bool) -> str:
    """Return a picture as a data URI: as it is, unless it takes many bytes."""
    bytes_, side = (400_000, 1200) if few else (20_000, 320)
    if path.stat().st_size <= bytes_:
        return _data_uri(path.read_bytes(), path.suffix[1:])
    with Image.open(path) as image:
        smaller = image.convert("RGB")
        smaller.thumbnail((side, side))
        return _encoded(smaller, "WEBP")


def _encoded(image: Image.Image, form: str) -> str:
    data = io.BytesIO()
    image.save(data, form, quality=85)
    return _data_uri(data.getvalue(), form.lower())


def _data_uri(data: bytes, form: str) -> str:
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"
