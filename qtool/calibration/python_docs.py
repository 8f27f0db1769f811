"""The built-in data set `python-docs`: text that every CPython carries.

The language reference topics behind `help("...")` (`pydoc_data.topics`) and the docstrings of the
standard library, read from its sources without importing them. It exists so that calibration and
evaluation work offline on any machine; a real run should use text like the model's own.

The text differs a little between Python versions, so whoever reports a figure reports the hash of
the texts beside it. Which split a document belongs to depends on its name alone.
"""

from __future__ import annotations

import ast
import sysconfig
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

HELD_OUT_SHARE = 8  # one document in so many is held out
SKIPPED_DIRS = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "ensurepip",
}


def texts(split: str) -> list[str]:
    """The documents of a split, "train" or "test" (held out), ordered by name."""
    wanted = {"train": False, "test": True}[split]
    return [text for name, text in _documents() if _is_held_out(name) == wanted]


def _is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


@lru_cache(maxsize=1)
def _documents() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    documents = [(f"topic:{name}", text.strip()) for name, text in topics.items()]
    documents += _stdlib_documents(Path(sysconfig.get_paths()["stdlib"]))
    return sorted(document for document in documents if len(document[1]) >= 200)


def _stdlib_documents(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_DIRS & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # templates and other sources that are no Python module
            continue
        module = ".".join(relative.with_suffix("").parts)
        docstrings = list(_docstrings(tree, module))
        if docstrings:
            yield f"module:{module}", "\n\n".join(docstrings)


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield f"{name}\n{docstring}"
        for child in node.body:
            yield from _docstrings(child, f"{name}.{getattr(child, 'name', '')}")
