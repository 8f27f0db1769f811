"""`qtool inspect`: the overview, the memory, the comparison and the single tensor, as numbers and as pages."""

import json
import subprocess
import sys
from math import ceil, log2, log10
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qtool.checkpoint.hub import open_headers
from qtool.checkpoint.reader import Checkpoint
from qtool.cli import run
from qtool.errors import QtoolError, UsageError
from qtool.formats import Contents, get_format
from qtool.inspection import compare as comparing
from qtool.inspection.compare import compare, error_sums
from qtool.inspection.memory import memory
from qtool.inspection.overview import component_of, overview
from qtool.inspection.tensor import tensor_stats
from qtool.inspection.views import bar, comparison_view, memory_view, tensor_view
from qtool.numerics.grid import QTensor, grid_of
from qtool.plan import make_plan
from qtool.recipe import Recipe
from qtool.report.table import plain_lines
from qtool.scheme import QuantScheme

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
SCHEMES = {"self_attn.q_proj": "int4-g32-asym", "mlp.up_proj": "int8-channel-sym"}
MANIFEST = {
    "identity": {"qtool": "0.1.0", "recipe": {"method": "gptq", "layers": {"*.up_proj": "w8a16"}}},
    "report": {
        "model": "org/tiny", "scheme": "int4-g32-asym",
        "kept": [{"name": "lm_head.weight", "reason": "ignored by `*lm_head`"}],
        "gates": [{"gate": "max_kl", "asked": "0.01", "limit": 0.01, "measured": 0.0217, "passed": False}],
    },
}  # fmt: skip


def dense_tensors(seed=0):
    """Two blocks of one attention and one mlp linear, beside embedding, norms and head."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape):
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": values(96, 64), "lm_head.weight": values(96, 64)}
    for block in range(2):
        prefix = f"model.layers.{block}."
        tensors[prefix + "input_layernorm.weight"] = values(64)
        tensors[prefix + "self_attn.q_proj.weight"] = values(64, 64)
        tensors[prefix + "mlp.up_proj.weight"] = values(96, 64)
    return tensors


def write(folder, tensors, config=CONFIG, file="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pack(tensors, schemes=SCHEMES):
    """The packed tensors, the config that describes them, and the dense weights that they stand for."""
    layout = get_format("compressed-tensors")
    packed, meant, modules = {}, {}, {}
    for name, tensor in tensors.items():
        kind = ".".join(name.split(".")[-3:-1])
        if kind not in schemes:
            packed[name] = meant[name] = tensor
            continue
        module, scheme = name.removesuffix(".weight"), QuantScheme.parse(schemes[kind])
        grid = grid_of(scheme, torch.bfloat16)
        params = grid.fit(tensor.float(), search=False)
        quantized = QTensor(grid.encode(tensor.float(), params), params, scheme)
        packed.update(layout.pack(module, quantized))
        meant[name], modules[module] = quantized.dequantize(), scheme
    return packed, {**CONFIG, "quantization_config": layout.config(Contents(modules, ["lm_head"]))}, meant


def quiet(stage, done, total, detail):
    pass


@pytest.fixture
def dense(tmp_path):
    return write(tmp_path / "dense", dense_tensors())


@pytest.fixture
def packed(tmp_path):
    tensors, config, _ = pack(dense_tensors())
    folder = write(tmp_path / "packed", tensors, config)
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    return folder


OVERVIEW = """\
MODEL

architecture  LlamaForCausalLM (llama)
dimensions    layers 2, hidden 64, heads 4, key/value heads 2, vocabulary 96, context 256
parameters    32.90K (32,896)
size          42.30 kB, 18 tensors in 1 file
types         BF16 25.73 kB, I32 16.51 kB, I64 64 B
bits          10.29 per parameter, over the whole model
quantized     62.3% of the parameters, at 6.800 bits per weight
format        compressed-tensors
scheme        int8-channel-sym, 2 layers, read by vLLM, SGLang, transformers
scheme        int4-g32-asym, 2 layers, read by vLLM, SGLang, transformers
made by       qtool 0.1.0: gptq, int4-g32-asym, *.up_proj=w8a16, from org/tiny
gate          FAILED: max_kl 0.01, measured 0.0217

