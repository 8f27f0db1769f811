"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3  # of glibc's mallopt
THRESHOLD_BYTES = 4 << 20


def return_freed_memory() -> None:
    """From now on, what is freed of large tensors leaves the process at once.

    glibc raises the size above which it does that to 32 MiB as it goes, and then keeps the holes between
    smaller tensors. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES)
