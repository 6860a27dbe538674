"""What a report shows, read from run folders into one object of plain values."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from litdiffusion.configuration.resolvers import metric_of
from litdiffusion.reporting.embedded import FEW, pictures
from litdiffusion.reporting.found import (
    Found,
    Ranking,
    guarded,
    note_state,
    read_settings,
    read_summary,
    read_table,
    vary,
)
from litdiffusion.reporting.series import Curves
from litdiffusion.runs.folder import RunFolder, read_json
from litdiffusion.runs.metrics import read_rows
from litdiffusion.runs.resume import flat
from litdiffusion.system.redaction import redacted_code

MAX_POINTS, MAX_POINTS_OF_ONE = 60_000, 1000
"""Points of all curves together, and of one."""
MAX_DIFF = 20_000
"""Characters of a change to the code that are shown."""

_LEVEL = re.compile(r"(.+)_t(\d\d)")
_SUFFIXES = {"_floor": "floor", "_std_error": "error", "_std": "error"}
"""Of the numbers of a metric: what perfect images would get, and how exact it is."""


def gather(
    runs: Sequence[Found], rank: Callable[[Sequence[Found]], Ranking | None] = lambda _: None
) -> dict[str, Any]:
    """Return what a report of runs shows. A run that cannot be read is shown with the reason.

    Args:
        runs: as ``find_runs`` returns them.
        rank: says which number compares them, when they have been read.
    """
    for run in runs:
        guarded(run, read_settings)
    known = {key for run in runs for key in run.typed}
    for run in runs:
        read_table(run, known)
    axes = vary(runs)
    logged = [
        guarded(run, lambda run: Curves(read_rows(run.folder / "metrics.csv"))) or Curves([]) for run in runs
    ]
    for run, curves in zip(runs, logged, strict=True):
        guarded(run, read_summary)
        if "step" in curves and curves["step"].y[-1] > run.numbers.get("steps", math.inf):
            run.status = ""  # it is continued beyond its end
        if not run.status:
            note_state(run, curves)
    ranking = rank(runs)
    best = sorted(runs, key=ranking.place)[:FEW] if ranking else runs[:FEW]
    number = sum(1 for curves in logged for name in curves if not _LEVEL.fullmatch(name))
    most = min(MAX_POINTS_OF_ONE, max(40, MAX_POINTS // max(number, 1)))
    names = _names([run.folder for run in runs])
    codes: dict[str, dict[str, Any]] = {}
    shown = []
    for index, (run, curves) in enumerate(zip(runs, logged, strict=True)):
        row = {
            "name": names[index],
            "folder": str(run.folder),
            "status": run.status,
            "reason": run.reason,
            "varied": run.varied,
            "typed": [f"{key}={value}" for key, value in run.typed.items()],
            "numbers": run.numbers,
            "facts": run.facts,
            **_of_curves(curves, most),
            "quality": guarded(run, _quality, curves) or [],
            "origin": guarded(run, _origin, codes) or {},
            **(guarded(run, _shown_pictures, len(runs), run in best) or {}),
        }
        shown.append(row)
    common, differing = _settings(runs)
    return {
        "runs": shown,
        "axes": axes,
        "metrics": {name: higher for run in runs for name, higher in _directions(run.config).items()},
        "axis": "images_seen" if any(curves.axis == "images_seen" for curves in logged if curves) else "step",
        "thinned": most * any(len(series.y) > most for curves in logged for series in curves.values()),
        "common": common,
        "differing": differing,
        "code": list(codes.values()),
        **(ranking._asdict() if ranking else {}),
    }


def _settings(runs: Sequence[Found]) -> tuple[dict[str, str], dict[str, list[tuple[str | None, list[int]]]]]:
    """Return the settings that the runs share; and each other one's values, with the indices of the runs."""
    read = {
        index: {
            key: str(value)
            for key, value in flat(run.config).items()
            if str(run.config["run_dir"]) not in str(value)
        }
        for index, run in enumerate(runs)
        if run.config.get("run_dir")
    }
    common, differing = {}, {}
    ends = set()
    for key in sorted(
        dict.fromkeys(key for each in read.values() for key in each), key=lambda key: key.count(".")
    ):
        values = tuple(each.get(key) for each in read.values())
        # Nodes share values by interpolation: each is named once, where it was written.
        parts = key.split(".")
        if any((".".join(parts[i:]), values) in ends for i in range(1, len(parts))):
            continue
        ends.add((key, values))
        having: dict[str | None, list[int]] = {}
        for index, value in zip(read, values, strict=True):
            having.setdefault(value, []).append(index)
        if len(having) > 1:
            differing[key] = list(having.items())
        else:
            common[key] = str(values[0])
    return common, differing


