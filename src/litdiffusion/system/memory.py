"""A setting of the C library that speeds up training on the CPU."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to keep the memory of freed tensors instead of returning it to the kernel.

    By default every tensor above 32 MB at most is mapped afresh, and the kernel clears its pages one by one on
    first touch: a third to a half of a training step (docs/benchmarks.md). Reusing the memory costs nothing but
    the peak staying resident. Returns whether the setting took effect (glibc only; CUDA has an allocator of its own).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, LARGEST_INT))
