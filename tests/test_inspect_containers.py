"""`qtool inspect` of GGUF files, of GPTQ, AWQ, fp8 and mxfp4, and of what lies like a model but is none.

What GGUF files hold is read a second time with the `gguf` package, which is llama.cpp's own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from math import log2
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint.hub import open_headers
from qtool.checkpoint.reader import Checkpoint
from qtool.cli import run
from qtool.errors import QtoolError
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import open_checkpoint
from qtool.inspection.compare import compare
from qtool.inspection.logical import entries, is_quantized, open_weights
from qtool.inspection.memory import memory
from qtool.inspection.overview import overview
from qtool.inspection.statistics import IMATRIX, STATS, InputKind, statistics_of
from qtool.inspection.tensor import tensor_stats
from qtool.inspection.views import comparison_view, overview_view, statistics_view, tensor_view
from qtool.report.table import plain_lines

# One matrix of each block type, in one file: the end of its name here, and what llama.cpp calls it
OF_TYPE = {
    "q4_0": ("0.self_attn.q_proj", "0.attn_q"), "q4_1": ("0.self_attn.k_proj", "0.attn_k"),
    "q5_0": ("0.self_attn.v_proj", "0.attn_v"), "q5_1": ("0.self_attn.o_proj", "0.attn_output"),
    "q8_0": ("0.mlp.gate_proj", "0.ffn_gate"), "q2_k": ("0.mlp.up_proj", "0.ffn_up"),
    "q3_k": ("0.mlp.down_proj", "0.ffn_down"), "q4_k": ("1.self_attn.q_proj", "1.attn_q"),
    "q5_k": ("1.self_attn.k_proj", "1.attn_k"), "q6_k": ("1.self_attn.v_proj", "1.attn_v"),
    "iq4_nl": ("1.self_attn.o_proj", "1.attn_output"), "iq4_xs": ("1.mlp.gate_proj", "1.ffn_gate"),
    "mxfp4a16": ("1.mlp.up_proj", "1.ffn_up"),
}  # fmt: skip
NAME, STORED = "model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"
READERS = "llama.cpp, Ollama, LM Studio"
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def base(make_model: Any) -> Path:
    return make_model(hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="session")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`made(scheme, format) -> Path`: that by rounding to nearest, each made once."""
    folders: dict[tuple[str, str], Path] = {}

    def make(scheme: str, format: str = "gguf") -> Path:
        if (scheme, format) not in folders:
            out = tmp_path_factory.mktemp("made") / "out"
            command = ["quantize", str(base), "-o", str(out), "--scheme", scheme, "--method", "rtn"]
            assert run([*command, "--format", format, "-q"]) == 0
            folders[scheme, format] = out
        return folders[scheme, format]

    return make


