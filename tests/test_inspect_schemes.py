"""`qtool inspect` of every scheme, format and architecture that quantize writes, against what lies in the files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from math import log2
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qtool.checkpoint.reader import Checkpoint
from qtool.cli import run
from qtool.errors import QtoolError
from qtool.formats import least_capable
from qtool.formats.weights import Weights
from qtool.inspection.compare import compare
from qtool.inspection.logical import open_weights, tied_pair
from qtool.inspection.memory import SCHEMES, memory
from qtool.inspection.overview import overview
from qtool.inspection.tensor import tensor_stats
from qtool.inspection.views import memory_view, overview_view, tensor_view
from qtool.report.table import plain_lines
from qtool.scheme import QuantScheme

COMPRESSED = ["w8a8", "w8a8-static", "w4a8-g32", "int4-g32-asym", "int8-tensor-sym+int8-token", "fp8", "fp8-dynamic",
              "fp8-block", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "mxfp8", "mxfp8a16"]  # fmt: skip
BITSANDBYTES = ["nf4", "nf4-dq", "fp4-dq", "llm-int8"]
OWN = ["fp8-e5m2-channel", "int3-g64-sym+outliers-1%"]
ALL = [*COMPRESSED, *BITSANDBYTES, *OWN]
STATIC = ("w8a8-static", "fp8", "nvfp4")
NAME = "model.layers.1.mlp.up_proj"
# Beside codes, scales and outliers: what a format adds, and fixed scales of inputs.
ADDED = ("weight_shape", "quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4", "weight_format", "input_scale",
         "input_global_scale")  # fmt: skip
SMALL_VALUES = ("weight_shape", "bitsandbytes__nf4", "bitsandbytes__fp4")  # all that may be read besides headers

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def made(make_model: Any, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`made(scheme, *arguments, kind="llama") -> Path`: that scheme by rounding to nearest, each made once."""
    folders: dict[tuple[str, ...], Path] = {}

    def make(scheme: str, *arguments: str, kind: str = "llama") -> Path:
        key = (kind, scheme, *arguments)
        if key not in folders:
            out = tmp_path_factory.mktemp("made") / "out"
            data = ["--data", str(calibration_text), "--rows", "8", "--seqlen", "32"]
            needs_data = scheme in STATIC or "--kv" in arguments
            command = ["quantize", str(dense(make_model, kind)), "-o", str(out), "--scheme", scheme, "--method", "rtn"]
            assert run([*command, *arguments, *(data if needs_data else []), "-q"]) == 0
            folders[key] = out
        return folders[key]

    return make


def dense(make_model: Any, kind: str = "llama") -> Path:
    wide = {"gpt2": {"n_inner": 256}, "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128}}
    return make_model(kind, hidden_size=128, **wide.get(kind, {"intermediate_size": 256}))


def quiet(*_: object) -> None:
    """A progress callback that says nothing."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all tensors whose values are read."""
    names: list[str] = []

    class Handle:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def __enter__(self) -> Handle:
            self.handle = self.handle.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.handle.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.handle, name)

        def get_tensor(self, name: str) -> Any:
            names.append(name)
            return self.handle.get_tensor(name)

    monkeypatch.setattr("safetensors.safe_open", lambda *args, **kwargs: Handle(safe_open(*args, **kwargs)))
    return names


# --- the overview -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ALL)
def test_overview_counts_what_lies_in_the_files(made: Make, reads: list[str], scheme: str) -> None:
    checkpoint = Checkpoint(made(scheme))
    reads.clear()  # those of making it
    found = overview(checkpoint)
    assert all(name.endswith(SMALL_VALUES) for name in reads), reads
    (use,) = found.schemes
    assert (use.scheme, use.layers) == (str(QuantScheme.parse(scheme)), 14)
    assert found.format == ("bitsandbytes" if scheme in BITSANDBYTES else "qtool" if scheme in OWN else
                            "compressed-tensors")  # fmt: skip
    parts = [info for name, info in checkpoint.tensors.items() if "_proj." in name]
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
    assert found.quantized_parameters == use.parameters == weights
    assert use.bits_on_disk == pytest.approx(8 * sum(p.size_bytes for p in parts) / weights, abs=1e-12)
    needed = 8 * sum(p.size_bytes for p in parts if not p.name.endswith(ADDED))
    if scheme == "w4a8-g32":  # a byte for each code
        needed -= 4 * weights
    elif scheme.endswith("-dq"):  # the offset is among the tensor that describes the weight
        needed += 14 * 32
    assert use.bits_per_weight == pytest.approx(needed / weights, abs=1e-12)
    assert found.size_bytes == checkpoint.size_bytes
    assert (
        checkpoint.size_bytes == sum(c.size_bytes for c in found.components) == sum(k.size_bytes for k in found.kinds)
    )
    page = plain_lines(overview_view(found))
    shown = any(" on disk, read by" in line for line in page)
    assert shown == (use.bits_on_disk - use.bits_per_weight >= 0.05)


