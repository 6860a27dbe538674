"""Each distance beside closed forms, brute force, and the packages that have it."""

from math import exp, log, sqrt
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torchmetrics.image
from torch import Tensor

from litdiffusion.evaluation.distances import (
    Gaussian,
    copying,
    coverage,
    density,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest,
    precision,
    radii,
)


def features(count: int, width: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    rows = torch.randn(count, width, generator=random, dtype=torch.float64) @ mixing
    return rows * scale + shift


A, B = features(300, 16, 0), features(260, 16, 1, shift=0.3, scale=1.2)
SETS = {
    "more images than features": (A, B),
    "fewer images than features": (features(40, 64, 2), features(50, 64, 3, 0.1)),
    "a constant feature": (torch.cat((A, A[:, :1] * 0 + 2), 1), torch.cat((B, B[:, :1] * 0 + 2), 1)),
}
both = pytest.mark.parametrize(("a", "b"), SETS.values(), ids=SETS)


class Rows(torch.nn.Module):
    """A torchmetrics feature network that passes features through."""

    num_features = 16

    def forward(self, rows: Tensor) -> Tensor:
        return rows


def fed(metric: Any, a: Tensor, b: Tensor) -> Any:
    metric.set_dtype(torch.float64)
    metric.update(b, real=True)
    metric.update(a, real=False)
    return metric.compute()


def fid(a: Tensor, b: Tensor) -> float:
    return frechet_distance(Gaussian.of(a), Gaussian.of(b))


def test_the_frechet_distance_of_gaussians_whose_covariances_commute():
    """Sum over axes of (m1 - m2)^2 + (s1 - s2)^2, in any rotation."""
    std_1, std_2 = torch.tensor([1.0, 2.0, 0.0, 3.0]).double(), torch.tensor([2.0, 2.0, 1.0, 0.5]).double()
    mean_1, mean_2 = torch.tensor([0.0, 1, 0, 0]).double(), torch.tensor([2.0, 1, 0, -1]).double()
    rotation = torch.linalg.qr(features(4, 4, 5)).Q
    first, second = (
        Gaussian(rotation @ mean, rotation @ torch.diag(std**2) @ rotation.T)
        for mean, std in ((mean_1, std_1), (mean_2, std_2))
    )
    expected = ((mean_1 - mean_2) ** 2 + (std_1 - std_2) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(float(expected), abs=1e-12)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")
@both
def test_the_frechet_distance_is_scipys(a, b):
    root = np.asarray(
        scipy.linalg.sqrtm((Gaussian.of(a).covariance @ Gaussian.of(b).covariance).numpy())
    ).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * np.trace(root)
    singular = len(a) < a.shape[1] or bool((a.std(0) == 0).any())
    assert fid(a, b) == pytest.approx(
        float(expected), rel=1e-4 if singular else 1e-9
    )  # scipy's, where singular
    assert fid(a, a) == pytest.approx(0, abs=1e-10)


def test_of_fewer_images_than_features_it_has_a_closed_form_too():
    """tr (A B)^1/2 is the nuclear norm of X Y^T, X and Y the centred features over the root of their number."""
    a, b = SETS["fewer images than features"]
    x, y = ((each - each.mean(0)) / sqrt(len(each) - 1) for each in (a, b))
    trace = torch.linalg.matrix_norm(x @ y.T, "nuc")
    expected = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * trace
    assert fid(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_torchmetrics_agrees_on_fid():
    metric = torchmetrics.image.FrechetInceptionDistance(Rows(), input_img_size=(16,), normalize=False)
    assert fid(A, B) == pytest.approx(float(fed(metric, A, B)), rel=1e-6)


@both
def test_torch_fidelity_agrees(a, b):
    pytest.importorskip("torch_fidelity", reason="the extra [features] is not installed")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), verbose=False)
    assert fid(a, b) == pytest.approx(theirs["frechet_inception_distance"], abs=1e-6 * float(a.var(0).sum()))
    options = {"kid_subsets": 10, "kid_subset_size": 30, "verbose": False}
    expected = kid_features_to_metric(a, b, **options)
    found = kernel_distance(a, b, subsets=10, subset_size=30)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)
    expected = prc_features_to_metric(a, b, verbose=False)
    assert (precision(a, b), precision(b, a)) == pytest.approx(
        (expected["precision"], expected["recall"]), abs=1e-6
    )
    expected = isc_features_to_metric(a, 10, True, 2020)
    mean, std = inception_score(a)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-6)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_kid_of_everything_is_torchmetrics():
    metric = torchmetrics.image.KernelInceptionDistance(Rows(), subsets=1, subset_size=260)
    expected, _ = fed(metric, A[:260], B)
    assert kernel_distance(A[:260], B, subsets=1, subset_size=260).mean == pytest.approx(
        float(expected), rel=1e-6
    )