def _of_curves(curves: Curves, most: int) -> dict[str, Any]:
    series: dict[str, list[list[float]]] = {}
    levels: dict[str, list[float | None]] = {}
    for name, found in curves.items():
        if level := _LEVEL.fullmatch(name):
            of_name = levels.setdefault(level[1], [None] * 10)
            if int(level[2]) < 10:
                of_name[int(level[2])] = _short(found.final())
        elif name not in ("step", "images_seen"):
            thin = found.thinned(most)
            series[name] = [[round(x) for x in thin.x], [_short(y) for y in thin.y]]
    steps = curves.get("step")
    per_step = steps.x[-1] / steps.y[-1] if steps and steps.y[-1] else 1
    return {"curves": series, "levels": levels, "images_per_step": per_step}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def own_metrics(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a configuration that are ours: for a run from elsewhere, nothing else is imported."""
    return {
        name: node
        for name, node in (config.get("metrics") or {}).items()
        if isinstance(node, dict) and str(node.get("_target_")).startswith("litdiffusion.evaluation.")
    }


def _directions(config: Mapping[str, Any]) -> dict[str, bool]:
    """Return the metrics of a run, each with whether higher is better."""
    metrics = DictConfig({"metrics": own_metrics(config)})
    named = [name for name, node in (config.get("metrics") or {}).items() if node is not None]
    return {name: bool(getattr(metric_of(name, metrics), "higher_is_better", False)) for name in named}


def _quality(run: Found, curves: Curves) -> list[dict[str, Any]]:
    """Return the metrics of the run's last validation, and of what ``evaluate`` has measured in its folder."""
    last = {name: series.y[-1] for name, series in curves.items()}
    told: list[tuple[str, dict[str, Any], dict[str, Any]]] = [("during training", last, {})]
    evaluated = run.folder / "evaluated" / "metrics.json"
    if evaluated.is_file():
        found = read_json(evaluated, dict)
        told.append(("evaluate", found, found))
    shown = []
    for source, numbers, about in told:
        names = dict.fromkeys(
            (
                *run.config.get("metrics", {}),
                *(name.removeprefix("val/") for name in about if name.startswith("val/")),
            )
        )
        for name in names:
            value = numbers.get(f"val/{name}")
            is_part = any(name != other and name.startswith(f"{other}_") for other in names)
            if isinstance(value, int | float) and math.isfinite(value) and not is_part:
                further = {
                    kind: numbers[f"val/{name}{suffix}"]
                    for suffix, kind in _SUFFIXES.items()
                    if f"val/{name}{suffix}" in numbers
                }
                keys = ("num_images", "sampler", "num_steps", "biased")
                note = ", ".join(f"{key} {about[key]}" for key in keys if about.get(key) not in (None, False))
                shown.append({"name": name, "value": value, "source": source, "note": note, **further})
    return shown


def _origin(run: Found, codes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return where a run came from; changes to the code are kept in ``codes``, since runs share them."""
    if not RunFolder(run.folder).provenance.exists():
        return {}
    starts = read_json(RunFolder(run.folder).provenance, list)
    last = starts[-1]
    git = last.get("git") or {}
    diff = redacted_code(str(git.get("diff", "")))
    code = {"commit": str(git.get("commit", "")), "diff": diff[:MAX_DIFF], "cut": len(diff) > MAX_DIFF}
    hardware = last.get("hardware") or {}
    codes.setdefault(repr(code), code)
    return {
        "started": [str(start.get("started")) for start in starts],
        "code": list(codes).index(repr(code)),
        "python": last.get("python"),
        "versions": last.get("versions"),
        "hardware": [hardware.get("processor"), *hardware.get("gpus", ()), hardware.get("system")],
    }


def _shown_pictures(run: Found, number: int, whole: bool) -> dict[str, Any]:
    return pictures(RunFolder(run.folder), number, whole)


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' paths below the folder that they share, or the name of a single one."""
    resolved = [folder.absolute() for folder in folders]
    shared = 0
    while len({folder.parts[: shared + 1] for folder in resolved}) == 1 and all(
        len(folder.parts) > shared + 1 for folder in resolved
    ):
        shared += 1
    return (
        ["/".join(folder.parts[shared:]) for folder in resolved] if len(folders) > 1 else [resolved[0].name]
    )
