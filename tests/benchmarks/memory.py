"""Memory and speed on a checkpoint of a billion random weights: what is bounded by one block, and by what.

Prints a table: peak memory of `quantize` by rtn and by gptq beside what one block, its statistics and the
hidden states take; seconds per billion parameters; the share of the time that is matrix products. A mix of
llama.cpp's has embedding and head in blocks, too: they are rounded a few rows at a time, and packed as a whole.

    python tests/benchmarks/memory.py [--layers 11] [--rows 128] [--vocabulary 128256] [--folder DIR]
                                      [--scheme int4-g128-sym --scheme q4_k_m]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from math import prod
from pathlib import Path

HIDDEN, MLP, HEADS, KV_HEADS = 2048, 5632, 32, 4
SEQLEN = 512
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llama"
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv", "aten::_scaled_dot_product")


def make_checkpoint(folder: Path, layers: int, vocabulary: int = 32000) -> int:
    """Random bfloat16 weights in one shard per block, with the example model's tokenizer; the parameter count."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_hidden_layers": layers,
        "vocab_size": vocabulary, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    kv = HIDDEN // HEADS * KV_HEADS
    block = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    outside = {"model.embed_tokens": (vocabulary, HIDDEN), "lm_head": (vocabulary, HIDDEN), "model.norm": (HIDDEN,)}
    shards = [outside, *({f"model.layers.{i}.{name}": s for name, s in block.items()} for i in range(layers))]
    generator = torch.Generator().manual_seed(0)
    weight_map, count = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in shard.items():
            values = torch.randn(shape, generator=generator) * 0.02 if len(shape) == 2 else torch.ones(shape)
            tensors[f"{name}.weight"] = values.bfloat16()
            weight_map[f"{name}.weight"] = file
            count += values.numel()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return count


def measured(arguments: list[str]) -> tuple[float, dict]:
    """Wall seconds and report of a `qtool` command in a process of its own."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "qtool", *arguments, "--json"], stdout=subprocess.PIPE, check=True)
    return time.perf_counter() - started, json.loads(done.stdout)


def base_bytes(rows: int) -> int:
    """Peak memory of a process that imports what every run with data does, and makes the same token rows."""
    code = f"""
import torch, transformers
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from qtool.calibration.tokens import Tokenizer, calibration_rows
from qtool.recipe import DataSpec
from qtool.report.model import peak_memory_bytes
calibration_rows(DataSpec(rows={rows}, seqlen={SEQLEN}), Tokenizer(Path({str(EXAMPLE)!r}), 2048), {SEQLEN})
print(peak_memory_bytes())
"""
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)


def matrix_share(model: Path, folder: Path, rows: int) -> dict[str, float]:
    """Share of the CPU time of rtn and of gptq that is matrix products, by torch's profiler, on a small model."""
    from torch.profiler import ProfilerActivity, profile

    from qtool.job import prepare
    from qtool.methods import METHODS
    from qtool.pipeline import RunOptions, quantize
    from qtool.recipe import build

    shares = {}
    for method in ("rtn", "gptq"):
        recipe = build({"method": method, "data": {"rows": rows, "seqlen": SEQLEN}}, METHODS)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            started = time.perf_counter()
            quantize(prepare(str(model), recipe), folder / method, RunOptions("cpu"), lambda *_: None)
            wall_s = time.perf_counter() - started
        products = sum(e.self_cpu_time_total for e in profiler.key_averages() if e.key.startswith(MATRIX_PRODUCTS))
        shares[method] = products / 1e6 / wall_s
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=128256, help="large, so that few blocks make a billion")
    parser.add_argument("--scheme", action="append", help="default int4-g128-sym; several may be given")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        parameters = make_checkpoint(folder / "model", options.layers, options.vocabulary)
        base = base_bytes(options.rows)
        kv = HIDDEN // HEADS * KV_HEADS
        block = 4 * (2 * HIDDEN * HIDDEN + 2 * kv * HIDDEN + 3 * MLP * HIDDEN)
        statistics = 4 * (3 * HIDDEN**2 + MLP**2)
        hidden = 4 * options.rows * SEQLEN * HIDDEN
        bound = block + statistics + hidden
        print(f"{parameters / 1e9:.2f}B random weights, {options.layers} blocks; {options.rows} rows of {SEQLEN}")
        print(f"one block {block / 1e6:.0f} MB + statistics {statistics / 1e6:.0f} + hidden states {hidden / 1e6:.0f}")
        print(f"a process with torch, transformers and the token rows takes {base / 1e6:.0f} MB")
        data = ["--rows", str(options.rows), "--seqlen", str(SEQLEN)]
        schemes = options.scheme or ["int4-g128-sym"]
        for scheme, method in product(schemes, ("rtn", "gptq")):
            out = folder / f"{scheme}-{method}"
            command = ["quantize", str(folder / "model"), "-o", str(out), "--scheme", scheme, "--method", method, "-q"]
            wall_s, report = measured(command + (data if method == "gptq" else []))
            peak = report["peak_memory_bytes"]
            largest = max(prod(layer["shape"]) * layer["bits_per_weight"] / 8 for layer in report["layers"])
            print(f"{scheme} by {method}: {wall_s:.0f} s, {wall_s / parameters * 1e9:.0f} s per billion parameters, "
                  f"peak {peak / 1e6:.0f} MB, largest packed weight {largest / 1e6:.0f} MB", end="")  # fmt: skip
            if method == "gptq":
                print(f", beyond that process {(peak - base) / bound:.2f} times the sum above", end="")
            stages = sorted(report["stages_s"].items(), key=lambda item: -item[1])
            print("; " + ", ".join(f"{name} {s:.0f} s" for name, s in stages), flush=True)
            shutil.rmtree(out)
        make_checkpoint(folder / "small", 1)
        for method, share in matrix_share(folder / "small", folder, min(options.rows, 16)).items():
            print(f"{method}: {100 * share:.0f} % of the time is matrix products (profile of one block)")


if __name__ == "__main__":
    main()