INPUTS = {
    "w8a8": ("int8, with a scale for each token as it comes (dynamic)", False),
    "w8a8-static": ("int8, with a fixed scale (static)", True),
    "fp8": ("fp8-e4m3, with a fixed scale (static)", True),
    "fp8-block": ("fp8-e4m3, with a scale for each group of 128 as it comes (dynamic)", False),
    "nvfp4": ("nvfp4, with a scale for each group of 16 as it comes, under a fixed one (static)", True),
    "mxfp4": ("mxfp4, with a scale for each group of 32 as it comes (dynamic)", False),
    "llm-int8": ("int8, with a scale for each token as it comes, but for columns that reach 6 (dynamic)", False),
    "nvfp4a16": (None, False),
}


@pytest.mark.parametrize("scheme", INPUTS)
def test_overview_says_how_inputs_are_rounded(made: Make, scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(made(scheme))]) == 0
    page, (text, static) = capsys.readouterr().out, INPUTS[scheme]
    (use,) = overview(Checkpoint(made(scheme))).schemes
    assert (use.inputs, use.inputs_static) == (text, static)
    assert ("inputs  " in page) == (text is not None)
    assert text is None or f"inputs        {text}, 14 layers\n" in page


def test_overview_of_mixed_precision_and_outliers(made: Make) -> None:
    mixed = made("nvfp4a16", "--layer", "*.down_proj=fp8-dynamic", "--layer", "*.o_proj=int3-g32-sym")
    found = overview(Checkpoint(mixed))
    uses = {use.scheme: use for use in found.schemes}
    assert {scheme: use.layers for scheme, use in uses.items()} == {
        "nvfp4a16": 10, "fp8-e4m3-channel+fp8-e4m3-token": 2, "int3-g32-sym": 2
    }  # fmt: skip
    assert found.readers == uses["int3-g32-sym"].readers
    assert f"read by       {found.readers}, as a whole" in plain_lines(overview_view(found))
    (use,) = overview(Checkpoint(made("int3-g64-sym+outliers-1%"))).schemes
    stored = [
        i for n, i in Checkpoint(made("int3-g64-sym+outliers-1%")).tensors.items() if n.endswith("outlier_values")
    ]
    assert use.outliers == sum(i.shape[0] for i in stored) > 0


def test_the_least_capable_reader_speaks_for_all() -> None:
    texts = ["vLLM, SGLang, transformers", "transformers (vLLM and SGLang only in versions that take these bits)",
             "transformers, and vLLM in recent versions", "transformers"]  # fmt: skip
    for start in range(len(texts)):
        assert least_capable(texts[: start + 1]) == texts[start]


def test_a_foreign_bitsandbytes_checkpoint_says_what_it_skips(made: Make, tmp_path: Path) -> None:
    for file in made("nf4").iterdir():
        if file.name != "manifest.json":
            (tmp_path / file.name).symlink_to(file)
    reasons = {k.pattern: k.why_not_quantized for k in overview(Checkpoint(tmp_path)).kinds}
    assert reasons["model.embed_tokens"] == "in the ignore list of config.json"
    assert reasons["model.norm"] == "a vector, not a matrix"


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4", "mxfp8", "w8a8", "int4-g32-asym", "nf4", "fp8-e5m2-channel"])
def test_overview_from_headers_alone(made: Make, scheme: str) -> None:
    here = Checkpoint(made(scheme))
    there = Checkpoint.from_headers(Path("org/name"), here.config, here.tensors.values())
    if scheme == "nf4":
        with pytest.raises(QtoolError, match="org/name is packed in a way whose shapes its headers do not tell"):
            overview(there)
        return
    alone = overview(there)
    assert alone.schemes == overview(here).schemes
    assert (alone.parameters, alone.size_bytes) == (overview(here).parameters, here.size_bytes)


