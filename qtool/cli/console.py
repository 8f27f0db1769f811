"""The only place that prints. stdout carries the result, stderr everything else.

Rich draws only on a stream that is a terminal; in a pipe there are plain lines, never wrapped or coloured.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.errors import QtoolError, UsageError
from qtool.report.table import Table, View, plain_lines, seconds


class Console:
    """How one command speaks. `progress` has the signature that library code calls back."""

    def __init__(
        self,
        as_json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        progress: bool = True,
        log_format: str = "text",
        output: Path | None = None,
        force: bool = False,
        resumable: bool = False,
    ) -> None:
        self.as_json, self.quiet, self.verbose, self.log_format = as_json, quiet, verbose, log_format
        self.output, self.force, self.resumable = output, force, resumable
        self.show_progress = progress and not quiet
        self.started = time.perf_counter()
        self._bar: Any = None
        self._task: Any = None

    def check(self) -> None:
        """Raises UsageError for options that cannot be."""
        if self.log_format not in ("text", "json"):
            raise UsageError(f"unknown log format `{self.log_format}`", "known: text, json")
        if self.output and self.output.is_dir():
            raise UsageError(f"{self.output} is a folder", "give a file with -o/--output")
        if self.output and self.output.exists() and not self.force:
            raise UsageError(f"{self.output} exists", "give another -o/--output, or replace it with --force")

    def result(self, tree: Mapping[str, Any], view: View) -> None:
        """The result of the command, as one JSON object or as a page; JSON also goes to the output file, if any."""
        self.close()
        text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False, default=str)
        if self.output:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            staged = self.output.with_name(self.output.name + ".partial")
            staged.write_text(text + "\n", encoding="utf-8")
            staged.replace(self.output)
        if self.as_json:
            print(text)
        elif sys.stdout.isatty():
            _draw(view)
        else:
            print("\n".join(plain_lines(view)))
        sys.stdout.flush()

    def text(self, text: str) -> None:
        """A result that is text by nature, such as a recipe."""
        print(text, end="" if text.endswith("\n") else "\n", flush=True)

    def log(self, message: str, level: str = "info", **fields: Any) -> None:
        """One line on stderr; warnings also with --quiet."""
        if self.quiet and level == "info":
            return
        if self.log_format == "json":
            elapsed_s = round(time.perf_counter() - self.started, 3)
            line = json.dumps(
                {"level": level, "elapsed_s": elapsed_s, "message": message, **fields}, ensure_ascii=False
            )
        else:
            line = {"info": message, "hint": f"\nhint: {message}"}.get(level, f"{level}: {message}")
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def progress(self, stage: str, done: int, total: int, detail: str) -> None:
        """One bar on a terminal, else one line per step."""
        if not self.show_progress:
            return
        if self.log_format == "json":
            self.log(detail, stage=stage, done=done, total=total)
        elif not sys.stderr.isatty():
            self.log(f"{stage} {done}/{total}  {detail}  [{seconds(time.perf_counter() - self.started)}]")
        else:
            self._draw_bar(stage, done, total, detail)

    def error(self, error: BaseException) -> int:
        """Say what went wrong; the exit code."""
        self.close()
        trace: dict[str, str] = {}
        if self.verbose and not isinstance(error, KeyboardInterrupt):
            if self.log_format == "json":
                trace = {"traceback": "".join(traceback.format_exception(error))}
            else:
                traceback.print_exception(error, file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            self.log("interrupted" + (": the same command goes on from here" if self.resumable else ""), "error")
            return 130
        if isinstance(error, QtoolError):
            self.log(error.message, "error", **trace)
            if error.hint:
                self.log(error.hint, "hint")
            return error.exit_code
        self.log(f"{type(error).__name__}: {error}".strip(), "error", **trace)
        if not self.verbose:
            self.log("the traceback is shown with -v", "hint")
        return 1

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw_bar(self, stage: str, done: int, total: int, detail: str) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        from qtool.report.model import peak_memory_bytes
        from qtool.report.table import size

        if self._bar is None:
            columns = (
                TextColumn("{task.fields[stage]} {task.completed:.0f}/{task.total:.0f}", markup=False),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
            )
            self._bar = Progress(*columns, console=RichConsole(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=total, stage=stage)
        if self._bar.tasks[0].fields["stage"] != stage:
            self._bar.reset(self._task, total=total)
        described = f"{size(peak_memory_bytes())}  {detail}"
        self._bar.update(self._task, completed=done, total=total, description=described, stage=stage)


def _draw(view: View) -> None:
    """The same lines as in a pipe, with titles and headers set off; the terminal wraps what is too long for it."""
    from rich.console import Console as RichConsole
    from rich.text import Text

    console = RichConsole(highlight=False)
    for part in view:
        lines = part.lines() if isinstance(part, Table) else [part]
        heads = part.head_lines() if isinstance(part, Table) else 0
        for number, line in enumerate(lines):
            console.print(Text(line, style="bold" if number < heads else ""), soft_wrap=True)
        if isinstance(part, Table):
            console.print()
