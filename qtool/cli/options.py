"""Options that several subcommands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a .safetensors or .gguf file, or a hub id (org/name, org/name@revision, org/name/file.gguf).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only the result, warnings and errors.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show the traceback of an error.")]
ShowProgress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show how far it is, on stderr.")]
LogFormat = Annotated[str, typer.Option("--log-format", help="Lines on stderr: text or json.", metavar="text|json")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
ReportFile = Annotated[Path | None, typer.Option("-o", "--output", help="Write the result as JSON to this file, too.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps; auto takes the fastest there is.")]
