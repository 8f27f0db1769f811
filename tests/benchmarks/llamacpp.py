"""Our GGUF types beside llama.cpp's own quantizer: the same model, the same importance of inputs, the same types.

Prints two tables. `error`: what rounding does to each matrix of a model, sum_j importance_j (w - w^)^2, of ours over
llama.cpp's, with that importance and without, and seconds per million weights. `mixes`: bytes, seconds, perplexity with
its paired delta and its error, and KL divergence of whole files, both read by `qtool eval-ppl`; what methods that
llama.cpp has not take off. Needs llama-cpp-python; the peers are its ggml_quantize_chunk and llama_model_quantize.

    python tests/benchmarks/llamacpp.py [MODEL] [--quick] [--only error,mixes] [--mixes q4_k_m,q3_k_s] [--work FOLDER]

A name with `+` at its end is a pure type: every matrix of a block has it, the output Q6_K. A method with finishes is
named `gptq:block`. `--work` keeps files and figures, and what is there already is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from schemes import EXAMPLE, Figures, Subject, kept, qtool

from qtool.calibration.imatrix_file import ImatrixStats
from qtool.checkpoint.reader import Checkpoint
from qtool.formats.weights import Weights
from qtool.gguf.model import GGUFModel
from qtool.mixes import MIXES
from qtool.numerics.grid import grid_of
from qtool.scheme import BLOCK_TYPES, QuantScheme

TYPES = (*BLOCK_TYPES, "mxfp4")
MIXED = "q2_k,q3_k_s,q3_k_m,q3_k_l,q4_k_s,q4_k_m,q5_k_m,q6_k,q4_0,iq4_xs,q2_k+,q3_k+,q4_k+"
QUICK = "q2_k,q3_k_m,q4_k_m,q3_k+,q4_k+"
PURE = {"q2_k+": "q2_k", "q3_k+": "q3_k_s", "q4_k+": "q4_k_s", "q5_k+": "q5_k_s", "iq4_xs+": "iq4_xs"}  # the mix beside


class LlamaCpp:
    """llama.cpp's quantizers, by ctypes."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        folder = Path(llama_cpp.__file__).parent / "lib"
        self.ggml = ctypes.CDLL(next(str(path) for path in folder.iterdir() if path.name.startswith("libggml-base.")))
        self.ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.ggml.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_void_p,
        ]  # fmt: skip
        llama_cpp.llama_log_set(no_log, None)

    def rounded(self, weight_OI: torch.Tensor, kind: str, importance_I: torch.Tensor | None) -> torch.Tensor:
        """A weight as it is read after llama.cpp has quantized it."""
        type_ = gguf.GGMLQuantizationType[kind.upper()]
        weight = np.ascontiguousarray(weight_OI.numpy(), dtype=np.float32)
        importance = None if importance_I is None else np.ascontiguousarray(importance_I.numpy(), dtype=np.float32)
        rows, columns = weight.shape
        raw = np.zeros((rows, gguf.quant_shape_to_byte_shape((columns,), type_)[0]), dtype=np.uint8)
        pointer = None if importance is None else importance.ctypes.data
        self.ggml.ggml_quantize_chunk(type_, weight.ctypes.data, raw.ctypes.data, 0, rows, columns, pointer)
        return torch.from_numpy(gguf.quants.dequantize(raw, type_))

    def quantize(self, source: Path, out: Path, mix: str, importance: dict[str, np.ndarray]) -> float:
        """What `llama-quantize --imatrix` does; the seconds."""
        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread, params.ftype = self.threads, MIXES[PURE.get(mix, mix)].file_type
        if mix in PURE:
            params.pure, params.output_tensor_type = True, gguf.GGMLQuantizationType.Q6_K
            params.token_embedding_type = gguf.GGMLQuantizationType.Q6_K
        entry, pointer = llama_cpp.llama_model_imatrix_data, ctypes.POINTER(ctypes.c_float)
        entries = [entry(name.encode(), x.ctypes.data_as(pointer), len(x)) for name, x in importance.items()]
        params.imatrix = (entry * (len(entries) + 1))(*entries)  # an entry without a name ends the list
        started = time.perf_counter()
        if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
            raise SystemExit(f"llama_model_quantize cannot make {mix} of {source}")
        return time.perf_counter() - started


@llama_cpp.llama_log_callback
def no_log(*_: object) -> None:
    """llama.cpp's log."""