component   parameters      size  of the size
mlp             12.29K  12.70 kB        30.0%
head             6.14K  12.29 kB        29.0%
embeddings       6.14K  12.29 kB        29.0%
attention        8.19K   4.77 kB        11.3%
norms              128     256 B         0.6%

kind of layer       stored as         count    shape    bits      size
*.mlp.up_proj       int8-channel-sym      2  96 x 64   8.250  12.70 kB
lm_head             BF16                  1  96 x 64  16.000  12.29 kB
model.embed_tokens  BF16                  1  96 x 64  16.000  12.29 kB
*.self_attn.q_proj  int4-g32-asym         2  64 x 64   4.625   4.77 kB
*.input_layernorm   BF16                  2       64  16.000     256 B

not quantized       why
lm_head             ignored by `*lm_head`
model.embed_tokens  nothing in the quantization_config names it
*.input_layernorm   a vector, not a matrix
"""


def test_overview_whole_output(packed, capsys):
    assert run(["inspect", str(packed)]) == 0
    out, err = capsys.readouterr()
    assert out.replace(str(packed), "MODEL") == OVERVIEW
    assert err == ""


def test_overview_numbers(packed):
    tensors = dense_tensors()
    found = overview(Checkpoint(packed))
    on_disk = sum(info.size_bytes for info in Checkpoint(packed).tensors.values())
    quantized = 2 * (64 * 64 + 96 * 64)
    assert found.parameters == sum(t.numel() for t in tensors.values())
    assert found.quantized_parameters == quantized
    for parts in (found.components, found.kinds):
        assert found.size_bytes == on_disk == sum(part.size_bytes for part in parts)
    assert found.parameters == sum(c.parameters for c in found.components) == sum(k.parameters for k in found.kinds)
    bits = 2 * (64 * 64 * 4 + 64 * 2 * (16 + 4)) + 2 * (96 * 64 * 8 + 96 * 16)
    assert found.bits_per_weight == bits / quantized
    assert found.bits_per_parameter == 8 * on_disk / found.parameters
    assert found.origin is not None
    assert [gate["passed"] for gate in found.origin.gates] == [False]


def test_overview_of_the_config_ignore_list(packed):
    (packed / "manifest.json").unlink()
    found = overview(Checkpoint(packed))
    reasons = {k.pattern: k.why_not_quantized for k in found.kinds}
    assert found.origin is None
    assert reasons["lm_head"] == "in the ignore list of config.json"
    assert reasons["*.mlp.up_proj"] is None


def test_a_foreign_manifest_is_no_origin(packed):
    (packed / "manifest.json").write_text('{"files": []}')
    assert overview(Checkpoint(packed)).origin is None


@pytest.mark.parametrize("stored", [("embed",), ("head",), ("embed", "head")])
def test_a_tied_head_counts_once(tmp_path, stored):
    tensors = dense_tensors()
    absent = {"embed": "lm_head.weight", "head": "model.embed_tokens.weight"}
    if len(stored) == 1:
        del tensors[absent[stored[0]]]
    folder = write(tmp_path / "tied", tensors, {**CONFIG, "tie_word_embeddings": True})
    found = overview(Checkpoint(folder))
    assert found.parameters == 96 * 64 + 2 * (64 + 64 * 64 + 96 * 64)
    assert found.size_bytes == sum(2 * t.numel() for t in tensors.values())
    assert len(found.notes) == 1
    assert "tied" in found.notes[0]


def test_overview_of_several_files_with_buffers(tmp_path):
    folder = write(tmp_path / "m", {"a.weight": torch.zeros(4, 8)}, file="1.safetensors")
    write(folder, {"position_ids": torch.arange(5)}, {}, file="2.safetensors")
    found = overview(Checkpoint(folder))
    assert (found.files, found.tensors, found.parameters, found.size_bytes) == (2, 2, 32, 4 * 32 + 8 * 5)
    assert found.architecture == "unknown"


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("transformer.h.3.ln_1.bias", "norms"),
        ("model.layers.0.self_attn.q_proj.bias", "attention"),
        ("model.layers.0.mlp.experts.7.up_proj.weight", "mlp"),
        ("transformer.wte.weight", "embeddings"),
        ("embed_out.weight", "head"),
        ("model.rotary.inv_freq", "other"),
    ],
)
def test_components(name, component):
    assert component_of(name) == component


def test_packed_single_file_says_what_it_misses(packed):
    notes = overview(Checkpoint(packed / "model.safetensors")).notes
    assert len(notes) == 1
    assert "without config.json" in notes[0]


def test_loads_neither_torch_nor_transformers(packed, dense):
    code = (
        "import sys; import qtool.cli.inspect; from qtool.cli import run\n"
        f"codes = [run(['inspect', {str(packed)!r}]), run(['inspect', {str(dense)!r}, '--memory'])]\n"
        "assert codes == [0, 0], codes\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- memory


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 5), heads=st.integers(1, 4), share=st.integers(1, 3), half_dim=st.integers(1, 40),
    context=st.integers(1, 10_000), batch=st.integers(1, 9),
)  # fmt: skip
def test_kv_cache_counts_every_value(tmp_path_factory, layers, heads, share, half_dim, context, batch):
    config = {"num_hidden_layers": layers, "num_attention_heads": heads * share, "num_key_value_heads": heads,
              "hidden_size": heads * share * 2 * half_dim}  # fmt: skip
    folder = write(tmp_path_factory.mktemp("kv"), {"a.weight": torch.zeros(2, 2)}, config)
    size_bytes = memory(Checkpoint(folder), context, batch).kv_cache.size_bytes
    values = sum(2 * heads * 2 * half_dim for _ in range(layers)) * context * batch
    scales = 2 * heads * layers * context * batch
    expected = {"fp16": 2 * values, "fp8": values, "int8": values + 2 * scales, "int4": values // 2 + 2 * scales}
    assert size_bytes == expected


def test_kv_cache_of_sliding_and_linear_layers(tmp_path):
    types = ["full_attention", "sliding_attention", "sliding_attention", "linear_attention"]
    config = {**CONFIG, "num_hidden_layers": 4, "head_dim": 8, "layer_types": types, "sliding_window": 100}
    found = memory(Checkpoint(write(tmp_path / "m", dense_tensors(), config)), 1000, 1)
    assert (found.kv_cache.layers, found.kv_cache.tokens) == (3, 1000 + 2 * 100)
    assert found.kv_cache.size_bytes["fp16"] == 1200 * 4 * 8 * 2
    assert any("linear_attention" in note for note in found.notes)
    assert any("256 tokens" in note for note in found.notes)


def test_kv_cache_of_latent_attention(tmp_path):
    config = {"num_hidden_layers": 3, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    cache = memory(Checkpoint(write(tmp_path / "m", dense_tensors(), {"text_config": config})), 10, 2).kv_cache
    assert cache.size_bytes["fp16"] == 3 * 10 * 2 * (512 + 64) * 2


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "hidden_size"])
def test_memory_names_the_missing_key(tmp_path, key):
    config = {k: v for k, v in CONFIG.items() if k != key}
    with pytest.raises(QtoolError, match=f"no `{key}` in .*config.json"):
        memory(Checkpoint(write(tmp_path / "m", dense_tensors(), config)), 10, 1)


def test_memory_of_schemes_is_what_quantize_writes(tmp_path):
    tensors = {n: t.repeat(1, 2) if t.dim() == 2 else t for n, t in dense_tensors().items()}  # 128 inputs
    checkpoint = Checkpoint(write(tmp_path / "m", tensors))
    options = {o.weights: o.weight_bytes for o in memory(checkpoint, 10, 1).options}
    assert options["this checkpoint"] == options["bf16"] == sum(2 * t.numel() for t in tensors.values())
    layout = get_format("compressed-tensors").tensors
    for scheme in ("int8-channel-sym", "int4-g128-sym", "int3-g128-sym", "int2-g128-sym"):
        plan = make_plan(checkpoint.tensors, Recipe(scheme=scheme), layout)
        shapes = 16 * len(plan.linears)  # weight_shape, the format's own
        assert options[scheme] == plan.size_bytes - shapes


def test_memory_says_which_scheme_does_not_fit(dense):
    found = memory(Checkpoint(dense), 10, 1)
    options = {o.weights: o.weight_bytes for o in found.options}
    assert options["int4-g128-sym"] == options["bf16"]
    assert any(note.startswith("int4-g128-sym: 4 linears cannot have it") for note in found.notes)


def test_memory_marks_the_largest_cache_that_fits(tmp_path):
    # 2 layers x 2 heads x 2 x 16 values: 256 bytes a token in fp16; 8 GB hold 7.2e9 bytes
    checkpoint = Checkpoint(write(tmp_path / "m", dense_tensors()))
    for context, expected in ((28_000_000, "fp16"), (48_000_000, "int8"), (55_000_000, "fp8"), (80_000_000, "int4"),
                              (120_000_000, None)):  # fmt: skip
        option = memory(checkpoint, context, 1).options[0]
        assert option.fits["8 GB"] == expected, context
        assert option.fits["80 GB"] == "fp16"
    lines = plain_lines(memory_view(memory(checkpoint, 120_000_000, 1)))
    row = next(line for line in lines if line.startswith("this checkpoint") and "B" not in line)
    assert row.split()[-5:] == ["-", "int4", "int8", "fp16", "fp16"]


# --- against


def test_compare_matches_a_naive_computation(tmp_path, dense, packed):
    _, _, meant = pack(dense_tensors())
    tensors = dense_tensors()
    found = compare(Checkpoint(packed), Checkpoint(dense), quiet)
    assert {d.name for d in found.different} == {n for n in tensors if "q_proj" in n or "up_proj" in n}
    assert set(found.identical) == set(tensors) - {d.name for d in found.different}
    ratios = [d.sqnr_db for d in found.different]
    assert ratios == sorted(ratios)
    for d in found.different:
        base, error = tensors[d.name].double(), meant[d.name].double() - tensors[d.name].double()
        assert d.relative == pytest.approx((error.norm() / base.norm()).item(), rel=1e-12)
        assert d.sqnr_db == pytest.approx(20 * log10(base.norm() / error.norm()), rel=1e-12)
        assert d.mean_absolute == pytest.approx(error.abs().mean().item(), rel=1e-12)
        assert d.max_absolute == error.abs().max().item()
        assert d.stored_as == ("int4-g32-asym" if "q_proj" in d.name else "int8-channel-sym")
        assert d.base_stored_as == "BF16"
    back = compare(Checkpoint(dense), Checkpoint(packed), quiet)
    assert {d.name: d.max_absolute for d in back.different} == {d.name: d.max_absolute for d in found.different}


COMPARISON = """\
MODEL against BASE

