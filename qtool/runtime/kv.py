"""Keys and values as they come back from a cache that rounds them; their ranges.

Attention code of transformers 5.17 hands its keys, after RoPE as vLLM stores them, and its values to the cache and
goes on with what that returns. The classes here do for transformers' Cache what its attention and masks ask of one.

Shapes: B rows, H heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.numerics.fake_quant import fake_quantize_inputs
from qtool.scheme import ActivationScheme


class KVCache:
    """One layer's rounding of keys and values by fixed scales [1]. Every call is a whole window: nothing is kept.

    Because the scales are fixed, each token of a window sees what it would see in decoding token by token.
    """

    def __init__(
        self, scheme: ActivationScheme | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None
    ) -> None:
        self.scheme, self.k_scale, self.v_scale = scheme, k_scale, v_scale
        self._seen: tuple[Tensor, Tensor] | None = None

    @classmethod
    def recording(cls) -> KVCache:
        """One that rounds nothing, for calibration."""
        return cls()

    def absmax(self) -> tuple[Tensor, Tensor]:
        """The largest magnitudes of all keys and of all values that a recording one has seen, float32 [1]."""
        assert self._seen is not None
        return self._seen

    def update(self, key_BHTD: Tensor, value_BHTD: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values as they will be read, in the type they came in."""
        if self.scheme is None:
            found = _absmax(key_BHTD), _absmax(value_BHTD)
            k_before, v_before = self._seen or found
            self._seen = torch.maximum(k_before, found[0]), torch.maximum(v_before, found[1])
            return key_BHTD, value_BHTD
        keys = fake_quantize_inputs(key_BHTD, self.scheme, self.k_scale)
        values = fake_quantize_inputs(value_BHTD, self.scheme, self.v_scale)
        return keys, values


class GrowingCache:
    """The cache of a whole model while it decodes: what a layer has stored stays, rounded once, and grows.

    `layers` are the roundings of all layers; None is a layer whose keys and values stay as they are. Layers with
    a sliding window keep all tokens, too: the masks hide what is outside.
    """

    is_compileable = False  # asked for by transformers

    def __init__(self, layers: Sequence[KVCache | None]) -> None:
        self.layers = list(layers)
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_BHTD: Tensor, value_BHTD: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; those of all tokens so far."""
        rounding = self.layers[layer_idx]
        new = rounding.update(key_BHTD, value_BHTD, layer_idx) if rounding else (key_BHTD, value_BHTD)
        if layer_idx in self._stored:
            keys, values = self._stored[layer_idx]
            new = torch.cat([keys, new[0]], -2), torch.cat([values, new[1]], -2)
        self._stored[layer_idx] = new
        return new

    def crop(self, tokens: int) -> None:
        """Forget the last `-tokens` tokens; 0 or less, as transformers 5.17 counts them."""
        assert tokens <= 0, tokens
        length = max(0, self.get_seq_length() + tokens)
        self._stored = {
            i: (keys[..., :length, :], values[..., :length, :]) for i, (keys, values) in self._stored.items()
        }

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens are stored."""
        return self._stored[layer_idx][0].shape[-2] if layer_idx in self._stored else 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many keys so many new tokens will see, and the position of the first."""
        return self.get_seq_length(layer_idx) + query_length, 0


def _absmax(states: Tensor) -> Tensor:
    smallest, largest = states.aminmax()
    return torch.maximum(largest, -smallest).float().reshape(1)
