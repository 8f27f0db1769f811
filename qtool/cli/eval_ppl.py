"""`qtool eval-ppl`: perplexity of a model with its error, alone or beside a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli import options, state
from qtool.errors import unknown
from qtool.recipe import PROTOCOLS, DataSpec, EvalSpec


def command(
    model: options.Model,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="Compare with this model, token by token.")
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="Text: python-docs, a file, a folder, or a data set id (org/name:config).")
    ] = "python-docs",
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="A LoRA adapter on MODEL, as PEFT writes it.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Of a data set (test).")] = None,
    column: Annotated[str | None, typer.Option("--column", help="Of a data set (text, else messages).")] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="At most so many windows or rows (all).")] = None,
    seqlen: Annotated[
        int | None, typer.Option("--seqlen", min=2, help="Tokens per window (the model's context, at most 2048).")
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            "--protocol", metavar="NAME", help="windows; rows: each text by itself; llama.cpp: half of each window."
        ),
    ] = "windows",
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="Overlap windows: tokens between starts.")
    ] = None,
    max_ppl_increase: options.MaxPplIncrease = None,
    max_kl: options.MaxKl = None,
    device: options.Device = "auto",
    output: options.ReportFile = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    progress: options.ShowProgress = True,
    log_format: options.LogFormat = "text",
) -> int:
    """Measure the perplexity of MODEL, dense or packed.

    \b
    qtool eval-ppl ./llama-w4 --data wiki.txt
    qtool eval-ppl ./llama-w4 --baseline ./llama --data wiki.txt --max-kl 0.05
    """
    console = state.open_console(
        as_json=as_json, quiet=quiet, verbose=verbose, progress=progress, log_format=log_format,
        output=None if dry_run else output, force=force,
    )  # fmt: skip
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    source = DataSpec(source=data, split=split, column=column, rows=rows, seqlen=seqlen)
    spec = EvalSpec(source, protocol, stride, max_ppl_increase, max_kl)
    from qtool.calibration.texts import check_source
    from qtool.checkpoint.hub import locate
    from qtool.evaluation.gates import check_gates, check_spec

    check_spec(spec, baseline is not None)
    check_source(source)
    path, base_path = locate(model), locate(baseline) if baseline else None
    if dry_run:
        from qtool.evaluation.describe import describe
        from qtool.report.views import fields_view

        description = describe(path, base_path, spec)
        console.result(description, fields_view(description))
        return 0
    from qtool.evaluation.evaluate import evaluate
    from qtool.report.views import evaluation_view

    result = evaluate(path, base_path, spec, device, console.progress, adapter)
    gates = check_gates(result, spec)
    tree = {**result.to_tree(), "gates": gates}
    console.result(tree, evaluation_view(tree))
    if any(not gate["passed"] for gate in gates):
        console.log("a quality gate was missed", "error")
        return options.GATE_MISSED
    return 0
