"""Rotation of the residual stream (QuaRot, arXiv 2404.00456, stages 1a and 1b; SpinQuant, 2405.16406, R1 and R2).

An orthogonal matrix R that spreads outliers over all channels is merged into all that reads or writes the residual
stream, and another into the values and the output of each attention head. What the model computes stays as it is and
the files are ordinary ones. RMS norms are folded into what they feed, since R does not commute with their weights;
tied embeddings part, since the final norm is folded into the head alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qtool.errors import unknown
from qtool.models.architectures import ARCHITECTURES, Architecture

if TYPE_CHECKING:
    from qtool.formats.weights import Source

KINDS = ("hadamard", "orthogonal")


@dataclass(frozen=True)
class Rotation:
    """Options of `rotation`."""

    kind: str = "hadamard"  # hadamard: with random signs; orthogonal: a random matrix
    seed: int = 0  # of the random signs or matrices
    heads: bool = True  # values and outputs of attention heads as well

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("value of rotation.kind:", self.kind, KINDS)

    def wrap(self, source: Source, architecture: Architecture, config: Mapping[str, Any]) -> Source:
        """See `qtool.transforms.SourceTransform`."""
        from qtool.formats.weights import Weights
        from qtool.transforms.rotated import RotatedSource

        assert isinstance(source, Weights)
        return RotatedSource(source, architecture, config, self)

    def problem(self, architecture: Architecture | None, config: Mapping[str, Any]) -> str | None:
        """See `qtool.transforms.SourceTransform`."""
        if architecture is not None and architecture.rotatable:
            return None
        able = ", ".join(sorted(name for name, known in ARCHITECTURES.items() if known.rotatable))
        return f"`{config.get('model_type')}` is not among the architectures that can be rotated: {able}"
