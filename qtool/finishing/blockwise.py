"""The training of one block on the output of its float version.

Shapes: B rows of a batch, T tokens, E hidden size, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from qtool.errors import TrainingError
from qtool.finishing import held_out_of
from qtool.finishing.block import Block
from qtool.finishing.linear import BETAS, LatentLinear
from qtool.models.blockwise import linear_of, replace_module
from qtool.numerics.grid import Grid, QTensor
from qtool.runtime.inputs import round_inputs
from qtool.training.loop import Progress, Task, train
from qtool.training.world import World

if TYPE_CHECKING:
    from qtool.calibration.rows import Roundings, Rows
    from qtool.runtime.kv import KVCache
    from qtool.training.curve import Curve


class Serving(NamedTuple):
    """How a block is served: which inputs of its linears are rounded, and its keys and values."""

    rounded: Roundings
    cache: KVCache | None


MISALIGNED = 0.01  # of the root mean square of outputs: more is not rounding
Weights = Mapping[str, tuple[QTensor, Grid, Tensor]]  # by name in the block: as it is, its grid, and float [O, I]


class BlockTask(Task):
    """The squared error of a block's output, relative to the output's own. `rows` are the batches of its inputs."""

    def __init__(self, block: nn.Module, run: Callable[[int], Tensor], targets: list[Tensor], options: Block) -> None:
        super().__init__()
        self.block, self.rows = block, len(targets)
        self._run, self._targets, self._options = run, targets, options
        tokens = sum(target.shape[:2].numel() for target in targets)
        self._mean_square = sum(float(target.square().sum()) for target in targets) / tokens or 1.0  # of a token

    def forward(self, indexes: list[int]) -> tuple[Tensor, Tensor]:
        targets = [self._targets[index] for index in indexes]
        errors = [self._run(i).float().sub(target).square().sum() for i, target in zip(indexes, targets, strict=True)]
        tokens = torch.tensor(sum(target.shape[:2].numel() for target in targets))
        return torch.stack(errors).sum() / self._mean_square, tokens.to(self._targets[0].device)

    def groups(self) -> list[dict[str, Any]]:
        linears = [module for module in self.block.modules() if isinstance(module, LatentLinear)]
        scale_lr = self._options.scale_lr / self._options.lr
        return [
            {"params": [p for linear in linears for p in linear.of_weights], "betas": BETAS},
            {"params": [p for linear in linears for p in linear.of_scales], "betas": BETAS, "lr_scale": scale_lr},
        ]


def train_block(
    block: nn.Module,
    rows: Rows,
    weights: Weights,
    served: Serving,
    options: Block,
    name: str,
    progress: Progress,
) -> tuple[dict[str, QTensor], Curve, Tensor]:
    """The trained weights of a loaded block's linears, how it went, and the output for the first batch then.

    The block itself stays as it is.
    """
    targets = rows.targets()
    before: dict[str, nn.Module] = {}
    trained: dict[str, LatentLinear] = {}
    for linear, (quantized, grid, float_OI) in weights.items():
        trained[linear] = LatentLinear(quantized, grid, linear_of(block, linear).bias, float_OI)
        before[linear] = replace_module(block, linear, trained[linear])
    try:
        task = BlockTask(block, lambda batch: rows.output(block, batch, served.cache), targets, options)
        held_out, learned = held_out_of(len(targets), options.held_out)
        loop = replace(options, batch=options.accumulate)  # batches of the stream are parts of a step
        with round_inputs(block, served.rounded):
            curve = train(task, loop, World(rows.model.device), None, progress, f"train {name}", held_out, learned)
            with torch.no_grad():
                sample_BTE = rows.output(block, 0, served.cache)
        return {linear: module.result() for linear, module in trained.items()}, curve, sample_BTE
    finally:
        for linear, module in before.items():
            block.set_submodule(linear, module)


def alignment(trained: Tensor, written: Tensor, name: str) -> dict[str, float]:
    """How far what was trained is from what was written, as both compute it: the largest difference, and of what size.

    Raises TrainingError where that is more than float rounding.
    """
    difference = (trained - written).abs()
    rms = float(trained.square().mean().sqrt())
    if not float(difference.square().mean().sqrt()) <= MISALIGNED * rms:
        raise TrainingError(
            f"what was trained as `{name}` is not what is in the files: the two compute values up to "
            f"{float(difference.max()):.3g} apart, of about {rms:.3g}: please report this bug"
        )
    return {"max_difference": float(difference.max()), "rms": rms}
