"""GGUF's block types: bytes against a reading block by block, scales against llama.cpp's own, methods on their grids.

Shapes: O out features, I in features, G groups, K weights of a group.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.calibration.stats import Moments
from qtool.errors import QtoolError
from qtool.formats.gguf import GGUF
from qtool.formats.gguf_blocks import pack_blocks, unpack_blocks
from qtool.methods.gptq import GPTQ
from qtool.numerics import block_search, chunks
from qtool.numerics.block_search import WIDE, sheared
from qtool.numerics.blocks import INTEGERS
from qtool.numerics.codecs import IQ4_VALUES, UnsignedCodec, codec_of
from qtool.numerics.grid import Grid, GridParams, QTensor, grid_of
from qtool.scheme import BLOCK_TYPES, FLOATS, MXFP4_BLOCK, QuantScheme

TYPES = {**BLOCK_TYPES, "mxfp4a16": MXFP4_BLOCK}
REFERENCED = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4a16"]  # those that the gguf package quantizes
WITH_MINIMA = ["q4_1", "q5_1", "q2_k", "q4_k", "q5_k"]
FLOAT_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
every_type = pytest.mark.parametrize("kind", TYPES)


def make_grid(kind: str) -> Grid:
    return grid_of(QuantScheme.parse(kind), torch.bfloat16)


def make_weight(rows: int = 16, inputs: int = 512, seed: int = 0) -> Tensor:
    """Ordinary weights; some with outliers, some rounded to bfloat16, where halves are common; a row of one sign."""
    weight = 0.03 * torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    weight[1, ::37] *= 8
    weight[2] = weight[2].abs() + 0.01
    weight[3:9] = weight[3:9].bfloat16().float()
    weight[9, ::2], weight[9, 1::2] = 0.25, -0.25
    return weight


def make_importance(inputs: int, sigma: float, seed: int = 1) -> Tensor:
    return (sigma * torch.randn(inputs, generator=torch.Generator().manual_seed(seed))).exp()


def random_bytes(kind: str, rows: int, blocks: int, seed: int) -> Tensor:
    """Blocks of any bytes, but for scales of blocks that are not finite and exponents of mxfp4 that are too large."""
    generator = torch.Generator().manual_seed(seed)
    size = TYPES[kind].size_bytes
    raw = torch.randint(0, 256, (rows, blocks, size), dtype=torch.uint8, generator=generator)
    for place in half_places(kind):
        raw[..., place + 1] &= 0xBB
    if kind == "mxfp4a16":
        raw[..., 0] %= 250
    return raw.flatten(1)


def half_places(kind: str) -> list[int]:
    """Where the float16 numbers of a block stand."""
    end = TYPES[kind].size_bytes
    places = {"q2_k": [end - 4, end - 2], "q3_k": [end - 2], "q6_k": [end - 2], "mxfp4a16": []}
    return places.get(kind, [0, 2] if kind in WITH_MINIMA else [0])


def half(block: bytes, place: int) -> float:
    return struct.unpack("<e", block[place : place + 2])[0]


def naive_block(kind: str, block: bytes) -> tuple[list[int], list[float], list[float]]:
    """Codes, and the scale and minimum of each weight, of one block: bit by bit from the description of its layout."""
    if kind == "q8_0":
        return [(b + 128) % 256 for b in block[2:]], [half(block, 0)] * 32, [0.0] * 32
    if TYPES[kind].weights == 32:
        start = {"q4_0": 2, "q4_1": 4, "q5_0": 6, "q5_1": 8, "iq4_nl": 2, "mxfp4a16": 1}[kind]
        codes = [block[start + i % 16] >> (4 * (i // 16)) & 15 for i in range(32)]
        if kind.startswith("q5"):
            high = int.from_bytes(block[start - 4 : start], "little")
            codes = [code + 16 * (high >> i & 1) for i, code in enumerate(codes)]
        scale = 2.0 ** (block[0] - 127) if kind == "mxfp4a16" else half(block, 0)
        return codes, [scale] * 32, [-half(block, 2) if kind in WITH_MINIMA else 0.0] * 32
    codes, scales, minima = [0] * 256, [0.0] * 256, [0.0] * 256
    for i in range(256):
        part, place = divmod(i, 128)  # of 128 weights
        if kind == "q2_k":
            codes[i] = block[16 + 32 * part + place % 32] >> (2 * (place // 32)) & 3
            byte = block[i // 16]
            scales[i], minima[i] = half(block, 80) * (byte & 15), half(block, 82) * (byte >> 4)
        elif kind == "q3_k":
            low = block[32 + 32 * part + place % 32] >> (2 * (place // 32)) & 3
            codes[i] = low + 4 * (block[i % 32] >> (i // 32) & 1)
            j = i // 16
            six = block[96 + j % 8] >> (4 * (j // 8)) & 15 | (block[104 + j % 4] >> (2 * (j // 4)) & 3) << 4
            scales[i] = half(block, 108) * (six - 32)
        elif kind in ("q4_k", "q5_k"):
            s, j = block[4:16], i // 32
            if j < 4:
                scale, minimum = s[j] & 63, s[j + 4] & 63
            else:
                scale = s[j + 4] & 15 | s[j - 4] >> 6 << 4
                minimum = s[j + 4] >> 4 | s[j] >> 6 << 4
            scales[i], minima[i] = half(block, 0) * scale, half(block, 2) * minimum
            nibbles = 16 if kind == "q4_k" else 48
            codes[i] = block[nibbles + 32 * (i // 64) + i % 32] >> (4 * (i // 32 % 2)) & 15
            if kind == "q5_k":
                codes[i] += 16 * (block[16 + i % 32] >> (i // 32) & 1)
        elif kind == "q6_k":
            low = block[64 * part + place % 64] >> (4 * (place // 64)) & 15
            codes[i] = low + 16 * (block[128 + 32 * part + place % 32] >> (2 * (place // 32)) & 3)
            scales[i] = half(block, 208) * struct.unpack("b", block[192 + i // 16 : 193 + i // 16])[0]
        else:
            j = i // 32
            high = int.from_bytes(block[2:4], "little") >> (2 * j) & 3
            scales[i] = half(block, 0) * ((block[4 + j // 2] >> (4 * (j % 2)) & 15) + 16 * high - 32)
            codes[i] = block[8 + 16 * j + i % 16] >> (4 * (i // 16 % 2)) & 15
    return codes, scales, minima


def naive_level(kind: str, code: int) -> float:
    """What a code stands for, in units of the scale."""
    if kind.startswith("iq4"):
        return IQ4_VALUES[code]
    if kind == "mxfp4a16":
        return (-1) ** (code >> 3) * [0, 0.5, 1, 1.5, 2, 3, 4, 6][code & 7]
    return code if kind in WITH_MINIMA else code - 2 ** (TYPES[kind].bits - 1)


def dequantized(kind: str, raw: Tensor) -> Tensor:
    """As the gguf package reads it."""
    values = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(TYPES[kind].number))
    return torch.from_numpy(np.array(values))


def difference(ours: Tensor, other: Tensor) -> str:
    gap = (ours.double() - other.double()).abs()
    return f"{int((gap > 0).sum())} of {gap.numel()} differ; max difference {gap.max():.3e}, mean {gap.mean():.3e}"


def error_of(weight: Tensor, back: Tensor, importance: Tensor | None) -> float:
    squares = (weight.double() - back.double()).square()
    return float((squares if importance is None else squares * importance.double()).sum())


def same(ours: QTensor, other: QTensor) -> bool:
    pairs = zip([ours.codes, *ours.params], [other.codes, *other.params], strict=True)
    return all(a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


# bytes


@every_type
def test_every_bit_against_a_reading_block_by_block(kind: str) -> None:
    raw = random_bytes(kind, rows=2, blocks=3, seed=len(kind))
    weight = unpack_blocks(raw, QuantScheme.parse(kind))
    block, back = TYPES[kind], weight.dequantize()
    for row in range(2):
        for b in range(3):
            columns = slice(b * block.weights, (b + 1) * block.weights)
            part = bytes(raw[row, b * block.size_bytes : (b + 1) * block.size_bytes].tolist())
            codes, scales, minima = naive_block(kind, part)
            assert weight.codes[row, columns].tolist() == codes
            values = [scale * naive_level(kind, c) - m for c, scale, m in zip(codes, scales, minima, strict=True)]
            ends = [
                abs(scale * naive_level(kind, c)) + abs(m) for c, scale, m in zip(codes, scales, minima, strict=True)
            ]
            gap = (back[row, columns].double() - torch.tensor(values).double()).abs()
            assert (gap <= 3e-7 * torch.tensor(ends)).all(), f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(list(TYPES)), rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 999))
def test_packing_is_the_inverse_of_unpacking(kind: str, rows: int, blocks: int, seed: int) -> None:
    size = TYPES[kind].size_bytes  # any bytes at all, NaN and infinity among them
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows, blocks * size), dtype=torch.uint8, generator=generator)
    weight = unpack_blocks(raw, QuantScheme.parse(kind))
    assert weight.codes.shape == (rows, blocks * TYPES[kind].weights)
    assert torch.equal(pack_blocks(weight), raw)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(list(TYPES)), rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 999))
def test_read_as_the_gguf_package_reads_it(kind: str, rows: int, blocks: int, seed: int) -> None:
    raw = random_bytes(kind, rows, blocks, seed)
    ours, theirs = unpack_blocks(raw, QuantScheme.parse(kind)).dequantize(), dequantized(kind, raw)
    assert torch.equal(ours, theirs), difference(ours, theirs)


@every_type
@pytest.mark.parametrize("search", [True, False], ids=["searched", "range"])
def test_what_is_packed_is_what_was_solved(kind: str, search: bool) -> None:
    grid, weight = make_grid(kind), make_weight()
    quantized = grid.nearest(weight, grid.fit(weight, search=search))
    raw = pack_blocks(quantized)
    assert raw.shape == (16, 512 // TYPES[kind].weights * TYPES[kind].size_bytes)
    assert same(unpack_blocks(raw, grid.scheme), quantized)
    back, theirs = quantized.dequantize(), dequantized(kind, raw)
    assert torch.equal(back, theirs), difference(back, theirs)


def test_a_block_of_q4_0_bit_by_bit() -> None:
    """d = 1 is 0x3c00; byte j holds code j in its low half and code j + 16 in its high half."""
    codes = torch.arange(32).remainder(16).to(torch.uint8)
    codes[0], codes[16] = 3, 12
    scheme = QuantScheme.parse("q4_0")
    raw = pack_blocks(QTensor(codes[None], GridParams(torch.ones(1, 1, dtype=torch.float16)), scheme))
    assert raw[0].tolist() == [0x00, 0x3C, 0xC3, *(0x11 * j for j in range(1, 16))]
    assert unpack_blocks(raw, scheme).dequantize()[0, [0, 16, 15]].tolist() == [-5.0, 4.0, 7.0]


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_are_their_own_codes(kind: str) -> None:
    grid, weight = make_grid(kind), make_weight()
    weight[0, :2] = torch.tensor([1e6, -1e6])
    params = grid.fit(weight)
    quantized = grid.nearest(weight, params)
    assert quantized.codes.dtype == FLOAT_DTYPES[kind]
    expected = weight.clamp(-65504, 65504) if kind == "f16" else weight
    assert torch.equal(quantized.dequantize(), expected.to(FLOAT_DTYPES[kind]).float())
    stored = GGUF().pack("m", quantized)
    assert same(GGUF().unpack("m", stored, grid.scheme), quantized)
    theirs = gguf.quants.quantize(expected.numpy(), gguf.GGMLQuantizationType(FLOATS[kind].number))
    assert stored["m.weight"].view(torch.uint8).numpy().tobytes() == theirs.tobytes()
    solved = GPTQ().solve(weight, grid, Moments(torch.eye(512))).weight
    assert torch.equal(solved.codes, quantized.codes)


@every_type
def test_rows_that_are_no_blocks_are_refused(kind: str) -> None:
    size, scheme = TYPES[kind].size_bytes, QuantScheme.parse(kind)
    for shape in ((2, size + 1), (2, size - 1), (size,)):
        with pytest.raises(QtoolError, match=f"blocks of {size} bytes") as caught:
            unpack_blocks(torch.zeros(shape, dtype=torch.uint8), scheme)
        assert "\n" not in str(caught.value)
    with pytest.raises(QtoolError, match="float32"):
        unpack_blocks(torch.zeros(2, size), scheme)


# scales


@pytest.mark.parametrize("kind", REFERENCED)
@pytest.mark.parametrize("seed", range(3))
def test_without_a_search_the_bytes_are_those_of_the_gguf_package(kind: str, seed: int) -> None:
    weight, grid = make_weight(64, 1024, seed), make_grid(kind)
    weight[10, :70] = 0
    weight[11] *= 1e-6
    weight[12] = -0.37
    weight[13:30] = (weight[13:30] * 256).round() / 256  # ties everywhere
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType(TYPES[kind].number))
    ours = pack_blocks(grid.nearest(weight, grid.fit(weight, search=False)))
    rows = (ours != torch.from_numpy(theirs)).any(1).nonzero().flatten()
    assert len(rows) == 0, f"rows {rows.tolist()} differ"


@every_type
@pytest.mark.parametrize("sigma", [None, 0.5, 2.0], ids=["plain", "flat", "strong"])
def test_the_search_is_never_worse_than_the_range(kind: str, sigma: float | None) -> None:
    grid, weight = make_grid(kind), make_weight()
    importance = None if sigma is None else make_importance(512, sigma)
    size, weights = TYPES[kind].weights, torch.ones(512) if importance is None else importance

    def errors(search: bool, coarse: bool = False) -> Tensor:
        params = grid.fit(weight, importance, search=search, coarse=coarse)
        return (
            ((grid.nearest(weight, params).dequantize() - weight).double().square() * weights)
            .unflatten(1, (-1, size))
            .sum(-1)
        )

    plain, coarse, full = errors(False), errors(True, coarse=True), errors(True)
    worse = (full / plain.clamp(min=1e-12)).max()
    assert worse < 1 + 1e-4, f"a block has {worse:.4f} of the error from its range"
    assert full.sum() < coarse.sum() * (1 + 1e-4) < plain.sum() * (1 + 1e-4)


@pytest.mark.parametrize("kind", ["q4_k", "q3_k", "iq4_xs"])
def test_the_error_that_is_compared_and_its_quadratic_form(kind: str) -> None:
    """Both against float64, group by group."""
    codec, symmetric = codec_of(QuantScheme.parse(kind)), not INTEGERS[kind].minimum
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.rand(3, 4, 16, generator=generator) - 0.4, torch.rand(1, 4, 16, generator=generator)
    scale, minimum = 0.01 + 0.1 * torch.rand(3, 4, generator=generator), torch.rand(3, 4, generator=generator) / 2
    scale[0, 0] = 0
    if symmetric:
        minimum, scale = torch.zeros_like(minimum), scale / codec.largest * 8
    groups = block_search._Groups(weight, importance, codec, None if symmetric else 0.0)
    found, sums = groups.offer(scale, minimum), groups.sums(scale, minimum)
    for r in range(3):
        for g in range(4):
            s, m = float(scale[r, g]), float(minimum[r, g])
            levels = codec.decode(codec.encode((weight[r, g] + m) / (s or torch.inf))).double()
            w, x = importance[0, g].double(), weight[r, g].double()
            error = float((w * (s * levels - m - x).square()).sum())
            assert float(found.error[r, g]) == pytest.approx(error, rel=1e-4)
            if s:
                one, level, square, product, total = (float(part[r, g]) for part in sums)
                form = s * s * square - 2 * s * product + m * m * one - 2 * m * (s * level - total)
                assert form + float((w * x * x).sum()) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("kind", ["q4_k", "q2_k", "q6_k", "iq4_xs"])
def test_integers_are_about_the_best_there_are(kind: str) -> None:
    """All integers of some groups, under the d and dmin that were found."""
    grid, weight, importance = make_grid(kind), make_weight(), make_importance(512, 1.0)
    quantized = grid.nearest(weight, grid.fit(weight, importance))
    limits, codec, params, back = INTEGERS[kind], codec_of(grid.scheme), quantized.params, quantized.dequantize()
    ours, best = 0.0, 0.0
    for row in (0, 1, 2, 3, 10):
        for group in range(0, 16, 3):
            columns = slice(group * 512 // params.scale.shape[1], (group + 1) * 512 // params.scale.shape[1])
            x, w, block = weight[row, columns].double(), importance[columns].double(), group // limits.groups
            ours += float((w * (back[row, columns].double() - x).square()).sum())
            scale = torch.arange(limits.lowest, limits.highest + 1)[:, None, None] * params.super_scale[row, block]
            minimum = torch.arange(limits.minimum + 1)[None, :, None].double()
            if params.super_zero is not None:
                minimum = minimum * params.super_zero[row, block].double()
            levels = codec.round(((x + minimum) / torch.where(scale == 0, torch.inf, scale.double())).float())
            best += float((w * (levels * scale.double() - minimum - x).square()).sum(-1).min())
    assert ours <= 1.1 * best, f"{ours:.4e}, of all integers {best:.4e}"


@every_type
def test_chunks_of_rows_do_not_change_the_result(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, weight = make_grid(kind), make_weight()
    importance = make_importance(512, 1.0)
    whole = grid.nearest(weight, grid.fit(weight, importance))
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", 7 * 512)
    assert same(grid.nearest(weight, grid.fit(weight, importance)), whole)
    row = weight[5:6]
    assert torch.equal(grid.nearest(row, grid.fit(row, importance)).dequantize(), whole.dequantize()[5:6])


@pytest.mark.parametrize("kind", [*TYPES, *FLOATS])
@pytest.mark.parametrize("options", [{}, {"coarse": True}, {"search": False}], ids=["search", "coarse", "range"])
def test_odd_weights_stay_finite(kind: str, options: dict[str, bool]) -> None:
    grid, weight = make_grid(kind), make_weight()
    weight[0], weight[1, :300], weight[10] = 0, 0, 0.37
    weight[11] *= 1e-12
    weight[12] *= 1e12
    weight[13], weight[14] = 3e38, 1e-38
    weight[15, ::100] = -1e30
    strong = make_importance(512, 2.0)
    strong[:300] = 0  # whole groups and a whole block that no input ever reaches
    for importance in (None, strong, 0 * strong, 1e-30 * strong, 1e30 * strong):
        quantized = grid.nearest(weight, grid.fit(weight, importance, **options))
        back = quantized.dequantize()
        rows = (~back.isfinite()).any(1).nonzero().flatten()
        assert len(rows) == 0, f"rows {rows.tolist()} are not finite"
        assert (back[0] == 0).all()
        assert (back[1, :256] == 0).all()
        ordinary = slice(2, 9)
        relative = (back - weight)[ordinary].norm(dim=1) / weight[ordinary].norm(dim=1)
        assert relative.max() < 0.5, f"{relative.max():.3f} of a row of ordinary weights is lost"
        assert (back[10] - 0.37).abs().max() < 0.02 * 0.37, f"a constant becomes {back[10].tolist()[:4]}"


def test_no_importance_is_plain_error() -> None:
    """Of a group and of a block that no input reaches."""
    grid, weight = make_grid("q4_k"), make_weight()
    importance = torch.ones(512)
    importance[:32], importance[256:] = 0, 0
    plain, dead = (grid.nearest(weight, grid.fit(weight, i)).dequantize() - weight for i in (None, importance))
    assert dead[:, :32].norm() < 1.2 * plain[:, :32].norm()
    assert torch.equal(dead[:, 256:], plain[:, 256:])


def test_the_lattice_moves_both_ends_equally_far() -> None:
    for reach in (1, 3):
        ends = [(b, 2 * a - b) for b, steps in sheared(reach) for a in steps]  # in half steps of the upper end
        assert {abs(low) for low, _ in ends} == set(range(2 * reach + 1))
        assert max(abs(high) for _, high in ends) == 2 * reach
    assert sum(len(steps) for _, steps in WIDE) == 145


@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=30))
def test_codecs_take_the_nearest_level(values: list[float]) -> None:
    given_values = torch.tensor(values)
    for codec, levels in (
        (codec_of(QuantScheme.parse("iq4_xs")), torch.tensor(IQ4_VALUES)),
        (UnsignedCodec(5), torch.arange(32.0)),
    ):
        gaps = (given_values[:, None] - levels).abs()
        codes = codec.encode(given_values.clone())
        assert torch.equal(gaps.gather(1, codes[:, None].long())[:, 0], gaps.amin(1))
        assert torch.equal(codec.round(given_values.clone()), codec.decode(codes))
        assert torch.equal(codec.decode(codes), levels[codes.long()])


# llama.cpp


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    package = pytest.importorskip("llama_cpp")
    found = sorted((Path(package.__file__).parent / "lib").glob("libggml-base.*"))
    if not found:
        pytest.skip("llama_cpp without libggml-base")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return library


def quantized_by(ggml: ctypes.CDLL, kind: str, weight: Tensor, importance: Tensor | None) -> Tensor:
    """The bytes that llama.cpp makes of a weight [O, I] with an importance matrix [I]."""
    block, (rows, inputs) = TYPES[kind], weight.shape
    raw = torch.zeros(rows, inputs // block.weights * block.size_bytes, dtype=torch.uint8)
    ggml.ggml_quantize_init(block.number)
    matrix = None if importance is None else importance.data_ptr()
    written = ggml.ggml_quantize_chunk(block.number, weight.data_ptr(), raw.data_ptr(), 0, rows, inputs, matrix)
    assert written == raw.numel()
    return raw


@pytest.mark.parametrize("kind", REFERENCED)
def test_without_a_search_the_bytes_are_those_of_llama_cpp(kind: str, ggml: ctypes.CDLL) -> None:
    weight, grid = make_weight(64, 1024), make_grid(kind)
    ours = pack_blocks(grid.nearest(weight, grid.fit(weight, search=False)))
    assert torch.equal(ours, quantized_by(ggml, kind, weight, None))


@every_type
def test_read_as_llama_cpp_reads_it(kind: str, ggml: ctypes.CDLL) -> None:
    raw = random_bytes(kind, rows=4, blocks=2, seed=7)
    ours = unpack_blocks(raw, QuantScheme.parse(kind)).dequantize()
    theirs = torch.zeros_like(ours)
    name = kind.removesuffix("a16").replace("_k", "_K")
    getattr(ggml, f"dequantize_row_{name}")(
        ctypes.c_void_p(raw.data_ptr()), ctypes.c_void_p(theirs.data_ptr()), ctypes.c_int64(theirs.numel())
    )
    gap = (ours - theirs).abs()
    assert (gap <= 3e-7 * ours.abs().amax()).all(), difference(ours, theirs)  # it may fuse products and sums


def weights_like(which: str, rows: int, inputs: int) -> Tensor:
    """Gaussian weights, or with tails as heavy as those of Student's t with four degrees of freedom."""
    generator = torch.Generator().manual_seed(3)
    weight = 0.03 * torch.randn(rows, inputs, generator=generator)
    if which == "heavy tails":
        weight /= (torch.randn(4, rows, inputs, generator=generator).square().sum(0) / 4).sqrt()
    return weight