def test_no_format_needs_torch_for_its_headers(made: Make) -> None:
    folders = [made(s) for s in ("int4-g32-asym", "nvfp4", "nf4", "llm-int8", "fp8-e5m2-channel")]
    folders += [made("w8a8", "--kv", "fp8"), made("int8-channel-sym", kind="opt"), made("nf4", kind="gpt2")]
    code = (
        "import sys; from qtool.cli import run\n"
        f"for folder in {[str(f) for f in folders]!r}:\n"
        "    assert run(['inspect', folder]) == run(['inspect', folder, '--memory']) == 0\n"
        "    assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), folder\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_that_is_gone_is_not_taken_for_the_hub(made: Make, tmp_path: Path) -> None:
    here = Checkpoint(made("nf4"))
    gone = Checkpoint.from_headers(tmp_path, here.config, here.tensors.values())
    with pytest.raises(QtoolError, match="cannot read"):
        open_weights(gone)


# --- caches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["fp8", "int8"])
@pytest.mark.parametrize("scheme", ["w8a8", "fp8-e5m2-channel"])
def test_a_cache_with_scales(made: Make, reads: list[str], scheme: str, kv: str) -> None:
    checkpoint = Checkpoint(made(scheme, "--kv", kv))
    assert sum(name.endswith((".k_scale", ".v_scale")) for name in checkpoint.tensors) == 4
    reads.clear()  # those of making it
    found, needed = overview(checkpoint), memory(checkpoint, 100, 3)
    assert not [name for name in reads if not name.endswith(SMALL_VALUES)]
    assert found.kv_cache is not None
    assert (found.kv_cache.stored_as, found.kv_cache.layers) == (kv, 2)
    assert found.size_bytes == sum(k.size_bytes for k in found.kinds)
    assert found.parameters == overview(Checkpoint(made(scheme))).parameters
    assert all(k.why_not_quantized is None for k in found.kinds if k.pattern.endswith("_scale"))
    assert f"KV cache      {kv}, with fixed scales for keys and values of 2 layers" in plain_lines(overview_view(found))
    assert needed.kv_cache.size_bytes["own"] == 2 * 100 * 3 * 4 * 32  # one byte a value, without scales of vectors
    assert needed.options[0].fits["8 GB"] == "own"
    assert needed.options[1].fits["8 GB"] == "fp16"
    page = plain_lines(memory_view(needed))
    assert any(f"own ({kv})" in line for line in page)


def test_a_cache_without_scales_is_of_no_own_type(made: Make) -> None:
    needed = memory(Checkpoint(made("w8a8")), 100, 1)
    assert needed.kv_cache.own is None
    assert "own" not in needed.kv_cache.size_bytes
    assert overview(Checkpoint(made("w8a8"))).kv_cache is None


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt"])
def test_memory_of_a_scheme_is_what_quantize_writes(made: Make, make_model: Any, kind: str) -> None:
    needed = memory(Checkpoint(dense(make_model, kind)), 10, 1)
    estimated = {option.weights: option.weight_bytes for option in needed.options}
    assert [*estimated] == ["this checkpoint", "bf16", *SCHEMES]
    for scheme in ("fp8-dynamic", "nvfp4a16", "mxfp4a16", "nf4", "int3-g128-sym"):
        tensors = Checkpoint(made(scheme, kind=kind)).tensors.values()
        written = sum(info.size_bytes for info in tensors if not info.name.endswith(ADDED))
        assert estimated[scheme] == written, scheme
    again = memory(Checkpoint(made("nf4", kind=kind)), 10, 1)
    packed = {option.weights: option.weight_bytes for option in again.options}
    assert {scheme: packed[scheme] for scheme in SCHEMES} == {scheme: estimated[scheme] for scheme in SCHEMES}


def test_memory_reads_the_keys_of_older_configs(make_model: Any) -> None:
    found = memory(Checkpoint(dense(make_model, "gpt2")), 200, 1)
    assert found.kv_cache.size_bytes["fp16"] == 2 * 200 * 2 * 128 * 2
    assert any("at most 128 tokens" in note for note in found.notes)
    assert overview(Checkpoint(dense(make_model, "gpt2"))).dimensions == {
        "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
        "vocab_size": 320, "max_position_embeddings": 128,
    }  # fmt: skip


# --- architectures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["nf4", "int4-g64-sym", "int8-channel-sym", "int3-g64-sym+outliers-1%"])
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt"])
def test_other_architectures(made: Make, make_model: Any, kind: str, scheme: str) -> None:
    before = overview(Checkpoint(dense(make_model, kind)))
    after = overview(Checkpoint(made(scheme, kind=kind)))
    assert after.parameters == before.parameters
    shapes = {k.pattern: (k.shape, k.parameters) for k in before.kinds}
    assert {k.pattern: (k.shape, k.parameters) for k in after.kinds} == shapes
    assert {c.name for c in after.components} == {"attention", "mlp", "embeddings", "norms"}
    assert after.format == ("qtool" if "outliers" in scheme or (kind == "gpt2" and scheme != "nf4") else
                            "bitsandbytes" if scheme == "nf4" else "compressed-tensors")  # fmt: skip
    expected = {"nf4": 4.5, "int4-g64-sym": 4.25}
    assert after.bits_per_weight == expected.get(scheme, after.bits_per_weight)
    linear = {"gpt2": "*.mlp.c_fc", "gpt_neox": "*.mlp.dense_h_to_4h", "opt": "*.fc1"}[kind]
    (row,) = [k for k in after.kinds if k.pattern == linear]
    if scheme == "int8-channel-sym":  # 256 rows of 128 inputs, whichever way they lie
        assert row.bits_per_weight == 8 + 16 / 128


@pytest.mark.parametrize("scheme", [None, "nf4", "int8-channel-sym"])
def test_channels_of_a_weight_that_lies_the_other_way(made: Make, make_model: Any, scheme: str | None) -> None:
    folder = made(scheme, kind="gpt2") if scheme else dense(make_model, "gpt2")
    name = "transformer.h.0.attn.c_attn.weight"
    found = tensor_stats(Checkpoint(folder), name)
    weight_IO = Weights(Checkpoint(folder)).read([name])[name]
    assert (found.shape, found.transposed) == ((128, 384), True)
    for which, axis in (("output", 0), ("input", 1)):
        reach = weight_IO.abs().amax(axis)
        channels = found.channels[which]
        assert channels.count == len(reach)
        assert channels.extremes[0] == (int(reach.argmax()), reach.max().item())
    assert any("128 x 384, stored [in, out]" in line for line in plain_lines(tensor_view(found)))


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_head_that_is_not_stored_is_tied_whatever_config_leaves_out(make_model: Any, kind: str) -> None:
    checkpoint = Checkpoint(dense(make_model, kind))
    said = tied_pair(checkpoint)
    assert said is not None
    del checkpoint.config["tie_word_embeddings"]
    assert tied_pair(checkpoint) == said
    checkpoint.config["tie_word_embeddings"] = False
    assert tied_pair(checkpoint) is None


# --- one tensor ---------------------------------------------------------------------------------------------------


def raw(folder: Path, module: str = NAME) -> dict[str, torch.Tensor]:
    """The tensors of a module by the ends of their names."""
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        names = [name for name in handle.keys() if name.startswith(module + ".")]  # noqa: SIM118 (a handle is no dict)
        return {name.removeprefix(module + ".").removeprefix("qtool."): handle.get_tensor(name) for name in names}


def nibbles(data: Iterable[int], high_first: bool) -> Iterator[int]:
    for byte in data:
        yield from ((byte >> 4, byte & 15) if high_first else (byte & 15, byte >> 4))


def codes_in_file(folder: Path, scheme: str) -> list[float]:
    """The value of every code, by the layout of each format written out here a second time."""
    parts = raw(folder)
    if scheme == "nf4":
        values = parts["weight.quant_map"].tolist()
        return [values[code] for code in nibbles(parts["weight"].flatten().tolist(), True)]
    if scheme in ("nvfp4", "mxfp4"):
        magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        codes = nibbles(parts["weight_packed"].flatten().tolist(), False)
        return [magnitudes[code & 7] * (-1 if code & 8 else 1) for code in codes]
    return parts["weight"].float().flatten().tolist()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "fp8", "fp8-block", "fp8-e5m2-channel", "mxfp8", "llm-int8",
                                    "nf4", "nvfp4", "mxfp4"])  # fmt: skip
