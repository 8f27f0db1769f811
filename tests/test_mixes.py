"""What llama.cpp's file types make of every matrix: the same as llama.cpp itself, where that is meant."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import UsageError
from qtool.mixes import MIXES, Mix, get_mix, scheme_of
from qtool.scheme import BLOCK_TYPES, QuantScheme

LLAMA = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
FUSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
MODELS = {  # architecture, roles, blocks, heads, heads of keys and values, tied
    "10 blocks": ("llama", LLAMA, 10, 8, 8, False),
    "24 blocks, grouped, tied": ("llama", LLAMA, 24, 8, 2, True),
    "31 blocks, threes": ("qwen2", LLAMA, 31, 6, 2, False),
    "70B": ("llama", ("attn_v", "ffn_down"), 80, 8, 1, False),
    "65B": ("llama", ("attn_v", "ffn_down"), 80, 8, 8, False),
    "1 block": ("qwen3", LLAMA, 1, 8, 1, True),
    "gemma": ("gemma3", LLAMA, 26, 4, 1, True),
    "phi": ("phi3", FUSED, 32, 8, 8, False),
    "neox": ("gptneox", FUSED, 16, 8, 8, False),
}


def matrices(roles: tuple[str, ...], blocks: int, tied: bool) -> dict[str, tuple[str, int]]:
    """Role and block of every matrix of a model, by llama.cpp's name."""
    found = {"token_embd.weight": ("output" if tied else "token_embd", 0)}
    if not tied:
        found["output.weight"] = ("output", 0)
    return found | {f"blk.{i}.{role}.weight": (role, i) for i in range(blocks) for role in roles}


