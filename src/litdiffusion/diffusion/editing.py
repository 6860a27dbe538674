"""Editing: given images steer what is drawn. Each edit is a thin wrapper around the samplers' loop.

An edit chooses where ``Sampler.steps`` begins and what changes on the way, and nothing else; so each goes with every
sampler, parametrization, schedule and guidance. To add one, subclass ``Edit``, write ``steps``, and name the class
in a YAML file.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from litdiffusion.diffusion.denoiser import Denoiser
from litdiffusion.diffusion.devices import to_device
from litdiffusion.diffusion.draws import Draws
from litdiffusion.diffusion.guidance import is_number
from litdiffusion.diffusion.process import renoise
from litdiffusion.diffusion.sampler import Noise, Sampler, SamplerOutput
from litdiffusion.diffusion.samplers import DDIM
from litdiffusion.diffusion.schedule import Schedule

Images = Float[Tensor, "batch channels h w"]
Given = Float[Tensor, "_images _channels _h _w"] | Float[Tensor, "_channels _h _w"]
"""Images in [-1, 1], or a single one. Of the shape that is drawn, which ``steps`` checks."""
Masks = Shaped[Tensor, "_masks _any _h _w"] | Shaped[Tensor, "_masks _h _w"] | Shaped[Tensor, "_h _w"]
"""True or 1 where pixels are drawn anew: one mask or more, for all channels or for each."""


class Edit(ABC):
    """A way to draw images from given ones.

    Attributes:
        num_images: how many it draws where nobody asks for another number.
        strength: the time at which it begins, in (0, 1].
    """

    num_images: int
    strength: float = 1.0
    same_noise: ClassVar[bool] = False
    """Whether all images of a run are drawn from one and the same noise, and differ by the edit alone."""

    def start(self, sampler: Sampler, schedule: Schedule) -> float:
        """Return where it begins: the sampler's time nearest to ``strength``; it is 1 for strength 1 alone.

        Raises:
            ValueError: the sampler has no time between 0 and 1.
        """
        first, *between, _ = sampler.times(schedule)
        if self.strength == 1:
            return first
        if not between:
            raise ValueError(
                f"strength={self.strength}: a sampler of 1 step begins with pure noise; take more steps"
            )
        return min(between, key=lambda t: abs(t - self.strength))

    @abstractmethod
    def steps(
        self, sampler: Sampler, denoiser: Denoiser, eps: Images, draws: Draws, first: int = 0
    ) -> Iterator[SamplerOutput]:
        """Draw the edited images, yielding every time on the way as ``Sampler.steps`` does.

        Args:
            sampler: any.
            denoiser: estimates x_0; guided or not.
            eps: standard normal noise.
            draws: as in ``Sampler.steps``.
            first: the number of ``eps[0]`` among all images of the run.

        Raises:
            ValueError: the given images are not of the shape that is drawn.
        """


class Inpaint(Edit):
    """Draw a part of an image anew, to fit the rest (RePaint: Lugmayr et al., 2201.09865, algorithm 1).

    With m = 1 where pixels are known, each step's x_s is joined with the known image at the same noise level:

        x_s <- m x_s^known + (1 - m) x_s,        x_s^known ~ q(x_s | x_0 = image)

    The step has not seen what it is joined with. So q(x_t | x_s) goes back up and the step is taken again, until
    both halves fit. The known pixels come out exactly as they were given, since x_0^known is the image.

    Args:
        image: one or more; drawn image i belongs to image i modulo their number.
        mask: where to draw anew (1 - m), for each image or for all.
        repeats: how often each step is taken: 1 is the fastest, the paper's 10 joins the halves best.

    Raises:
        ValueError: fewer than 1 repeat, or several masks and not as many images.
    """

    def __init__(self, image: Given, mask: Masks, repeats: int = 10) -> None:
        if repeats < 1:
            raise ValueError(f"repeats={repeats}: each step is taken at least once")
        self.num_images = how_many(image)
        masks = len(mask) if mask.ndim > 2 else 1
        if masks not in (1, self.num_images):
            raise ValueError(f"mask: {masks} masks for {self.num_images} images; give one, or one for each")
        self.image = image
        self.mask = mask
        self.repeats = repeats

    def steps(
        self, sampler: Sampler, denoiser: Denoiser, eps: Images, draws: Draws, first: int = 0
    ) -> Iterator[SamplerOutput]:
        """Begin with pure noise, putting the known pixels back after every step."""
        image = _rows(self.image, eps, first)
        unknown = _mask_rows(self.mask, eps, first)

        def keep_known(x_s: Images, s: float, noise: Noise) -> Images:
            known = image if s == 0 else _noised(denoiser.schedule, image, s, noise())
            return torch.where(unknown, x_s, known)

        x_T = denoiser.schedule.init_noise_sigma * eps
        return sampler.steps(denoiser, x_T, draws, edit=keep_known, repeats=self.repeats)


class Variation(Edit):
    """Draw an image again from part of the way (SDEdit: Meng et al., 2108.01073).

        x_t ~ q(x_t | x_0 = image)        at t = strength, from where the sampler goes on as usual

    What the noise hides at t is invented, the rest stays.

    Args:
        image: one or more; drawn image i belongs to image i modulo their number.
        strength: t, in (0, 1]; the nearest of the sampler's times between 0 and 1 is taken. At 1 itself samplers
            begin with pure noise: it keeps nothing of the image.

    Raises:
        ValueError: strength is out of range.
    """

    def __init__(self, image: Given, strength: float = 0.5) -> None:
        self.num_images = how_many(image)
        self.image = image
        self.strength = _checked_strength(strength)

    def steps(
        self, sampler: Sampler, denoiser: Denoiser, eps: Images, draws: Draws, first: int = 0
    ) -> Iterator[SamplerOutput]:
        """Noise the image, and go on from there."""
        start = self.start(sampler, denoiser.schedule)
        x_t = _noised(denoiser.schedule, _rows(self.image, eps, first), start, eps)
        return sampler.steps(denoiser, x_t, draws, start=start)


class Interpolate(Edit):
    """Draw what lies between two images (Ho et al., 2006.11239, section 4.3 and figure 8).

        x_t = (1 - lambda) q(x_t | image) + lambda q(x_t | image2)        at t = strength

    and the sampler goes on from there. Drawn image i of n has lambda = i / (n - 1). Both ends meet the same eps:
    a mean of two independent ones would hold less noise than belongs to t.

    Args:
        image, image2: the ends of the path.
        num_images: images on the path, its ends among them.
        strength: t, in (0, 1], as for ``Variation``; the larger, the freer the path and the less like the two
            images its ends.

    Raises:
        ValueError: fewer than 2 images, more than one at an end, or strength is out of range.
    """

    same_noise = True

    def __init__(self, image: Given, image2: Given, num_images: int, strength: float = 0.5) -> None:
        self.ends = _checked_ends(image, image2, num_images)
        self.num_images = num_images
        self.strength = _checked_strength(strength)

    def steps(
        self, sampler: Sampler, denoiser: Denoiser, eps: Images, draws: Draws, first: int = 0
    ) -> Iterator[SamplerOutput]:
        """Mix the images, noise them, and go on from there."""
        start = self.start(sampler, denoiser.schedule)
        image, image2 = (_rows(end, eps, first) for end in self.ends)
        mixed = torch.lerp(image, image2, _fractions(eps, first, self.num_images))
        return sampler.steps(denoiser, _noised(denoiser.schedule, mixed, start, eps), draws, start=start)


class Slerp(Edit):
    """Draw what lies between two images by way of their noise (Song et al., 2010.02502, section 5.3).

    DDIM's inversion takes both to their x_1; what lies between is drawn from the great circle between those:

        x_1 = sin((1 - lambda) theta) / sin(theta) x_1(image) + sin(lambda theta) / sin(theta) x_1(image2)

    with theta the angle between the two. Drawn image i of n has lambda = i / (n - 1). A deterministic sampler comes
    back to the two images at the ends of the path, as nearly as its steps are fine.

    Args:
        image, image2: the ends of the path.
        num_images: images on the path, its ends among them.
        iterations: of each step of the inversion, as for ``DDIM.invert``.

    Raises:
        ValueError: fewer than 2 images, or more than one at an end.
    """

    same_noise = True

    def __init__(self, image: Given, image2: Given, num_images: int, iterations: int = 3) -> None:
        self.ends = _checked_ends(image, image2, num_images)
        self.num_images = num_images
        self.iterations = iterations

    def steps(
        self, sampler: Sampler, denoiser: Denoiser, eps: Images, draws: Draws, first: int = 0
    ) -> Iterator[SamplerOutput]:
        """Invert both ends at the sampler's own times, row by row: each row's label guides both ways."""
        times = sampler.times(denoiser.schedule)
        one, two = (
            DDIM().invert(denoiser, _rows(end, eps, first), self.iterations, times) for end in self.ends
        )
        share = _fractions(eps, first, self.num_images)
        cosine = torch.cosine_similarity(one.flatten(1), two.flatten(1)).clamp(-1, 1)
        theta = cosine.acos()[:, None, None, None] / torch.pi
        # sinc(a) = sin(pi a) / (pi a) is 1 at 0: two equal images are no special case.
        mixed = (1 - share) * torch.sinc((1 - share) * theta) * one + share * torch.sinc(share * theta) * two
        return sampler.steps(denoiser, mixed / torch.sinc(theta), draws)


def how_many(given: Given) -> int:
    """Return the number of given images."""
    return len(given) if given.ndim == 4 else 1


def _noised(schedule: Schedule, image: Images, t: float, eps: Images) -> Images:
    """The x_t of q(x_t | image), for t > 0; at 1 what samplers begin with, which is noise alone."""
    return schedule.init_noise_sigma * eps if t == 1 else renoise(schedule, image, 0.0, t, eps)


def _rows(given: Given, eps: Images, first: int) -> Images:
    """For each row of ``eps`` the given image that belongs to it."""
    given = given[None] if given.ndim == 3 else given
    if given.shape[1:] != eps.shape[1:]:
        raise ValueError(
            f"image: {list(given.shape[1:])} (channels, height, width), but {list(eps.shape[1:])} is drawn"
        )
    return to_device(_of_each(given, eps, first).to(eps.dtype), eps.device)


def _mask_rows(mask: Masks, eps: Images, first: int) -> Bool[Tensor, "batch _ h w"]:
    mask = mask[None] if mask.ndim == 2 else mask
    mask = mask[:, None] if mask.ndim == 3 else mask
    if mask.shape[2:] != eps.shape[2:] or mask.shape[1] not in (1, eps.shape[1]):
        raise ValueError(f"mask: {list(mask.shape[1:])}, but {list(eps.shape[1:])} is drawn")
    return to_device(_of_each(mask, eps, first), eps.device) > 0


def _of_each(given: Tensor, eps: Images, first: int) -> Tensor:
    """For each row of ``eps`` that of ``given``, in turn, chosen where ``given`` lies."""
    return given[torch.arange(first, first + len(eps), device=given.device) % len(given)]


def _fractions(eps: Images, first: int, num_images: int) -> Float[Tensor, "batch 1 1 1"]:
    """Where on the path each row lies: 0 at the first image of the run, 1 at the last."""
    fractions = torch.arange(first, first + len(eps)) / (num_images - 1)
    return to_device(fractions.to(eps.dtype), eps.device)[:, None, None, None]


def _checked_strength(strength: float) -> float:
    if not (is_number(strength) and 0 < strength <= 1):
        raise ValueError(
            f"strength={strength}: must lie in (0, 1], as a fraction of the way from image to noise"
        )
    return float(strength)  # of less precision, another of the sampler's times might be the nearest


def _checked_ends(image: Given, image2: Given, num_images: int) -> tuple[Given, Given]:
    if num_images < 2:
        raise ValueError(f"num_images={num_images}: a path has at least its two ends")
    for name, end in (("image", image), ("image2", image2)):
        if how_many(end) != 1:
            raise ValueError(
                f"{name}: a path leads from one image to another, but this holds {how_many(end)}"
            )
    return image, image2
