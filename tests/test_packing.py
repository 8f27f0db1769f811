"""Packing into 32-bit words: worked examples, its inverse, and the library that reads the files."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.numerics.packing import pack_bits, unpack_bits
from qtool.scheme import packed_words

shapes = st.tuples(st.integers(1, 9), st.integers(1, 131))


def random_codes(rows: int, count: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, count), generator=generator, dtype=torch.uint8)


def unsigned(words: Tensor) -> list[list[int]]:
    return [[word % 2**32 for word in row] for row in words.tolist()]


@given(bits=st.integers(2, 8), shape=shapes, seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=200)
def test_unpacking_undoes_packing(bits: int, shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(*shape, bits, seed)
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32
    assert tuple(words.shape) == (shape[0], packed_words(shape[1], bits))
    assert words.is_contiguous()
    back = unpack_bits(words, bits, shape[1])
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes), f"{int((back != codes).sum())} of {codes.numel()} codes differ"


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_code_everywhere(bits: int) -> None:
    codes = torch.full((3, 64), 2**bits - 1, dtype=torch.uint8)
    words = pack_bits(codes, bits)
    assert unsigned(words) == [[2**32 - 1] * (2 * bits)] * 3, "every bit is set"
    assert torch.equal(unpack_bits(words, bits, 64), codes)


def test_four_bits_by_hand() -> None:
    # low bits first: code 0 in bits 0..3, code 1 in bits 4..7, ...
    codes = torch.tensor([[0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0x7, 0xF, 0xA]], dtype=torch.uint8)
    assert unsigned(pack_bits(codes, 4)) == [[0xF7654321, 0x0000000A]]


def test_three_bits_by_hand() -> None:
    # 11 codes take 33 bits: the last one has two bits in the first word and one in the second
    codes = [0b001, 0b010, 0b011, 0b100, 0b101, 0b110, 0b111, 0b000, 0b001, 0b010, 0b111]
    #        code 10 | 9   8   7   6   5   4   3   2   1   0
    first = 0b11_010_001_000_111_110_101_100_011_010_001
    second = 0b1
    assert unsigned(pack_bits(torch.tensor([codes], dtype=torch.uint8), 3)) == [[first, second]]
    signed = torch.tensor([[first - 2**32, second]], dtype=torch.int32)
    assert unpack_bits(signed, 3, 11).tolist() == [codes]


def test_five_bits_by_hand() -> None:
    # code 6 stands at bits 30..34: its low two bits end the first word, its high three begin the second
    codes = [0, 0, 0, 0, 0, 0, 0b10110, 0b00001]
    assert unsigned(pack_bits(torch.tensor([codes], dtype=torch.uint8), 5)) == [[0b10 << 30, 0b00001_101]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_against_the_bits_as_one_large_number(bits: int) -> None:
    codes = random_codes(4, 77, bits)
    for row, words in zip(codes.tolist(), unsigned(pack_bits(codes, bits)), strict=True):
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        assert words == [(stream >> (32 * i)) % 2**32 for i in range(packed_words(77, bits))]


@given(bits=st.integers(2, 8), shape=shapes, seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=100)
def test_the_library_packs_the_same_words(bits: int, shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(*shape, bits, seed)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)  # the library counts from -2^(b-1)
    along_inputs = pack_to_int32(signed, bits)
    assert torch.equal(pack_bits(codes, bits), along_inputs)
    along_rows = pack_to_int32(signed, bits, packed_dim=0)
    assert torch.equal(pack_bits(codes.T, bits).T, along_rows)
    assert torch.equal(unpack_from_int32(pack_bits(codes, bits), bits, torch.Size(shape)), signed)
    assert torch.equal(unpack_from_int32(pack_bits(codes.T, bits).T, bits, torch.Size(shape), packed_dim=0), signed)
    assert torch.equal(unpack_bits(along_inputs, bits, shape[1]), codes)
    assert torch.equal(unpack_bits(along_rows.T.contiguous(), bits, shape[0]), codes.T)


def test_the_padding_is_zero() -> None:
    for bits in range(2, 9):
        words = unsigned(pack_bits(torch.full((1, 5), 2**bits - 1, dtype=torch.uint8), bits))[0]
        assert sum(word << (32 * i) for i, word in enumerate(words)) == 2 ** (5 * bits) - 1
