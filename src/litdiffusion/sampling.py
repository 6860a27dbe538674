"""Images from a denoiser, in batches: what training previews, ``sample`` and ``load_model`` share.

Image i of a seed is the same picture in any batch, on any device and on any number of processes, up to the
rounding of the network: its noise comes from a generator of its own, its class and its edit from i.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from litdiffusion.diffusion import Denoiser, Guidance, Sampler, Step
from litdiffusion.diffusion.editing import Edit
from litdiffusion.diffusion.walk import normal_like
from litdiffusion.randomness import image_generators
from litdiffusion.system.processes import gathered, share_of

Watch = Callable[[int, Step], None]
"""Called with the first image's index and each moment of each batch: for previews, GIFs, progress bars."""

Labels = str | int | Sequence[int] | Int[Tensor, " classes"] | None
"""Classes to draw: ``all`` for each in turn, one, several (image i gets class i modulo their number), or none."""


def sample_images(
    denoiser: Denoiser,
    sampler: Sampler,
    num_images: int,
    seed: int,
    batch_size: int = 64,
    watch: Watch | None = None,
    labels: Labels = "all",
    guidance_scale: float = 1.0,
    guidance_interval: Sequence[float] = (0.0, 1.0),
    edit: Edit | None = None,
) -> Float[Tensor, "num_images channels h w"]:
    """Draw ``num_images`` images in [-1, 1] (clamped), float32 on the CPU.

    The denoiser is put into evaluation mode for the while. Where several processes share a run, all of them must
    call this; each draws its part, and each gets all.

    Args:
        denoiser: estimates x_0.
        sampler: any.
        num_images: how many.
        seed: of the noise.
        batch_size: images at a time.
        watch: called with every moment of every batch.
        labels: which classes to draw, of a network that knows some.
        guidance_scale: how firmly (see ``Guidance``).
        guidance_interval: where on the way from image (0) to noise (1).
        edit: draw them from given images.

    Raises:
        ValueError: what ``check_request`` refuses.
    """
    check_request(denoiser, sampler, labels, guidance_scale, guidance_interval)
    classes = drawn_classes(denoiser.num_classes, labels)
    low, high = guidance_interval
    device = denoiser.schedule.alpha.device
    was_training = denoiser.training
    denoiser.eval()
    mine = share_of(num_images)
    batches = [torch.empty((0, *denoiser.image_shape))]  # with more processes than images, some have none
    try:
        for start in range(mine.start, mine.stop, batch_size):
            numbers = range(start, min(start + batch_size, mine.stop))
            generators = (
                [image_generators(seed, 0, 1)[0] for _ in numbers]
                if edit is not None and edit.same_noise
                else image_generators(seed, numbers.start, numbers.stop)
            )
            noise = normal_like(torch.empty((len(numbers), *denoiser.image_shape), device=device), generators)
            guided = denoiser
            if classes is not None:
                rows = torch.tensor([classes[i % len(classes)] for i in numbers])
                guided = denoiser.guided(Guidance(rows, guidance_scale, (low, high)))
            if edit is None:
                moments = sampler.steps(guided, denoiser.schedule.terminal_std * noise, generators)
            else:
                moments = edit.steps(sampler, guided, noise, generators, start)
            for moment in moments:
                if watch is not None:
                    watch(start, moment)
            batches.append(moment.x.float().clamp(-1, 1).cpu())  # waits for the device, once a batch
    finally:
        denoiser.train(was_training)
    return torch.cat(gathered(torch.cat(batches)))


def drawn_classes(num_classes: int | None, labels: Labels) -> list[int] | None:
    """Return the classes that images are drawn from in turn, or None for none.

    Raises:
        ValueError: they are not classes of the network.
    """
    everything = isinstance(labels, str) and labels == "all"
    if labels is None or (everything and num_classes is None):
        return None
    if num_classes is None:
        raise ValueError(f"labels={labels}: this network was trained without classes; leave labels out")
    if everything:
        return list(range(num_classes))
    if isinstance(labels, Tensor):
        labels = labels.tolist()
    classes: list[Any] = list(labels) if isinstance(labels, Sequence) else [labels]
    if not classes or not all(isinstance(each, Integral) and not isinstance(each, bool) for each in classes):
        raise ValueError(
            f"labels={labels}: give all (each class in turn), null (none), a class number or a list of them"
        )
    if not all(0 <= each < num_classes for each in classes):
        raise ValueError(f"labels={labels}: each must be one of 0..{num_classes - 1}")
    return [int(each) for each in classes]


def check_request(
    denoiser: Denoiser,
    sampler: Sampler,
    labels: Labels = "all",
    guidance_scale: float = 1.0,
    guidance_interval: Sequence[float] = (0.0, 1.0),
) -> None:
    """Check what can be asked of a denoiser, before anything is drawn.

    Raises:
        ValueError: more steps than the schedule has, a learned variance that was not learned, labels that are none
            of the network's, guidance without labels, or guidance out of range.
    """
    sampler.check(denoiser)
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale}: must be finite")
    if drawn_classes(denoiser.num_classes, labels) is None and guidance_scale != 1:
        way_out = (
            "this network was trained without classes, leave it out"
            if denoiser.num_classes is None
            else "it exaggerates a class, so name one by labels"
        )
        raise ValueError(f"guidance_scale={guidance_scale}: {way_out}")
    low_high = tuple(guidance_interval)
    if len(low_high) != 2 or not 0 <= low_high[0] <= low_high[1] <= 1:
        raise ValueError(
            f"guidance_interval={list(low_high)}: must be [from, to], fractions of the way from image to noise"
        )
