"""Regular expressions of a config.json, which come without trust: none is tried that could keep `re` busy for long.

Where a match fails, `re` goes through all the ways in which a text fits: every place where a repeat may end times every
alternative. They are counted before, for a name of LONGEST_NAME characters. Checked against `re` of Python 3.11.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from qtool.errors import QtoolError, shown

LONGEST_PATTERN, LONGEST_NAME = 1000, 200  # characters
MOST_WAYS = 10**7  # three repeats of anything, such as `.*`, one after the other: 201 ** 3 ways, some 0.1 s

_parser: Any = re._parser  # type: ignore[attr-defined]
_compile_parsed: Any = re._compiler.compile  # type: ignore[attr-defined]
SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")  # read one character
AHEAD = ("ASSERT", "ASSERT_NOT")
REPEATS = ("MAX_REPEAT", "MIN_REPEAT")


def begins(pattern: str, name: str) -> bool:
    """Whether a pattern fits the begin of a module's name, as `re.match` has it. Raises QtoolError for a `problem`."""
    if said := problem(pattern, name):
        raise QtoolError(said)
    found = _compiled(pattern)
    return isinstance(found, re.Pattern) and found.match(name) is not None


def problem(pattern: str, name: str) -> str | None:
    """Why it is not tried: the pattern is none, is too long or fits in too many ways, or the name is too long."""
    if len(name) > LONGEST_NAME:
        return f"`{shown(name)}` has {len(name)} characters: patterns are tried on {LONGEST_NAME} at most"
    found = _compiled(pattern)
    return f"the quantization_config has the pattern `{shown(pattern)}`: {found}" if isinstance(found, str) else None


@lru_cache(1 << 14)
def _compiled(pattern: str) -> re.Pattern[str] | str:
    """A pattern, or what is wrong with it."""
    if len(pattern) > LONGEST_PATTERN:
        return f"it has {len(pattern)} characters, and {LONGEST_PATTERN} are the most"
    try:
        _ways(_parser.parse(pattern), 1, last=True)
        return re.compile(pattern)
    except (ValueError, re.error, RecursionError, OverflowError) as error:
        return shown(error)


def _ways(items: Any, before: int, last: bool = False) -> int:
    """In how many ways, at most, a parsed sequence fits, times `before`; `last` where nothing comes after it.

    Raises ValueError for more than MOST_WAYS, and for what is not counted.
    """
    ways = before
    for place, (code, value) in enumerate(items):
        name = str(code)
        if name in AHEAD:  # whatever it finds, there is one way to go on
            _ways(value[1], ways, last=True)
        elif name == "BRANCH":
            ways = sum(_ways(alternative, ways) for alternative in value[1])
        elif name == "SUBPATTERN":
            ways = _ways(value[3], ways)
        elif name in REPEATS and value[1] <= 1:
            ways += _ways(value[2], ways)
        elif name in REPEATS:
            least, most, body = value
            ways = _repeated(least, most, body, items[place + 1 :], ways, last)
        elif name not in (*SINGLE, "AT"):
            raise ValueError(f"it has {name.lower()}, which is not read here")
        if ways > MOST_WAYS:
            raise ValueError(f"it fits in too many ways: names could take minutes ({MOST_WAYS} are the most)")
    return ways


def _repeated(least: int, most: int, body: Any, following: Any, before: int, last: bool) -> int:
    """The ways of a repeat; its body must itself fit in one way, and always in the same number of characters."""
    ways = before * (min(most, LONGEST_NAME) - min(least, LONGEST_NAME) + 1)
    if len(body) == 1 and str(body[0][0]) in SINGLE:
        ends_once = _stops_at(body, *following[0]) if following else last
        return before if ends_once else ways
    fewest, longest = body.getwidth()
    if not fewest or fewest != longest or _ways(body, ways) != ways:
        raise ValueError("it repeats what itself fits in several ways: names could take minutes")
    return ways


def _stops_at(body: Any, code: Any, value: Any) -> bool:
    """Whether repeats of a character can only end in one place: what comes next is a letter that is none of them."""
    known = str(code) == "LITERAL" and value < 128
    return known and not _compile_parsed(body, re.IGNORECASE | re.DOTALL).match(chr(value))
