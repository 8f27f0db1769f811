"""Pages of a report for people. A view takes the tree that `--json` prints, and adds nothing to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import mean
from typing import Any

from qtool.finishing import BLOCK
from qtool.headers import kind_of
from qtool.recipe import NO_METHOD
from qtool.report.model import LayerRecord, Report
from qtool.report.table import Table, View, seconds, size

Tree = Mapping[str, Any]


def report_view(report: Report) -> View:
    """The verdict of a `quantize` run: layers by kind, what was left alone, what it cost."""
    view: View = [_layers(report.layers), _left_alone(report)]
    view.append(_verdict(report))
    view += [gate_line(gate) for gate in report.gates]
    return view


def plan_view(plan: Tree) -> View:
    """What `--dry-run` shows."""
    rows = [(x["kind"], x["scheme"], str(x["layers"]), f"{x['bits_per_weight']:.3f}") for x in plan["layers"]]
    left = [(x["reason"], str(x["tensors"]), size(x["size_bytes"])) for x in plan["left_alone"]]
    facts = [
        ("model", f"{plan['model']} ({plan['architecture']})"),
        ("method", " + ".join([*plan["transforms"], plan["method"], *plan["finish"]])),
        ("format", f"{plan['format']}: {plan['readers']}"),
        *([("KV cache", f"{plan['kv']}, with calibrated scales")] if plan["kv"] else []),
        *([("calibration", plan["data"])] if plan["data"] else []),
        ("size", f"{size(plan['bytes_before'])} -> {size(plan['bytes_after'])}"),
        *([("bits per weight", f"{plan['bits_per_weight']:.3f}")] if plan["layers"] else []),
        ("memory", f"about {size(plan['expected_memory_bytes'])}"),
        ("time", f"about {seconds(plan['expected_wall_s'])} on two CPU cores"),
        *(("note", note) for note in plan["notes"]),
    ]
    return [
        Table(("quantized", "scheme", ">layers", ">bits/weight"), rows),
        Table(("left alone", ">tensors", ">size"), left),
        Table(("", ""), facts),
    ]


def evaluation_view(tree: Tree) -> View:
    """Perplexity alone, or beside a baseline with what changed and where."""
    facts = [
        ("data", f"{tree['data']}, {tree['tokens']} tokens in {tree['rows']} rows (sha256 {tree['data_sha256'][:12]})"),
        ("protocol", f"{tree['protocol']}, context {tree['context']}" + _stride(tree)),
        ("tokenizer", tree["tokenizer"]),
        ("perplexity", estimate(tree["perplexity"])),
        ("bits per byte", f"{tree['bits_per_byte']:.4f}"),
    ]
    comparison = tree["comparison"]
    if comparison:
        facts += _comparison(comparison)
    facts += [
        ("speed", f"{tree['tokens_per_s']:.0f} tokens/s"),
        ("time", seconds(tree["wall_s"])),
        ("peak memory", size(tree["peak_memory_bytes"])),
    ]
    view: View = [Table(("", ""), facts, title=tree["model"])]
    if comparison:
        worst = [(f"{w['kl']:.3f}", f"{w['row']}:{w['position']}", _quoted(w["context"]), _quoted(w["token"]))
                 for w in comparison["worst"]]  # fmt: skip
        view.append(Table((">KL", ">row:token", "after", "token"), worst, title="where the distribution changed most"))
    return view + [gate_line(gate) for gate in tree.get("gates", [])]


def fields_view(tree: Tree) -> View:
    """A flat tree as two columns; keys say the units."""

    def shown(key: str, value: Any) -> tuple[str, str]:
        if isinstance(value, bool):
            return key, "yes" if value else "no"
        if isinstance(value, (list, tuple)):
            return key, ", ".join(map(str, value))
        if key.endswith("_bytes"):
            return key.removesuffix("_bytes"), f"about {size(value)}" if key.startswith("expected") else size(value)
        if key.endswith("_s"):
            return key.removesuffix("_s").replace("wall", "time"), f"about {seconds(value)}"
        return key, str(value)

    pairs = [shown(key, value) for key, value in tree.items()]
    return [Table(("", ""), [(key.replace("_", " "), text) for key, text in pairs])]


def estimate(value: Tree, digits: int = 4) -> str:
    """A figure with its standard error."""
    if value["standard_error"] is None:
        return f"{value['value']:.{digits}f}"
    return f"{value['value']:.{digits}f} ± {value['standard_error']:.{digits}f}"


def _layers(layers: list[LayerRecord]) -> Table:
    kinds: dict[tuple[str, str], list[LayerRecord]] = defaultdict(list)
    for layer in layers:
        kinds[kind_of(layer.module), layer.scheme].append(layer)
    rows = []
    for (kind, scheme), members in kinds.items():
        outputs = [m.output_error for m in members if m.output_error is not None]
        rows.append(
            (
                kind,
                scheme,
                str(len(members)),
                f"{members[0].bits_per_weight:.3f}",
                _percent(mean(m.weight_error for m in members)),
                _percent(mean(outputs)) if outputs else "-",
                _percent(max(outputs)) if outputs else "-",
                seconds(sum(m.wall_s for m in members)),
            )
        )
    columns = ("layers", "scheme", ">n", ">bits", ">weight", ">output", ">worst", ">time")
    return Table(columns, rows, title="mean relative error of weights and outputs, and the worst output")


def _recipe(report: Report) -> str:
    if report.method == NO_METHOD:
        return "none: nothing was rounded, the weights are laid out anew"
    finish = f", finished by {', '.join(report.finish)}" if report.finish else ""
    return " + ".join([*report.transforms, report.method]) + f" {report.scheme}{finish}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _left_alone(report: Report) -> Table:
    reasons: dict[str, list[int]] = defaultdict(list)
    for kept in report.kept:
        reasons[kept.reason + (", changed" if kept.changed else "")].append(kept.size_bytes)
    rows = [(reason, str(len(sizes)), size(sum(sizes))) for reason, sizes in reasons.items()]
    return Table(("left alone", ">tensors", ">size"), rows)


def _verdict(report: Report) -> Table:
    share = report.bytes_after / report.bytes_before
    stages = ", ".join(f"{name} {seconds(s)}" for name, s in sorted(report.stages_s.items(), key=lambda x: -x[1])[:4])
    facts = [
        ("model", f"{report.model} ({report.architecture})"),
        ("recipe", _recipe(report)),
        *[("transforms", line) for line in _transforms(report)],
        *[("training", line) for line in _training(report)],
        *([("KV cache", f"{report.kv}, calibrated scales")] if report.kv else []),
        ("output", report.output),
        ("loads in", report.readers),
        ("size", f"{size(report.bytes_before)} -> {size(report.bytes_after)} ({100 * share:.1f} %)"),
        *([("bits per weight", f"{report.bits_per_weight:.3f}, scales and zeros included")] if report.layers else []),
    ]
    if report.data:
        facts.append(
            ("calibration", f"{report.data['source']}, {report.data['rows']} rows, {report.data['tokens']} tokens")
        )
    if report.evaluation:
        evaluation = report.evaluation
        facts.append(("evaluation", f"{evaluation['data']}, {evaluation['protocol']}, {evaluation['tokens']} tokens"))
        facts.append(("perplexity", estimate(evaluation["perplexity"])))
        facts += _comparison(evaluation["comparison"])
    facts.append(("time", f"{seconds(report.wall_s)}: {stages}"))
    facts.append(("peak memory", size(report.peak_memory_bytes)))
    facts += [("note", note) for note in report.notes]
    facts += [("note", f"{layer.module}: {note}") for layer in report.layers for note in layer.notes]
    return Table(("", ""), facts)


def _transforms(report: Report) -> list[str]:
    """For each transform that scales inputs, how many layers it scaled, and why not the others."""
    notes = [note.partition(": ") for layer in report.layers for note in layer.transforms]
    lines = []
    for name in dict.fromkeys(name for name, _, _ in notes):
        whys = [note for other, _, note in notes if other == name]
        counts = {why: whys.count(why) for why in ("best as it is", "nothing to fold into")}
        others = "".join(f", {count} {why}" for why, count in counts.items() if count)
        lines.append(f"{name} scaled the inputs of {len(whys) - sum(counts.values())} layers{others}")
    return lines


def _training(report: Report) -> list[str]:
    """For each finish what became of its held-out loss: of blocks the mean over them."""
    lines = []
    for name in report.finish:
        curves = [tree for tree in report.training if tree["finish"] == name]
        ends = [
            (tree["held_out"][0][1], dict(tree["held_out"])[tree["best_step"]]) for tree in curves if tree["held_out"]
        ]
        what = f"{len(curves)} blocks, their held-out error" if name == BLOCK else "held-out loss"
        change = (
            f"{what} {mean(a for a, _ in ends):.4g} -> {mean(b for _, b in ends):.4g}" if ends else "nothing held out"
        )
        steps, took = sum(tree["steps"] for tree in curves), seconds(sum(tree["wall_s"] for tree in curves))
        worst = max(
            (tree["alignment"]["max_difference"] / (tree["alignment"]["rms"] or 1) for tree in curves), default=0.0
        )
        lines.append(
            f"{name}: {change}, {steps} steps in {took}; the files differ from what was trained by {worst:.1g}"
        )
    return lines


def _comparison(comparison: Tree) -> list[tuple[str, str]]:
    delta, relative, kl, spread = (
        comparison["delta"], comparison["relative_increase"], comparison["kl"], comparison["kl_percentiles"],
    )  # fmt: skip
    interval = f", 95 % interval {delta['low']:+.4f} .. {delta['high']:+.4f}" if delta["low"] is not None else ""
    return [
        ("baseline", f"{estimate(comparison['perplexity'])}  {comparison['baseline']}"),
        (
            "delta",
            f"{'+' if delta['value'] >= 0 else ''}{estimate(delta)} ({100 * relative['value']:+.2f} %){interval}",
        ),
        ("KL divergence", f"{estimate(kl, 5)} nats"),
        ("KL percentiles", ", ".join(f"{k.replace('_', '.')} {v:.4f}" for k, v in spread.items())),
        ("same top token", f"{100 * comparison['top1_agreement']['value']:.2f} %"),
        ("RMS change of p", f"{100 * comparison['rms_delta_p']:.2f} %"),
    ]


def _stride(tree: Tree) -> str:
    return f", stride {tree['stride']}" if tree["stride"] else ""


def _quoted(text: str) -> str:
    return repr(text[-48:])


def gate_line(gate: Tree) -> str:
    verdict = "passed" if gate["passed"] else "MISSED"
    return (
        f"gate {gate['gate']} {gate['asked']}: {verdict}, measured {gate['measured']:.5g} (limit {gate['limit']:.5g})"
    )