def test_codes_are_those_in_the_file(made: Make, scheme: str) -> None:
    codes = codes_in_file(made(scheme), scheme)
    found = tensor_stats(Checkpoint(made(scheme)), NAME + ".weight")
    stats, count = found.codes, Counter(code + 0.0 for code in codes)
    assert stats is not None
    assert {round(v, 6): n for v, n in stats.counts if n} == {round(v, 6): n for v, n in count.items()}
    shares = [n / len(codes) for n in count.values()]
    assert stats.entropy_bits == pytest.approx(-sum(s * log2(s) for s in shares))
    assert stats.codes_used == len(count)
    largest = {"w8a8": 127, "w4a8-g32": 8, "fp8-e5m2-channel": 57344, "llm-int8": 127, "nf4": 1}
    top = largest.get(scheme, 6 if "fp4" in scheme else 448)
    below = 7 if scheme == "w4a8-g32" else top
    assert stats.saturated_ratio == sum(c in (-top, below) for c in codes) / len(codes)
    assert found.zero_ratio == sum(c == 0 for c in codes) / len(codes)


AVAILABLE = {
    "w8a8": 255, "w8a8-static": 255, "w4a8-g32": 16, "int4-g32-asym": 16, "int8-tensor-sym+int8-token": 255,
    "llm-int8": 255, "nf4": 16, "nf4-dq": 16, "fp8-e5m2-channel": 247, "int3-g64-sym+outliers-1%": 8,
}  # fmt: skip
SCALE_KINDS = {
    "fp8": (1, "one for the tensor, bfloat16"),
    "fp8-dynamic": (256, "one for each row, bfloat16"),
    "fp8-block": (2, "one for each 128 x 128 block, bfloat16"),
    "w4a8-g32": (1024, "one for each 32 inputs of a row, bfloat16"),
    "nvfp4": (2048, "one for each 16 inputs of a row, two levels: e4m3, over one float32 for the tensor"),
    "mxfp4": (1024, "one for each 32 inputs of a row, powers of two (e8m0)"),
    "nf4": (512, "one for each 64 inputs of a row, float32"),
    "nf4-dq": (
        512,
        "one for each 64 inputs of a row, two levels: 8-bit codes, over one float32 for every 256 and an offset",
    ),
    "llm-int8": (256, "one for each row, float32"),
}


