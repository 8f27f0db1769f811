"""`qtool calibrate`: statistics of the inputs of a model's linears, saved for later runs or for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli import options, state
from qtool.errors import UsageError
from qtool.recipe import DataSpec, options_of


def command(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="A folder or a hub id (org/name); with --merge, statistics folders."),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The folder to make, or with --format imatrix the .gguf file.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add up statistics of one model: `--merge A B -o C`. No data is read.")
    ] = False,
    format: Annotated[
        str, typer.Option("--format", metavar="NAME", help="stats, or imatrix: a file for llama.cpp's llama-quantize.")
    ] = "stats",
    hessians: Annotated[
        bool | None,
        typer.Option("--hessians/--no-hessians", help="Second moments too, which GPTQ and AWQ need (no): much larger."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Text: python-docs, a file, a folder, a data set id (org/name:config), or self: "
            "what the model writes by itself, which takes the whole model in memory and its time.",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Of a data set (train).")] = None,
    column: Annotated[str | None, typer.Option("--column", help="Of a data set (text, else messages).")] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Calibration rows (128).")] = None,
    seqlen: options.SeqLen = None,
    pack: options.Pack = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Which rows, when there are more than asked for (0).")
    ] = None,
    device: options.Device = "auto",
    batch_tokens: options.BatchTokens = 512,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    progress: options.ShowProgress = True,
    log_format: options.LogFormat = "text",
) -> int:
    """Measure what MODEL's linears read, and save the statistics.

    Interrupted, the same command goes on where it stopped; done, it says so and changes nothing.

    \b
    qtool calibrate ./llama -o ./llama-stats --data code.jsonl --hessians
    qtool calibrate --merge ./code-stats ./prose-stats -o ./both-stats
    qtool calibrate ./llama --format imatrix -o llama.imatrix.gguf
    """
    console = state.open_console(
        as_json=as_json, quiet=quiet, verbose=verbose, progress=progress, log_format=log_format, resumable=True
    )
    typed = {"source": data, "split": split, "column": column, "rows": rows, "seqlen": seqlen, "pack": pack,
             "seed": seed}  # fmt: skip
    given = {key: value for key, value in typed.items() if value is not None}
    if merge and given:
        flag = "data" if "source" in given else next(iter(given))
        raise UsageError(f"--{flag} means nothing with --merge, which reads no data", f"leave --{flag} out")
    if not merge and len(models) > 1:
        raise UsageError(f"{len(models)} models are given: {', '.join(models)}", "to add up statistics, use --merge")
    if output is None and not dry_run:
        raise UsageError("nowhere to write to", "give a folder with -o/--output, or look only with --dry-run")
    from qtool.calibrate import CalibrateOptions, FromModel, Merge, describe, prepare, prepare_merge, run

    work: FromModel | Merge
    if merge:
        work = prepare_merge([Path(path).expanduser() for path in models], hessians, format)
    else:
        work = prepare(models[0], options_of(DataSpec, given, "data"), bool(hessians), format)
    if dry_run:
        from qtool.report.views import fields_view

        description = describe(work)
        console.result(description, fields_view(description))
        return 0
    from qtool.report.calibration_view import calibration_view

    assert output is not None
    report, up_to_date = run(work, output, CalibrateOptions(device, force, batch_tokens), console.progress)
    for note in report["notes"]:
        console.log(note, "warning")
    if up_to_date:
        console.log(f"{output} is up to date")
    console.result({**report, "up_to_date": up_to_date}, calibration_view(report))
    return 0
