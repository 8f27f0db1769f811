"""The page of a `calibrate` run: where the outliers are, and what rounding the inputs would cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import mean
from typing import Any

from qtool.report.table import Table, View, seconds, size

Tree = Mapping[str, Any]
WORST = 10  # inputs that are shown
HURTS = {"int8": 0.02, "int4": 0.33}  # relative error of an input: twice that of normally distributed ones


def calibration_view(tree: Tree) -> View:
    """The inputs with the largest outliers, a summary by kind, and the facts of the run."""
    return [_worst(tree["inputs"]), _kinds(tree["inputs"]), _facts(tree)]


def _worst(inputs: list[Tree]) -> Table:
    worst = sorted(inputs, key=lambda x: -x["outlier_ratio"])[:WORST]
    rows = [
        (
            x["input"],
            f"{x['outlier_ratio']:.1f}",
            f"{x['absmax']:.4g}",
            f"{x['large_channels']}/{x['channels']}",
            str(x["dead_channels"]),
            _percent(x["token_error"]["int8"]),
            _percent(x["token_error"]["int4"]),
        )
        for x in worst
    ]
    columns = ("input of", ">max/mean", ">max", ">|x|>=6", ">dead", ">8 bits", ">4 bits")
    return Table(columns, rows, title=f"largest outliers ({len(rows)} of {len(inputs)} inputs; --json has all)")


def _kinds(inputs: list[Tree]) -> Table:
    kinds: dict[str, list[Tree]] = defaultdict(list)
    for x in inputs:
        kinds[x["kind"]].append(x)
    rows = [
        (
            kind,
            str(len(members)),
            f"{mean(x['outlier_ratio'] for x in members):.1f}",
            f"{max(x['outlier_ratio'] for x in members):.1f}",
            str(sum(x["large_channels"] for x in members)),
            str(sum(x["dead_channels"] for x in members)),
            _percent(mean(x["token_error"]["int8"] for x in members)),
            _percent(mean(x["token_error"]["int4"] for x in members)),
        )
        for kind, members in kinds.items()
    ]
    columns = ("inputs of", ">n", ">max/mean", ">worst", ">|x|>=6", ">dead", ">8 bits", ">4 bits")
    return Table(columns, rows, title="by kind: means, and sums of channels")


def _facts(tree: Tree) -> Table:
    facts = [
        ("model", f"{tree['model']} ({tree['architecture']})"),
        ("output", f"{tree['output']}, {size(tree['size_bytes'])}" + (", with second moments" * tree["hessians"])),
        *(("data", _data(record)) for record in tree["data"]),
        ("enough data", "yes" if not tree["too_little_data"] else f"no: {tree['too_little_data']}"),
    ]
    for bits, limit in HURTS.items():
        hurt = sum(x["token_error"][bits] > limit for x in tree["inputs"])
        facts.append(
            (f"{bits} per token", f"{hurt} of {len(tree['inputs'])} inputs would lose more than {100 * limit:.0f} %")
        )
    facts += [("time", seconds(tree["wall_s"])), ("peak memory", size(tree["peak_memory_bytes"]))]
    return Table(("", ""), facts + [("note", note) for note in tree["notes"] if note != tree["too_little_data"]])


def _data(record: Tree) -> str:
    return f"{record['source']}, {record['rows']} rows, {record['tokens']} tokens (sha256 {record['sha256'][:12]})"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
