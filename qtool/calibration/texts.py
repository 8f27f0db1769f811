"""Texts from wherever a DataSpec points: a built-in name, a file, a folder, or a data set id.

Plain text and JSON lines are read here; tables (csv, parquet) and data set ids go through `datasets`, streamed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qtool.errors import QtoolError, UsageError, unknown
from qtool.recipe import DataSpec

BUILT_IN = ("python-docs",)
SELF = "self"  # rows that the model writes itself: `qtool.calibration.self_data`
FILE_TYPES = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet")
Render = Callable[[list[dict[str, str]]], str]  # chat messages -> text


def read_texts(spec: DataSpec, split: str, render: Render) -> Iterator[str]:
    """The texts of `spec`, in order; `split` is the default one. Raises UsageError for what does not exist."""
    split = spec.split or split
    path = Path(spec.source).expanduser()
    if spec.source in BUILT_IN:
        yield from _built_in(split)
    elif path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in FILE_TYPES)
        if not files:
            raise UsageError(f"folder {path} holds no {', '.join(FILE_TYPES)}")
        for file in files:
            yield from _file(file, spec.column, render)
    elif path.is_file():
        yield from _file(path, spec.column, render)
    else:
        yield from _data_set(spec, split, render)


def check_source(spec: DataSpec, calibrating: bool = False) -> None:
    """Raises UsageError for a local file or folder that is not there, and for options that do not go with "self".

    A data set id is only known when it is read.
    """
    if spec.source == SELF:
        if not calibrating:
            raise UsageError("rows that a model writes itself say nothing about its perplexity", "give a text")
        for flag, value in {"--split": spec.split, "--column": spec.column, "--no-pack": not spec.pack}.items():
            if value:
                raise UsageError(f"{flag} means nothing with `--data self`", f"leave {flag} out")
        return
    path = Path(spec.source).expanduser()
    if spec.source not in BUILT_IN and not path.exists() and _looks_local(spec.source):
        raise UsageError(f"no such file or folder: {spec.source}")


def is_local(spec: DataSpec) -> bool:
    """Whether the texts are built in or lie on this machine's disk."""
    return spec.source in BUILT_IN or Path(spec.source).expanduser().exists()


def local_files(spec: DataSpec) -> list[Path]:
    """The files behind `spec`, none for a built-in name or a data set id."""
    path = Path(spec.source).expanduser()
    if spec.source in (*BUILT_IN, SELF):
        return []
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in FILE_TYPES)
    return [path] if path.is_file() else []


def _looks_local(source: str) -> bool:
    return source.count("/") > 1 or source.startswith((".", "~", "/")) or Path(source).suffix in FILE_TYPES


def _built_in(split: str) -> list[str]:
    from qtool.calibration import python_docs

    if split not in ("train", "test"):
        raise unknown("split of python-docs", split, ("train", "test"))
    return python_docs.texts(split)


def _file(path: Path, column: str | None, render: Render) -> Iterator[str]:
    try:
        if path.suffix in (".txt", ".md"):
            yield path.read_text(encoding="utf-8")
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                yield from _texts(_json_lines(file, path), column, render, str(path))
        elif path.suffix in FILE_TYPES:
            yield from _texts(_table(path), column, render, str(path))
        else:
            raise UsageError(f"{path} is of no known type", f"known: {', '.join(FILE_TYPES)}")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be read as UTF-8 {path.suffix[1:]}: {error}") from None


def _table(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a csv, parquet or json file. Raises UsageError when `datasets` cannot read it."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
    try:
        yield from datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train", streaming=True)
    except Exception as error:  # whatever the reader of that format raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} cannot be read as {path.suffix[1:]}: {reason}") from None


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}: line {number} is not JSON: {error}") from None


def _data_set(spec: DataSpec, split: str, render: Render) -> Iterator[str]:
    check_source(spec)
    from datasets import load_dataset

    name, _, config = spec.source.partition(":")
    try:
        records = load_dataset(name, config or None, split=split, streaming=True)
        yield from _texts(records, spec.column, render, spec.source)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"`{spec.source}` is no file, no built-in data set ({', '.join(BUILT_IN)}), and cannot be loaded: {reason}",
            "give a .txt, .jsonl, .csv or .parquet file, or a data set id as `org/name` or `org/name:config`",
        ) from None


def _texts(records: Iterable[dict[str, Any]], column: str | None, render: Render, source: str) -> Iterator[str]:
    """The text of each record: of the named column, else `text`, else chat `messages`."""
    for record in records:
        if not isinstance(record, dict):
            raise UsageError(f"{source}: a record is not an object with columns, but {type(record).__name__}")
        name = column or next((c for c in ("text", "messages", "conversations") if c in record), None)
        if name is None or name not in record:
            raise UsageError(
                f"{source} has no column `{column or 'text'}`; it has {', '.join(map(str, record))}",
                "name the column: `--column` of eval-ppl, `--set data.column=...` of quantize",
            )
        value = record[name]
        if isinstance(value, list):
            yield render(value)
        elif isinstance(value, str):
            yield value
        elif value is not None:
            raise QtoolError(f"{source}: column `{name}` holds {type(value).__name__}, not text")
