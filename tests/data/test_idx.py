import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from litdiffusion.data.idx import read_idx, write_idx
from litdiffusion.errors import UserError


@given(arrays(np.uint8, array_shapes(min_dims=1, max_dims=3, max_side=5)), st.sampled_from(["x", "x.gz"]))
def test_writing_then_reading_gives_the_values_back(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, name: str
) -> None:
    path = tmp_path_factory.mktemp("idx") / name
    write_idx(path, values)
    assert np.array_equal(read_idx(path, values.ndim), values)


def test_the_format_is_that_of_the_specification(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
    assert read_idx(path, ndim=1).tolist() == [7, 8, 9]


whole = bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>not found</html>",
        whole[:6],
        whole[:-1],
        whole + b"x",
        bytes([0, 0, 8, 1, 255, 255, 255, 255, 7]),  # a header that promises four gigabytes
        bytes([0, 0, 13, 1, 0, 0, 0, 1, 0, 0, 0, 0]),  # floats
        bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 5]),  # images where labels should be
        gzip.compress(whole, mtime=0)[:-4],
        gzip.compress(whole, mtime=0)[:14],
        gzip.compress(whole, mtime=0)[:12] + b"\xff" * 12,
        gzip.compress(whole[:-1], mtime=0),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train-labels"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_idx(path, ndim=1)
    assert str(path) in str(error.value)
    assert "make data" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-file"):
        read_idx(tmp_path / "no-such-file", ndim=1)