def ours(mix: Mix, model: str, columns: int = 256, weighted: bool = False) -> dict[str, str]:
    _, roles, blocks, heads, kv_heads, tied = MODELS[model]
    return {
        name: scheme_of(mix, role, index, blocks, (2, columns), heads // kv_heads, weighted)[0]
        for name, (role, index) in matrices(roles, blocks, tied).items()
    }


class LlamaCpp:
    """llama.cpp's own quantizer on models of two rows per matrix: it looks at names and columns, and loads nothing."""

    def __init__(self, folder: Path, library: Any) -> None:
        self.folder, self.library = folder, library

    def types(self, mix: Mix, model: str, columns: int = 256, weighted: bool = False) -> dict[str, str]:
        """The type of every matrix, as qtool names its scheme."""
        lib = self.library
        source, out = self._source(model, columns), self.folder / "out.gguf"
        params = lib.llama_model_quantize_default_params()
        params.nthread, params.ftype = 1, mix.file_type
        importance = (ctypes.c_float * columns)(*[1.0] * columns)
        entries = (lib.llama_model_imatrix_data * 2)()  # of one weight that is in no model; the last ends the list
        if weighted:
            entries[0] = lib.llama_model_imatrix_data(b"none", importance, columns)
            params.imatrix = entries
        assert lib.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
        found = {x.name: x.tensor_type.name.lower() for x in gguf.GGUFReader(out).tensors}
        return {name: "mxfp4a16" if kind == "mxfp4" else kind for name, kind in found.items()}

    def _source(self, model: str, columns: int) -> Path:
        path = self.folder / f"{model}-{columns}.gguf"
        if not path.exists():
            architecture, roles, blocks, heads, kv_heads, tied = MODELS[model]
            writer = gguf.GGUFWriter(path, architecture)
            writer.add_block_count(blocks)
            writer.add_context_length(64)
            writer.add_embedding_length(columns)
            writer.add_feed_forward_length(columns)
            writer.add_head_count(heads)
            writer.add_head_count_kv(kv_heads)
            writer.add_layer_norm_eps(1e-5)
            writer.add_layer_norm_rms_eps(1e-5)
            writer.add_rope_dimension_count(columns // heads)
            writer.add_parallel_residual(True)
            writer.add_vocab_size(2)
            weight = np.random.default_rng(0).standard_normal((2, columns)).astype(np.float32)
            for name in matrices(roles, blocks, tied):
                writer.add_tensor(name, weight)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return path


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    library.llama_log_set(quiet, None)
    return LlamaCpp(tmp_path_factory.mktemp("llama"), library)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def quiet(*_: object) -> None:
    """llama.cpp's log."""


@pytest.mark.parametrize("name", [name for name in MIXES if name != "mxfp4"])
@pytest.mark.parametrize("model", MODELS)
def test_every_matrix_becomes_what_llama_cpp_makes_of_it(name: str, model: str, llama_cpp: LlamaCpp) -> None:
    for weighted in (False, True):
        assert ours(MIXES[name], model, weighted=weighted) == llama_cpp.types(MIXES[name], model, weighted=weighted)


def test_llama_cpp_has_mxfp4_for_experts_alone(llama_cpp: LlamaCpp) -> None:
    found = ours(MIXES["mxfp4"], "10 blocks")
    assert set(llama_cpp.types(MIXES["mxfp4"], "10 blocks").values()) == {"q8_0"}
    assert {name for name, kind in found.items() if kind != "mxfp4a16"} == {"token_embd.weight", "output.weight"}
    assert found["token_embd.weight"] == found["output.weight"] == "q8_0"


def test_where_256_do_not_divide_the_columns_we_take_no_more_bits(llama_cpp: LlamaCpp) -> None:
    """Of 288 columns, as in a small model: llama.cpp's Q4_K_M has 6.3 bits per weight there."""
    theirs = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "q2_k": "q4_0", "q3_k": "q4_0", "iq4_xs": "iq4_nl"}
    better = {"q4_k": "iq4_nl", "q5_k": "q5_0", "q6_k": "q5_1", "q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl"}
    for name in ("q2_k", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs", "iq4_nl", "q4_0"):
        fitting = ours(MIXES[name], "10 blocks")
        unaligned = ours(MIXES[name], "10 blocks", 288)
        of_llama = llama_cpp.types(MIXES[name], "10 blocks", 288)
        for matrix, kind in fitting.items():
            assert unaligned[matrix] == better.get(kind, kind)
            assert of_llama[matrix] == theirs.get(kind, kind)


def test_q4_k_m_by_hand() -> None:
    """The first and the last eighth of 16 blocks, and every third between: 0 1 | 4 7 10 13 | 14 15."""
    for role in ("attn_v", "attn_qkv", "ffn_down"):
        kinds = [scheme_of(MIXES["q4_k_m"], role, i, 16, (64, 512), 1)[0] for i in range(16)]
        assert [i for i, kind in enumerate(kinds) if kind == "q6_k"] == [0, 1, 4, 7, 10, 13, 14, 15]
        assert {*kinds} == {"q4_k", "q6_k"}
    others = {scheme_of(MIXES["q4_k_m"], role, 0, 16, (64, 512), 1)[0] for role in ("attn_q", "attn_k", "ffn_gate")}
    assert others == {"q4_k"}
    assert scheme_of(MIXES["q4_k_m"], "token_embd", 0, 16, (64, 512), 1) == ("q4_k", None)
    assert scheme_of(MIXES["q4_k_m"], "output", 0, 16, (64, 512), 1) == ("q6_k", None)


def test_notes() -> None:
    def note(name: str, columns: int) -> str | None:
        return scheme_of(MIXES[name], "attn_q", 0, 2, (8, columns), 1)[1]

    assert note("q4_k_m", 288) == "iq4_nl instead of q4_k: 288 inputs are not a multiple of 256"
    assert note("q4_k_m", 100) == "f16 instead of q4_k: 100 inputs are not a multiple of 32"
    assert note("mxfp4", 100) == "f16 instead of mxfp4a16: 100 inputs are not a multiple of 32"
    assert note("q8_0", 288) is None
    assert note("bf16", 7) is None


@given(
    name=st.sampled_from([*MIXES]),
    role=st.sampled_from([*LLAMA, *FUSED, "token_embd", "output", "position_embd"]),
    place=st.integers(1, 100).flatmap(lambda blocks: st.tuples(st.integers(0, blocks - 1), st.just(blocks))),
    columns=st.integers(1, 1100),
    gqa=st.integers(1, 8),
    weighted=st.booleans(),
)
def test_what_comes_out_can_be_stored(
    name: str, role: str, place: tuple[int, int], columns: int, gqa: int, weighted: bool
) -> None:
    kind, note = scheme_of(MIXES[name], role, *place, (3, columns), gqa, weighted)
    scheme = QuantScheme.parse(kind)
    assert scheme.shape_error((3, columns)) is None
    wanted, none = scheme_of(MIXES[name], role, *place, (3, 256), gqa, weighted)
    assert none is None
    assert (note is None) == (kind == wanted)
    if note and kind != "f16":
        most = QuantScheme.parse(wanted).bits_per_weight((3, 256))
        assert scheme.bits_per_weight((3, columns)) <= max(4.5, most)
        assert BLOCK_TYPES[kind].weights == 32


def test_names_and_numbers() -> None:
    """The numbers are those of the `gguf` package; 38 is named after experts there."""
    for key, mix in MIXES.items():
        assert key == mix.name.lower()
        theirs = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}.get(mix.name, f"MOSTLY_{mix.name}")
        assert int(gguf.LlamaFileType[theirs]) == mix.file_type
    assert get_mix("Q4_K") is get_mix(" q4_k_m ") is MIXES["q4_k_m"]
    assert get_mix("q3_K") is MIXES["q3_k_m"]
    assert get_mix("q5_k") is MIXES["q5_k_m"]
    with pytest.raises(UsageError, match="unknown mix `Q4_K_X`") as error:
        get_mix("Q4_K_X")
    assert "Q4_K_" in str(error.value.hint)