1 of 2 tensors differs, worst first
tensor    stored as  base  SQNR dB  relative  mean error  max error
a.weight  F32        F32     20.00   10.000%       0.025        0.1

all compared tensors together: SQNR 26.02 dB, relative error 5.000%
identical: 1 of 2

not compared: 1 tensor of another shape
tensor    shape  base
c.weight  2 x 2     3

only in MODEL: 2 tensors
d.weight
... and 1 more

only in BASE: 1 tensor
f.weight
"""


def test_comparison_whole_output(tmp_path, capsys):
    ones = torch.zeros(2, 2)
    ones[0, 0] = 1.0
    more = ones.double().clone()
    more[0, 0] = 1.1
    three = torch.full((3,), 3.0**0.5 / 3**0.5)
    model = {"a.weight": more.float(), "b.weight": three, "c.weight": ones, "d.weight": ones, "e.weight": ones}
    base = {"a.weight": ones, "b.weight": three, "c.weight": three, "f.weight": ones}
    write(tmp_path / "model", {n: t.clone() for n, t in model.items()}, {})
    write(tmp_path / "base", {n: t.clone() for n, t in base.items()}, {})
    arguments = ["inspect", str(tmp_path / "model"), "--against", str(tmp_path / "base"), "--top", "1", "-q"]
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert out.replace(str(tmp_path / "model"), "MODEL").replace(str(tmp_path / "base"), "BASE") == COMPARISON
    assert err == ""
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["only_model"] == ["d.weight", "e.weight"]


def test_compare_of_a_base_of_zeros_comes_first(tmp_path):
    model = write(tmp_path / "m", {"a": torch.full((4,), 2.0), "b": torch.full((4,), 1.5)}, {})
    base = write(tmp_path / "b", {"a": torch.full((4,), 1.0), "b": torch.zeros(4)}, {})
    found = compare(Checkpoint(model), Checkpoint(base), quiet)
    assert [(d.name, d.sqnr_db, d.relative) for d in found.different] == [("b", None, None), ("a", 0.0, 1.0)]
    assert any(line.startswith("b") and " - " in line for line in plain_lines(comparison_view(found, 5)))


@pytest.mark.parametrize(("ours", "theirs"), [("embed", "both"), ("both", "head"), ("embed", "head"), ("head", "head")])
def test_compare_knows_tied_heads(tmp_path, ours, theirs):
    checkpoints = []
    for name, stored in (("ours", ours), ("theirs", theirs)):
        tensors = dense_tensors()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if stored != "both":
            del tensors["lm_head.weight" if stored == "embed" else "model.embed_tokens.weight"]
        config = {**CONFIG, "tie_word_embeddings": stored != "both"}
        checkpoints.append(Checkpoint(write(tmp_path / name, tensors, config)))
    found = compare(*checkpoints, quiet)
    assert (found.different, found.only_model, found.only_base) == ([], [], [])
    assert len(found.identical) == 6 + (2 if "both" in (ours, theirs) else 1)
    assert len(found.notes) == (0 if ours == theirs else 1)


def test_compare_of_strangers(tmp_path, dense):
    other = write(tmp_path / "other", {"w": torch.zeros(2)}, {})
    with pytest.raises(QtoolError, match="no tensor in common"):
        compare(Checkpoint(dense), Checkpoint(other), quiet)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32)), min_size=1, max_size=40),
       st.integers(1, 50), st.integers(-8, 8))  # fmt: skip
def test_error_sums_do_not_depend_on_chunks_or_scale(pairs, chunk, exponent):
    tensor, base = torch.tensor(pairs, dtype=torch.float32).T.contiguous()
    whole = error_sums(tensor, base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "CHUNK", chunk)
        parts = error_sums(tensor, base)
    assert (parts.count, parts.max_absolute) == (whole.count, whole.max_absolute)
    assert parts.error_squares == pytest.approx(whole.error_squares, rel=1e-12)
    assert parts.base_squares == pytest.approx(whole.base_squares, rel=1e-12)
    scaled = error_sums(tensor.double() * 2.0**exponent, base.double() * 2.0**exponent)
    for ours, theirs in ((scaled.relative, whole.relative), (scaled.sqnr_db, whole.sqnr_db)):
        assert ours == (None if theirs is None else pytest.approx(theirs, rel=1e-9, abs=1e-9))


# --- one tensor


def naive_quantile(values, share):
    """Linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def test_tensor_matches_a_naive_computation(tmp_path):
    weight = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    weight[2, 17], weight[4, 200] = 9.0, -30.0
    found = tensor_stats(Checkpoint(write(tmp_path / "m", {"w.weight": weight})), "w.weight")
    flat = weight.flatten().tolist()
    mean = sum(flat) / len(flat)
    std = (sum((x - mean) ** 2 for x in flat) / len(flat)) ** 0.5
    assert (found.minimum, found.maximum) == (-30.0, 9.0)
    assert (found.mean, found.std) == (pytest.approx(mean, rel=1e-9), pytest.approx(std, rel=1e-9))
    assert found.outlier_ratio == sum(abs(x - mean) > 6 * std for x in flat) / len(flat)
    for name, value in found.quantiles.items():
        assert value == pytest.approx(naive_quantile(flat, float(name.rstrip("%")) / 100), rel=1e-5)
    rows = [[abs(x) for x in row] for row in weight.tolist()]
    groups = [row[start : start + 128] for row in rows for start in (0, 128)]
    per_group = sorted(log2(naive_quantile(g, 0.99) / max(g)) for g in groups)
    median = (per_group[5] + per_group[6]) / 2
    for effective in found.effective_bits:
        typical = naive_quantile([abs(x) for x in flat], 0.99)
        assert effective.tensor == pytest.approx(effective.bits - 1 + log2(typical / 30), rel=1e-5)
        assert effective.group == pytest.approx(effective.bits - 1 + median, rel=1e-5)
        assert effective.group > effective.tensor
    output, inputs = found.channels["output"], found.channels["input"]
    assert (output.count, inputs.count) == (6, 300)
    assert output.extremes[:2] == [(4, 30.0), (2, 9.0)]
    assert inputs.extremes[:2] == [(200, 30.0), (17, 9.0)]
    largest = sorted(max(row) for row in rows)
    assert (output.minimum, output.maximum) == (pytest.approx(largest[0]), 30.0)
    assert output.median == pytest.approx((largest[2] + largest[3]) / 2)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 200), seed=st.integers(0, 99), power=st.sampled_from([1, 3, 9]))
