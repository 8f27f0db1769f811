"""The documentation says what the program does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from qtool.cli import app
from qtool.cli.reference import reference

ROOT = Path(__file__).parents[1]


def test_the_command_reference_is_what_the_help_texts_say():
    written = (ROOT / "examples" / "COMMANDS.md").read_text(encoding="utf-8")
    assert written == reference(), "run `make commands`"


def test_every_option_is_explained():
    import typer.main

    root = typer.main.get_command(app)
    silent = [
        f"{name} {parameter.name}"
        for name, command in root.commands.items()
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert silent == []


def test_readme_commands_are_commands_of_the_program():
    """Every `qtool ...` line of README and recipes uses subcommands and options that exist."""
    known = reference()
    for page in ("README.md", "recipes/README.md", "examples/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^ *qtool .*$", text, re.MULTILINE):
            words = line.split()
            assert f"## qtool {words[1]}\n" in known, line
            section = known.partition(f"## qtool {words[1]}\n")[2].partition("\n## ")[0]
            for option in [w.partition("=")[0] for w in words if w.startswith("-")]:
                assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", section), (page, option)


@pytest.mark.parametrize("name", ["demo", "test", "lint", "bench", "help"])
def test_makefile_has_the_target(name):
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"make {name}\b", listed), listed


def test_top_level_is_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.partition("/")[0] for line in tracked.stdout.splitlines()}
    agreed = {"pyproject.toml", "constraints.txt", "qtool", "recipes", "tests", "examples"}
    agreed |= {"README.md", "LICENSE", "Makefile", "CHANGELOG.md"}
    assert {name for name in top if not name.startswith(".")} <= agreed
