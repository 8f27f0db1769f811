"""The pages of a `distill` run: the verdict on teacher and student, how the training went, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.checkpoint.writer import counted
from qtool.report.table import Table, View, count, seconds, size
from qtool.report.views import estimate, gate_line

Tree = Mapping[str, Any]
SHOWN_STEPS = 9  # of the curve


def distill_view(tree: Tree) -> View:
    """The verdict, the curve, the facts, and the gates."""
    return [_verdict(tree), _curve(tree["curve"]), _facts(tree), *map(gate_line, tree["gates"])]


def distill_plan_view(plan: Tree) -> View:
    """What `--dry-run` shows."""
    (theirs, ours), (before, after) = plan["parameters"], plan["size_bytes"]
    about = "" if plan["rows_are_known"] else "about "
    facts = [
        ("teacher", plan["teacher"]),
        ("student", plan["student"]),
        ("parameters", f"{count(theirs)} -> {count(ours)} ({100 * ours / theirs:.1f} %)"),
        ("size", f"{size(before)} -> {size(after)}"),
        ("loss", plan["loss"]),
        ("data", f"{plan['data']}, {about}{counted(plan['rows'], 'row')} of {plan['seqlen']} tokens"),
        (
            "training",
            f"{about}{counted(plan['steps'], 'step')} of {counted(plan['batch'], 'row')}, lr {plan['lr']:g}, "
            f"{plan['precision']}",
        ),
        ("memory", f"about {size(plan['expected_memory_bytes'])}"),
        ("time", f"about {seconds(plan['expected_wall_s'])} on two CPU cores"),
    ]
    return [Table(("", ""), facts)]


def _verdict(tree: Tree) -> Table:
    """Teacher, student before, student after. Divergences, differences and agreement are with the teacher."""
    sizes = [
        (str(tree["layers"][who]), count(tree["parameters"][who]), size(tree["size_bytes"][who]))
        for who in ("teacher", "student", "student")
    ]
    names = ("teacher", "student before", "student after")
    columns: tuple[str, ...] = ("", ">layers", ">parameters", ">size")
    measured: list[tuple[str, ...]] = [(), (), ()]
    title = "no text to measure on: give one with --eval"
    if evaluation := tree["evaluation"]:
        before, after = evaluation["before"], evaluation["after"]
        columns += (">perplexity", ">delta", ">KL, nats", ">same top token", ">tokens/s")
        base = after["comparison"]
        measured = [
            (estimate(base["perplexity"], 3), "", "", "", f"{base['tokens_per_s']:.0f}"),
            *map(_measured, (before, after)),
        ]
        title = f"measured on {after['data']}: {after['protocol']}, {after['tokens']} tokens"
    rows = [(name, *of, *figures) for name, of, figures in zip(names, sizes, measured, strict=True)]
    return Table(columns, rows, title=title)


def _measured(tree: Tree) -> tuple[str, ...]:
    comparison = tree["comparison"]
    delta = comparison["delta"]
    return (
        estimate(tree["perplexity"], 3),
        f"{'+' if delta['value'] >= 0 else ''}{estimate(delta, 3)}",
        estimate(comparison["kl"]),
        f"{100 * comparison['top1_agreement']['value']:.1f} %",
        f"{tree['tokens_per_s']:.0f}",
    )


def _curve(curve: Tree) -> Table:
    """The held-out losses, and the mean of the training losses since the one before."""
    losses = dict(map(tuple, curve["train"]))
    held_out = [tuple(pair) for pair in curve["held_out"]]
    rows, last = [], 0
    for step, loss in held_out:
        between = [losses[i] for i in range(last + 1, step + 1) if i in losses]
        mean = f"{sum(between) / len(between):.4f}" if between else ""
        rows.append((str(step), mean, f"{loss:.4f}", "kept" if step == curve["best_step"] else ""))
        last = step
    every = max(1, -(-(len(rows) - 1) // (SHOWN_STEPS - 1)))
    shown = [row for i, row in enumerate(rows) if i % every == 0 or row[3] or i == len(rows) - 1]
    return Table((">step", ">loss", ">held-out loss", ""), shown, title="loss per token, in nats")


def _facts(tree: Tree) -> Table:
    curve, data, training = tree["curve"], tree["data"], tree["recipe"]["training"]
    stages = ", ".join(f"{name} {seconds(s)}" for name, s in sorted(tree["stages_s"].items(), key=lambda x: -x[1])[:4])
    several = f", {tree['processes']} processes" if tree["processes"] > 1 else ""
    facts = [
        ("teacher", f"{tree['teacher']} ({tree['architecture']}): {tree['teacher_is']}"),
        ("student", tree["student"]),
        *_influence(tree["chosen"]),
        ("loss", tree["loss"]),
        (
            "training",
            f"{counted(len(curve['train']), 'step')} of {counted(training['batch'], 'row')}, lr {training['lr']:g}, "
            f"{training['precision']}, {curve['tokens']} tokens, {curve['tokens_per_s']:.0f} tokens/s{several}",
        ),
        (
            "data",
            f"{data['source']}, {counted(data['rows'], 'row')}, {data['tokens']} tokens; "
            f"{counted(data['held_out_rows'], 'row')} held out",
        ),
        ("output", tree["output"]),
        ("time", f"{seconds(tree['wall_s'])}: {stages}"),
        ("peak memory", size(max(tree["peak_memory_bytes"], curve["peak_memory_bytes"]))),
    ]
    if recovered := _recovered(tree["evaluation"]):
        facts.insert(2, ("recovered", recovered))
    return Table(("", ""), facts + [("note", note) for note in tree["notes"]])


def _recovered(evaluation: Tree | None) -> str | None:
    """The share of what the cut cost that training won back."""
    if not evaluation:
        return None
    before, after = (evaluation[who]["perplexity"]["value"] for who in ("before", "after"))
    teacher = evaluation["after"]["comparison"]["perplexity"]["value"]
    if before <= teacher:
        return None
    return f"{100 * (before - after) / (before - teacher):.1f} % of the perplexity that the student had lost"


def _influence(chosen: Tree) -> list[tuple[str, str]]:
    """How much each layer of the teacher turns the hidden states, where that was measured."""
    if not chosen.get("influence"):
        return []
    kept = set(chosen["blocks"])
    shown = [f"{i}{'' if i in kept else ' (gone)'} {value:.3f}" for i, value in enumerate(chosen["influence"])]
    return [("layers", "1 - cosine of what enters and leaves: " + ", ".join(shown))]
