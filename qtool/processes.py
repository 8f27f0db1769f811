"""How many processes torchrun has started, and which of them this is. Never imports torch."""

from __future__ import annotations

import os


def processes() -> int:
    """How many there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this is, from 0; the first writes and speaks."""
    return int(os.environ.get("RANK", 0))
