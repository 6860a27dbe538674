"""Guidance: which classes are drawn, and how strongly.

``Labelled`` and ``Guided`` are denoisers around denoisers; ``Guidance`` is a user's request, checked once, that
composes them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from litdiffusion.diffusion.denoiser import Denoiser, Estimate, Images, Labels, Wrapped, consistent
from litdiffusion.diffusion.devices import to_device
from litdiffusion.diffusion.schedule import Time

Classes = str | SupportsIndex | Iterable[SupportsIndex] | None
"""Classes to draw: ``all`` for each in turn, one, several (image i gets class i modulo their number), or none."""


class Labelled(Wrapped):
    """Ask for a class of each image.

    Args:
        inner: a denoiser of a network that knows classes.
        labels: one for each image of the batch; ``num_classes`` stands for no class in particular.
    """

    def __init__(self, inner: Denoiser, labels: Labels) -> None:
        super().__init__(inner)
        self.labels = labels

    def forward(
        self, x_t: Images, t: Time, self_cond: Images | None = None, labels: Labels | None = None
    ) -> Estimate:
        """Tell the network the labels, whichever others are given."""
        estimate: Estimate = self.inner(x_t, t, self_cond, self.labels)
        return estimate


class Guided(Wrapped):
    """Extrapolate from a weaker denoiser's estimate.

        x_0 = x_0(guide) + scale (x_0 - x_0(guide))

    With the same denoiser without labels as the guide it is classifier-free guidance (Ho & Salimans, 2207.12598);
    with a worse model of the same data, autoguidance (Karras et al., 2406.02507).

    Args:
        inner: the main denoiser.
        guide: the weaker one, on the same schedule.
        scale: 1 is the denoiser itself, 0 the guide; more than 1 exaggerates what tells them apart.
        interval: guide only at times in it (Kynkäänniemi et al., 2404.07724); elsewhere as for scale 1.
    """

    def __init__(
        self, inner: Denoiser, guide: Denoiser, scale: float, interval: Sequence[float] = (0.0, 1.0)
    ) -> None:
        super().__init__(inner)
        self.guide = guide
        self.scale = float(scale)  # a whole number, as typed, decides the same below
        self.low, self.high = interval

    def forward(
        self, x_t: Images, t: Time, self_cond: Images | None = None, labels: Labels | None = None
    ) -> Estimate:
        """Ask both, or one of them where the other does not count."""
        scale: float | Tensor = self.scale
        if isinstance(t, Tensor):
            inside = (t >= self.low) & (t <= self.high)
            scale = torch.where(inside, self.scale, 1.0).to(x_t.dtype)[:, None, None, None]
        elif not self.low <= t <= self.high:
            scale = 1.0
        if isinstance(scale, float) and scale == 0:
            guide: Estimate = self.guide(x_t, t, self_cond, labels)
            return guide
        estimate: Estimate = self.inner(x_t, t, self_cond, labels)
        if isinstance(scale, float) and scale == 1:
            return estimate
        guide = self.guide(x_t, t, self_cond, labels)
        x0 = guide.x0 + scale * (estimate.x0 - guide.x0)
        return consistent(self.schedule, x0, x_t, t, estimate.variance)


@dataclass(frozen=True)
class Guidance:
    """A request to a denoiser.

    Args:
        labels: the classes to draw, where the network knows some; None for no class in particular.
        scale: 1 as learned; more exaggerates what tells the classes from all images, or, with a ``guide``, the
            denoiser from its guide; 0 is the other of the two alone.
        interval: guide only at times in it, from image (0) to noise (1); elsewhere as for scale 1.
        guide: a weaker denoiser of the same data and schedule, for autoguidance; None for classifier-free guidance.

    Raises:
        ValueError: a value is out of range.
    """

    labels: Any = "all"  # each of any type, as a user types it: checked below
    scale: Any = 1.0
    interval: Any = (0.0, 1.0)
    guide: Denoiser | None = None

    def __post_init__(self) -> None:
        for name in ("labels", "scale", "interval"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if not is_number(self.scale):
            raise ValueError(f"guidance_scale={self.scale}: must be a finite number")
        ends: Any = self.interval
        is_pair = isinstance(ends, Sequence) and len(ends) == 2 and all(map(is_number, ends))
        if not is_pair or not 0 <= ends[0] <= ends[1] <= 1:
            raise ValueError(f"guidance_interval={ends}: must be [from, to], two times in [0, 1]")
        if self.guide is not None and self.scale == 1:
            raise ValueError("guidance_scale=1: a guide changes nothing then; give another, such as 2")

    def classes(self, denoiser: Denoiser) -> list[int] | None:
        """Return the classes that images are drawn from in turn, or None for none.

        Raises:
            ValueError: they are not classes of the network.
        """
        labels, number = self.labels, denoiser.num_classes
        if labels is None or (isinstance(labels, str) and labels == "all" and number is None):
            return None
        if number is None:
            raise ValueError(f"labels={labels}: this network was trained without classes; leave labels out")
        if isinstance(labels, str) and labels == "all":
            return list(range(number))
        classes: list[Any] = list(labels) if isinstance(labels, Sequence) else [labels]
        if not classes or not all(isinstance(c, Integral) and not isinstance(c, bool) for c in classes):
            raise ValueError(
                f"labels={labels}: give all (each class in turn), null (none), a class number or a list of them"
            )
        if not all(0 <= each < number for each in classes):
            raise ValueError(f"labels={labels}: each must be one of 0..{number - 1}")
        return [int(each) for each in classes]

    def require_support(self, denoiser: Denoiser) -> None:
        """Make sure that a denoiser can draw what is asked for.

        Raises:
            ValueError: labels that are none of its network's, guidance without labels or a guide, or a guide of
                another kind.
        """
        is_guided = self.classes(denoiser) is not None or self.guide is not None
        if not is_guided and self.scale != 1:
            way_out = (
                "this network was trained without classes, leave it out"
                if denoiser.num_classes is None
                else "it exaggerates a class, so name one by labels"
            )
            raise ValueError(f"guidance_scale={self.scale}: {way_out}")
        if self.guide is not None and _kind(self.guide) != _kind(denoiser):
            raise ValueError(
                "guide_ckpt: a guide must have the same image size, classes and schedule as the model it guides"
            )

    def around(self, denoiser: Denoiser, numbers: Iterable[int]) -> Denoiser:
        """Return the denoiser that draws the images of these numbers as asked."""
        classes = self.classes(denoiser)
        labels: Tensor | None = None
        if classes is not None:
            rows = torch.tensor([classes[i % len(classes)] for i in numbers])
            labels = to_device(rows, denoiser.device)

        def labelled(core: Denoiser) -> Denoiser:
            return core if labels is None else Labelled(core, labels)

        def guided(core: Denoiser) -> Denoiser:
            if self.scale == 1:
                return labelled(core)
            weaker = core if self.guide is None else labelled(self.guide.core)
            return Guided(labelled(core), weaker, self.scale, self.interval)

        return denoiser.with_core(guided)


def plain(value: Any) -> Any:
    """Return what arrays and tensors, also in a list, hold as Python's numbers; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def is_number(value: object) -> bool:
    """Whether a value is a finite real number, and no bool."""
    return type(value) is not bool and isinstance(value, Real) and math.isfinite(value)


def _kind(denoiser: Denoiser) -> tuple[Any, ...]:
    schedule = denoiser.schedule
    noise = [round(x, 9) for i in range(1, 11) for x in schedule.at(i / 10)]
    return denoiser.image_shape, denoiser.num_classes, noise