@dataclass(frozen=True)
class Bench(Subject):
    """With how much is evaluated, and the peer."""

    evaluation_rows: str | None
    peer: LlamaCpp

    @cached_property
    def imatrix(self) -> Path:
        path = self.work / "imatrix.gguf"
        qtool("calibrate", str(self.model), "--format", "imatrix", "-o", str(path), *self.data)
        return path

    @property
    def data(self) -> list[str]:
        return ["--data", self.calibration, "--rows", self.rows, "--seqlen", self.seqlen]

    @cached_property
    def float32(self) -> Path:
        """The model as a GGUF file, which llama.cpp's quantizer starts from."""
        return self.made("float", "f32", ["--method", "rtn"])[0]

    def matrices(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name, weight [O, I] and importance [I] of every linear of the blocks."""
        weights = Weights(Checkpoint(self.model))
        stats = ImatrixStats(self.imatrix, weights.checkpoint.config)
        model = GGUFModel.of_config(weights.checkpoint.config)
        for name, shape in weights.shapes.items():
            if len(shape) == 2 and str(model.gguf_name(name)).startswith("blk."):
                squares = stats.stats(name.removesuffix(".weight"), ()).square_I
                yield name, weights.read([name])[name], squares

    def made(self, label: str, mix: str, arguments: list[str]) -> tuple[Path, Figures]:
        """A file of ours, and its report."""
        out = self.work / f"{mix}-{label}"
        layers = ["--layer", f"*={mix[:-1]}", "--layer", "*embed*=q6_k"] if mix in PURE else []
        command = ["quantize", str(self.model), "-o", str(out), "--format", "gguf", "--scheme", PURE.get(mix, mix)]
        report = kept(self.work / f"{out.name}.json", lambda: qtool(*command, *layers, *arguments, "--force"))
        return out / "model.gguf", report

    def theirs(self, mix: str) -> tuple[Path, Figures]:
        """A file of llama.cpp's."""
        out = self.work / f"{mix}-llama.cpp.gguf"

        def make() -> Figures:
            reader = gguf.GGUFReader(self.imatrix)
            tensors = {tensor.name: tensor.data for tensor in reader.tensors}
            names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
            values = {n: (tensors[f"{n}.in_sum2"] / tensors[f"{n}.counts"]).astype(np.float32).ravel() for n in names}
            return {"wall_s": self.peer.quantize(self.float32, out, mix, values)}

        return out, kept(self.work / f"{mix}-llama.cpp.json", make)

    def evaluated(self, path: Path, name: str) -> Figures:
        rows = ["--rows", self.evaluation_rows] if self.evaluation_rows else []
        command = ["eval-ppl", str(path), "--baseline", str(self.model), "--data", self.evaluation, *rows]
        return kept(self.work / f"{name}.eval.json", lambda: qtool(*command, "--seqlen", self.seqlen))


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def error_table(bench: Bench, kinds: list[str]) -> None:
    """Ratios of errors, ours over llama.cpp's, of each type over all matrices."""
    matrices = list(bench.matrices())
    count = sum(weight.numel() for _, weight, _ in matrices)
    print(f"weighted error, ours over llama.cpp's, of {len(matrices)} matrices with {count / 1e6:.1f}M weights")
    print(f"{'type':8}{'bits':>7}{'with importance':>17}{'worst':>8}  {'':34}{'without':>8}{'worst':>8}"
          f"{'ours s/M':>10}{'theirs':>8}")  # fmt: skip
    for kind in kinds:
        scheme = QuantScheme.parse("mxfp4a16" if kind == "mxfp4" else kind)
        grid, seconds = grid_of(scheme, torch.float16), [0.0, 0.0]
        ratios: list[dict[str, float]] = [{}, {}]
        for name, weight_OI, importance_I in matrices:
            if scheme.shape_error(tuple(weight_OI.shape)):
                continue
            for found, given_I in zip(ratios, (importance_I, None), strict=True):
                started = time.perf_counter()
                ours = grid.nearest(weight_OI, grid.fit(weight_OI, given_I)).dequantize()
                seconds[0] += time.perf_counter() - started
                started = time.perf_counter()
                theirs = bench.peer.rounded(weight_OI, kind, given_I)
                seconds[1] += time.perf_counter() - started
                of_I = torch.ones(weight_OI.shape[1]) if given_I is None else given_I
                errors = [float(((weight_OI - x).double().square() * of_I).sum()) for x in (ours, theirs)]
                found[name] = errors[0] / errors[1]
        if not ratios[0]:
            print(f"{kind:8} divides no matrix of this model")
            continue
        worst = max(ratios[0], key=lambda name: ratios[0][name])
        bits = scheme.bits_per_weight((1, 256))
        means = [geometric_mean([*found.values()]) for found in ratios]
        print(f"{kind:8}{bits:7.3f}{means[0]:17.4f}{ratios[0][worst]:8.4f}  {worst[-34:]:34}"
              f"{means[1]:8.4f}{max(ratios[1].values()):8.4f}"
              f"{seconds[0] / count * 5e5:10.2f}{seconds[1] / count * 5e5:8.2f}", flush=True)  # fmt: skip


def file_error(bench: Bench, path: Path, other: Path) -> float:
    """The weighted error of one file's matrices over another's, geometric mean."""
    from qtool.gguf.checkpoint import open_checkpoint

    readers = [Weights(open_checkpoint(x)) for x in (path, other)]
    ratios = []
    for name, weight_OI, importance_I in bench.matrices():
        errors = [float(((weight_OI - x.read([name])[name]).square() * importance_I).sum()) for x in readers]
        ratios.append(errors[0] / errors[1])
    return geometric_mean(ratios)


def line(mix: str, label: str, figures: Figures, peer: Figures | None, wall_s: float, path: Path, error: float) -> str:
    delta, kl = (figures["comparison"][key] for key in ("delta", "kl"))
    text = (
        f"{mix:9}{label:14}{path.stat().st_size / 1e6:8.3f}{figures['perplexity']['value']:10.3f}"
        f"{delta['value']:+9.4f} ± {delta['standard_error']:<7.4f}{kl['value']:10.6f} ± {kl['standard_error']:<9.6f}"
        f"{wall_s:8.1f}{error:8.3f}"
    )
    if peer is None:
        return text
    ratios = [figures["comparison"][key]["value"] / peer["comparison"][key]["value"] for key in ("delta", "kl")]
    return text + f"{ratios[0]:9.3f}{ratios[1]:9.3f}"


def mixes_table(bench: Bench, mixes: list[str], methods: list[str]) -> None:
    """Whole files: llama.cpp's, and ours by each method."""
    print(f"whole files; perplexity on {bench.evaluation}, calibrated on {bench.rows} rows of {bench.seqlen} tokens of "
          f"{bench.calibration}")  # fmt: skip
    print(f"{'mix':9}{'by':14}{'MB':>8}{'ppl':>10}{'delta':>9}{'':10}{'KL, nats':>10}{'':12}{'seconds':>8}{'error':>8}"
          f"{'delta /':>9}{'KL / theirs':>12}")  # fmt: skip
    for mix in mixes:
        path, made = bench.theirs(mix)
        theirs = bench.evaluated(path, f"{mix}-llama.cpp")
        print(line(mix, "llama.cpp", theirs, None, made["wall_s"], path, 1.0), flush=True)
        for method in methods:
            data = ["--stats", str(bench.imatrix)] if method == "rtn" else bench.data
            name, *finishes = method.split(":")
            flags = [flag for finish in finishes for flag in ("--finish", finish)]
            ours, report = bench.made(method, mix, ["--method", name, *flags, *data])
            if types_of(ours) != types_of(path):
                differing = {n: (k, types_of(path)[n]) for n, k in types_of(ours).items() if types_of(path)[n] != k}
                print(f"{mix}: not the same types: {json.dumps(differing)[:200]}", file=sys.stderr)
            figures = bench.evaluated(ours, f"{mix}-{method}")
            error = file_error(bench, ours, path)
            print(line(mix, f"qtool {method}", figures, theirs, report["wall_s"], ours, error), flush=True)
    comparison = theirs["comparison"]
    print(f"float: perplexity {comparison['perplexity']['value']:.3f} on {theirs['tokens']} tokens; "
          f"data sha256 {theirs['data_sha256'][:12]}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=EXAMPLE)
    parser.add_argument("--only", default="error,mixes", help="error, mixes or both")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--mixes", help=f"default {MIXED}")
    parser.add_argument("--methods", default="rtn,gptq,gptaq")
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--evaluation", default="python-docs")
    parser.add_argument("--rows", default="128", help="of calibration")
    parser.add_argument("--seqlen", default="512")
    parser.add_argument("--evaluation-rows", help="default all")
    parser.add_argument("--quick", action="store_true", help="fewer mixes and rows: about ten minutes on two cores")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where files and figures are kept; default a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        evaluation_rows = options.evaluation_rows or ("100" if options.quick else None)
        bench = Bench(
            options.model, work, options.calibration, options.rows, options.seqlen, options.evaluation,
            evaluation_rows, LlamaCpp(options.threads),
        )  # fmt: skip
        if "error" in options.only:
            error_table(bench, options.types.split(","))
        if "mixes" in options.only:
            mixes = options.mixes or (QUICK if options.quick else MIXED)
            mixes_table(bench, mixes.split(","), options.methods.split(","))


if __name__ == "__main__":
    main()