@every_type
@pytest.mark.parametrize("which", ["gaussian", "heavy tails"])
@pytest.mark.parametrize("sigma", [None, 0.5, 2.0], ids=["plain", "flat", "strong"])
def test_lower_error_than_llama_cpp(kind: str, which: str, sigma: float | None, ggml: ctypes.CDLL) -> None:
    weight, grid = weights_like(which, 48, 512), make_grid(kind)
    importance = None if sigma is None else make_importance(512, sigma)
    theirs = error_of(weight, dequantized(kind, quantized_by(ggml, kind, weight, importance)), importance)
    ours = error_of(weight, grid.nearest(weight, grid.fit(weight, importance)).dequantize(), importance)
    # q2_k under a flat importance: with scales of any precision at all it would be 0.89
    most = {"q4_k": 0.95, "q5_k": 0.91, "q2_k": 0.93 if sigma == 0.5 else 0.82}.get(kind, 0.99)
    assert ours < most * theirs, f"{ours / theirs:.4f} of llama.cpp's error"


# methods


@every_type
def test_columns_may_come_in_any_order(kind: str) -> None:
    grid, weight = make_grid(kind), make_weight()
    params = grid.fit(weight)
    rounder = grid.rounder(params, (16, 512))
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    back = torch.empty_like(weight)
    for part in order.split(100):
        rounder.start(part)
        for j, column in enumerate(part.tolist()):
            back[:, column] = rounder.round(j, weight[:, column])
    assert same(rounder.result(), grid.nearest(weight, params))
    assert torch.equal(rounder.result().dequantize(), back)


