"""Tables and lines: what a view is made of before anything is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells as text. Columns whose header starts with ">" are flushed right (the ">" is not printed)."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]] = ()
    title: str | None = None

    def head_lines(self) -> int:
        """How many of the lines are title and header."""
        return bool(self.title) + any(self.columns)

    def lines(self) -> list[str]:
        """Plain text, columns aligned, never wrapped."""
        right = [c.startswith(">") for c in self.columns]
        header = tuple(c.removeprefix(">") for c in self.columns)
        widths = [max(len(row[i]) for row in [header, *self.rows]) for i in range(len(header))]

        def line(cells: Sequence[str]) -> str:
            aligned = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
            return "  ".join(aligned).rstrip()

        body = [line(row) for row in self.rows]
        head = [line(header)] if any(header) else []
        return [*([self.title] if self.title else []), *head, *body]


View = list[Table | str]  # a page: tables and single lines, in order


def plain_lines(view: View) -> list[str]:
    """The whole page as plain text, an empty line around each table."""
    lines: list[str] = []
    for part in view:
        if isinstance(part, str):
            lines.append(part)
        else:
            lines += [*([""] if lines and lines[-1] else []), *part.lines(), ""]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def size(size_bytes: float) -> str:
    """A size for people: 1.25 GB, powers of ten."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def count(number: float) -> str:
    """A count for people: 1.10B parameters."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= factor:
            return f"{number / factor:.2f}{unit}"
    return f"{number:.0f}"


def seconds(wall_s: float) -> str:
    """A duration for people: 0.42 s, 12.3 s, 4 min 02 s, 1 h 05 min."""
    if wall_s < 10:
        return f"{wall_s:.2f} s"
    if wall_s < 120:
        return f"{wall_s:.1f} s"
    minutes, rest = divmod(round(wall_s), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
