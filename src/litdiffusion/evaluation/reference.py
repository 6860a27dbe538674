"""The features of real images, computed once for each data set and feature network, and kept in a file."""

import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.data.sources.base import Split
from litdiffusion.evaluation.features import FeatureSet, extract, joined
from litdiffusion.system.files import whole_file
from litdiffusion.system.processes import gathered, rank_and_number

log = logging.getLogger(__name__)


def real_features(
    data: ImageDataModule, split: Split, network: nn.Module, cache: Path, feature_hash: str
) -> FeatureSet:
    """Return the features of all images of a split, in order; every process must call this.

    They are kept under ``cache``, by the fingerprint of the images and the hash of the network, where that folder can
    be written to.
    """
    images = json.dumps(data.split_fingerprint(split), sort_keys=True)
    name = hashlib.sha256(images.encode()).hexdigest()[:12]
    path = cache / f"{name}-{feature_hash}.npz"
    found = gathered(_read(path))[0]  # the first process's word: files may come and go
    if found is not None:
        return found
    rank, _ = rank_and_number()
    batches = tqdm(data.in_order(split), desc=f"features of {split} images", unit="batch", disable=rank > 0)
    starts, parts = [], []
    for batch in batches:
        starts.append(batch.start)
        parts.append(extract(network, [batch.images]))
    shares = gathered(list(zip(starts, parts, strict=True)))
    in_order = sorted((pair for share in shares for pair in share), key=lambda pair: pair[0])
    found = joined([part for _, part in in_order])
    if rank == 0:
        _write(path, found)
    return found


def _read(path: Path) -> FeatureSet | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            logits = torch.from_numpy(archive["logits"]) if "logits" in archive else None
            return FeatureSet(torch.from_numpy(archive["features"]), logits)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or not ours
        return None


def _write(path: Path, found: FeatureSet) -> None:
    arrays: dict[str, Any] = {"features": found.features.numpy()}
    if found.logits is not None:
        arrays["logits"] = found.logits.numpy()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            np.savez(temporary, **arrays)
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): the next evaluation computes these features again", path, error
        )
