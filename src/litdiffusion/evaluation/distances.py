"""How far one set of images is from another, by the features that a network finds in them.

Every function takes arrays of features, [images, features] in float64, one row for each image, and needs nothing but
torch: the matrix square root of FID comes from symmetric eigendecompositions. Where torchmetrics, torch-fidelity and
prdc compute the same number they agree with it (``tests/evaluation/test_distances.py``).
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

Features = Float64[Tensor, "_ features"]
"""Any number of images; the same features in every argument."""
PerImage = Float64[Tensor, " _"]

ROWS = 1024
"""Rows of a matrix of distances that are held at a time."""


class Gaussian(NamedTuple):
    """Mean [D] and unbiased covariance [D, D] of features."""

    mean: Float64[Tensor, " features"]
    covariance: Float64[Tensor, "features features"]

    @classmethod
    def of(cls, features: Features) -> "Gaussian":
        """Fit a Gaussian.

        Raises:
            ValueError: fewer than two images have no covariance.
        """
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 images; there are {len(features)}")
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2), FID's distance (Heusel et al., 1706.08500).

    tr (A B)^1/2 is the sum of the singular values of A^1/2 B^1/2, which loses less precision than the eigenvalues of
    A B where a covariance is singular, as that of fewer images than features is.
    """
    difference = a.mean - b.mean
    root = torch.linalg.svdvals(_square_root(a.covariance) @ _square_root(b.covariance)).sum()
    return float(difference @ difference + a.covariance.trace() + b.covariance.trace() - 2 * root)


