"""Which rows a step trains on, and which of them a process takes. Never imports torch."""

from __future__ import annotations

import math
import random


class Order:
    """`total` rows as they are trained on: epoch after epoch, each in an order by seed and number alone."""

    def __init__(self, rows: list[int], total: int, seed: int) -> None:
        self.rows, self.total, self.seed = rows, total, seed
        self._epoch, self._shuffled = -1, rows

    def batch(self, step: int, size: int) -> list[int]:
        """The rows of a step, counted from 0; the last batch may be smaller."""
        places = range(step * size, min((step + 1) * size, self.total))
        return [self._at(*divmod(place, len(self.rows))) for place in places]

    def _at(self, epoch: int, index: int) -> int:
        if epoch != self._epoch:
            self._epoch, self._shuffled = epoch, list(self.rows)
            random.Random(f"{self.seed} {epoch}").shuffle(self._shuffled)
        return self._shuffled[index]


def parts(batch: list[int], most: int, rank: int, processes: int) -> list[tuple[list[int], float]]:
    """One process's rows of a batch, in at most so many parts and as many as every process has; what each counts.

    A process without rows of its own for a part takes one that counts nothing.
    """
    own = batch[rank::processes]
    count = min(most, math.ceil(len(batch) / processes))
    shares = [own[part::count] for part in range(count)]
    return [(indexes, 1.0) if indexes else (batch[:1], 0.0) for indexes in shares]