@pytest.fixture(scope="session")
def measured(base: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `stats` and `imatrix.gguf` of the model."""
    folder = tmp_path_factory.mktemp("measured")
    for name, more in (("stats", []), ("hessians", ["--hessians"]), ("imatrix.gguf", ["--format", "imatrix"])):
        command = ["calibrate", str(base), "-o", str(folder / name), "--data", str(calibration_text)]
        assert run([*command, "--rows", "4", "--seqlen", "32", "-q", *more]) == 0
    return folder


@pytest.fixture(scope="session")
def every_type(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with one matrix of each block type."""
    out = tmp_path_factory.mktemp("every") / "out"
    layers = [x for kind, (name, _) in OF_TYPE.items() for x in ("--layer", f"model.layers.{name}={kind}")]
    assert run(["quantize", str(base), "-o", str(out), "--scheme", "q8_0", "--method", "rtn", *layers, "-q"]) == 0
    return out / "model.gguf"


def quiet(*_: object) -> None:
    """A progress callback that says nothing."""


def page_of(checkpoint: Checkpoint) -> list[str]:
    return plain_lines(overview_view(overview(checkpoint)))


def stored(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def write_gguf(path: Path, architecture: str, tensors: dict[str, tuple[str, tuple[int, ...]]], **keys: Any) -> Path:
    """A file of zeros; of tensors type and shape, of keys `__` for the dot."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add: Any = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32}[type(value)]
        add(key.replace("__", "."), value)
    for name, (kind, shape) in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        weights, size_bytes = gguf.GGML_QUANT_SIZES[number]
        data = np.zeros((*shape[:-1], shape[-1] // weights * size_bytes), np.uint8)
        if kind in ("F32", "F16"):
            data = np.zeros(shape, {"F32": np.float32, "F16": np.float16}[kind])
        writer.add_tensor(name, data, raw_dtype=None if kind in ("F32", "F16") else number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- GGUF: the overview ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["q4_k_m", "iq4_xs", "mxfp4"])
def test_overview_counts_what_lies_in_the_file(made: Make, scheme: str) -> None:
    there = stored(made(scheme) / "model.gguf")
    sizes: dict[str, int] = Counter()
    for tensor in there.values():
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    found = overview(open_checkpoint(made(scheme)))
    assert found.dtypes == sizes
    assert found.size_bytes == sum(sizes.values()) == sum(kind.size_bytes for kind in found.kinds)
    blocks = [tensor for tensor in there.values() if tensor.tensor_type.name not in ("F32", "F16")]
    weights = sum(int(tensor.n_elements) for tensor in blocks)
    assert found.quantized_parameters == weights
    assert found.bits_per_weight == 8 * sum(int(tensor.n_bytes) for tensor in blocks) / weights
    assert found.parameters == sum(int(tensor.n_elements) for tensor in there.values())
    kinds = Counter(tensor.tensor_type.name for tensor in blocks)
    names = {"mxfp4a16": "MXFP4"}
    assert {names.get(use.scheme, use.scheme.upper()): use.layers for use in found.schemes} == kinds
    assert {use.readers for use in found.schemes} == {READERS}
    assert (found.format, found.file_type) == ("gguf", {"mxfp4": "MXFP4"}.get(scheme, scheme.upper()))
    assert f"format        gguf, file type {found.file_type}" in page_of(open_checkpoint(made(scheme)))


OVERVIEW = """\
MODEL

architecture  LlamaForCausalLM (llama)
dimensions    layers 2, hidden 256, mlp 512, heads 4, key/value heads 2, vocabulary 320, context 128
parameters    1.26M (1,262,848)
size          778.11 kB, 20 tensors in 1 file
types         Q4_K 571.39 kB, Q6_K 201.60 kB, F32 5.12 kB
bits          4.93 per parameter, over the whole model
quantized     99.9% of the parameters, at 4.902 bits per weight
format        gguf, file type Q4_K_M
scheme        q6_k, 3 layers, read by llama.cpp, Ollama, LM Studio
scheme        q4_k, 12 layers, read by llama.cpp, Ollama, LM Studio
made by       qtool 0.1.0: rtn, q4_k_m, from BASE
"""


def test_the_file_and_its_folder_are_one(made: Make, base: Path) -> None:
    folder = made("q4_k_m")
    page = page_of(open_checkpoint(folder))
    lines = "\n".join(page).replace(str(folder), "MODEL").replace(str(base), "BASE")
    assert lines.startswith(OVERVIEW), lines
    assert page_of(open_checkpoint(folder / "model.gguf"))[1:] == page[1:]


def test_a_manifest_of_another_file_is_no_origin(made: Make, tmp_path: Path) -> None:
    shutil.copy(made("q8_0") / "manifest.json", tmp_path)
    shutil.copy(made("q8_0") / "model.gguf", tmp_path / "other.gguf")
    found = overview(open_checkpoint(tmp_path / "other.gguf"))
    assert found.origin is None
    assert {k.why_not_quantized for k in found.kinds} == {None, "a vector, not a matrix"}


@pytest.mark.parametrize(("scheme", "dtype"), [("f16", "F16"), ("bf16", "BF16"), ("f32", "F32")])
def test_a_file_of_floats(made: Make, scheme: str, dtype: str) -> None:
    checkpoint = open_checkpoint(made(scheme))
    found, page = overview(checkpoint), page_of(checkpoint)
    assert (found.format, found.file_type, found.readers) == ("gguf", dtype, READERS)
    assert (found.bits_per_weight, found.quantized_parameters, found.schemes) == (None, 0, [])
    start = page.index("quantized     nothing")
    assert page[start + 1 : start + 3] == [f"format        gguf, file type {dtype}", f"read by       {READERS}"]
    assert not is_quantized(Weights(checkpoint))
    assert not any(kind.why_not_quantized for kind in found.kinds)


MOE: dict[str, tuple[str, tuple[int, ...]]] = {
    "token_embd.weight": ("Q4_K", (64, 256)),
    "output_norm.weight": ("F32", (256,)),
    "output.weight": ("Q6_K", (64, 256)),
    "blk.0.attn_q.weight": ("IQ2_XXS", (512, 256)),
    "blk.0.ffn_gate_exps.weight": ("Q4_K", (4, 128, 256)),
    "blk.0.ffn_gate_inp.weight": ("F32", (4, 256)),
}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A mixture of experts of an architecture and types that qtool does not read."""
    return write_gguf(tmp_path / "moe.gguf", "qwen3moe", MOE, general__file_type=19, qwen3moe__block_count=1,
                      qwen3moe__embedding_length=256, qwen3moe__attention__head_count=4, qwen3moe__context_length=4096,
                      tokenizer__ggml__tokens=["a", "b"])  # fmt: skip


def test_what_is_not_read_is_shown_all_the_same(foreign: Path) -> None:
    found = overview(open_checkpoint(foreign))
    assert (found.architecture, found.model_type, found.file_type) == ("qwen3moe", None, "IQ2_XXS")
    assert found.dimensions == {"num_hidden_layers": 1, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 2,
                                "max_position_embeddings": 4096}  # fmt: skip
    assert found.parameters == 2 * 64 * 256 + 256 + 512 * 256 + 4 * 128 * 256 + 4 * 256
    assert found.size_bytes == foreign_bytes(foreign)
    bits = {use.scheme: (use.layers, use.bits_per_weight, use.readers) for use in found.schemes}
    assert bits == {"q4_k": (2, 4.5, READERS), "q6_k": (1, 6.5625, READERS), "IQ2_XXS": (1, 2.0625, READERS)}
    kinds = {k.pattern: (k.stored_as, k.shape, k.why_not_quantized) for k in found.kinds}
    assert kinds["*.ffn_gate_exps"] == ("q4_k", (4, 128, 256), None)
    assert kinds["*.attn_q"] == ("IQ2_XXS", (512, 256), None)
    assert kinds["*.ffn_gate_inp"] == ("F32", (4, 256), "the file has it as F32")
    parts = {c.name: c.parameters for c in found.components}
    assert parts == {"head": 64 * 256, "embeddings": 64 * 256, "norms": 256, "attention": 512 * 256,
                     "mlp": 4 * 128 * 256 + 4 * 256}  # fmt: skip
    assert found.notes == [
        "qtool does not know the architecture `qwen3moe`: tensors have the names that llama.cpp gives them",
        "the values of 2 tensors are not read: IQ2_XXS, q4_k of 3 dimensions",
    ]
    assert is_quantized(open_weights(open_checkpoint(foreign)))


def test_experts_of_a_known_architecture_are_shown_all_the_same(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "moe.gguf", "llama", MOE, llama__expert_count=4, llama__block_count=1)
    found = overview(open_checkpoint(path))
    assert (found.architecture, found.model_type, found.dimensions) == ("llama", None, {"num_hidden_layers": 1})
    kinds = {k.pattern: (k.stored_as, k.shape) for k in found.kinds}
    assert kinds["*.ffn_gate_exps"] == ("q4_k", (4, 128, 256))
    said = "qtool does not know the architecture `llama` with experts: tensors have the names that llama.cpp gives them"
    assert found.notes[0] == said
    weights = open_weights(open_checkpoint(path))
    assert "blk.0.ffn_gate_exps" not in weights.schemes


def foreign_bytes(path: Path) -> int:
    return sum(int(tensor.n_bytes) for tensor in stored(path).values())


def test_values_that_are_not_read_are_refused_by_name(foreign: Path) -> None:
    checkpoint = open_checkpoint(foreign)
    with pytest.raises(QtoolError, match=r"`blk.0.attn_q.weight` in .* is IQ2_XXS of the shape \[512, 256\]"):
        tensor_stats(checkpoint, "blk.0.attn_q.weight")
    with pytest.raises(QtoolError, match=r"q4_k of the shape \[4, 128, 256\], which is not read"):
        tensor_stats(checkpoint, "blk.0.ffn_gate_exps.weight")
    assert tensor_stats(checkpoint, "token_embd.weight").stored_as == "q4_k"
    found = compare(checkpoint, open_checkpoint(foreign), quiet)
    assert found.unread == ["blk.0.attn_q.weight", "blk.0.ffn_gate_exps.weight"]
    assert len(found.identical) == 4
    assert "not compared: 2 tensors in blocks that are not read" in plain_lines(comparison_view(found, 5))
    with pytest.raises(QtoolError, match="qtool does not know the architecture `qwen3moe`"):
        memory(checkpoint, 100, 1)


@pytest.mark.parametrize(
    ("number", "name"), [(15, "Q4_K_M"), (19, "IQ2_XXS"), (1024, "GUESSED"), (77, "unknown (77)"), ("x", None)]
)
def test_names_of_file_types(tmp_path: Path, number: Any, name: str | None) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bert", {"a.weight": ("F16", (2, 4))}, general__file_type=number)
    assert overview(open_checkpoint(path)).file_type == name


def test_a_gguf_file_that_is_no_model(tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"blk.0.attn_q.weight.lora_a": ("F32", (8, 256))}
    path = write_gguf(tmp_path / "lora.gguf", "llama", tensors, general__type="adapter")
    found = overview(open_checkpoint(path))
    assert found.notes == ["general.type is `adapter`: this is no model"]
    assert (found.architecture, found.readers) == ("llama", None)


def test_headers_of_containers_need_no_torch(made: Make, foreign: Path, measured: Path) -> None:
    """But mxfp4's and fp8's, which are tested by hand-made files below, the formats are all here."""
    paths = [made("q4_k_m"), made("q4_k_m") / "model.gguf", made("int4-g128-sym", "gptq"), foreign]
    paths += [made("int4-g128-asym", "awq"), measured / "stats", measured / "imatrix.gguf"]
    code = (
        "import sys; from qtool.cli import run\n"
        f"for path in {[str(path) for path in paths]!r}:\n"
        "    assert run(['inspect', path]) == 0\n"
        "    assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), path\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- GGUF: one tensor, comparison, memory ---------------------------------------------------------------------------


def tensor_of(path: Path, kind: str) -> tuple[gguf.ReaderTensor, Any]:
    """The matrix of that type, as the `gguf` package reads it and as it is inspected."""
    name, there = OF_TYPE[kind]
    tensor = stored(path)[f"blk.{there}.weight"]
    assert tensor.tensor_type.name == kind.removesuffix("a16").upper()
    return tensor, tensor_stats(open_checkpoint(path), f"model.layers.{name}.weight")


@pytest.mark.parametrize("kind", OF_TYPE)
def test_a_tensor_of_every_block_type(every_type: Path, kind: str) -> None:
    tensor, found = tensor_of(every_type, kind)
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert found.stored_as == kind
    assert (found.shape, found.minimum, found.maximum) == (values.shape, values.min(), values.max())
    assert found.bits_per_weight == 8 * tensor.n_bytes / tensor.n_elements
    assert found.zero_ratio == (values == 0).mean()
    stats = found.codes
    assert stats is not None
    assert sum(n for _, n in stats.counts) == values.size
    assert 0 < stats.codes_used <= stats.codes_available
    assert stats.scale_minimum <= stats.scale_median <= stats.scale_maximum
    assert stats.zero_point_minimum is None
    json.dumps(found.to_tree())
    assert any(line.startswith("scales ") for line in plain_lines(tensor_view(found)))


def codes_in_file(data: np.ndarray, kind: str) -> Iterator[int]:
    """The codes of a tensor in any order, by the layout of blocks written out here a second time."""
    first, last, size = {"q4_0": (2, 18, 18), "q4_1": (4, 20, 20), "q4_k": (16, 144, 144), "iq4_nl": (2, 18, 18),
                         "iq4_xs": (8, 136, 136), "mxfp4a16": (1, 17, 17), "q8_0": (2, 34, 34)}[kind]  # fmt: skip
    for byte in data.reshape(-1, size)[:, first:last].reshape(-1).tolist():
        yield from ((byte,) if kind == "q8_0" else (byte & 15, byte >> 4))


MXFP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
IQ4_VALUES = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "q4_k", "iq4_nl", "iq4_xs", "mxfp4a16"])
def test_codes_are_those_in_the_file(every_type: Path, kind: str) -> None:
    tensor, found = tensor_of(every_type, kind)
    meaning = {
        "q4_0": lambda code: code - 8,
        "q8_0": lambda code: code - 256 if code > 127 else code,
        "mxfp4a16": lambda code: MXFP4_VALUES[code & 7] * (-1 if code & 8 else 1),
        **dict.fromkeys(("iq4_nl", "iq4_xs"), IQ4_VALUES.__getitem__),
    }.get(kind, lambda code: code)
    expected = Counter(float(meaning(code)) + 0.0 for code in codes_in_file(tensor.data, kind))
    stats = found.codes
    assert stats is not None
    assert {value: n for value, n in stats.counts if n} == expected
    shares = [n / expected.total() for n in expected.values()]
    assert stats.entropy_bits == pytest.approx(-sum(share * log2(share) for share in shares))


OF_32, OF_16 = "one for each 32 inputs of a row", "one for each 16 inputs of a row"
OVER_HALVES = "bit integers, over one float16 for every 256 inputs"
SCALES = {  # rows and columns over how many weights share one, what it is, whether there are minima
    "q8_0": (512 * 8, f"{OF_32}, float16", False),
    "q4_1": (128 * 8, f"{OF_32}, float16", True),
    "q2_k": (512 * 16, f"{OF_16}, two levels: 4-{OVER_HALVES}", True),
    "q3_k": (256 * 32, f"{OF_16}, two levels: 6-{OVER_HALVES}", False),
    "q4_k": (256 * 8, f"{OF_32}, two levels: 6-{OVER_HALVES}", True),
    "q5_k": (128 * 8, f"{OF_32}, two levels: 6-{OVER_HALVES}", True),
    "q6_k": (128 * 16, f"{OF_16}, two levels: 8-{OVER_HALVES}", False),
    "iq4_xs": (512 * 8, f"{OF_32}, two levels: 6-{OVER_HALVES}", False),
    "mxfp4a16": (512 * 8, f"{OF_32}, powers of two (e8m0)", False),
}


@pytest.mark.parametrize("kind", SCALES)
def test_scales_and_minima(every_type: Path, kind: str) -> None:
    tensor, found = tensor_of(every_type, kind)
    stats, (scales, text, minima) = found.codes, SCALES[kind]
    assert (stats.scales, stats.scale_kind) == (scales, text)
    lines = [line for line in plain_lines(tensor_view(found)) if line.startswith("minima ")]
    assert bool(lines) == minima == (stats.minimum_lowest is not None)
    if kind == "q4_1":  # where each block has a scale and a minimum of its own
        scale, minimum = tensor.data.reshape(-1, 20)[:, :4].copy().view(np.float16).astype(np.float32).T
        assert (stats.scale_minimum, stats.scale_maximum) == (scale.min(), scale.max())
        assert (stats.minimum_lowest, stats.minimum_highest) == (minimum.min(), minimum.max())
        (line,) = lines
        assert line.split(maxsplit=1)[1] == f"{minimum.min():.4g} to {minimum.max():.4g}: what the code 0 stands for"


def test_a_gguf_file_against_what_it_was_made_from(made: Make, base: Path) -> None:
    packed, source = open_checkpoint(made("q4_k_m")), Checkpoint(base)
    found = compare(packed, source, quiet)
    assert (len(found.different), len(found.identical), found.only_model, found.only_base) == (15, 5, [], [])
    assert found.reshaped == found.unread == []
    values = gguf.dequantize((t := stored(made("q4_k_m") / "model.gguf")[STORED]).data, t.tensor_type)
    theirs = Weights(source).read([NAME])[NAME].double().numpy()
    (row,) = [d for d in found.different if d.name == NAME]
    relative = np.linalg.norm(values.astype(np.float64) - theirs) / np.linalg.norm(theirs)
    assert row.relative == pytest.approx(relative, rel=1e-9)
    assert (row.stored_as, row.base_stored_as) == ("q4_k", "BF16")
    # rows of queries and keys lie in another order in the file
    assert all(d.relative is not None and d.relative < 0.08 for d in found.different)
    back = compare(source, packed, quiet)
    page = plain_lines(comparison_view(back, 3))
    assert any(line.split()[1:3] == ["BF16", "q4_k"] for line in page)


def test_a_file_of_floats_is_its_source(made: Make, base: Path) -> None:
    found = compare(open_checkpoint(made("bf16")), Checkpoint(base), quiet)
    assert (found.different, len(found.identical)) == ([], 20)


@pytest.mark.parametrize(("scheme", "format"), [("int4-g128-sym", "gptq"), ("int4-g128-asym", "gptq-v2"),
                                                ("int4-g128-asym", "awq")])  # fmt: skip
def test_against_another_format(made: Make, scheme: str, format: str) -> None:
    found = compare(open_checkpoint(made(scheme, format)), open_checkpoint(made("q8_0")), quiet)
    # the embedding is rounded in the GGUF file only
    assert (len(found.different), found.only_model, found.only_base) == (15, [], [])
    assert {(d.stored_as, d.base_stored_as) for d in found.different} == {(scheme, "q8_0"), ("BF16", "q8_0")}
    assert found.relative is not None
    assert 0.05 < found.relative < 0.12


def test_memory_of_a_gguf_file(made: Make, base: Path) -> None:
    needed = memory(open_checkpoint(made("q4_k_m")), 64, 1)
    dense = memory(Checkpoint(base), 64, 1)
    assert needed.kv_cache == dense.kv_cache
    sizes = {option.weights: option.weight_bytes for option in needed.options}
    assert sizes["this checkpoint"] == foreign_bytes(made("q4_k_m") / "model.gguf")
    assert sizes["bf16"] == {option.weights: option.weight_bytes for option in dense.options}["bf16"]
    # under another scheme the embedding stays as it is: in 6.5625 bits here, in 16 in the source; norms in 32 and 16
    dense_sizes = {option.weights: option.weight_bytes for option in dense.options}
    less = 320 * 256 * (16 - 6.5625) / 8 - 5 * 256 * 2
    assert sizes["int4-g128-sym"] == dense_sizes["int4-g128-sym"] - less


# --- formats in safetensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "format", "readers"),
    [
        ("int4-g128-sym", "gptq", "vLLM, SGLang, transformers (with gptqmodel and optimum)"),
        ("int8-channel-sym", "gptq", "vLLM, SGLang, transformers (with gptqmodel and optimum)"),
        ("int3-g128-sym", "gptq-v2", "transformers (with gptqmodel and optimum)"),
        ("int4-g128-asym", "awq", "vLLM, SGLang, transformers (with gptqmodel)"),
    ],
)
def test_overview_of_gptq_and_awq(made: Make, scheme: str, format: str, readers: str) -> None:
    checkpoint = Checkpoint(made(scheme, format))
    found = overview(checkpoint)
    (use,) = found.schemes
    assert (found.format, use.scheme, use.layers, use.readers) == (format, scheme, 14, readers)
    parts = [info for name, info in checkpoint.tensors.items() if "_proj." in name]
    weights = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
    assert use.parameters == weights
    assert use.bits_on_disk == 8 * sum(part.size_bytes for part in parts) / weights
    scales = [part for part in parts if part.name.endswith(".scales")]
    needed = int(scheme[3]) * weights + 8 * sum(part.size_bytes for part in scales)
    if "asym" in scheme:
        needed += 4 * sum(part.size_bytes for part in scales) // 2
    assert use.bits_per_weight == needed / weights
    assert found.size_bytes == sum(kind.size_bytes for kind in found.kinds)


