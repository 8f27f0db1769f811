"""Rounded keys and values: a window at once is decoding token by token, for every architecture.

Models run in float64, where the order of additions cannot push a key over the border of a rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.checkpoint.reader import Checkpoint
from qtool.formats.weights import Weights
from qtool.models.architectures import ARCHITECTURES
from qtool.models.blockwise import BlockModel
from qtool.numerics.activations import fake_quantize, static_scale
from qtool.runtime.kv import GrowingCache, KVCache
from qtool.scheme import KV_SCHEMES

every_scheme = pytest.mark.parametrize("name", KV_SCHEMES)
every_architecture = pytest.mark.parametrize("kind", ARCHITECTURES)
LAYERS, TOKENS = 2, 24  # three times the sliding windows


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make_tokens(rows: int = 2) -> Tensor:
    return torch.randint(2, 300, (rows, TOKENS), generator=torch.Generator().manual_seed(0))


def make_cache(name: str = "fp8") -> GrowingCache:
    """Scales so coarse that logits show it; another one for each layer, and for keys and values."""
    scheme = KV_SCHEMES[name]
    absmax = torch.tensor([8.0, 5.0, 6.0, 7.0])
    scales = static_scale(absmax, scheme).split(1)
    return GrowingCache([KVCache(scheme, scales[2 * i], scales[2 * i + 1]) for i in range(LAYERS)])


@torch.no_grad()
def run(model: Any, tokens: Tensor, cache: GrowingCache | None) -> Tensor:
    return model(tokens, past_key_values=cache, use_cache=cache is not None).logits


def step_by_step(model: Any, tokens: Tensor, cache: GrowingCache) -> Tensor:
    return torch.cat([run(model, token, cache) for token in tokens.split(1, 1)], 1)


def check_close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    gap = (ours - expected).abs()
    assert gap.max() <= tolerance, f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"


@every_scheme
@every_architecture
def test_a_window_at_once_is_decoding_token_by_token(make_model: Any, kind: str, name: str) -> None:
    model, tokens = load(make_model(kind)), make_tokens()
    whole = run(model, tokens, make_cache(name))
    check_close(step_by_step(model, tokens, make_cache(name)), whole, 1e-9)
    assert (whole - run(model, tokens, None)).abs().max() > 1e-4, "something was rounded"


@every_architecture
def test_without_rounding_it_is_the_cache_of_transformers(make_model: Any, kind: str) -> None:
    model, tokens = load(make_model(kind)), make_tokens()
    expected = run(model, tokens, None)
    for pieces in (1, 5, TOKENS):
        cache = GrowingCache([None] * LAYERS)
        parts = [run(model, part, cache) for part in tokens.split(pieces, 1)]
        check_close(torch.cat(parts, 1), expected, 1e-9)
        assert cache.get_seq_length() == cache.get_seq_length(1) == TOKENS


@every_scheme
def test_compressed_tensors_computes_the_same(make_model: Any, name: str) -> None:
    """With the same scales in the attention modules, where a checkpoint has them."""
    folder, tokens, cache = make_model("llama"), make_tokens(), make_cache(name)
    ours = run(load(folder, torch.float32), tokens, cache)
    args = {"num_bits": 8, "type": "float" if name == "fp8" else "int", "strategy": "tensor", "symmetric": True}
    config = {"config_groups": {}, "kv_cache_scheme": args, "quantization_status": "frozen"}
    model = load(folder, torch.float32)
    apply_quantization_config(model, QuantizationConfig(**config))
    for block, rounding in zip(model.model.layers, cache.layers, strict=True):
        assert rounding is not None
        block.self_attn.k_scale.data.copy_(rounding.k_scale)
        block.self_attn.v_scale.data.copy_(rounding.v_scale)
    check_close(ours, run(model, tokens, None), 0)


@every_architecture
def test_ranges_are_those_of_all_keys_and_values(make_model: Any, kind: str) -> None:
    from transformers import DynamicCache

    model, ranges = load(make_model(kind), torch.float32), [KVCache.recording() for _ in range(LAYERS)]
    expected = [torch.zeros(2) for _ in range(LAYERS)]
    for tokens in make_tokens(4).split(2):
        stored = DynamicCache()  # without a config it has no windows and keeps all
        with torch.no_grad():
            plain = model(tokens, past_key_values=stored, use_cache=True).logits
        assert torch.equal(run(model, tokens, GrowingCache(ranges)), plain), "only watched"
        for i, layer in enumerate(stored.layers):
            seen = torch.stack([layer.keys.abs().amax(), layer.values.abs().amax()])
            expected[i] = torch.maximum(expected[i], seen)
    for found, wanted in zip(ranges, expected, strict=True):
        assert [part.shape for part in found.absmax()] == [(1,), (1,)]
        assert torch.equal(torch.cat(found.absmax()), wanted), (found.absmax(), wanted)


@every_architecture
def test_block_by_block_it_is_the_whole_model(make_model: Any, kind: str) -> None:
    folder, tokens, cache = make_model(kind), make_tokens(), make_cache()
    model = BlockModel(folder, Weights(Checkpoint(folder)), torch.device("cpu"))
    stream = model.start(tokens.split(1))  # two batches, so what a layer kept of the first would show
    for i, rounding in enumerate(cache.layers):
        with model.block(i) as block:
            stream.hidden = [model.run(block, i, stream, batch, rounding) for batch in range(2)]
    with model.head() as head:
        logits = head(torch.cat(stream.hidden))
    whole = load(folder, torch.float32)
    whole.set_attn_implementation(ARCHITECTURES[kind].attention)
    check_close(logits, run(whole, tokens, cache), 1e-5)


def test_one_layer_keeps_nothing_between_windows() -> None:
    scheme, scale = KV_SCHEMES["fp8"], torch.tensor([0.01])
    cache = KVCache(scheme, scale, 3 * scale)
    for dtype in (torch.float32, torch.bfloat16):
        keys, values = (torch.randn(1, 2, 5, 8).to(dtype) for _ in range(2))
        for _ in range(2):
            found = cache.update(keys, values, 7)
            assert [part.dtype for part in found] == [dtype] * 2
            assert torch.equal(found[0], fake_quantize(keys.float(), scheme, scale).to(dtype))
            assert torch.equal(found[1], fake_quantize(values.float(), scheme, 3 * scale).to(dtype))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_cropped_tokens_are_forgotten(make_model: Any, kind: str) -> None:
    model, tokens = load(make_model(kind)), make_tokens()
    cache = make_cache()
    expected = run(model, tokens, make_cache())
    run(model, torch.cat([tokens[:, :15], tokens[:, :6]], 1), cache)
    cache.crop(0)
    assert cache.get_seq_length() == 21
    cache.crop(-6)
    assert cache.get_seq_length() == 15
    check_close(run(model, tokens[:, 15:], cache), expected[:, 15:], 1e-9)
    cache.crop(-100)
    check_close(run(model, tokens, cache), expected, 1e-9)


def test_transformers_generates_with_it(make_model: Any) -> None:
    model, start = load(make_model("llama")), make_tokens(1)[:, :5]
    found = model.generate(start, past_key_values=make_cache(), max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = start
    for _ in range(12):
        expected = torch.cat([expected, run(model, expected, make_cache())[:, -1:].argmax(-1)], 1)
    assert found.tolist() == expected.tolist()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(KV_SCHEMES)), st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 10**6))
def test_pieces_come_back_as_one_window(name: str, pieces: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (5 * torch.randn(2, 3, sum(pieces), 8, generator=generator) for _ in range(2))
    whole, grown = make_cache(name), make_cache(name)
    expected = whole.update(keys, values, 1)
    for part in zip(keys.split(pieces, 2), values.split(pieces, 2), strict=True):
        before = grown.get_seq_length(1)
        assert grown.get_mask_sizes(part[0].shape[2], 1) == (before + part[0].shape[2], 0)
        found = grown.update(*part, 1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert grown.get_seq_length(0) == 0
