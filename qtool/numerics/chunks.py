"""Running a function over chunks of a tensor: each chunk on one thread, several chunks at a time.

Chains of element-wise operations are limited by memory and by the threads' barriers, not by arithmetic:
a chunk that fits the cache on one thread beats all threads on one operation, the more so on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

CPU_ELEMENTS = 1 << 18
DEVICE_ELEMENTS = 1 << 26

Item = TypeVar("Item")
Result = TypeVar("Result")


def chunk_rows(device: torch.device, row_elements: int) -> int:
    """How many rows of so many elements make one chunk on a device."""
    return max(1, (CPU_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS) // max(1, row_elements))


def map_chunks(function: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> list[Result]:
    """[function(item) for item in items]; on a CPU one item per thread. The results do not depend on the threads."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return [function(item) for item in items]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
