"""What distillation wins back of a smaller student's perplexity, beside cross entropy alone at equal steps.

Each student is cut out of the example model, or one of your own, trained on the same rows in the same order, and
measured on other text. Every run is a process of its own.

    python tests/benchmarks/distill.py [MODEL] [--data TEXT] [--evaluation TEXT] [--steps 200]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llama"
STUDENTS = {
    "half the layers": ("--layers", "2"),
    "half the MLP": ("--mlp", "384"),
    "three quarters of all widths": ("--hidden", "192", "--heads", "6", "--mlp", "576"),
}
LOSSES = {"KL": ("--alpha", "1"), "KL and CE": ("--alpha", "0.5"), "CE alone": ("--alpha", "0")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(EXAMPLE))
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--evaluation", default="python-docs")
    parser.add_argument("--steps", default="200")
    parser.add_argument("--lr", default="1e-3")
    options = parser.parse_args()
    header = f"{'student':30}{'loss':11}{'before':>9}{'after':>9}{'recovered':>11}"
    print(header + f"{'KL, nats':>10}{'same top':>10}{'train s':>9}")
    for student, cut in STUDENTS.items():
        for loss, alpha in LOSSES.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable,
                    "-m",
                    "qtool",
                    "distill",
                    options.model,
                    "-o",
                    f"{folder}/out",
                    "--json",
                    "-q",
                ]
                command += [*cut, *alpha, "--data", options.data, "--rows", "1024", "--seqlen", "256"]
                command += ["--steps", options.steps, "--lr", options.lr, "--eval", options.evaluation]
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
            report = json.loads(done.stdout)
            after = report["evaluation"]["after"]
            comparison = after["comparison"]
            teacher = comparison["perplexity"]["value"]
            first, last = (report["evaluation"][who]["perplexity"]["value"] for who in ("before", "after"))
            print(
                f"{student:30}{loss:11}{first:9.2f}{last:9.2f}{100 * (first - last) / (first - teacher):10.1f}%"
                f"{comparison['kl']['value']:10.4f}{100 * comparison['top1_agreement']['value']:9.1f}%"
                f"{report['stages_s']['train']:9.1f}",
                flush=True,
            )
    print(f"teacher: perplexity {teacher:.2f} on {after['tokens']} tokens of {options.evaluation}; "
          f"data sha256 {after['data_sha256'][:12]}")  # fmt: skip


if __name__ == "__main__":
    main()
