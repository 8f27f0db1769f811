"""Folding the scales of an input into what produces it, so that the float model computes what it did.

Columns of the readers are multiplied by s, and the producer's output is divided by it: a norm's weight and bias, or
the rows of a linear. What is stored in 16 bits is rounded first, and s is then what the stored value amounts to.

Shapes: O out features, I in features of the readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qtool.models.architectures import Architecture, Input
from qtool.models.producers import producer_rows
from qtool.parameters import Parameters
from qtool.transforms.scaling import LARGEST, SMALLEST


def sharing(parameters: Parameters, source: Input, config: Mapping[str, Any]) -> Tensor | None:
    """For each channel of an input the row of the linear that produces it, [I]; None when it comes from a norm."""
    producer = parameters.full(source.producer or "")
    if not parameters.is_matrix(producer):
        return None
    readers = parameters.weight(parameters.full(source.linears[0]))
    rows = producer_rows(source, config, len(parameters.weight(producer)), readers.shape[1])
    return torch.tensor(rows, device=readers.device)


def fold(
    parameters: Parameters, source: Input, scale_I: Tensor, architecture: Architecture, share_I: Tensor | None
) -> Tensor:
    """Divide the producer by `scale_I` and multiply the readers' columns; the scales as they came out, [I]."""
    assert source.producer is not None
    scale_I = scale_I.clamp(SMALLEST, LARGEST)
    producer = parameters.full(source.producer)
    if share_I is None:
        scale_I = _divide_norm(parameters, producer, scale_I, architecture.norm_offset)
    else:
        scale_I = _divide_rows(parameters, producer, scale_I, share_I)
    for linear in source.linears:
        parameters.weight(parameters.full(linear)).mul_(scale_I)
    return scale_I


def _divide_norm(parameters: Parameters, norm: str, scale_I: Tensor, offset: float) -> Tensor:
    weight_I = parameters[f"{norm}.weight"]
    stored_I = parameters.as_stored(f"{norm}.weight", (weight_I + offset) / scale_I - offset)
    ratio_I = (weight_I + offset) / (stored_I + offset)
    fits_I = ratio_I.isfinite() & (ratio_I > 0)  # not where the weight is 0, or would be stored as 0
    scale_I = torch.where(fits_I, ratio_I, 1.0)
    parameters.change(f"{norm}.weight", torch.where(fits_I, stored_I, weight_I))
    if f"{norm}.bias" in parameters:
        parameters.change(f"{norm}.bias", parameters.as_stored(f"{norm}.bias", parameters[f"{norm}.bias"] / scale_I))
    return scale_I


def _divide_rows(parameters: Parameters, linear: str, scale_I: Tensor, share_I: Tensor) -> Tensor:
    if not parameters.is_quantized(linear):
        scale_I = scale_I.log2().round().exp2()  # exact in the 16 bits that it is stored in
        parameters.changed.add(f"{linear}.weight")
    weight_OI = parameters.weight(linear)
    by_row = torch.ones(len(weight_OI), device=weight_OI.device)
    by_row[share_I] = scale_I
    weight_OI.div_(by_row[:, None])
    if f"{linear}.bias" in parameters:
        parameters.change(
            f"{linear}.bias", parameters.as_stored(f"{linear}.bias", parameters[f"{linear}.bias"] / by_row)
        )
    return by_row[share_I]
