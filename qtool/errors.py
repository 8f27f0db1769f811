"""The errors that a user can cause or meet. Only `qtool.cli` catches them.

A message names the object and the numbers in one line; the hint says what to type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QtoolError(Exception):
    """Something that the user can mend: ends the run with exit code 1."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ReadError(QtoolError):
    """A file that was there could not be read: trying again may help."""


class TrainingError(QtoolError):
    """The loss or its gradient is no number any more, or has exploded."""


class UsageError(QtoolError):
    """A wrong command line, recipe or plan: ends the run with exit code 2, before any work."""

    exit_code = 2


def shown(value: object) -> str:
    """Something that a file says, in one short line."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else f"{text[:117]}..."


def unknown(what: str, name: object, known: Iterable[str], hint: str | None = None) -> UsageError:
    """The error for a name that is in no table, with the nearest names that are."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.5)
    suggestion = "did you mean " + " or ".join(f"`{n}`" for n in near) + "?" if near else None
    listed = f"known: {', '.join(known)}" if known else "there is none"
    return UsageError(f"unknown {what} `{shown(name)}`", hint or suggestion or listed)