def test_readers_depend_on_shapes(make_model: Any, tmp_path: Path) -> None:
    """32 outputs of keys and values are nothing that the kernels of vLLM and SGLang multiply."""
    model = make_model(hidden_size=128, intermediate_size=256, num_key_value_heads=1)
    out = tmp_path / "out"
    assert run(["quantize", str(model), "-o", str(out), "--format", "gptq", "--method", "rtn", "-q"]) == 0
    assert overview(Checkpoint(out)).readers == "transformers (with gptqmodel and optimum)"


def foreign_copy(folder: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Checkpoint:
    """A checkpoint as another program would have made it: without a manifest, with another quantization_config."""
    shutil.copytree(folder, to)
    (to / "manifest.json").unlink()
    config = json.loads((to / "config.json").read_text())
    change(config["quantization_config"])
    (to / "config.json").write_text(json.dumps(config))
    return Checkpoint(to)


UNREAD_PATTERNS = "the ignore list of config.json has patterns that are not read"


@pytest.mark.parametrize(
    ("format", "scheme", "entry", "why"),
    [
        ("awq", "int4-g128-asym", {"modules_to_not_convert": ["embed_tokens"]}, "in the ignore list of config.json"),
        ("awq", "int4-g128-asym", {"modules_to_not_convert": None}, "config.json does not say why"),
        ("awq", "int4-g128-asym", {"modules_to_not_convert": 7}, "config.json does not say why"),
        ("gptq", "int4-g128-sym", {"dynamic": {"-:.*embed_tokens": {}}}, "in the ignore list of config.json"),
        ("gptq", "int4-g128-sym", {"dynamic": {"-:lm_head": {}}}, "config.json does not say why"),
        ("compressed-tensors", "w4a16", {"ignore": ["re:.*embed.*"]}, "in the ignore list of config.json"),
        ("compressed-tensors", "w4a16", {"ignore": ["re:("]}, UNREAD_PATTERNS),
        ("compressed-tensors", "w4a16", {"ignore": ["re:([a-z_.]+)+Q"]}, UNREAD_PATTERNS),
        ("bitsandbytes", "nf4", {"llm_int8_skip_modules": ["lm_head"]}, "config.json does not say why"),
    ],
)
def test_why_not(made: Make, tmp_path: Path, format: str, scheme: str, entry: dict[str, Any], why: str) -> None:
    checkpoint = foreign_copy(made(scheme, format), tmp_path / "m", lambda config: config.update(entry))
    reasons = {kind.pattern: kind.why_not_quantized for kind in overview(checkpoint).kinds}
    assert reasons["model.embed_tokens"] == why
    assert reasons["model.norm"] == "a vector, not a matrix"
    assert reasons["*.mlp.up_proj"] is None


def test_what_is_laid_out_anew_says_so(made: Make, tmp_path: Path) -> None:
    source = made("int4-g128-sym", "gptq")
    assert run(["quantize", str(source), "-o", str(tmp_path / "awq"), "--format", "awq", "-q"]) == 0
    page = page_of(Checkpoint(tmp_path / "awq"))
    assert any(line.startswith("made by") and line.endswith(f": laid out anew, from {source}") for line in page)
    assert any(line.split() == ["model.embed_tokens", "not", "quantized", "before"] for line in page)


def test_overview_of_fp8_as_deepseek_has_it(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "m")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        out, inputs = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(-(-out // 128), inputs // 128)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    entry = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
             "modules_to_not_convert": ["model.embed_tokens"]}  # fmt: skip
    config = {**json.loads((base / "config.json").read_text()), "quantization_config": entry}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(tmp_path / "m")
    found = overview(checkpoint)
    (use,) = found.schemes
    assert (found.format, use.scheme, use.layers) == ("fp8", "fp8-e4m3-block+fp8-e4m3-g128", 14)
    assert use.inputs == "fp8-e4m3, with a scale for each group of 128 as it comes (dynamic)"
    assert (use.readers, use.inputs_static) == ("vLLM, SGLang, transformers", False)
    assert use.bits_per_weight == use.bits_on_disk == 8 + 32 / 128 / 128
    reasons = {kind.pattern: kind.why_not_quantized for kind in found.kinds}
    assert reasons["model.embed_tokens"] == "in the ignore list of config.json"
    stats = tensor_stats(checkpoint, NAME)
    assert stats.codes is not None
    assert (stats.codes.scales, stats.codes.scale_kind) == (8, "one for each 128 x 128 block, float32")
    difference = compare(checkpoint, Checkpoint(base), quiet)
    assert len(difference.different) == 14
    assert {option.weights: option.weight_bytes for option in memory(checkpoint, 8, 1).options}["bf16"] == (
        Checkpoint(base).size_bytes
    )


@pytest.fixture
def experts(tmp_path: Path) -> Checkpoint:
    """A block as gpt-oss has it: 4 experts of 64 inputs in mxfp4."""
    torch.manual_seed(0)
    block = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": torch.ones(32, 64, dtype=torch.bfloat16),
        "lm_head.weight": torch.ones(32, 64, dtype=torch.bfloat16),
        f"{block}self_attn.q_proj.weight": torch.ones(64, 64, dtype=torch.bfloat16),
        f"{block}mlp.router.weight": torch.ones(4, 64, dtype=torch.bfloat16),
        f"{block}mlp.experts.gate_up_proj_blocks": torch.randint(0, 256, (4, 96, 2, 16)).to(torch.uint8),
        f"{block}mlp.experts.gate_up_proj_scales": torch.randint(120, 130, (4, 96, 2)).to(torch.uint8),
        f"{block}mlp.experts.gate_up_proj_bias": torch.ones(4, 96, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_hidden_layers": 1, "hidden_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": skipped},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Checkpoint(tmp_path)


def test_experts_in_mxfp4(experts: Checkpoint) -> None:
    found = overview(experts)
    (use,) = found.schemes
    assert (found.format, use.scheme, use.layers, use.parameters) == ("mxfp4", "mxfp4a16", 1, 4 * 96 * 64)
    assert use.bits_per_weight == use.bits_on_disk == 4.25
    kinds = {k.pattern: (k.stored_as, k.shape, k.why_not_quantized) for k in found.kinds}
    left = "in the ignore list of config.json"
    assert kinds == {
        "*.mlp.experts.gate_up_proj": ("mxfp4a16", (4, 64, 96), None),
        "*.mlp.experts.gate_up_proj_bias": ("BF16", (4, 96), "a bias, not a weight"),
        "*.mlp.router": ("BF16", (4, 64), left),
        "*.self_attn.q_proj": ("BF16", (64, 64), left),
        "model.embed_tokens": ("BF16", (32, 64), left),
        "lm_head": ("BF16", (32, 64), "config.json does not say why"),
    }
    assert found.parameters == 4 * 96 * 64 + 4 * 96 + 4 * 64 + 64 * 64 + 2 * 32 * 64
    sizes = {option.weights: option.weight_bytes for option in memory(experts, 8, 1).options}
    assert sizes["bf16"] == 2 * found.parameters
    assert sizes["int4-g128-sym"] > sizes["nf4"]  # 64 inputs are no group of 128, and count in 16 bits


def test_a_tensor_of_experts(experts: Checkpoint) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = tensor_stats(experts, name)
    values = Weights(experts).read([name])[name]
    assert (found.shape, found.bits_per_weight) == ((4, 64, 96), 4.25)
    assert (found.minimum, found.maximum) == (values.min().item(), values.max().item())
    assert (found.channels["output"].count, found.channels["input"].count) == (4 * 96, 64)
    reach = values.abs().amax((0, 2))
    assert found.channels["input"].extremes[0] == (int(reach.argmax()), reach.max().item())
    assert found.codes is not None
    assert found.codes.scales == 4 * 96 * 2
    (entry,) = [entry for entry in entries(Weights(experts)) if entry.scheme]
    assert entry.matrix == (4 * 96, 64)


# --- statistics -----------------------------------------------------------------------------------------------------

KINDS = [("*.self_attn.q_proj", 2, 256), ("*.self_attn.o_proj", 2, 256), ("*.mlp.gate_proj", 2, 256),
         ("*.mlp.down_proj", 2, 512)]  # fmt: skip


@pytest.mark.parametrize("name", ["stats", "hessians"])
def test_statistics_are_no_model(measured: Path, base: Path, calibration_text: Path, name: str) -> None:
    path = measured / name
    found = statistics_of(open_headers(str(path)))
    assert found is not None
    assert (found.kind, found.model, found.architecture) == (STATS, str(base), "llama")
    assert found.data == [f"{calibration_text}, 4 rows, 128 tokens"]
    assert found.inputs == [InputKind(*kind) for kind in KINDS]
    assert ("second moments" in found.holds) == (name == "hessians")
    page = plain_lines(statistics_view(found))
    assert page[0] == f"{path}: no model, but statistics of qtool calibrate"
    assert page[-1] == f"qtool quantize {base} -o OUT --stats {path}"
    json.dumps(found.to_tree())


def test_an_imatrix_is_no_model(measured: Path, calibration_text: Path) -> None:
    found = statistics_of(open_headers(str(measured / "imatrix.gguf")))
    assert found is not None
    assert (found.kind, found.model, found.architecture) == (IMATRIX, None, "llama")
    assert found.data == [f"{calibration_text}, 4 chunks of 32 tokens"]
    assert {(x.pattern, x.inputs, x.columns) for x in found.inputs} == {
        *((f"*.attn_{name}", 2, 256) for name in ("q", "k", "v", "output")),
        *((f"*.ffn_{name}", 2, columns) for name, columns in (("gate", 256), ("up", 256), ("down", 512))),
    }
    page = plain_lines(statistics_view(found))
    assert page[0] == f"{measured / 'imatrix.gguf'}: no model, but importance matrix of llama.cpp"
    assert page[-1].endswith(f"--stats {measured / 'imatrix.gguf'}")


@pytest.mark.parametrize("name", ["stats", "imatrix.gguf"])
def test_statistics_on_the_command_line(measured: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(measured / name)
    assert run(["inspect", path]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: no model, but ")
    assert run(["inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] in (STATS, IMATRIX)
    assert run(["inspect", path, "--memory"]) == 1
    assert f"{path} holds statistics of a model's inputs, not a model" in capsys.readouterr().err


def test_what_statistics_suggest_can_be_typed(measured: Path, tmp_path: Path, base: Path) -> None:
    for name in ("hessians", "imatrix.gguf"):
        found = statistics_of(open_headers(str(measured / name)))
        assert found is not None
        words = found.use.replace("OUT", str(tmp_path / name)).replace("MODEL", str(base)).split()
        assert words[0] == "qtool"
        assert run([*words[1:], "--dry-run", "-q"]) == 0, found.use


@pytest.mark.parametrize("change", [{"model": 7}, {"data": [1]}, {"blocks": {"b": [{}]}}, {"layout": None}])
def test_a_damaged_manifest_of_statistics_is_no_traceback(measured: Path, tmp_path: Path, change: Any) -> None:
    shutil.copytree(measured / "stats", tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    manifest |= change
    (tmp_path / "s" / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))
    checkpoint = open_headers(str(tmp_path / "s"))
    assert statistics_of(checkpoint) is None
    assert overview(checkpoint).format is None


def test_models_are_no_statistics(base: Path, made: Make, foreign: Path) -> None:
    assert statistics_of(Checkpoint(base)) is None
    assert statistics_of(open_checkpoint(made("q8_0"))) is None
    assert statistics_of(open_checkpoint(foreign)) is None
