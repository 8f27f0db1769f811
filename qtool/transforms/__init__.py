"""The table of transforms: what the weights are before they are rounded.

A transform is a frozen dataclass whose fields are its recipe options, and leaves what the float model computes
as it is. There are three kinds. A `ScaleTransform` multiplies the columns of the linears that read one input, and
divides what produces the input. A `SourceTransform` changes all tensors as they are read, before anything else. A
`BiasTransform` moves biases after the rounding. Modules import torch only inside functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from qtool.errors import unknown
from qtool.recipe import options_of

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.calibration.stats import Moments
    from qtool.formats.weights import Source
    from qtool.models.architectures import Architecture
    from qtool.numerics.grid import Grid

TRANSFORMS = {
    "rotation": "qtool.transforms.rotation:Rotation",
    "smoothquant": "qtool.transforms.smoothquant:SmoothQuant",
    "awq": "qtool.transforms.awq:AWQ",
    "bias-correction": "qtool.transforms.bias_correction:BiasCorrection",
}


@dataclass(frozen=True)
class Scales:
    """What a search found: columns are multiplied by `scale_I` (float32, positive); `note` says how strongly."""

    scale_I: Tensor
    note: str


class Transform(Protocol):
    """What all kinds have."""

    needs: ClassVar[frozenset[str]]  # statistics of the inputs, as in `Method.needs`


@runtime_checkable
class ScaleTransform(Transform, Protocol):
    """Scales for the columns of linears that share an input."""

    def scales(self, weights: Sequence[Tensor], grid: Grid, moments: Moments, share_I: Tensor | None) -> Scales | None:
        """Scales for weights [O_k, I] under their grid, or None to leave them as they are.

        Channels with the same number in `share_I` must have the same scale.
        """
        ...


@runtime_checkable
class SourceTransform(Transform, Protocol):
    """Changes tensors as they are read."""

    def wrap(self, source: Source, architecture: Architecture, config: Mapping[str, Any]) -> Source:
        """The same checkpoint with the transform applied."""
        ...

    def problem(self, architecture: Architecture | None, config: Mapping[str, Any]) -> str | None:
        """Why a model cannot take it, or None."""
        ...


@runtime_checkable
class BiasTransform(Transform, Protocol):
    """Corrects the bias of a rounded linear."""

    def shift(self, error_OI: Tensor, moments: Moments) -> Tensor:
        """What to add to the bias, [O], given W - W^ of its weight."""
        ...


def get_transform(name: str, options: Mapping[str, Any]) -> Transform:
    """The transform of that name with its options. Raises UsageError for unknown names, keys and types."""
    if name not in TRANSFORMS:
        raise unknown("transform", name, TRANSFORMS)
    module, _, cls = TRANSFORMS[name].partition(":")
    transform: Transform = options_of(getattr(import_module(module), cls), options, name)
    return transform
