"""What training after quantization takes off: methods alone, and with their finishes.

Prints for each: bits per weight, perplexity with the paired delta and its error, KL divergence, agreement, seconds,
seconds of CPU and peak memory. Every run is a process of its own.

    python tests/benchmarks/finishing.py [MODEL] [--calibration TEXT] [--evaluation TEXT] [--protocol rows]
        [--schemes w2a16,nvfp4] [--runs gptq,gptaq:block:scales] [--work FOLDER]

`--work` keeps outputs and figures, and what is there already is not made again.
"""

from __future__ import annotations

import sys

from schemes import Bench, arguments, bench_of, line

RUNS = ("gptq", "gptaq", "gptaq:block", "gptaq:block:scales")  # a method, and how its solution is trained


def finish_table(bench: Bench, schemes: list[str], runs: list[str]) -> None:
    print(f"{'scheme':16}{'by':24}{'bits':>7}{'ppl':>10}{'delta':>10}{'':10}{'KL, nats':>9}{'':10}{'top-1':>8}"
          f"{'work s':>8}{'cpu s':>8}{'MB':>8}")  # fmt: skip
    for scheme in schemes:
        for run in runs:
            method, *finishes = run.split(":")
            out = bench.work / "finish" / f"{scheme}_{run.replace(':', '_')}"
            command = [sys.executable, "-m", "qtool", "quantize", str(bench.model), "-o", str(out), "--json", "-q"]
            command += ["--scheme", scheme, "--method", method]
            command += [flag for finish in finishes for flag in ("--finish", finish)]
            command += ["--data", bench.calibration, "--rows", bench.rows, "--seqlen", bench.seqlen]
            print(line(f"{scheme:16}{run:24}", bench.figures(out, command), None), flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--schemes", default="w2a16,w3a16,nvfp4")
    parser.add_argument("--runs", default=",".join(RUNS))
    options = parser.parse_args()
    with bench_of(options) as bench:
        finish_table(bench, options.schemes.split(","), options.runs.split(","))


if __name__ == "__main__":
    main()
