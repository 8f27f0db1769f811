"""What every scheme loses under each transform and method, on any model, beside llm-compressor's figures.

Prints a table: bits per weight, perplexity with the paired delta and its error, KL divergence, agreement, wall seconds
of the work, CPU seconds of the whole process, peak memory. Every run and every evaluation is a process of its own. With
the Python of an environment that has llm-compressor 0.14, its recipe of the same steps runs on the same token rows, its
output is evaluated by the same command, and `to peer` is the perplexity less its, again paired. What failed says why.

    python tests/benchmarks/schemes.py [MODEL] [--peer-python PATH] [--only 'w4a16 .* gptq'] [--work FOLDER]

`--work` keeps outputs and figures, and what is there already is not measured again: remove what shall be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llama"
PEER = Path(__file__).with_name("peer.py")
# scheme -> what is done to the weights before; "-" is nothing
SCHEMES = {
    "w8a16-g128": ("-",),
    "w4a16": ("-", "awq", "rotation"),
    "w4a16-asym": ("-", "awq", "rotation"),
    "w3a16": ("-", "awq", "rotation"),
    "w2a16": ("-", "awq", "rotation"),
    "w8a8": ("-", "smoothquant"),
    "w8a8-static": ("-", "smoothquant"),
    "w4a8": ("-", "awq", "smoothquant"),
    "w4a4": ("-", "smoothquant", "rotation"),
    "w4afp8": ("-", "awq"),
    "fp8": ("-",),
    "fp8-dynamic": ("-",),
    "fp8-block": ("-",),
    "fp8-e5m2-channel": ("-",),
    "nvfp4a16": ("-", "awq", "rotation"),
    "nvfp4": ("-", "awq", "rotation"),
    "mxfp4a16": ("-", "awq", "rotation"),
    "mxfp4": ("-", "awq", "rotation"),
    "mxfp8a16": ("-",),
    "mxfp8": ("-",),
    "nf4": ("-", "awq"),
    "nf4-dq": ("-",),
    "llm-int8": ("-",),
    "int3-g64-sym+outliers-0.5%": ("-",),
}
# the preset of llm-compressor that is the same scheme, and its name for the same transform
PRESETS = {
    "w8a16-g128": "W8A16", "w4a16": "W4A16", "w4a16-asym": "W4A16_ASYM", "w3a16": "W3A16", "w2a16": "W2A16",
    "w8a8": "W8A8", "w4a8": "W4A8", "w4a4": "W4A4", "w4afp8": "W4AFP8",
    "fp8": "FP8", "fp8-dynamic": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK", "nvfp4a16": "NVFP4A16", "nvfp4": "NVFP4",
    "mxfp4a16": "MXFP4A16", "mxfp4": "MXFP4", "mxfp8a16": "MXFP8A16", "mxfp8": "MXFP8",
}  # fmt: skip
PEER_TRANSFORMS = {"-": "", "awq": "awq+", "smoothquant": "smoothquant+", "rotation": "spinquant+"}
EXPORT = """
import json, sys
from pathlib import Path
from qtool.calibration.tokens import Tokenizer, calibration_rows
from qtool.checkpoint.reader import Checkpoint
from qtool.recipe import DataSpec
model, out, source, rows, seqlen = sys.argv[1:]
config = Checkpoint(Path(model)).config
spec = DataSpec(source=source, rows=int(rows), seqlen=int(seqlen))
made = calibration_rows(spec, Tokenizer(Path(model), config["vocab_size"]), config["max_position_embeddings"])
Path(out).write_text(json.dumps([row.tolist() for row in made.rows]))
"""
Figures = dict[str, Any]


class RunError(Exception):
    """A process that ended badly, with its own words."""


@dataclass(frozen=True)
class Subject:
    """One model, its data and where to work."""

    model: Path
    work: Path
    calibration: str
    rows: str
    seqlen: str
    evaluation: str


@dataclass(frozen=True)
class Bench(Subject):
    """With the protocol of the evaluation, and the peer."""

    protocol: str
    peer_python: str | None

    def token_rows(self) -> Path:
        """The calibration rows as JSON: what `quantize` makes of the same options."""
        path = self.work / "rows.json"
        if not path.exists():
            arguments = [str(self.model), str(path), self.calibration, self.rows, self.seqlen]
            measured([sys.executable, "-c", EXPORT, *arguments], self.work / "rows.log")
        return path

    def ours(self, scheme: str, transform: str, method: str) -> Figures:
        out = self.work / "qtool" / f"{scheme}_{transform}_{method}"
        command = [sys.executable, "-m", "qtool", "quantize", str(self.model), "-o", str(out), "--json", "-q"]
        command += ["--scheme", scheme, "--method", method, *(("--transform", transform) if transform != "-" else ())]
        command += ["--data", self.calibration, "--rows", self.rows, "--seqlen", self.seqlen]
        return self.figures(out, command)

    def theirs(self, scheme: str, transform: str, method: str) -> Figures:
        assert self.peer_python
        recipe = f"{PEER_TRANSFORMS[transform]}{method}:{PRESETS[scheme]}"
        out = self.work / "peer" / recipe
        command = [self.peer_python, str(PEER), str(self.model), str(out), str(self.token_rows()), recipe]
        return self.figures(out, command)

    def figures(self, out: Path, command: list[str]) -> Figures:
        """Make OUT by a command that prints JSON with `wall_s`, and evaluate it."""

        def make() -> Figures:
            text, cpu_s, peak_bytes = measured(command, out.with_name(out.name + ".log"))
            report = json.loads(text[text.index("{") :])
            return {"wall_s": report["wall_s"], "cpu_s": cpu_s, "peak_memory_bytes": peak_bytes}

        out.parent.mkdir(parents=True, exist_ok=True)
        made = kept(out.with_name(out.name + ".run.json"), make)
        seen = kept(out.with_name(out.name + ".inspect.json"), lambda: qtool("inspect", str(out)))
        evaluation = self.evaluate(out, self.model, "eval")
        return {**evaluation, **made, "bits_per_weight": seen["bits_per_weight"]}  # the seconds of the making

    def evaluate(self, out: Path, baseline: Path, name: str) -> Figures:
        arguments = [str(out), "--baseline", str(baseline), "--data", self.evaluation, "--protocol", self.protocol]
        arguments += ["--seqlen", self.seqlen]
        return kept(out.with_name(f"{out.name}.{name}.json"), lambda: qtool("eval-ppl", *arguments))


def measured(command: list[str], log: Path) -> tuple[str, float, int]:
    """stdout, seconds of CPU and peak memory in bytes of a process; stderr goes to a log. Raises RunError."""
    with open(log, "wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout
        text = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("error:")] or lines[-1:] or ["no word"]
        raise RunError(f"exit {process.returncode}: {said[0]}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return text, usage.ru_utime + usage.ru_stime, peak


def qtool(*arguments: str) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        text, _, _ = measured([sys.executable, "-m", "qtool", *arguments, "--json", "-q"], Path(folder) / "log")
    figures: Figures = json.loads(text)
    return figures


def kept(path: Path, make: Callable[[], Figures]) -> Figures:
    """The figures in a file, made and written when it is not there."""
    if not path.exists():
        path.write_text(json.dumps(make()))
    figures: Figures = json.loads(path.read_text())
    return figures


def line(label: str, figures: Figures, versus: Figures | None) -> str:
    comparison = figures["comparison"]
    delta, kl = comparison["delta"], comparison["kl"]
    text = (
        f"{label}{figures['bits_per_weight']:7.3f}{figures['perplexity']['value']:10.3f}"
        f"{delta['value']:+10.3f} ± {delta['standard_error']:<7.3f}"
        f"{kl['value']:9.5f} ± {kl['standard_error']:.5f}"
        f"{100 * comparison['top1_agreement']['value']:7.1f}%{figures['wall_s']:8.1f}{figures['cpu_s']:8.1f}"
        f"{figures['peak_memory_bytes'] / 1e6:8.0f}"
    )
    if versus is None:
        return text
    difference = versus["comparison"]["delta"]
    return text + f"{difference['value']:+10.3f} ± {difference['standard_error']:.3f}"


def run_case(bench: Bench, scheme: str, transform: str, method: str) -> None:
    """Print the lines of one case: the peer's, where it has such a recipe, and ours beside it."""
    peer = ours = None
    label = f"{scheme:27}{transform:13}{method:6}"
    if bench.peer_python and scheme in PRESETS:
        try:
            peer = bench.theirs(scheme, transform, method)
            print(line(label + "peer   ", peer, None), flush=True)
        except RunError as error:
            print(f"{label}peer   {error}", flush=True)
    try:
        ours = bench.ours(scheme, transform, method)
        versus = None
        if peer:
            out = bench.work / "qtool" / f"{scheme}_{transform}_{method}"
            versus = bench.evaluate(out, Path(peer["model"]), "versus")
        print(line(label + "qtool  ", ours, versus), flush=True)
    except RunError as error:
        print(f"{label}qtool  {error}", flush=True)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark of whole runs takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=EXAMPLE)
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--evaluation", default="python-docs")
    parser.add_argument("--protocol", default="windows")
    parser.add_argument("--rows", default="128")
    parser.add_argument("--seqlen", default="512")
    parser.add_argument("--work", type=Path, help="where outputs and figures are kept; default a temporary folder")
    return parser


@contextmanager
def bench_of(options: argparse.Namespace, peer_python: str | None = None) -> Iterator[Bench]:
    """The subject that was asked for, and its folder."""
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        yield Bench(
            options.model, work, options.calibration, options.rows, options.seqlen, options.evaluation,
            options.protocol, peer_python,
        )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--methods", default="rtn,gptq")
    parser.add_argument("--only", default="", help="a regular expression that `SCHEME TRANSFORM METHOD` must hold")
    parser.add_argument("--peer-python", help="a Python with llm-compressor 0.14")
    options = parser.parse_args()
    with bench_of(options, options.peer_python) as bench:
        print(f"{'scheme':27}{'transform':13}{'method':6}{'by':7}{'bits':>7}{'ppl':>10}{'delta':>10}{'':10}"
              f"{'KL, nats':>9}{'':10}{'top-1':>8}{'work s':>8}{'cpu s':>8}{'MB':>8}{'to peer':>10}")  # fmt: skip
        for scheme, transforms in SCHEMES.items():
            for transform in transforms:
                for method in options.methods.split(","):
                    if re.search(options.only, f"{scheme} {transform} {method}"):
                        run_case(bench, scheme, transform, method)


if __name__ == "__main__":
    main()
