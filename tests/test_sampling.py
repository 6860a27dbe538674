import pytest
import torch
from torch import nn

from litdiffusion.diffusion import DDIM, DDPM, Denoiser, V, schedules
from litdiffusion.randomness import image_generators
from litdiffusion.sampling import sample_images
from small_worlds import Affine, Spy, affine_denoiser, normal

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.cosine(20)
SAMPLERS = [DDPM(5), DDIM(5), DDIM(5, eta=0.5)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["ddpm", "ddim", "ddim_eta"])
def test_an_image_is_the_same_in_any_batch(sampler):
    denoiser = affine_denoiser(SCHEDULE, V(), net=Spy())
    whole = sample_images(denoiser, sampler, 7, seed=3)
    assert whole.shape == (7, 1, 4, 4)
    for batch_size in (1, 2, 3, 7, 100):
        assert torch.equal(sample_images(denoiser, sampler, 7, 3, batch_size), whole)
    assert torch.equal(sample_images(denoiser, sampler, 3, seed=3), whole[:3])
    assert not torch.equal(sample_images(denoiser, sampler, 7, seed=4), whole)
    assert len(whole.unique(dim=0)) == 7


def test_images_start_from_noise_of_their_own():
    seen = {}
    sampler = DDIM(4)
    sample_images(
        affine_denoiser(SCHEDULE), sampler, 5, 0, 2, lambda first, step: seen.setdefault(first, step)
    )
    assert list(seen) == [0, 2, 4]
    for first, step in seen.items():
        noise = [torch.randn(1, 4, 4, generator=g) for g in image_generators(0, first, min(first + 2, 5))]
        assert step.t == 20
        assert torch.equal(step.x, torch.stack(noise))


def test_a_watcher_sees_every_moment_of_every_batch():
    moments = []
    images = sample_images(
        affine_denoiser(SCHEDULE), DDIM(4), 3, 0, 2, lambda first, step: moments.append((first, step.t))
    )
    assert moments == [(first, t) for first in (0, 2) for t in (20, 15, 10, 5, 0)]
    assert images.shape == (3, 1, 4, 4)


def test_images_are_clamped_float32_of_the_denoisers_shape():
    class Loud(Affine):
        def forward(self, x, clock):
            return -100 * torch.ones_like(x)

    denoiser = Denoiser(Loud(), SCHEDULE, V(), 3, (4, 6), clip="none")
    images = sample_images(denoiser, DDIM(5), 2, 0)
    assert images.shape == (2, 3, 4, 6)
    assert images.dtype == torch.float32
    assert float(images.max()) == 1  # far outside before
    assert float(images.min()) >= -1


class Moody(Affine):
    """Different in training, and able to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.modes: set[bool] = set()
        self.fails = False

    def forward(self, x, clock):
        self.modes.add(self.dropout.training)
        if self.fails:
            raise RuntimeError("a bug")
        return self.dropout(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_network_samples_in_evaluation_mode_and_is_left_as_it_was(training, fails):
    net = Moody()
    denoiser = affine_denoiser(SCHEDULE, V(), net=net).train(training)
    net.fails = fails
    if fails:
        with pytest.raises(RuntimeError, match="a bug"):
            sample_images(denoiser, DDIM(3), 2, 0)
    else:
        sample_images(denoiser, DDIM(3), 2, 0)
    assert net.modes == {False}
    assert net.training is net.dropout.training is training


def test_sampling_draws_nothing_from_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    images = sample_images(affine_denoiser(SCHEDULE), DDPM(5), 2, 0)
    assert torch.equal(torch.rand(3), expected)
    assert not images.requires_grad
    assert not torch.equal(images, normal(2, 1, 4, 4))
