"""Settings of the C library's allocator."""

import ctypes
import sys

__all__ = ["return_large_buffers"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BYTES = 1024 * 1024


def return_large_buffers() -> None:
    """Return large buffers to the system once they are free. Does nothing without glibc.

    By itself glibc keeps room for twice the largest buffer so far: in a project of 300,000 files some 50 MiB.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)
            mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
