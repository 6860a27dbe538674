"""Sampling on a GPU: each sampler, guidance, and editing give the CPU's images; checkpoints move between the two."""

from pathlib import Path

import pytest
import torch
from gpu_world import DEVICE, NUM_STEPS, ON_DEVICE, needs_gpu
from torch import Tensor

from commands import run
from litdiffusion import load_model
from litdiffusion.diffusion import EDM, Clipped, Denoiser, Preconditioned, Schedule, V, schedules
from litdiffusion.diffusion.editing import Edit, Inpaint, Interpolate, Slerp, Variation
from litdiffusion.diffusion.guidance import Guidance
from litdiffusion.nn import UNet
from litdiffusion.sampling import sample_images
from small_worlds import SAMPLERS, images, randomized

pytestmark = needs_gpu

TOLERANCE = 5e-4
"""Of pixels in [-1, 1], a sixteenth of a gray level; rounding alone, of eight evaluations, comes to 3e-5."""


def denoiser(clip: str = "static", **options: bool) -> Denoiser:
    net = randomized(
        UNet(dim=8, channels=1, dim_mults=[1, 2], attention=["linear", "full"], num_classes=3, **options)
    )
    return Clipped(Preconditioned(net, schedules.cosine(50), V(), channels=1, image_size=8), clip)


def on_both(
    model: Denoiser, sampler: str, guidance: Guidance, edit: Edit | None = None
) -> tuple[Tensor, Tensor]:
    def draw(device: torch.device) -> Tensor:
        return sample_images(
            model.to(device), SAMPLERS[sampler](NUM_STEPS), 6, seed=0, guidance=guidance, edit=edit
        )

    return draw(torch.device("cpu")), draw(DEVICE)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_what_the_cpu_draws(sampler: str) -> None:
    cpu, device = on_both(denoiser(), sampler, Guidance(None))
    torch.testing.assert_close(device, cpu, rtol=0, atol=TOLERANCE)
    assert cpu.std() > 0.1


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_draws_what_the_cpu_draws(scale: float, interval: tuple[float, float]) -> None:
    cpu, device = on_both(denoiser(), "dpmpp_2m", Guidance([0, 2], scale, interval))
    torch.testing.assert_close(device, cpu, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("make", [schedules.VE, schedules.Flow, schedules.VPCosine])
def test_continuous_schedules_are_the_same(make: type[Schedule]) -> None:
    schedule = make()
    target = V() if schedule.has_zero_terminal_snr else EDM()
    model = Clipped(Preconditioned(denoiser().core.net, schedule, target, 1, 8))
    cpu, device = on_both(model, "heun", Guidance())
    torch.testing.assert_close(device, cpu, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("option", ["self_condition", "learned_variance"])
def test_what_a_network_may_do_besides_is_the_same(option: str) -> None:
    cpu, device = on_both(denoiser(**{option: True}), "ddpm", Guidance())
    torch.testing.assert_close(device, cpu, rtol=0, atol=TOLERANCE)


def test_dynamic_clipping_is_the_same() -> None:
    cpu, device = on_both(denoiser(clip="dynamic"), "ddim", Guidance(None))
    torch.testing.assert_close(device, cpu, rtol=0, atol=TOLERANCE)


GIVEN, OTHER = images(1, size=8), images(1, size=8, seed=1)
EDITS = {
    "inpaint": Inpaint(GIVEN, torch.ones(8, 8, dtype=torch.bool).tril(), repeats=2),
    "variation": Variation(GIVEN, 0.5),
    "interpolate": Interpolate(GIVEN, OTHER, 6, 0.5),
    "slerp": Slerp(GIVEN, OTHER, 6),
}


@pytest.mark.parametrize("edit", EDITS)
def test_editing_is_the_same(edit: str) -> None:
    cpu, device = on_both(denoiser(), "ddim", Guidance(None), EDITS[edit])
    torch.testing.assert_close(device, cpu, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("here", "there"), [("trainer=cpu", ON_DEVICE), (ON_DEVICE, "trainer=cpu")])
def test_a_checkpoint_moves_and_its_run_goes_on(
    here: str, there: str, tiny: list[str], tmp_path: Path
) -> None:
    options = [*tiny, "callbacks.sample_images=null", "trainer.precision=32-true", f"run_dir={tmp_path}"]
    options += ["lr_scheduler.total_steps=10"]
    run("train", *options, here, "trainer.max_steps=5")
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    drawn = [
        load_model(checkpoint, device=device).sample(4, "dpmpp_2m", num_steps=8) for device in ("cpu", DEVICE)
    ]
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=TOLERANCE)
    run("train", *options, there, "trainer.max_steps=10")
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 10
    assert all(bool(torch.isfinite(weight).all()) for weight in state["state_dict"].values())
