"""What a metric is. ``configs/metrics`` lists those of a run, and whatever shows numbers goes by that list."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torchmetrics
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module

from litdiffusion.data.stores import Batch
from litdiffusion.diffusion import Denoiser, Objective
from litdiffusion.diffusion.devices import precise_dtype
from litdiffusion.errors import UserError
from litdiffusion.evaluation.sample_metrics import Found, SampleMetric, named

BINS = 10
TENTHS = tuple(f"_t{i:02d}" for i in range(BINS))
"""Suffixes of numbers by noise level, from nearly clean to nearly noise."""


class Model(NamedTuple):
    """What is measured.

    Fields:
        denoiser: the one to sample from: with averaged weights where there are any.
        objective: what it was trained on.
        raw: the denoiser with the weights of the last step, where ``denoiser`` has averaged ones.
    """

    denoiser: Denoiser
    objective: Objective
    raw: Denoiser | None = None


class Metric(torchmetrics.Metric):
    """One or several numbers that tell how good a model is, on images that the training never sees.

    Metric ``NAME`` of the configuration is logged as ``val/NAME`` and stands as ``val_NAME`` in ``summary.json`` and
    in a sweep's table; its further numbers add a suffix to ``val/NAME``. A subclass sets ``higher_is_better``, adds
    its states with ``add_state(..., dist_reduce_fx="sum")``, so that it is the same on any number of processes, and
    writes ``update`` and ``compute``. For a mean over images, see ``Mean``.

    ``depends_on`` names the keys of the configuration, with all below them, that decide what the number means. Runs
    that differ in one of them, or in the metric's own settings, are not ranked by it.
    """

    higher_is_better = False
    depends_on: tuple[str, ...] = ("data", "datamodule.num_val", "trainer.limit_val_batches")

    def require_support(self, denoiser: Denoiser) -> None:
        """Make sure, before anything is trained or measured, that a denoiser has what this metric needs.

        Raises:
            UserError: it has not.
        """

    @abstractmethod
    def update(self, model: Model, batch: Batch) -> None:
        """Take in a batch of held-out images, finished and on the model's device, of this process alone."""

    @abstractmethod
    def compute(self) -> Found:
        """Return a number, or several by suffix, "" for the main one; none where nothing was measured."""

    def extent(self) -> dict[str, int]:
        """Return over how many images and times the numbers are averages, for ``evaluate``, by full names."""
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> Module:
        """Follow the model's device; the states are as precise as numbers are there."""
        precise = precise_dtype(fn(torch.empty(0)).device)
        return super()._apply(lambda x: fn(x.to(precise) if x.is_floating_point() else x), *args)


class Mean(Metric):
    """Means over images: of one number for each, of further ones under ``suffixes``, and of either by noise level."""

    sums: Tensor
    counts: Tensor

    def __init__(self, *suffixes: str) -> None:
        super().__init__()
        self.suffixes = ("", *suffixes, *TENTHS)
        for state in ("sums", "counts"):
            zeros = torch.zeros(len(self.suffixes), dtype=torch.float64)
            self.add_state(state, zeros, dist_reduce_fx="sum")

    def add(self, values: Float[Tensor, " images"], suffix: str = "") -> None:
        """Add one number for each image."""
        self._add(values, torch.full(values.shape, self.suffixes.index(suffix), device=values.device))

    def add_by_noise_level(self, values: Float[Tensor, " images"], tenth: Int[Tensor, " images"]) -> None:
        """Add one number for each image to the mean of all, and to that of its tenth of the noise levels, 0..9."""
        self.add(values)
        self._add(values, len(self.suffixes) - BINS + tenth)

    def _add(self, values: Float[Tensor, " images"], index: Int[Tensor, " images"]) -> None:
        values = values.to(self.sums.dtype)
        self.sums = self.sums.index_add(0, index, values)
        self.counts = self.counts.index_add(0, index, torch.ones_like(values))

    def compute(self) -> dict[str, float]:
        """Return the means of what was added."""
        means = zip(self.suffixes, self.sums.tolist(), self.counts.tolist(), strict=True)
        return {suffix: total / count for suffix, total, count in means if count}


def tenth_of(t: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Return in which tenth of (0, 1] each time lies, its end included up to rounding: 0..9."""
    return (t * BINS - 1e-6).long().clamp(0, BINS - 1)


def listed(metrics: Mapping[str, object] | None) -> tuple[dict[str, Metric], dict[str, SampleMetric]]:
    """Return the metrics of a configuration that have not been left out with null: of held-out images, of samples."""
    held_out: dict[str, Metric] = {}
    of_samples: dict[str, SampleMetric] = {}
    for name, metric in (metrics or {}).items():
        if isinstance(metric, Metric):
            held_out[name] = metric
        elif isinstance(metric, SampleMetric):
            of_samples[name] = metric
        elif metric is not None:
            kind = type(metric).__name__
            raise UserError(
                f"metrics.{name}: {kind} is no metric; subclass Metric or SampleMetric of litdiffusion.evaluation"
            )
    return held_out, of_samples


def numbers(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Return all numbers of the metrics under their full names, over all processes; every process must call this."""
    return {
        full_name: value
        for name, metric in metrics.items()
        for full_name, value in named(name, metric.compute()).items()
        if value is not None
    }
