"""Dense bit streams: codes of 2 to 8 bits in 32-bit words, low bits first, crossing word borders.

Code i of a row stands at bits i*b .. i*b + b - 1 of the row's stream (compressed-tensors 0.19,
`pack_to_int32`). 32 codes fill exactly b words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.scheme import packed_words


def pack_bits(codes_RC: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, C] -> int32 words [R, ceil(C * bits / 32)]."""
    rows, count = codes_RC.shape
    codes = pad(codes_RC, (0, -count % 32)).view(rows, -1, 32)
    words = torch.zeros(rows, codes.shape[1], bits, dtype=torch.int32, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = codes[:, :, i].int()
        words[:, :, word] |= code << shift  # int32 drops what does not fit
        if shift + bits > 32:
            words[:, :, word + 1] |= code >> (32 - shift)
    return words.view(rows, -1)[:, : packed_words(count, bits)].contiguous()


def unpack_bits(words_RW: Tensor, bits: int, count: int) -> Tensor:
    """int32 words [R, W] -> uint8 codes [R, count]; the inverse of `pack_bits`."""
    rows = words_RW.shape[0]
    words = pad(words_RW, (0, -words_RW.shape[1] % bits)).view(rows, -1, bits)
    codes = torch.empty(rows, words.shape[1], 32, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = words[:, :, word] >> shift  # int32 shifts the sign in: the mask or the low part removes it
        if shift + bits > 32:
            kept = 32 - shift
            code = (code & (2**kept - 1)) | (words[:, :, word + 1] << kept)
        codes[:, :, i] = (code & mask).to(torch.uint8)
    return codes.view(rows, -1)[:, :count].contiguous()
