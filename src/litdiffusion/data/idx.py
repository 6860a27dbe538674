"""The IDX file format of MNIST and its successors.

A file holds two zero bytes, a type byte (8: uint8), the number of dimensions, each dimension as a big-endian
32-bit number, then the values. It may be gzipped.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from litdiffusion.errors import UserError

_UINT8 = 8


def read_idx(path: Path, ndim: int) -> UInt8[np.ndarray, "..."]:
    """Read a whole IDX file of uint8 values.

    Args:
        path: the file, gzipped or not (told by its content).
        ndim: number of dimensions it must have: 1 for labels, 3 for images.

    Raises:
        UserError: the file cannot be read, or is not exactly such a file.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; fetch it again with `make data`") from error
    header = 4 + 4 * ndim
    if len(data) < header or data[:4] != bytes((0, 0, _UINT8, ndim)):
        raise UserError(
            f"{path} is not an IDX file of uint8 in {ndim} dimensions; fetch it again with `make data`"
        )
    shape = struct.unpack(f">{ndim}I", data[4:header])
    if len(data) - header != math.prod(shape):
        raise UserError(
            f"{path} is damaged: {len(data) - header} values where its header says {math.prod(shape)}; "
            "fetch it again with `make data`"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def write_idx(path: Path, values: UInt8[np.ndarray, "..."]) -> None:
    """Write values as an IDX file, gzipped if the name ends so."""
    data = (
        bytes((0, 0, _UINT8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    )
    path.write_bytes(gzip.compress(data, compresslevel=6) if path.suffix == ".gz" else data)
