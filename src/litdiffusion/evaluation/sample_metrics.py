"""Metrics of generated images, from the features that a network finds in them and in real ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from litdiffusion.errors import UserError
from litdiffusion.evaluation import distances
from litdiffusion.evaluation.features import FeatureSet


class Reference(NamedTuple):
    """The real images that generated ones are compared with."""

    train: FeatureSet
    test: FeatureSet | None = None

    def floor(self, count: int, measure: Callable[[FeatureSet], float]) -> float | None:
        """Return what ``measure`` says of ``count`` test images: what perfect samples would get; None of fewer."""
        if self.test is None or len(self.test.features) < count:
            return None
        return measure(self.test.some(count))


Found = float | Tensor | Mapping[str, float | Tensor | None]
"""What a metric has measured: a number, or several by the suffixes of their names."""


def named(name: str, found: Found) -> dict[str, float | None]:
    """Return what metric ``name`` has measured under full names."""
    several = found if isinstance(found, Mapping) else {"": found}
    return {
        f"val/{name}{suffix}": None if value is None else float(value) for suffix, value in several.items()
    }


class SampleMetric(ABC):
    """One or several numbers that tell how good generated images are.

    It is listed in ``configs/metrics`` beside the metrics of held-out images (``Metric``), and named like them.
    """

    higher_is_better = False
    depends_on: tuple[str, ...] = ("data", "features", "callbacks.measure_samples", "num_images", "images")
    """As for ``Metric``."""

    @abstractmethod
    def measure(self, samples: FeatureSet, reference: Reference) -> Found:
        """Return a number, or several by suffix, "" for the main one; None for what so many images do not tell."""


class FID(SampleMetric):
    """The Fréchet distance to the training images; ``_floor``: that of as many test images."""

    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float | None]:
        """See ``SampleMetric``."""
        train = distances.Gaussian.of(reference.train.features)

        def to_train(images: FeatureSet) -> float:
            return distances.frechet_distance(distances.Gaussian.of(images.features), train)

        return {"": to_train(samples), "_floor": reference.floor(len(samples.features), to_train)}


class KID(SampleMetric):
    """The squared maximum mean discrepancy from the training images; ``_std_error``: its standard error.

    Args:
        subsets: how many random subsets it is the mean over.
        subset_size: images in each.
    """

    def __init__(self, subsets: int = 100, subset_size: int = 1000) -> None:
        for name, value, least in (("subsets", subsets, 1), ("subset_size", subset_size, 2)):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        self.subsets = subsets
        self.subset_size = subset_size

    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        """See ``SampleMetric``."""
        sets = samples.features, reference.train.features
        found = distances.kernel_distance(*sets, self.subsets, self.subset_size)
        return {"": found.mean, "_std_error": found.std_error}


class _Neighbours(SampleMetric):
    """A metric of balls around images, among as many real images as generated ones.

    Args:
        neighbours: k; a ball reaches to the k-th nearest other.
    """

    higher_is_better = True

    def __init__(self, neighbours: int) -> None:
        if neighbours < 1:
            raise ValueError(f"neighbours={neighbours}: must be at least 1")
        self.neighbours = neighbours

    def measure(self, samples: FeatureSet, reference: Reference) -> float:
        """See ``SampleMetric``."""
        generated = samples.features
        return self.of(generated, reference.train.some(len(generated)).features)

    @abstractmethod
    def of(self, generated: distances.Features, real: distances.Features) -> float:
        """Return the number."""


class Precision(_Neighbours):
    """The share of generated images that look like real ones (improved precision)."""

    def __init__(self, neighbours: int = 3) -> None:
        super().__init__(neighbours)

    def of(self, generated: distances.Features, real: distances.Features) -> float:
        """See ``distances.precision``."""
        return distances.precision(generated, real, self.neighbours)


class Recall(Precision):
    """The share of real images that look like generated ones (improved recall)."""

    def of(self, generated: distances.Features, real: distances.Features) -> float:
        """See ``distances.precision``."""
        return distances.precision(real, generated, self.neighbours)


class Density(_Neighbours):
    """How densely generated images lie around real ones."""

    def __init__(self, neighbours: int = 5) -> None:
        super().__init__(neighbours)

    def of(self, generated: distances.Features, real: distances.Features) -> float:
        """See ``distances.density``."""
        return distances.density(generated, real, self.neighbours)


class Coverage(Density):
    """The share of real images that have a generated one nearby."""

    def of(self, generated: distances.Features, real: distances.Features) -> float:
        """See ``distances.coverage``."""
        return distances.coverage(generated, real, self.neighbours)


class InceptionScore(SampleMetric):
    """How sure the feature network is of each image's class, and how varied the classes; ``_std`` over ten parts.

    It needs a feature network with classes; of another it is left out.
    """

    higher_is_better = True

    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        """See ``SampleMetric``."""
        if samples.logits is None:
            return {}
        mean, std = distances.inception_score(samples.logits)
        return {"": mean, "_std": std}


class ClassBalance(SampleMetric):
    """The total variation distance of the class shares from those of the training images; ``_00``...: the shares.

    The classes are those that the feature network sees; of a network without any it is left out.
    """

    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float]:
        """See ``SampleMetric``."""
        if samples.logits is None or reference.train.logits is None:
            return {}
        generated, real = (
            torch.bincount(each.argmax(1), minlength=each.shape[1]).double() / len(each)
            for each in (samples.logits, reference.train.logits)
        )
        shares = {f"_{i:02d}": share for i, share in enumerate(generated.tolist())}
        return {"": float((generated - real).abs().sum() / 2), **shares}


class Copying(SampleMetric):
    """The share of generated images that are nearer to a training image than that one is to any other.

    ``_floor``: that share of as many test images, which are no copies; a half where both are drawn alike.
    ``_distance_q01``, ``_q10``, ``_q50``: quantiles of the distance to the nearest training image. The nearest ones
    stay as ``nearest``, to be shown.
    """

    nearest: distances.Nearest | None = None

    def measure(self, samples: FeatureSet, reference: Reference) -> dict[str, float | None]:
        """See ``SampleMetric``."""

        def copied(images: FeatureSet) -> distances.Copying:
            return distances.copying(images.features, reference.train.features)

        found = copied(samples)
        self.nearest = found.nearest
        return {
            "": found.share_closer,
            "_floor": reference.floor(len(samples.features), lambda images: copied(images).share_closer),
            **{
                f"_distance_q{percent:02d}": float(found.nearest.distances.quantile(percent / 100))
                for percent in (1, 10, 50)
            },
        }


def measured(
    metrics: Mapping[str, SampleMetric], samples: FeatureSet, reference: Reference
) -> dict[str, float | None]:
    """Return the numbers of all metrics under their full names.

    Raises:
        UserError: there are too few images for one of them.
    """
    report: dict[str, float | None] = {}
    for name, metric in metrics.items():
        try:
            found = metric.measure(samples, reference)
        except ValueError as error:
            raise UserError(
                f"metrics.{name}: {error}; give more, or leave it out by metrics.{name}=null"
            ) from error
        report |= named(name, found)
    return report
