"""Metrics of generated images, of sets whose numbers are known."""

import pytest
import torch

from litdiffusion.errors import UserError
from litdiffusion.evaluation import (
    FID,
    KID,
    ClassBalance,
    Copying,
    Coverage,
    Density,
    HeldOutLoss,
    InceptionScore,
    Precision,
    Recall,
    SampleMetric,
    listed,
)
from litdiffusion.evaluation.features import FeatureSet
from litdiffusion.evaluation.sample_metrics import Reference, measured

ALL: dict[str, SampleMetric] = {
    "fid": FID(),
    "kid": KID(subsets=5, subset_size=50),
    "precision": Precision(),
    "recall": Recall(),
    "density": Density(),
    "coverage": Coverage(),
    "inception_score": InceptionScore(),
    "class_balance": ClassBalance(),
    "copying": Copying(),
}


def normal(count: int, seed: int, shift: float = 0.0) -> FeatureSet:
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 4, generator=random, dtype=torch.float64) + shift
    return FeatureSet(features, features[:, :3] * 10)


TRAIN, TEST = normal(2000, 0), normal(500, 1)


def test_of_the_training_images_themselves() -> None:
    found = measured(ALL, TRAIN, Reference(TRAIN))
    expected = {
        "fid": 0,
        "kid": 0,
        "precision": 1,
        "recall": 1,
        "coverage": 1,
        "class_balance": 0,
        "copying": 1,
    }
    assert {name: found[f"val/{name}"] for name in expected} == pytest.approx(expected, abs=0.1)
    assert found["val/copying_distance_q50"] == 0
    assert found["val/fid_floor"] is None  # nothing to measure it on


def test_of_new_images_of_the_same_kind_and_of_another() -> None:
    same = measured(ALL, normal(500, 2), Reference(TRAIN, TEST))
    other = measured(ALL, normal(500, 2, shift=8), Reference(TRAIN, TEST))
    assert same["val/fid"] == pytest.approx(same["val/fid_floor"], abs=0.05)
    assert same["val/copying"] == pytest.approx(0.5, abs=0.06)
    assert other["val/fid"] == pytest.approx(4 * 64, rel=0.05)
    assert {
        name: other[f"val/{name}"] for name in ("precision", "recall", "density", "coverage", "copying")
    } == {
        "precision": 0,
        "recall": 0,
        "density": 0,
        "coverage": 0,
        "copying": 0,
    }
    for name in ("fid", "kid", "precision", "recall", "density", "coverage"):
        sign = 1 if ALL[name].higher_is_better else -1
        assert sign * same[f"val/{name}"] > sign * other[f"val/{name}"], name
    assert same["val/fid_floor"] == other["val/fid_floor"]


def test_the_floor_is_measured_at_the_same_count() -> None:
    few = measured({"fid": FID()}, normal(60, 3), Reference(TRAIN, TEST))
    many = measured({"fid": FID()}, normal(500, 3), Reference(TRAIN, TEST))
    assert few["val/fid_floor"] > 2 * many["val/fid_floor"]
    assert few["val/fid_floor"] == FID().measure(TEST.some(60), Reference(TRAIN))[""]
    more = measured({"fid": FID(), "copying": Copying()}, normal(501, 3), Reference(TRAIN, TEST))
    assert (more["val/fid_floor"], more["val/copying_floor"]) == (None, None)


def test_class_shares() -> None:
    logits = torch.eye(3).double()
    train = FeatureSet(torch.rand(6, 2).double(), logits[[0, 0, 1, 1, 2, 2]])
    samples = FeatureSet(torch.rand(4, 2).double(), logits[[0, 0, 0, 1]])
    found = measured({"classes": ClassBalance()}, samples, Reference(train))
    assert found == pytest.approx(
        {"val/classes": 5 / 12, "val/classes_00": 3 / 4, "val/classes_01": 1 / 4, "val/classes_02": 0}
    )


def test_of_a_network_without_classes_their_metrics_are_left_out() -> None:
    bare = FeatureSet(TEST.features)
    assert (
        measured({"a": InceptionScore(), "b": ClassBalance()}, bare, Reference(FeatureSet(TRAIN.features)))
        == {}
    )


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"metrics.fid: a covariance needs at least 2 images; there are 1"):
        measured(ALL, TEST.some(1), Reference(TRAIN))
    with pytest.raises(UserError, match=r"metrics.precision: 3 nearest neighbours need more images than 3"):
        measured({"precision": Precision()}, TEST.some(3), Reference(TRAIN))


def test_the_list_holds_both_kinds() -> None:
    held_out, of_samples = listed({"loss": HeldOutLoss(), "fid": FID(), "kid": None})
    assert (list(held_out), list(of_samples)) == (["loss"], ["fid"])
    with pytest.raises(UserError, match=r"metrics.x: str is no metric; subclass Metric or SampleMetric"):
        listed({"x": "fid"})
