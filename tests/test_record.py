"""The record's own arithmetic and its trainings; a whole small record is slow."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from peers import blog
from recordkit import peers as trainings
from recordkit.peers import Training, train
from recordkit.report import picture, seconds_until, table
from recordkit.scoring import of_ddpm_pytorch, of_the_blog
from recordkit.snapshots import Stopwatch, snapshots
from small_worlds import normal, randomized

ROOT = Path(__file__).resolve().parents[1]


def row(key: str, seconds: float, fid: float) -> dict[str, object]:
    return {"key": key, "seconds": seconds, "images": int(100 * seconds), "fid": fid, "val/fid_floor": 0.1}


ROWS = [row("a", 10, 80), row("a", 100, 20), row("a", 400, 10), row("b", 10, 40), row("b", 40, 2.5)]


def test_when_a_quality_is_reached():
    a, b = ROWS[:3], ROWS[3:]
    assert seconds_until(20, a) == pytest.approx(100)
    assert seconds_until(10, b) == pytest.approx(
        20
    )  # half of the way in log FID is half of it in log seconds
    assert seconds_until(50, b) == 10  # at the first score already
    assert seconds_until(1, b) is None


def test_the_table_compares_with_the_first_contenders_end():
    text = table({"a": "A", "b": "B", "absent": "C"}, ROWS, [10, 100])
    assert text.splitlines()[2:] == [
        "| A | 80.00 | 20.00 | **10.00** (6.7 min) | 40,000 | 400 s |",
        "| B | 40.00 |  | **2.50** (0.7 min) | 4,000 | 20 s, 20.0 times sooner |",
    ]


def test_the_picture_is_drawn(tmp_path):
    picture({"a": "A", "b": "B"}, ROWS, tmp_path / "record.png")
    assert (tmp_path / "record.png").read_bytes().startswith(b"\x89PNG")


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("recordkit.snapshots.time.perf_counter", lambda: self.now)


def test_weights_are_kept_at_their_times_and_writing_does_not_count(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    watch = Stopwatch(tmp_path, [5.0, 20.0], seconds=3.0)
    net = nn.Linear(1, 1)
    save = torch.save
    monkeypatch.setattr(
        "recordkit.snapshots.torch.save", lambda *args: (save(*args), setattr(clock, "now", clock.now + 50))
    )
    watch.start()
    for step in range(1, 10):
        clock.now += 2.0
        watch.step(step, net)
    assert watch.seconds == 21.0
    kept = [torch.load(path, weights_only=True) for path in snapshots(tmp_path)]
    assert [(each["seconds"], each["images"]) for each in kept] == [(5.0, 1), (21.0, 9)]
    assert torch.equal(kept[0]["net"]["weight"], net.weight)


def test_a_peers_training_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(
        trainings, "batches", lambda size, first, data: (normal(size, 1, seed=i) for i in range(first, 99))
    )

    def training(fail_at: int | None = None) -> Training:
        torch.manual_seed(0)
        net = nn.Linear(1, 1)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        steps = iter(range(99))

        def step(batch: torch.Tensor) -> None:
            if next(steps) == fail_at:
                raise KeyboardInterrupt
            optimizer.zero_grad()
            (net(batch) * torch.rand(len(batch), 1)).mean().backward()
            optimizer.step()

        return Training({"net": net, "optimizer": optimizer}, step, 4, net)

    rest = (24, math.inf, [], tmp_path)
    train(whole := training(), tmp_path / "a", *rest)
    with pytest.raises(KeyboardInterrupt):
        train(training(fail_at=3), tmp_path / "b", *rest)
    train(resumed := training(), tmp_path / "b", *rest)
    assert torch.equal(whole.learned.weight, resumed.learned.weight)
    assert len(snapshots(tmp_path / "b" / "snapshots")) == 1
    before = resumed.learned.weight.clone()
    train(resumed, tmp_path / "b", *rest)  # has come to its end
    assert torch.equal(resumed.learned.weight, before)


def test_the_blogs_weights_are_scored_by_a_network_that_computes_the_same():
    net = randomized(blog.Unet(dim=28, channels=1, dim_mults=(1, 2, 4)))
    denoiser, sampler = of_the_blog(net.state_dict())
    assert len(sampler.times(denoiser.schedule)) == 21
    x = normal(2, 1, 28, 28)
    diffusion = blog.Diffusion(blog.linear_betas(300))
    with torch.no_grad():
        eps = net(x, torch.tensor([99, 99]))
        estimate = denoiser(x, 100 / 300)
    torch.testing.assert_close(estimate.eps, eps, rtol=1e-4, atol=1e-4)
    x0 = (x - diffusion.sqrt_one_minus_alphas_cumprod[99] * eps) / diffusion.sqrt_alphas_cumprod[99]
    torch.testing.assert_close(estimate.x0, x0, rtol=1e-3, atol=1e-3)


def test_the_librarys_estimate_is_its_own():
    library = pytest.importorskip("denoising_diffusion_pytorch")
    torch.manual_seed(0)
    net = library.Unet(dim=28, dim_mults=(1, 2, 4), channels=1)
    model = library.GaussianDiffusion(net, image_size=28, timesteps=1000)
    denoiser, _ = of_ddpm_pytorch(net.state_dict())
    x = normal(2, 1, 28, 28)
    with torch.no_grad():
        theirs = model.model_predictions(
            x, torch.tensor([399, 399]), clip_x_start=True, rederive_pred_noise=True
        )
        ours = denoiser(x, 0.4)
    torch.testing.assert_close(ours.x0, theirs.pred_x_start, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.eps, theirs.pred_noise, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_whole_record_in_small(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "record.py"), "--quick", "--folder", str(tmp_path)]
    command += ["--only", "blog", "quickstart"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert {each["key"] for each in rows} == {"blog", "quickstart"}
    assert all(math.isfinite(each["fid"]) and each["images"] > 0 for each in rows)
    assert "quickstart" in done.stdout
    kept = sorted(tmp_path.rglob("samples.npz"))
    before = [path.stat().st_mtime_ns for path in kept]
    assert subprocess.run(command, capture_output=True, timeout=1200).returncode == 0
    assert [path.stat().st_mtime_ns for path in kept] == before
