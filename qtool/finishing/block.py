"""Block by block (Block-AP of EfficientQAT, arXiv 2407.11062): weights, scales and zero points of a block's linears are
trained on the output of the float block for the float model's inputs, given the inputs of the quantized model.

It starts from the method's solution. A weight begins half way between its grid point and the point of that code's
cell that is nearest to the float weight, so that a weight whose code was a close call changes it easily. No more than
one block is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtool.training.options import Training


@dataclass(frozen=True)
class Block(Training):
    """Options of `block`. The learning rate is that of weights, in steps of their grid."""

    epochs: int | None = 4
    lr: float = 0.01
    scale_lr: float = 0.0005  # of scales, as shares of themselves, and of zero points
    clip: float = 0.0
    held_out: int | None = None  # batches kept for the held-out loss; default 1/16 of them, at least one
    accumulate: int = 1  # parts of a batch; they stay together, so it decides which rows meet at a step
    recompute: bool = False  # there is one block: nothing to recompute

    def rows_at_once(self) -> int:
        """Rows that go through the block together."""
        return max(1, self.batch // self.accumulate)
