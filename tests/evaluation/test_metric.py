"""A metric is one class and one node of the configuration; whatever shows numbers goes by that list."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from commands import run, train_tiny
from litdiffusion.data.stores import to_float
from litdiffusion.evaluation import Mean, Model
from litdiffusion.evaluation.metric import tenth_of
from litdiffusion.runs.metrics import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")


class Brightness(Mean):
    """The brightness of the held-out images, which no training changes, and of their first rows."""

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__("_top")

    def update(self, model: Model, batch) -> None:
        assert model.objective is not None
        self.add(batch.images.mean((1, 2, 3)))
        self.add(batch.images[:, :, 0].mean((1, 2)), "_top")


LISTED = ("+metrics.bright._target_=test_metric.Brightness", "metrics.x0_mae=null")


FEW = "bits_per_dim_times=2"


def test_a_new_metric_is_one_class_and_one_line(tmp_path: Path) -> None:
    run_dir = train_tiny(tmp_path / "run", *LISTED, "callbacks.sample_images=null")
    row = read_rows(run_dir / "metrics.csv")[-1]
    assert {"val/loss", "val/bits_per_dim", "val/bright", "val/bright_top"} < row.keys()
    assert not [name for name in row if "x0_mae" in name]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["val_bright"] == row["val/bright"]
    assert [name for name in summary if name.startswith("val_")] == [
        "val_loss",
        "val_bits_per_dim",
        "val_bright",
    ]
    checkpoint = f"ckpt={run_dir / 'checkpoints' / 'last.ckpt'}"
    run("evaluate", checkpoint, f"out={tmp_path}", "device=cpu", "num_held_out=32", FEW, *LISTED)
    measured = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("val/bright", "val/bright_top"):
        assert measured[name] == pytest.approx(row[name], rel=1e-6)
    # And what is measured may change where a run is continued.
    run("train", "debug=tiny", "trainer.max_steps=5", f"run_dir={run_dir}", "callbacks.sample_images=null")
    assert "val/x0_mae" in read_rows(run_dir / "metrics.csv")[-1]


PACKAGE = """
from litdiffusion.evaluation import SampleMetric

class Spread(SampleMetric):
    def measure(self, samples, reference):
        return samples.features.std()

class Both(SampleMetric):
    def measure(self, samples, reference):
        return {"": samples.features.mean(), "_real": reference.train.features.mean()}
"""


def test_a_new_metric_of_generated_images_is_one_class_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mypackage.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    pixels = torch.randint(0, 256, (20, 8, 8, 1), dtype=torch.uint8).numpy()
    np.savez(tmp_path / "x.npz", images=pixels)
    mine = [f"+metrics.{name.lower()}._target_=mypackage.{name}" for name in ("Spread", "Both")]
    given = (f"images={tmp_path / 'x.npz'}", "data=digits", "features=pixels", f"cache={tmp_path}")
    run("evaluate", *given, *mine, f"out={tmp_path / 'out'}")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    features = to_float(torch.from_numpy(pixels)).double()
    assert found["val/spread"] == pytest.approx(float(features.std()), rel=1e-6)
    assert found["val/both"] == pytest.approx(float(features.mean()), rel=1e-6)
    assert found["val/both_real"] < found["val/both"]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_means_of_what_was_added_and_nothing_of_what_was_not() -> None:
    metric = Brightness()
    metric.add(torch.tensor([1.0, 2.0]))
    metric.add(torch.tensor([3.0]))
    metric.add(torch.tensor([8.0]), "_top")
    assert metric.compute() == {"": 2.0, "_top": 8.0}
    metric.reset()
    metric.add_by_noise_level(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 9, 9]))
    assert metric.compute() == {"": 2.0, "_t00": 1.0, "_t09": 2.5}


@pytest.mark.parametrize("num_steps", [10, 30, 1000])
def test_tenths_of_the_noise_levels(num_steps: int) -> None:
    tenths = tenth_of(torch.arange(1, num_steps + 1).double() / num_steps)
    assert torch.equal(tenths, torch.arange(10).repeat_interleave(num_steps // 10))
