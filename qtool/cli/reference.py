"""The command reference: every help text as one Markdown page. `python -m qtool.cli.reference FILE` writes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer.main


def reference() -> str:
    """examples/COMMANDS.md, as the help texts are now."""
    from qtool.cli import app

    root: Any = typer.main.get_command(app)
    parts = ["# Commands\n", "Written from the help texts by `make commands`.\n"]
    for name, command in [("", root), *sorted(root.commands.items())]:
        full_name = f"qtool {name}".strip()
        context = command.make_context(full_name, [], resilient_parsing=True, terminal_width=100)
        parts.append(f"## {full_name}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
