"""An output that is there already: whether it is this very run's, and whether it may be replaced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.checkpoint.writer import JOURNAL, MANIFEST, partial_path, replaced_path
from qtool.errors import UsageError


def read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of an output, or None where there is none of ours."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "identity" in manifest else None


def check_apart(out: Path, source: Path) -> None:
    """Raises UsageError when making OUT would touch the source."""
    here, there = out.resolve(), source.resolve()
    for ours in (here, partial_path(here), replaced_path(here)):
        if ours == there or ours in there.parents:
            raise UsageError(
                f"{out if ours == here else ours} is where the model itself is", "give another folder with -o/--output"
            )


def check_replaceable(out: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UsageError when OUT holds something that even --force must not throw away."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file, not a folder", "give another -o/--output")
    own = {MANIFEST, f"{MANIFEST}.new", JOURNAL, *(Path(file["name"]).parts[0] for file in manifest.get("files", []))}
    others = sorted(path.name for path in out.iterdir() if path.name not in own)
    if others:
        raise UsageError(
            f"{out} holds what qtool did not write there, such as {others[0]}",
            "give another -o/--output, or move it away",
        )


def check_same(out: Path, manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises UsageError unless the output is that of a run with this identity, and whole."""
    difference = first_difference(manifest["identity"], identity)
    if difference:
        raise UsageError(
            f"{out} was made otherwise: {difference}", "give another -o/--output, or replace it with --force"
        )
    for file in manifest.get("files", []):
        path = out / file["name"]
        if not path.is_file() or path.stat().st_size != file["size_bytes"]:
            raise UsageError(
                f"{out} is damaged: {file['name']} is missing or has changed", "make it again with --force"
            )


def first_difference(old: Any, new: Any, path: str = "") -> str:
    """The first key in which two trees differ, with both values; "" where they are equal."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*new, *old]):
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return ""
    return "" if old == new else f"{path} was `{old}` and is now `{new}`"