@pytest.mark.parametrize("scheme", ALL)
def test_a_tensor_of_every_kind(made: Make, scheme: str) -> None:
    folder = made(scheme)
    found = tensor_stats(Checkpoint(folder), NAME + ".weight")
    stats = found.codes
    assert stats is not None
    assert sum(n for _, n in stats.counts) == 256 * 128
    assert [v for v, _ in stats.counts] == sorted({v for v, _ in stats.counts})
    assert stats.codes_available == AVAILABLE.get(scheme, 15 if "fp4" in scheme else 253)
    assert 0 < stats.codes_used <= stats.codes_available
    assert 0 < stats.entropy_bits <= log2(stats.codes_used)
    assert 0 < stats.scale_minimum <= stats.scale_median <= stats.scale_maximum
    assert (stats.scales, stats.scale_kind) == SCALE_KINDS.get(scheme, (stats.scales, stats.scale_kind))
    parts = raw(folder)
    assert (stats.input_scale is not None) == (scheme in STATIC)
    if stats.input_scale is not None:
        stored = parts["input_global_scale" if scheme == "nvfp4" else "input_scale"]
        assert stats.input_scale == stored.float().item()
    if "asym" in scheme:
        assert stats.zero_point_minimum is not None
        assert stats.zero_point_maximum is not None
        assert 0 <= stats.zero_point_minimum <= stats.zero_point_maximum <= 15
    elif "outliers" not in scheme:  # the largest weight is a code times a scale
        reach = max(abs(v) for v, n in stats.counts if n) * stats.scale_maximum
        assert max(-found.minimum, found.maximum) <= reach * (1 + 1e-6)
    lines = plain_lines(tensor_view(found))
    listed = any(line.startswith("codes, as multiples") for line in lines)
    assert listed == (stats.codes_available <= 16)
    json.dumps(found.to_tree())


