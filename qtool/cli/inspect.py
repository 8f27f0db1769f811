"""`qtool inspect`: what a checkpoint is, what it takes to serve, and how far it is from another."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qtool.cli import options, state
from qtool.errors import UsageError

CONTEXT, BATCH, TOP = 4096, 1, 20


def command(
    model: options.Model,
    memory: Annotated[
        bool, typer.Option("--memory", help="What serving takes: weights and KV cache, now and under other schemes.")
    ] = False,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help=f"With --memory: tokens per sequence ({CONTEXT}).")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help=f"With --memory: sequences at a time ({BATCH}).")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="BASE", help="How far each tensor is from BASE's, worst first.")
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", min=1, help=f"With --against: rows to show ({TOP}); --json has all.")
    ] = None,
    tensor: Annotated[
        str | None, typer.Option("--tensor", metavar="NAME", help="One tensor: distribution, outliers, channels.")
    ] = None,
    output: options.ReportFile = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    progress: options.ShowProgress = True,
    log_format: options.LogFormat = "text",
) -> int:
    """Show what MODEL is, dense or packed, from its headers.

    Of a hub id only headers and config.json are fetched, unless --against or --tensor need its values.

    Example: qtool inspect ./llama-w4 --against ./llama
    """
    console = state.open_console(
        as_json=as_json, quiet=quiet, verbose=verbose, progress=progress, log_format=log_format,
        output=None if dry_run else output, force=force,
    )  # fmt: skip
    views = [flag for flag, asked in (("--memory", memory), ("--against", against), ("--tensor", tensor)) if asked]
    if len(views) > 1:
        raise UsageError(f"{' and '.join(views)} are different views", "ask for one at a time")
    for flag, value, view in (
        ("--context", context, "--memory"),
        ("--batch", batch, "--memory"),
        ("--top", top, "--against"),
    ):
        if value is not None and view not in views:
            raise UsageError(f"{flag} means nothing without {view}", f"add {view}")
    if dry_run:
        from qtool.report.views import fields_view

        description = _describe(model, against, tensor)
        listed = {key: ", ".join(value) if isinstance(value, list) else value for key, value in description.items()}
        console.result(description, fields_view(listed))
        return 0
    from qtool.checkpoint.hub import locate, open_headers
    from qtool.gguf.checkpoint import open_checkpoint
    from qtool.inspection import views as pages

    if against:
        from qtool.inspection.compare import compare

        difference = compare(open_checkpoint(locate(model)), open_checkpoint(locate(against)), console.progress)
        console.result(difference.to_tree(), pages.comparison_view(difference, top or TOP))
    elif tensor:
        from qtool.inspection.tensor import tensor_stats

        stats = tensor_stats(open_checkpoint(locate(model)), tensor)
        console.result(stats.to_tree(), pages.tensor_view(stats))
    elif memory:
        from qtool.inspection.memory import memory as estimate

        needed = estimate(open_headers(model), context or CONTEXT, batch or BATCH)
        console.result(needed.to_tree(), pages.memory_view(needed))
    else:
        from qtool.inspection.overview import overview
        from qtool.inspection.statistics import statistics_of

        checkpoint = open_headers(model)
        if measured := statistics_of(checkpoint):
            console.result(measured.to_tree(), pages.statistics_view(measured))
        else:
            found = overview(checkpoint)
            console.result(found.to_tree(), pages.overview_view(found))
    return 0


def _describe(model: str, against: str | None, tensor: str | None) -> dict[str, Any]:
    """What would be read, without reading more than the headers of what is local."""
    from qtool.checkpoint.hub import local_path
    from qtool.gguf.checkpoint import open_checkpoint
    from qtool.inspection.logical import open_weights
    from qtool.inspection.tensor import check_name

    values = f"the values of `{tensor}`" if tensor else "the values of every tensor" if against else "headers only"
    described: dict[str, Any] = {"reads": values}
    for role, name in (("model", model), ("base", against)):
        if name is None:
            continue
        path = local_path(name)
        described[role] = name
        if path:
            checkpoint = open_checkpoint(path)
            if tensor:
                check_name(tensor, list(open_weights(checkpoint).shapes))
            described[f"{role}_files"] = [str(checkpoint.root / file) for file in checkpoint.own_files]
        else:
            wanted = "all files, downloaded" if against or tensor else "headers and config.json, fetched"
            described[f"{role}_files"] = f"{wanted} from the hub"
    return described