def test_the_kernel_distance_of_a_one_dimensional_shift():
    """E k(x, y) for the kernel (x y + 1)^3 follows from the moments: here of x = 1 and y = -1 exactly."""
    a, b = torch.ones(50, 1, dtype=torch.float64), -torch.ones(50, 1, dtype=torch.float64)
    assert kernel_distance(a, b, subsets=3, subset_size=20) == pytest.approx((8 + 8 - 0, 0, 0), abs=1e-12)


def test_the_standard_error_is_no_smaller_than_what_repetitions_show():
    estimates = [
        kernel_distance(
            features(400, 8, 2 * i), features(400, 8, 2 * i + 1, 0.3), subsets=30, subset_size=100
        )
        for i in range(40)
    ]
    spread = float(np.std([each.mean for each in estimates]))
    claimed = float(np.mean([each.std_error for each in estimates]))
    assert 0.9 * spread < claimed < 2 * spread


def test_few_images_are_one_subset():
    assert (
        kernel_distance(A[:40], B[:30], subsets=2).std_error == kernel_distance(A[:40], B[:30], subsets=2).std
    )
    with pytest.raises(ValueError, match="KID needs at least 2 images of each kind; there are 1"):
        kernel_distance(A[:1], B)
    with pytest.raises(ValueError, match="a covariance needs at least 2 images; there are 1"):
        Gaussian.of(A[:1])
    with pytest.raises(ValueError, match="5 nearest neighbours need more images than 5"):
        coverage(A, B[:5])


LINE = torch.tensor([[0.0], [1.0], [2.0], [10.0]], dtype=torch.float64)


def test_balls_on_a_line():
    """Radii for k = 1 are 1, 1, 1, 8; what lies on the edge is inside."""
    assert radii(LINE, 1).tolist() == [1, 1, 1, 8]
    points = torch.tensor([[-1.0], [3.5], [1.5], [30.0]], dtype=torch.float64)
    # -1 is in the ball of 0; 3.5 in that of 10 alone; 1.5 in those of 1 and 2; 30 in none.
    assert precision(points, LINE, neighbours=1) == 3 / 4
    assert density(points, LINE, neighbours=1) == (1 + 1 + 2 + 0) / 4
    assert coverage(points, LINE, neighbours=1) == 1  # the balls of 0, 1, 2 and 10 each hold one
    # The points' own radii are 2.5, 2, 2 and 26.5: 0, 1 and 2 lie in those of -1 and 1.5, 10 in that of 30.
    assert precision(LINE, points, neighbours=1) == 1
    # Radii for k = 2 are 2, 1, 2, 9: the points lie in 3, 4, 4 and 1 of the balls.
    assert density(LINE, LINE, 2) == (3 + 4 + 4 + 1) / (4 * 2)


def test_balls_are_those_of_brute_force():
    new, real = A[:90], B[:80]
    among_real, between = ((x[:, None] - real).norm(dim=2) for x in (real, new))
    assert precision(new, real) == (between <= among_real.sort(1).values[:, 3]).any(1).double().mean()
    reach = among_real.sort(1).values[:, 5]
    assert density(new, real) == pytest.approx(float((between <= reach).sum(1).double().mean() / 5))
    assert coverage(new, real) == (between.min(0).values <= reach).double().mean()


def test_duplicates_cover_themselves():
    twice = torch.cat((A, A))
    assert coverage(twice, twice) == precision(twice, twice) == 1


def test_the_nearest_is_that_of_brute_force():
    distances, index = nearest(A, B)
    expected = (A[:, None] - B).norm(dim=2).min(1)
    assert torch.equal(index, expected.indices)
    torch.testing.assert_close(distances, expected.values)
    assert nearest(A, A).distances.max() == 0
    besides = nearest(A, A, besides=torch.arange(len(A)))
    expected = ((A[:, None] - A).norm(dim=2) + torch.diag(torch.full((len(A),), torch.inf))).min(1)
    assert torch.equal(besides.indices, expected.indices)


def test_copies_are_told_from_new_images():
    train, new = features(2000, 4, 0), features(500, 4, 9)
    assert copying(train[:500], train).share_closer == 1
    assert copying(train[:500] + 1e-6, train).share_closer == 1
    assert copying(new, train).share_closer == pytest.approx(0.5, abs=0.05)
    assert copying(features(500, 4, 9, shift=30), train).share_closer == 0


def test_the_inception_score_of_known_distributions():
    sure = torch.eye(4).double().repeat(25, 1) * 1000
    assert inception_score(sure, splits=1)[0] == pytest.approx(4)
    assert inception_score(torch.zeros(100, 4).double()) == pytest.approx((1, 0))
    half = torch.tensor([[log(3), 0.0], [0.0, log(3)]]).double().repeat(50, 1)  # 3/4 and 1/4, either way
    expected = exp(0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5))
    assert inception_score(half, splits=1)[0] == pytest.approx(expected)