def _square_root(matrix: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    values, vectors = torch.linalg.eigh(matrix)
    rounding = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    roots = torch.where(values > rounding, values, 0).sqrt()
    return (vectors * roots) @ vectors.T


class KernelDistance(NamedTuple):
    """KID: the mean over subsets, their standard deviation, and the standard error of the mean."""

    mean: float
    std: float
    std_error: float


def kernel_distance(
    a: Features, b: Features, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """Return KID: the squared MMD by the kernel (x y / D + 1)^3 (Bińkowski et al., 1801.01401), without bias.

    It is the mean over random subsets of each set, which torch-fidelity draws from NumPy's ``RandomState(seed)``.

    The subsets overlap, so that their spread overstates how far the mean varies, and spread / sqrt(subsets)
    understates it. An estimate from all n images varies at most sqrt(subset_size / n) as far as that from one
    subset: that is the standard error.

    Raises:
        ValueError: a subset of fewer than 2 images.
    """
    fewest = min(len(a), len(b))
    size = min(subset_size, fewest)
    if size < 2:
        raise ValueError(f"KID needs at least 2 images of each kind; there are {fewest}")
    random = np.random.RandomState(seed)  # torch-fidelity's subsets
    found = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        x = a[torch.from_numpy(random.choice(len(a), size, replace=False))]
        y = b[torch.from_numpy(random.choice(len(b), size, replace=False))]
        found[i] = _squared_mmd(x, y)
    std = float(found.std(correction=0))
    return KernelDistance(float(found.mean()), std, std * (size / fewest) ** 0.5)


def _squared_mmd(x: Features, y: Features) -> float:
    m = len(x)
    within = sum(float(k.sum() - k.trace()) for k in (_kernel(x, x), _kernel(y, y)))
    return within / (m * (m - 1)) - 2 * float(_kernel(x, y).mean())


def _kernel(x: Features, y: Features) -> Float64[Tensor, "_ _"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision(generated: Features, real: Features, neighbours: int = 3) -> float:
    """Return the share of generated images that lie in a ball around a real one (Kynkäänniemi et al., 1904.06991).

    A ball reaches to the k-th nearest other of its own set. With the sets exchanged it is improved recall.
    """
    return float((_inside(generated, real, radii(real, neighbours)) > 0).double().mean())


def density(generated: Features, real: Features, neighbours: int = 5) -> float:
    """Return the mean number of balls around real images that a generated one lies in, over k (2002.09797)."""
    return float(_inside(generated, real, radii(real, neighbours)).double().mean()) / neighbours


def coverage(generated: Features, real: Features, neighbours: int = 5) -> float:
    """Return the share of real images whose ball holds a generated one (Naeem et al., 2002.09797).

    The edge belongs to the ball, so that the real images cover themselves; the ``prdc`` package leaves it out, and
    says 0 of duplicates.
    """
    return float((nearest(real, generated).distances <= radii(real, neighbours)).double().mean())


def radii(features: Features, neighbours: int) -> PerImage:
    """Return each image's distance to the k-th nearest other.

    Raises:
        ValueError: there are no k others.
    """
    if len(features) <= neighbours:
        raise ValueError(f"{neighbours} nearest neighbours need more images than {len(features)}")
    rows = [
        _distances(part, features).kthvalue(neighbours + 1).values for part in torch.split(features, ROWS)
    ]
    return torch.cat(rows)


def _inside(points: Features, centres: Features, reach: PerImage) -> Int64[Tensor, " _"]:
    """Return in how many of the balls each point lies."""
    return torch.cat([(_distances(part, centres) <= reach).sum(1) for part in torch.split(points, ROWS)])


class Nearest(NamedTuple):
    """The distance of each image to the nearest of others, and which it is."""

    distances: PerImage
    indices: Int64[Tensor, " _"]


def nearest(points: Features, others: Features, besides: Int64[Tensor, " _"] | None = None) -> Nearest:
    """Return the nearest of ``others`` to each point; ``besides[i]`` is left out for point i.

    Many distances are wanted and only the smallest kept: they are found by matrix products, which are quick and round
    to about 1e-7 of the features' size, and the one kept is computed anew from the difference.
    """
    indices = []
    for start in range(0, len(points), ROWS):
        distances = torch.cdist(points[start : start + ROWS], others)
        if besides is not None:
            distances.scatter_(1, besides[start : start + ROWS, None], torch.inf)
        indices.append(distances.argmin(1))
    index = torch.cat(indices)
    return Nearest((points - others[index]).square().sum(1).sqrt(), index)


class Copying(NamedTuple):
    """How near generated images are to the training images.

    Attributes:
        nearest: of the training images to each generated one.
        share_closer: of the generated images, those nearer to a training image than that one is to any other
            (1 - authenticity, Alaa et al., 2102.08921). Of new images of the same distribution it is about a half.
    """

    nearest: Nearest
    share_closer: float


def copying(generated: Features, train: Features) -> Copying:
    """Return how near generated images are to the training images, and to how many of them too near."""
    found = nearest(generated, train)
    hit, back = torch.unique(found.indices, return_inverse=True)
    among_themselves = nearest(train[hit], train, besides=hit).distances[back]
    return Copying(found, float((found.distances < among_themselves).double().mean()))


def inception_score(logits: Features, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Return exp(mean KL(p(class | image) || p(class))) (Salimans et al., 1606.03498): mean and spread over splits.

    The images are shuffled first, by NumPy's ``RandomState(seed)``, as in torch-fidelity.
    """
    order = np.random.RandomState(seed).permutation(len(logits))
    log_p = logits[torch.from_numpy(order)].log_softmax(1)
    count = min(splits, len(logits))
    edges = [i * len(logits) // count for i in range(count + 1)]
    scores = torch.tensor(
        [
            float((part.exp() * (part - part.exp().mean(0).log())).nansum(1).mean().exp())
            for part in (log_p[start:stop] for start, stop in pairwise(edges))
        ],
        dtype=torch.float64,
    )
    return float(scores.mean()), float(scores.std(correction=0))


def _distances(points: Features, others: Features) -> Float64[Tensor, "_ _"]:
    """Euclidean distances from differences: from products, those between equal points would not be 0."""
    return torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")