def test_tensor_accounts_for_every_value(tmp_path_factory, rows, columns, seed, power):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** power
    found = tensor_stats(Checkpoint(write(tmp_path_factory.mktemp("t"), {"w.weight": weight})), "w.weight")
    histogram = found.histogram
    assert sum(histogram.counts) + histogram.below + histogram.above == weight.numel()
    assert all(e.tensor <= e.bits - 1 and (e.group is None or e.group <= e.bits - 1) for e in found.effective_bits)
    ordered = list(found.quantiles.values())
    assert ordered == sorted(ordered)
    assert max(len(line) for line in plain_lines(tensor_view(found))[1:]) <= 100


def test_tensor_effective_bits_worked_example(tmp_path):
    weight = torch.ones(4, 128)
    weight[0, 0] = 8.0  # one outlier, three bits above the rest: lost for all, but for one group only with groups
    found = tensor_stats(Checkpoint(write(tmp_path / "m", {"w.weight": weight})), "w.weight")
    assert [(e.bits, e.tensor, e.group) for e in found.effective_bits] == [(4, 0.0, 3.0), (8, 4.0, 7.0)]


def test_tensor_of_a_packed_weight_and_of_odd_shapes(tmp_path, packed):
    name = "model.layers.1.self_attn.q_proj.weight"
    found = tensor_stats(Checkpoint(packed), name)
    _, _, meant = pack(dense_tensors())
    assert (found.stored_as, found.bits_per_weight) == ("int4-g32-asym", 4.625)
    assert found.maximum == meant[name].max().item()
    odd = {"zeros": torch.zeros(3), "scalar": torch.tensor(2.5), "cube": torch.ones(2, 3, 4), "none": torch.zeros(0, 4)}
    checkpoint = Checkpoint(write(tmp_path / "odd", odd, {}))
    assert tensor_stats(checkpoint, "zeros").effective_bits == []
    assert tensor_stats(checkpoint, "scalar").channels == {}
    assert tensor_stats(checkpoint, "cube").channels["output"].count == 6
    for name in ("zeros", "scalar", "cube"):
        assert plain_lines(tensor_view(tensor_stats(checkpoint, name)))
    with pytest.raises(QtoolError, match="has no values"):
        tensor_stats(checkpoint, "none")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("model.layers.0.mlp.up_proj", "did you mean `model.layers.0.mlp.up_proj.weight`"),
        ("q_proj", "2 tensors have that in their names, such as `model.layers.0.self_attn.q_proj.weight`"),
        ("zzz", "names look like `"),
    ],
)
def test_tensor_names_the_nearest(dense, typed, hint):
    with pytest.raises(UsageError, match=f"unknown tensor `{typed}`") as caught:
        tensor_stats(Checkpoint(dense), typed)
    assert hint in caught.value.hint


