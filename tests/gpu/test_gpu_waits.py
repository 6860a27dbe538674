"""No step of training or sampling makes the host wait for the GPU.

The exceptions, each of which has to read a number: a line of the monitor, with the check that the loss is finite
(``callbacks.monitor.every_n_steps``); validation; checkpoints; finished images; the progress bar, twice a second; the
scaling of the loss in 16-mixed.
``tests/test_host_waits.py`` looks for waits without a GPU.
"""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from gpu_world import DEVICE, NUM_STEPS, ON_DEVICE, NoWaiting, needs_gpu, no_waiting

from commands import run
from litdiffusion.diffusion import Clipped, Denoiser, Preconditioned, V, schedules
from litdiffusion.diffusion.editing import Inpaint, Variation
from litdiffusion.diffusion.guidance import Guidance
from litdiffusion.nn import UNet
from small_worlds import SAMPLERS, draws, images, normal, randomized

pytestmark = needs_gpu

LINES_APART = ["callbacks.monitor.every_n_steps=100", "callbacks.save_checkpoints.every_n_steps=100"]
LINES_APART += ["callbacks.sample_images=null", "callbacks.progress=null", "trainer.val_check_interval=16"]

TRAININGS = {
    "plain": ["trainer.precision=32-true"],
    "half precision": ["trainer.precision=bf16-mixed", "weighting=min_snr", "net.dropout=0.1"],
    "classes": [
        "experiment=class_conditional",
        "net.self_condition=true",
        "target=epsilon",
        "schedule=linear",
    ],
    "learned variance": ["experiment=learned_variance", "noise_levels=importance"],
    "edm": ["experiment=edm", "stratified=false"],
    "a transformer": ["net=dit_tiny", "experiment=class_conditional", "net.self_condition=true"],
}


@pytest.mark.parametrize("training", TRAININGS)
def test_a_training_step_does_not_wait(training: str, tiny: list[str], tmp_path: Path) -> None:
    NoWaiting.guarded = 0
    guard = [
        "+callbacks.guard._target_=gpu_world.NoWaiting",
        "+callbacks.guard.first=3",
        "+callbacks.guard.last=12",
    ]
    options = [*TRAININGS[training], *tiny, *LINES_APART, *guard, ON_DEVICE, "trainer.max_steps=16"]
    run("train", *options, f"run_dir={tmp_path}")
    assert NoWaiting.guarded == 9


def denoiser(clip: str) -> Denoiser:
    net = UNet(
        dim=8, channels=1, dim_mults=[1, 2], attention=["linear", "full"], num_classes=3, self_condition=True
    )
    core = Preconditioned(randomized(net), schedules.cosine(50), V(), 1, 8)
    return Clipped(core, clip).eval().to(DEVICE)


@pytest.mark.parametrize("clip", ["static", "dynamic"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampling_step_does_not_wait(sampler: str, clip: str) -> None:
    guided = Guidance([0, 1, 2], scale=3.0, interval=(0.2, 0.8)).around(denoiser(clip), range(3))
    noise = normal(3, 1, 8, 8).to(DEVICE)
    numbers = draws(3, device=str(DEVICE))
    with no_waiting():
        times = [output.t for output in SAMPLERS[sampler](NUM_STEPS).steps(guided, noise, numbers)]
    assert all(t > s for t, s in pairwise(times))
    assert times[-1] == 0


@pytest.mark.parametrize("edit", ["inpaint", "variation"])
def test_editing_does_not_wait(edit: str) -> None:
    given = images(1, size=8)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    how = Inpaint(given, mask, repeats=2) if edit == "inpaint" else Variation(given, 0.5)
    model, noise = denoiser("static"), normal(2, 1, 8, 8).to(DEVICE)
    numbers = draws(2, device=str(DEVICE))
    with no_waiting():
        *_, last = how.steps(SAMPLERS["ddim"](NUM_STEPS), model, noise, numbers, 0)
    assert last.t == 0
