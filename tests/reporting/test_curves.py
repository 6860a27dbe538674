import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from litdiffusion.diffusion import schedules
from litdiffusion.errors import UserError
from litdiffusion.reporting.curves import Curves, Series, curves, schedules_figure
from litdiffusion.runs.metrics import read_rows

TENTHS = [f"train/loss_t{tenth:02d}" for tenth in range(10)]
COLUMNS = [
    "step",
    "images_seen",
    "train/loss",
    "train/grad_norm",
    "train/lr",
    *TENTHS,
    "val/loss",
    "val/loss_raw",
]


def write(path: Path, rows: list[dict[str, float]], columns: list[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(num_rows: int) -> list[dict[str, float]]:
    rows = []
    for k in range(1, num_rows + 1):
        row = {"step": k * 10, "images_seen": k * 1280, "train/loss": 0.05 + 0.4 / k, "train/lr": 1e-3}
        row["train/grad_norm"] = 1 + math.sin(k)
        row |= {name: 0.1 for name in TENTHS if k % 2 == 0}
        row |= {"val/loss": 0.06 + 0.4 / k, "val/loss_raw": 0.07 + 0.4 / k} if k % 5 == 0 else {}
        rows.append(row)
    return rows


def darkness(png: Path) -> list[float]:
    """Mean darkness of each quarter of a picture, by rows."""
    with Image.open(png) as image:
        gray = image.convert("L")
        w, h = gray.size
        boxes = [(x, y, x + w // 2, y + h // 2) for y in (0, h // 2) for x in (0, w // 2)]
        return [255 - sum(crop.tobytes()) / (crop.width * crop.height) for crop in map(gray.crop, boxes)]


@pytest.mark.parametrize(
    ("num_rows", "columns"),
    [(0, COLUMNS), (1, COLUMNS), (2, ["step", "train/loss"]), (60, COLUMNS), (60, ["images_seen"])],
    ids=["none", "one", "few", "all", "x"],
)
def test_curves_are_drawn_from_whatever_was_logged(tmp_path, num_rows, columns):
    png = tmp_path / "curves.png"
    curves(write(tmp_path / "metrics.csv", run(num_rows), columns), png)
    with Image.open(png) as image:
        assert image.format == "PNG"
        assert image.size == (1056, 660)


def test_each_panel_shows_what_its_columns_hold(tmp_path):
    full, bare = tmp_path / "full.png", tmp_path / "bare.png"
    curves(write(tmp_path / "full.csv", run(60), COLUMNS), full)
    curves(write(tmp_path / "bare.csv", run(60), ["images_seen"]), bare)
    assert all(drawn > empty + 0.5 for drawn, empty in zip(darkness(full), darkness(bare), strict=True))


def test_each_further_metric_that_was_logged_has_a_panel(tmp_path):
    rows = [row | {"val/fid": row["step"]} for row in run(60)]
    path, png = write(tmp_path / "metrics.csv", rows, [*COLUMNS, "val/fid"]), tmp_path / "curves.png"
    curves(path, png, ["loss", "absent"], ["fid"])
    with Image.open(png) as image:
        assert image.size == (1056, 990)


def test_what_a_researcher_logs_has_a_panel(tmp_path):
    rows = [row | {"train/x": row["step"], "lr-Adam": 1.0} for row in run(60)]
    columns = [*COLUMNS, "train/x", "lr-Adam"]
    path, png = write(tmp_path / "metrics.csv", rows, columns), tmp_path / "curves.png"
    curves(path, png, ["loss"])
    with Image.open(png) as image:
        assert image.size == (1056, 990)


def test_curves_do_without_pyplot_and_pictures_without_matplotlib(tmp_path):
    path = write(tmp_path / "metrics.csv", run(3), COLUMNS)
    program = f"""
import sys
from pathlib import Path
import litdiffusion.reporting.gif, litdiffusion.reporting.images
assert "matplotlib" not in sys.modules
from litdiffusion.reporting.curves import curves
curves(Path({str(path)!r}), Path({str(tmp_path / "curves.png")!r}))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_empty_truncated_and_infinite_cells_are_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("images_seen,train/loss,val/loss\n10,0.5,\n20,nan,\n30,0.3,0.4\n40,inf,\n50")
    metrics = Curves(read_rows(path))
    assert metrics.get("train/loss") == Series([10.0, 30.0], [0.5, 0.3])
    assert metrics.get("val/loss") == Series([30.0], [0.4])
    assert metrics.get("train/lr") is None


def test_what_a_resumed_run_repeats_is_drawn_once(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("images_seen,train/loss\n10,0.5\n20,0.4\n30,0.3\n20,0.45\n30,0.35\n")
    series = Curves(read_rows(path)).get("train/loss")
    assert series is not None
    assert series.x == sorted(series.x)
    assert 0.3 not in series.y


def test_bad_metrics_end_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"gone\.csv does not exist"):
        curves(tmp_path / "gone.csv", tmp_path / "curves.png")
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,train/loss\n1,0.5\n")
    with pytest.raises(UserError, match="neither a column images_seen nor a column step"):
        read_rows(path)
    path.write_text("step,train/loss\n1,0.5\n2,half\n")
    with pytest.raises(UserError, match=f"{path} is damaged .*line 3: train/loss is 'half'"):
        read_rows(path)


def test_smoothing_keeps_a_constant_and_a_mean():
    x = [float(i) for i in range(100)]
    assert Series(x, [2.0] * 100).smoothed().y == pytest.approx([2.0] * 100)
    line = Series(x, x).smoothed(0.1)
    assert line.y[:90] == pytest.approx(x[:90]), "a centred window does not lag"
    wave = Series(x, [(-1.0) ** i for i in range(100)]).smoothed(0.1)
    assert max(abs(value) for value in wave.y[10:]) < 0.2
    assert Series(x, x).final(0.1) == pytest.approx(94.5)


def test_schedules_stand_side_by_side():
    tables = {"linear": schedules.linear(300), "cosine": schedules.cosine(100)}
    figure = schedules_figure({name: schedule.alphas_cumprod for name, schedule in tables.items()})
    alpha_bar, log_snr = figure.axes
    for name, schedule, *lines in zip(tables, tables.values(), alpha_bar.lines, log_snr.lines, strict=True):
        t = torch.arange(1, schedule.num_steps + 1, dtype=torch.float64) / schedule.num_steps
        for line, view in zip(lines, (schedule.alphas_cumprod, schedule.log_snr(t)), strict=True):
            assert line.get_label() == name
            assert line.get_ydata() == pytest.approx(view.numpy(), abs=1e-9)
            assert line.get_xdata()[-1] == 1
