"""What several subcommands share: options, declared once, and how typed flags go into a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qtool.cli.console import Console
from qtool.errors import UsageError
from qtool.recipe import section
from qtool.report.table import View

GATE_MISSED = 3  # the exit code

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a .safetensors or .gguf file, or a hub id (org/name, org/name@revision, org/name/file.gguf).",
    ),
]
Teacher = Annotated[
    str, typer.Argument(metavar="TEACHER", help="A model, dense or packed; named as MODEL is elsewhere.")
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="The folder to make. It appears whole or not at all.")
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A YAML recipe; typed flags go before it.")]
PrintRecipe = Annotated[bool, typer.Option("--print-recipe", help="Print the resolved recipe and stop.")]
SeqLen = Annotated[
    int | None, typer.Option("--seqlen", min=2, help="Tokens per row (the model's context, at most 2048).")
]
Pack = Annotated[
    bool | None, typer.Option("--pack/--no-pack", help="Join the texts and cut rows, or one row per text (pack).")
]
Protocol = Annotated[
    str | None, typer.Option("--protocol", help="Of --eval: windows, rows or llama.cpp.", metavar="NAME")
]
MaxPplIncrease = Annotated[
    str | None,
    typer.Option("--max-ppl-increase", metavar="1%|0.2", help="Gate: exit 3 if perplexity rises by more."),
]
MaxKl = Annotated[float | None, typer.Option("--max-kl", help="Gate: exit 3 if the mean KL divergence (nats) is more.")]
BatchTokens = Annotated[
    int,
    typer.Option("--batch-tokens", min=1, help="Tokens that run through a block at once; speed and memory only."),
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


def put(tree: dict[str, Any], **typed: Any) -> None:
    """Flags that were typed go over what the recipe says."""
    tree.update({key: value for key, value in typed.items() if value is not None})


def put_into(tree: dict[str, Any], name: str, **typed: Any) -> None:
    """The same for a section."""
    given = {key: value for key, value in typed.items() if value is not None}
    if given:
        tree[name] = {**section(tree, name), **given}


def check_folder(output: Path) -> None:
    """Raises UsageError for an output that is called like a file."""
    if output.suffix in (".gguf", ".safetensors"):
        raise UsageError(
            f"{output} is the name of a file, but the output is a folder", f"`-o {output.with_suffix('')}`"
        )


def conclude(console: Console, output: Path, tree: dict[str, Any], view: View, up_to_date: bool) -> int:
    """A report is the result, after its notes; the exit code says whether it passed its gates."""
    for note in tree["notes"]:
        console.log(note, "warning")
    if up_to_date:
        console.log(f"{output} is up to date")
    console.result({**tree, "up_to_date": up_to_date}, view)
    if any(not gate["passed"] for gate in tree["gates"]):
        console.log("a quality gate was missed: the output is kept and marked in its manifest", "error")
        return GATE_MISSED
    return 0


def show_recipe(console: Console, tree: dict[str, Any], text: str) -> int:
    """The resolved recipe is the result; the exit code."""
    console.result(tree, []) if console.as_json else console.text(text)
    return 0