def test_scales_are_those_in_the_file(made: Make) -> None:
    def of(scheme: str) -> Any:
        return tensor_stats(Checkpoint(made(scheme)), NAME + ".weight").codes

    for scheme in ("w4a8-g32", "fp8-dynamic", "fp8-block"):
        scale = raw(made(scheme))["weight_scale"].float()
        assert (of(scheme).scales, of(scheme).scale_maximum) == (scale.numel(), scale.abs().max().item())
        assert of(scheme).negative_scales == int((scale < 0).sum())
    parts = raw(made("nvfp4"))
    scale = parts["weight_scale"].float() / parts["weight_global_scale"]
    assert of("nvfp4").scale_minimum == scale.min().item()
    powers = 2.0 ** (raw(made("mxfp4"))["weight_scale"].float() - 127)
    assert of("mxfp4").scale_median == pytest.approx(powers.flatten().quantile(0.5).item())
    assert of("nf4").scale_maximum == raw(made("nf4"))["weight.absmax"].max().item()
    assert of("nf4-dq").scale_maximum == pytest.approx(of("nf4").scale_maximum, rel=0.02)


def test_outliers_are_counted(made: Make) -> None:
    parts = raw(made("int3-g64-sym+outliers-1%"))
    found = tensor_stats(Checkpoint(made("int3-g64-sym+outliers-1%")), NAME + ".weight")
    assert found.codes is not None
    assert found.codes.outliers == len(parts["outlier_values"]) == int(0.01 * 256 * 128)
    assert found.codes.outlier_maximum == parts["outlier_values"].float().abs().max().item()
    assert any(line.startswith("kept") and "327 weights" in line for line in plain_lines(tensor_view(found)))


# --- against ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ALL)
def test_compare_of_every_kind_with_its_source(made: Make, make_model: Any, scheme: str) -> None:
    source, packed = Checkpoint(dense(make_model)), Checkpoint(made(scheme))
    found = compare(packed, source, quiet)
    assert (len(found.different), len(found.identical), found.only_model, found.only_base) == (14, 6, [], [])
    name = NAME + ".weight"
    (row,) = [d for d in found.different if d.name == name]
    ours = Weights(packed).read([name])[name].double()
    theirs = Weights(source).read([name])[name].double()
    assert row.relative == pytest.approx(((ours - theirs).norm() / theirs.norm()).item(), rel=1e-9)
    assert (row.stored_as, row.base_stored_as) == (str(QuantScheme.parse(scheme)), "BF16")
    bits = QuantScheme.parse(scheme).bits
    assert found.relative is not None
    assert found.relative < {3: 0.25, 4: 0.15, 8: 0.06}[bits]


@pytest.mark.parametrize(("one", "other"), [("nf4", "fp8-dynamic"), ("nvfp4", "int3-g64-sym+outliers-1%"),
                                            ("llm-int8", "w8a8")])  # fmt: skip
def test_compare_of_two_kinds(made: Make, one: str, other: str) -> None:
    there = compare(Checkpoint(made(one)), Checkpoint(made(other)), quiet)
    back = compare(Checkpoint(made(other)), Checkpoint(made(one)), quiet)
    assert {d.name: d.max_absolute for d in there.different} == {d.name: d.max_absolute for d in back.different}
    assert {(d.stored_as, d.base_stored_as) for d in there.different} == {
        (str(QuantScheme.parse(one)), str(QuantScheme.parse(other)))
    }


def test_compare_of_weights_that_lie_the_other_way_and_of_caches(made: Make, make_model: Any) -> None:
    found = compare(Checkpoint(made("nf4", kind="gpt2")), Checkpoint(dense(make_model, "gpt2")), quiet)
    assert (len(found.different), found.reshaped, found.only_model, found.only_base) == (8, [], [], [])
    assert found.relative is not None
    assert found.relative < 0.15
    cached = compare(Checkpoint(made("w8a8", "--kv", "fp8")), Checkpoint(made("w8a8")), quiet)
    assert (cached.different, cached.only_model, cached.only_base) == ([], [], [])
