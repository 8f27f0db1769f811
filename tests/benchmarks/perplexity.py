"""What each method loses at each width, on the example model or on one of your own.

Prints a table: bits per weight, perplexity with the paired delta and its error, KL divergence, agreement,
seconds and peak memory of each run. Every run is a process of its own.

    python tests/benchmarks/perplexity.py [MODEL] [--calibration TEXT] [--evaluation TEXT] [--protocol rows]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llama"
RUNS = [
    (scheme, method, extra)
    for scheme in ("int8-channel-sym", "int4-g128-sym", "int4-g128-asym", "int3-g128-sym", "int2-g128-sym")
    for method, extra in (
        ("rtn", ("--set", "rtn.scales=minmax")),
        ("rtn", ()),
        ("gptq", ()),
        ("gptaq", ()),
    )
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(EXAMPLE))
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--evaluation", default="python-docs")
    parser.add_argument("--protocol", default="windows")
    parser.add_argument("--rows", default="128")
    parser.add_argument("--seqlen", default="512")
    options = parser.parse_args()
    header = f"{'scheme':17}{'method':12}{'bits/weight':>12}{'perplexity':>12}{'delta':>20}{'KL, nats':>22}"
    print(header + f"{'same top':>10}{'solve s':>9}{'peak MB':>9}")
    for scheme, method, extra in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "qtool", "quantize", options.model, "-o", f"{folder}/out", "--json", "-q"]
            command += ["--scheme", scheme, "--method", method, *extra, "--protocol", options.protocol]
            command += ["--data", options.calibration, "--rows", options.rows, "--seqlen", options.seqlen]
            command += ["--eval", options.evaluation, "--set", f"eval.data.seqlen={options.seqlen}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        report = json.loads(done.stdout)
        evaluation, comparison = report["evaluation"], report["evaluation"]["comparison"]
        delta, kl = comparison["delta"], comparison["kl"]
        quantizing_s = report["wall_s"] - report["stages_s"]["evaluate"]
        label = method + (" minmax" if extra else "")
        print(
            f"{scheme:17}{label:12}{report['bits_per_weight']:12.3f}{evaluation['perplexity']['value']:12.3f}"
            f"{delta['value']:+12.3f} ± {delta['standard_error']:.3f}"
            f"{kl['value']:13.5f} ± {kl['standard_error']:.5f}"
            f"{100 * comparison['top1_agreement']['value']:9.1f}%"
            f"{quantizing_s:9.1f}{report['peak_memory_bytes'] / 1e6:9.0f}",
            flush=True,
        )
    print(f"float: perplexity {comparison['perplexity']['value']:.3f} on {evaluation['tokens']} tokens of "
          f"{options.evaluation} ({options.protocol}); data sha256 {evaluation['data_sha256'][:12]}")  # fmt: skip


if __name__ == "__main__":
    main()
