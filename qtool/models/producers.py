"""Which row of the linear that produces an input stands for which of its channels. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtool.errors import QtoolError
from qtool.models.architectures import Input, config_value


def producer_rows(source: Input, config: Mapping[str, Any], out_features: int, in_features: int) -> list[int]:
    """For each of the `in_features` channels of an input the row of its producer, which has `out_features`.

    Scaling that row, and its bias, scales the channel. With grouped-query attention several channels share a row.
    Raises QtoolError where the sizes do not belong together.
    """
    rows: Sequence[int]
    if source.rows == "all":
        rows = range(out_features)
    elif source.rows == "second-half":
        rows = range(out_features // 2, out_features)
    else:
        heads = int(config_value(config, "num_attention_heads") or 0)
        rows = _value_rows(source.rows == "value-of-each-head", heads, out_features, in_features)
    if len(rows) != in_features:
        raise QtoolError(
            f"`{source.producer}` has {out_features} outputs and `{source.linears[0]}` {in_features} inputs: "
            "config.json and the checkpoint do not belong together"
        )
    return list(rows)


def _value_rows(of_each_head: bool, heads: int, out_features: int, in_features: int) -> list[int]:
    """The rows of the value heads, repeated for each query head that shares them; [] where they cannot be told.

    The producer's heads are the value heads alone, or all query, then all key, then all value heads, or the three
    of each head together.
    """
    if not heads or in_features % heads or out_features % (width := in_features // heads):
        return []
    count = out_features // width
    if of_each_head:
        starts = [3 * head + 2 for head in range(heads)] if count == 3 * heads else []
    else:
        values = count if count <= heads else (count - heads) // 2
        fits = values and heads % values == 0 and count in (values, heads + 2 * values)
        starts = [count - values + head * values // heads for head in range(heads)] if fits else []
    return [start * width + row for start in starts for row in range(width)]
