"""Imports point down the map in the design, and what must answer at once loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import qtool

ROOT = Path(qtool.__file__).parent
# From the top. A module may import from its own layer and from those below. The longest prefix counts.
LAYERS = [
    ["qtool.cli", "qtool.__main__"],
    ["qtool.distill"],
    ["qtool.pipeline"],
    ["qtool.finishing.end_to_end"],
    ["qtool.solving", "qtool.calibrate", "qtool.gather"],
    ["qtool.job", "qtool.recommend"],
    ["qtool.containers", "qtool.targets"],
    ["qtool.evaluation", "qtool.inspection"],
    ["qtool.estimate", "qtool.report.views", "qtool.report.calibration_view", "qtool.report.distill_view"],
    ["qtool.methods", "qtool.transforms", "qtool.finishing"],
    ["qtool.training"],
    [
        "qtool.calibration.saved",
        "qtool.calibration.imatrix",
        "qtool.calibration.imatrix_file",
        "qtool.calibration.self_data",
        "qtool.parameters",
    ],
    ["qtool.formats.weights"],
    ["qtool.formats"],
    ["qtool.models", "qtool.calibration"],
    ["qtool.runtime"],
    ["qtool.numerics"],
    ["qtool.checkpoint.hub"],
    ["qtool.gguf"],
    ["qtool.checkpoint"],
    ["qtool.plan"],
    ["qtool.recipe", "qtool.report"],
    ["qtool.training.options", "qtool.training.objective"],
    ["qtool.mixes"],
    ["qtool.scheme", "qtool.headers", "qtool.memory", "qtool.processes"],
    ["qtool.errors"],
    ["qtool"],
]
# What a command line needs before any work, and every table of names.
WITHOUT_TORCH = [
    "scheme",
    "recipe",
    "plan",
    "errors",
    "headers",
    "report",
    "report.model",
    "report.table",
    "report.views",
]
WITHOUT_TORCH += [
    "mixes",
    "gguf.file",
    "gguf.checkpoint",
    "gguf.container",
    "gguf.model",
    "gguf.tokenizer",
    "gguf.merges",
    "gguf.pretokenizers",
    "estimate",
    "job",
    "recommend",
    "targets",
    "methods",
    "finishing",
    "finishing.block",
    "finishing.scales",
    "finishing.full",
    "finishing.lora",
    "processes",
    "transforms",
    "transforms.awq",
    "transforms.bias_correction",
    "transforms.rotation",
    "transforms.smoothquant",
    "models.producers",
    "formats",
    "models.architectures",
    "models.widths",
    "distill.recipe",
    "distill.cut",
    "distill.job",
    "report.distill_view",
    "training.options",
    "training.objective",
    "training.curve",
    "training.batches",
    "checkpoint.reader",
    "checkpoint.writer",
    "cli",
]

STAGING = ("qtool.pipeline", "qtool.calibrate", "qtool.distill.run", "qtool.recommend")
HEAVY = ["torch", "transformers", "datasets", "safetensors", "huggingface_hub", "numpy"]


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(("qtool", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


MODULES = modules()


def layer_of(module: str) -> int:
    """The layer of a module: the one with the longest prefix of its name."""
    fits = [
        (len(prefix), i) for i, layer in enumerate(LAYERS) for prefix in layer if f"{module}.".startswith(f"{prefix}.")
    ]
    return max(fits)[1]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name of every module imported to run, inside functions too; those for types alone do not run."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((node.lineno, whole if whole in MODULES else str(node.module)))
        found += imports(node)
    return found


def test_imports_point_downwards() -> None:
    wrong = []
    for module, tree in MODULES.items():
        for line, imported in imports(tree):
            if imported.partition(".")[0] == "qtool" and layer_of(imported) < layer_of(module):
                wrong.append(f"{module}, line {line}: imports {imported} from a layer above")
    assert not wrong, "\n".join(wrong)


def test_every_module_is_on_the_map() -> None:
    """By a prefix of its own: the last layer is the package itself, with its version."""
    assert [m for m in MODULES if layer_of(m) == len(LAYERS) - 1] == ["qtool"]
    known = {prefix for layer in LAYERS for prefix in layer}
    for prefix in known:
        assert prefix in MODULES, f"{prefix} is no module any more"


def test_the_check_sees_what_it_should() -> None:
    tree = ast.parse(
        "import a\nfrom qtool import cli\nif TYPE_CHECKING:\n    import b\ndef f():\n    from qtool.scheme import x\n"
    )
    assert imports(tree) == [(1, "a"), (2, "qtool.cli"), (6, "qtool.scheme")]
    assert (
        layer_of("qtool.formats.weights")
        < layer_of("qtool.formats.compressed_tensors")
        < layer_of("qtool.numerics.grid")
    )
    assert layer_of("qtool.cli.console") == 0


def test_no_module_imports_itself_in_a_circle() -> None:
    """At import time, that is: inside functions it does no harm."""
    graph = {m: {i for _, i in top_level(t) if i in MODULES and i != m} for m, t in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def top_level(tree: ast.Module) -> list[tuple[int, str]]:
    body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return imports(ast.Module(body=list(body), type_ignores=[]))


def test_only_the_console_prints() -> None:
    wrong = []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                wrong.append((module, node.lineno))
            if (
                isinstance(node, ast.Attribute)
                and node.attr in ("stdout", "stderr")
                and isinstance(node.value, ast.Name)
            ):
                wrong.append((module, node.lineno))
    others = [place for place in wrong if place[0] not in ("qtool.cli.console", "qtool.cli")]
    assert not others
    in_cli = [
        n for n in ast.walk(MODULES["qtool.cli"]) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"
    ]
    assert len(in_cli) <= 1, "only --version prints there"


def test_only_the_command_line_catches() -> None:
    """QtoolErrors pass through the library: no bare or blanket handlers without a reason beside them."""
    wrong = []
    for module, tree in MODULES.items():
        # those that stage an output clean up and raise again; a recommendation says why a program cannot have a model
        if module.startswith("qtool.cli") or module in STAGING:
            continue
        lines = (ROOT.parent / Path(*module.split("."))).with_suffix(".py")
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"everything"}
                if names & {"everything", "BaseException", "QtoolError", "UsageError"}:
                    wrong.append(f"{lines}, line {node.lineno}: catches {', '.join(sorted(names))}")
    assert not wrong, "\n".join(wrong)


def test_architectures_are_data() -> None:
    """Nothing outside `models` compares a model_type."""
    wrong = []
    for module, tree in MODULES.items():
        if not module.startswith("qtool.models"):
            for node in ast.walk(tree):
                if isinstance(node, ast.Compare):
                    text = ast.unparse(node)
                    if "model_type" in text:
                        wrong.append(f"{module}, line {node.lineno}: {text}")
    assert not wrong, "\n".join(wrong)


def test_what_must_be_quick_loads_nothing_heavy() -> None:
    """In one fresh interpreter, one module after another, so that the first to load something is named."""
    names = [f"qtool.{m}" for m in WITHOUT_TORCH]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "    if loaded:\n"
        "        sys.exit(f'{name} loads {loaded}')\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_options_are_checked_without_torch() -> None:
    code = (
        "import sys\n"
        "from qtool.methods import METHODS, get_method\n"
        "from qtool.recipe import build\n"
        "recipe = build({'gptq': {'damp': 0.1}, 'scheme': 'w4a16'}, METHODS)\n"
        "for name in METHODS:\n"
        "    get_method(name, recipe.options.get(name, {}))\n"
        "assert 'torch' not in sys.modules\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
