"""The calibration rows on their way through the blocks, and what is measured of them there.

Shapes: N tokens, I input features.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from qtool.calibration.stats import CROSS, InputStats, inputs_of
from qtool.calibration.tokens import TokenRows, batches
from qtool.models.blockwise import BlockModel, Stream, linear_of
from qtool.numerics.activations import fake_quantize
from qtool.runtime.inputs import round_inputs
from qtool.runtime.kv import KVCache
from qtool.scheme import ActivationScheme

Roundings = Mapping[str, tuple[ActivationScheme, Tensor | None]]  # of the inputs of linears, relative to the block


class Rows:
    """Hidden states of all rows before block `index`; with `cross` a second stream goes through the float model."""

    def __init__(self, model: BlockModel, rows: TokenRows, batch_tokens: int, cross: bool) -> None:
        self.model, self.cross = model, cross
        self.stream = model.start(batch for batch, _ in batches(rows.rows, batch_tokens))
        self.float_stream = Stream(list(self.stream.hidden), self.stream.arguments) if cross else None
        self.float_block: nn.Module | None = None
        self.float_left = False  # the float stream stands behind the block already
        self.index = 0

    def enter(self, index: int) -> None:
        """The rows stand before this block."""
        self.index = index

    def split(self, block: nn.Module) -> None:
        """From here on the block will be rounded; the float stream keeps a copy of it as it is."""
        assert self.cross
        self.float_block = copy.deepcopy(block)

    def targets(self) -> list[Tensor]:
        """The output of the float block for the float model's inputs, batch by batch; they leave the block."""
        assert self.float_stream is not None
        assert self.float_block is not None
        block, stream = self.float_block, self.float_stream
        self._advance(block, stream, None)
        self.float_block, self.float_left = None, True
        return stream.hidden

    def output(self, block: nn.Module, batch: int, cache: KVCache | None = None) -> Tensor:
        """The output of a block for one batch, with the gradient of whatever in it asks for one."""
        return self.model.forward(block, self.index, self.stream, batch, cache)

    def measure(
        self,
        block: nn.Module,
        layers: Iterable[str],
        wanted: Collection[str],
        rounded: Roundings | None = None,
        cache: KVCache | None = None,
        advance: bool = False,
        scales: Mapping[str, Tensor] | None = None,
    ) -> dict[str, InputStats]:
        """Statistics of the inputs of these linears as the block is now; `advance` takes the rows through it as well.

        Inputs in `rounded` are rounded as they will be when the model runs. `cache` sees the keys and values.
        Transforms have divided the inputs in `scales` by these [I], but not those of the float model.
        """
        layers, rounded = list(layers), rounded or {}
        stats = {x: InputStats.empty(linear_of(block, x).in_features, wanted, self.model.device) for x in layers}
        to_the_end = advance or (cache is not None and cache.scheme is None)  # attention may come after the last input
        with round_inputs(block, rounded):
            for batch in range(len(self.stream.hidden)):
                inputs, output = self._inputs(block, self.stream, batch, layers, cache, to_the_end)
                floats: dict[str, Tensor] = {}
                if CROSS in wanted:
                    assert self.float_block is not None
                    assert self.float_stream is not None
                    floats, _ = self._inputs(self.float_block, self.float_stream, batch, layers, None, False)
                    floats = {x: floats[x] / scales[x] if scales and x in scales else floats[x] for x in layers}
                for x in layers:
                    x_NI = fake_quantize(inputs[x], *rounded[x]) if x in rounded else inputs[x]
                    stats[x].add(x_NI, floats.get(x))
                if advance:
                    assert output is not None
                    self.stream.hidden[batch] = output
        return stats

    def leave(self, block: nn.Module, rounded: Roundings | None = None, cache: KVCache | None = None) -> None:
        """The rows advance to the next block."""
        with round_inputs(block, rounded or {}):
            self._advance(block, self.stream, cache)
        if self.float_stream is not None and not self.float_left:
            self._advance(self.float_block or block, self.float_stream, None)
        self.float_block, self.float_left = None, False

    def _advance(self, block: nn.Module, stream: Stream, cache: KVCache | None) -> None:
        for batch in range(len(stream.hidden)):
            stream.hidden[batch] = self.model.run(block, self.index, stream, batch, cache)

    def _inputs(
        self, block: nn.Module, stream: Stream, batch: int, layers: list[str], cache: KVCache | None, to_the_end: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        with torch.no_grad():
            return inputs_of(lambda: self.model.run(block, self.index, stream, batch, cache), block, layers, to_the_end)