@every_type
def test_gptq_on_every_type(kind: str) -> None:
    grid, weight = make_grid(kind), make_weight()
    generator = torch.Generator().manual_seed(2)
    x_NI = torch.randn(2000, 16, generator=generator) @ torch.randn(16, 512, generator=generator)
    x_NI += 0.5 * torch.randn(2000, 512, generator=generator)
    second = x_NI.T @ x_NI / len(x_NI)

    def loss(quantized: QTensor) -> float:
        error = (quantized.dequantize() - weight).double()
        return float(((error @ second.double()) * error).sum())

    solved = GPTQ().solve(weight, grid, Moments(second)).weight
    assert same(unpack_blocks(pack_blocks(solved), grid.scheme), solved)
    nearest = loss(grid.nearest(weight, grid.fit(weight, second.diagonal())))
    assert loss(solved) < 0.6 * nearest, f"gptq {loss(solved):.4e}, rounding {nearest:.4e}"
    ranged = GPTQ(scales="minmax", order="natural").solve(weight, grid, Moments(second)).weight
    assert loss(ranged) < loss(grid.nearest(weight, grid.fit(weight, search=False)))
    # inputs that have nothing in common: no feedback
    alone = GPTQ().solve(weight, grid, Moments(torch.eye(512))).weight
    assert torch.equal(alone.codes, grid.encode(weight, alone.params))
