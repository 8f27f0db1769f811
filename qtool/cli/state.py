"""The console of the command that runs, so that errors are told the way it was asked."""

from __future__ import annotations

from typing import Any

from qtool.cli.console import Console

console = Console()
interrupted = False  # whether Ctrl-C was pressed: what it raises may come out as another exception


def open_console(**options: Any) -> Console:
    """A console with a command's options; from now on errors go through it."""
    global console
    console = Console(**options)
    console.check()
    return console