@given(st.floats(0, 1), st.integers(1, 60))
def test_bars_are_as_long_as_their_share(share, width):
    drawn = bar(share, width)
    assert len(drawn) == ceil(ceil(share * width * 8) / 8)
    assert len(drawn) <= width
    assert (drawn == "") == (share == 0)


# --- the command


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--context", "9"], "--context means nothing without --memory", "add --memory"),
        (["--top", "9", "--memory"], "--top means nothing without --against", "add --against"),
        (["--memory", "--tensor", "a"], "--memory and --tensor are different views", "ask for one at a time"),
    ],
)
def test_wrong_usage(dense, capsys, arguments, message, hint):
    assert run(["inspect", str(dense), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {message}\n\nhint: {hint}\n")


@pytest.mark.parametrize("option", ["--context", "--batch"])
def test_counts_are_positive(dense, capsys, option):
    assert run(["inspect", str(dense), "--memory", option, "0"]) == 2
    assert f"Invalid value for '{option}'" in capsys.readouterr().err


def test_json_output_file_and_dry_run(packed, dense, tmp_path, capsys):
    output = tmp_path / "report.json"
    assert run(["inspect", str(packed), "--json", "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads(output.read_text())
    assert run(["inspect", str(packed), "-o", str(output)]) == 2
    assert "--force" in capsys.readouterr().err
    assert run(["inspect", str(packed), "--against", str(dense), "--dry-run", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["reads"] == "the values of every tensor"
    assert tree["base_files"] == [str(dense / "model.safetensors"), str(dense / "config.json")]
    assert run(["inspect", "org/name", "--dry-run"]) == 0
    assert "headers and config.json, fetched from the hub" in capsys.readouterr().out


def test_non_finite_values_name_the_tensor(tmp_path, capsys):
    folder = write(tmp_path / "m", {"w.weight": torch.tensor([[1.0, float("nan")]])})
    assert run(["inspect", str(folder), "--tensor", "w.weight"]) == 1
    assert "`w.weight` has 1 NaN or infinite values" in capsys.readouterr().err


# --- the hub


@pytest.fixture
def hub(monkeypatch, packed, dense):
    """A hub with two models, known by their headers."""
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError

    folders = {"org/dense": dense, "org/packed": packed}

    def get_safetensors_metadata(repo, revision=None):
        if repo not in folders:
            raise NotASafetensorsRepoError(repo)
        offset, tensors = 0, {}
        for info in Checkpoint(folders[repo]).tensors.values():
            offsets = (offset, offset := offset + info.size_bytes)
            tensors[info.name] = SimpleNamespace(dtype=info.dtype, shape=list(info.shape), data_offsets=offsets)
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, revision: str(folders[repo] / file))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision: ["pytorch_model.bin"])
    return folders


def test_hub_headers_give_the_same_overview(hub):
    here, there = overview(Checkpoint(hub["org/dense"])), overview(open_headers("org/dense@main"))
    assert there.model == "org/dense@main"
    assert {**here.to_tree(), "model": ""} == {**there.to_tree(), "model": ""}


def test_hub_headers_of_packed_weights(hub, tmp_path):
    with pytest.raises(QtoolError, match="org/packed is packed in a way whose shapes its headers do not tell"):
        overview(open_headers("org/packed"))
    tensors, config, _ = pack(dense_tensors(), {"self_attn.q_proj": "int4-g32-asym"})
    hub["org/groups"] = write(tmp_path / "groups", tensors, config)
    assert overview(open_headers("org/groups")).bits_per_weight == 4.625


def test_hub_without_safetensors(hub):
    with pytest.raises(UsageError, match=r"neither model\.safetensors"):
        open_headers("org/pickles")


def test_hub_offline(monkeypatch, tmp_path, dense, capsys):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    cached = {}

    def offline(*args, **kwargs):
        raise OfflineModeIsEnabled("offline")

    def snapshot_download(repo, local_files_only, **kwargs):
        assert local_files_only
        if repo not in cached:
            raise LocalEntryNotFoundError("not cached")
        return str(cached[repo])

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(["inspect", "org/dense"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: `org/dense` is no local folder and is not in the cache: HF_HUB_OFFLINE is set\n")
    cached["org/dense"] = dense
    assert open_headers("org/dense").root == Path(dense)
