"""A recipe: everything that decides the bytes of an output, as frozen dataclasses.

It comes from YAML, `--set key=value` and typed flags, in that order of rising precedence, and prints
back as YAML. An unknown key is an error with the nearest known one. Never imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qtool.errors import UsageError, unknown
from qtool.mixes import ALIASES as MIX_ALIASES
from qtool.mixes import MIXES, get_mix
from qtool.scheme import BLOCK_TYPES, KV_SCHEMES, QuantScheme

EMBEDDINGS = ("*lm_head", "*embed_out", "*embed*", "*wte", "*wpe")
DEFAULT_IGNORE = (*EMBEDDINGS, "*norm*", "*router*", "*.gate")
AUTO, DEFAULT_SCHEME, DEFAULT_METHOD = "auto", "int4-g128-sym", "gptq"
NO_METHOD = "none"  # of a model that is only laid out anew
PROTOCOLS = ("windows", "rows", "llama.cpp")
SHORTHANDS = {"data": "source", "eval": "data"}  # a section given as one word means this key of it


class Loader(yaml.SafeLoader):
    """YAML without numbers of base 60: `4:1` is text."""

    def construct_yaml_int(self, node: Any) -> Any:
        return node.value if ":" in node.value else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        return node.value if ":" in node.value else super().construct_yaml_float(node)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and not least <= value < math.inf:
        raise UsageError(f"{name} is {value}, but must be a number of at least {least}")


@dataclass(frozen=True)
class DataSpec:
    """Where token rows come from."""

    source: str = "python-docs"  # built-in name, file, directory, or data set id
    split: str | None = None  # of a data set; default "train" to calibrate, "test" to evaluate
    column: str | None = None  # of a data set; default `text`, else `messages`
    rows: int | None = None  # at most so many rows; default 128 to calibrate, all to evaluate
    seqlen: int | None = None  # tokens per row; default the model's context, at most 2048
    pack: bool = True  # True: join the texts and cut; False: one row per text
    seed: int = 0  # which rows, when there are more than asked for

    def __post_init__(self) -> None:
        _at_least("rows", self.rows, 1)
        _at_least("seqlen", self.seqlen, 2)


@dataclass(frozen=True)
class EvalSpec:
    """What is measured, and the gates on it."""

    data: DataSpec = DataSpec()
    protocol: str = "windows"  # windows, rows or llama.cpp
    stride: int | None = None  # windows: tokens between their starts; default no overlap
    max_ppl_increase: str | None = None  # gate: "1%" relative, or "0.2" absolute
    max_kl: float | None = None  # gate on the mean KL divergence, in nats per token

    def __post_init__(self) -> None:
        _at_least("stride", self.stride, 1)
        if self.stride is not None and self.protocol != "windows":
            raise UsageError(f"--stride belongs to the protocol windows, not {self.protocol}")
        _at_least("max_kl", self.max_kl, 0)


@dataclass(frozen=True)
class Recipe:
    """What `quantize` does to a model."""

    scheme: str = AUTO  # of every linear that no pattern below names; auto: int4-g128-sym
    layers: Mapping[str, str] = field(default_factory=dict)  # pattern -> scheme; the last match wins
    ignore: tuple[str, ...] = DEFAULT_IGNORE  # patterns of modules that stay as they are
    transforms: tuple[str, ...] = ()  # what is done to the weights before, in this order
    method: str = AUTO  # which codes are chosen; auto: gptq
    finish: tuple[str, ...] = ()  # how what was rounded is trained afterwards, in this order
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # method, transform or finish -> its options
    kv: str | None = None  # the key/value cache when the model is served: fp8 or int8
    format: str = "auto"  # how they lie on disk; auto: what the scheme's readers expect
    data: DataSpec = DataSpec()  # calibration rows, for what wants them
    stats: str | None = None  # saved statistics instead of data, as `qtool calibrate` writes them
    eval: EvalSpec | None = None  # measure before and after, and gate
    requantize: bool = False  # a model that is quantized already is rounded a second time
    strict: bool = False  # a tensor left alone for any reason that was not asked for is an error


def build(tree: Mapping[str, Any], with_options: typing.Iterable[str]) -> Recipe:
    """The recipe that a tree of plain values describes; `with_options` are the methods, transforms and finishes.

    Raises UsageError for unknown keys and wrong types.
    """
    tree, names = dict(tree), tuple(with_options)
    options = {name: dict(_mapping(name, tree.pop(name) or {})) for name in names if name in tree}
    if "options" in tree:
        raise UsageError("unknown recipe key `options`", f"options stand under their owner's name: {', '.join(names)}")
    recipe: Recipe = _from_tree(Recipe, tree, "", extra=names)
    for kind, names_of_kind in (("transform", recipe.transforms), ("finish", recipe.finish)):
        twice = next((name for name in names_of_kind if names_of_kind.count(name) > 1), None)
        if twice:
            raise UsageError(f"{kind} `{twice}` is given twice", "once is enough")
    if recipe.kv is not None and recipe.kv not in KV_SCHEMES:
        raise unknown("type of key/value cache", recipe.kv, KV_SCHEMES)
    layers = {pattern: str(QuantScheme.parse(scheme)) for pattern, scheme in recipe.layers.items()}
    recipe = dataclasses.replace(recipe, options=options, layers=layers, scheme=_scheme(recipe.scheme))
    if recipe.eval and recipe.eval.protocol not in PROTOCOLS:
        raise unknown("protocol", recipe.eval.protocol, PROTOCOLS)
    return recipe


def _scheme(text: str) -> str:
    name = text.strip().lower()
    name = MIX_ALIASES.get(name, name)
    if name.startswith(("q", "iq")) and name not in BLOCK_TYPES:
        return get_mix(name).name.lower()  # or an error that names the nearest
    return name if name == AUTO or name in MIXES else str(QuantScheme.parse(text))


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """The plain values that `build` takes: the inverse of it."""
    tree = dataclasses.asdict(recipe)
    tree.update(ignore=list(recipe.ignore), transforms=list(recipe.transforms), finish=list(recipe.finish))
    tree.update(tree.pop("options"))
    return tree


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(to_tree(recipe), sort_keys=False, allow_unicode=True)


def load_tree(path: Path) -> dict[str, Any]:
    """The YAML mapping in a recipe file."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UsageError(f"cannot read recipe `{path}`: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe `{path}` is not YAML: {' '.join(str(error).split())}") from None
    return dict(_mapping(f"recipe `{path}`", tree if tree is not None else {}))


def set_key(tree: dict[str, Any], assignment: str) -> None:
    """Apply one `--set a.b=value` to a tree; the value is YAML."""
    path, equals, value = assignment.partition("=")
    if not equals or not path:
        raise UsageError(f"`--set {assignment}` is not KEY=VALUE", "for example `--set gptq.damp=0.05`")
    *parents, last = path.split(".", 1 if path.startswith("layers.") else -1)  # patterns have dots of their own
    for parent in parents:
        tree[parent] = section(tree, parent)
        tree = tree[parent]
    try:
        tree[last] = yaml.load(value, Loader)
    except yaml.YAMLError:
        raise UsageError(f"`--set {assignment}`: `{value}` is not a YAML value") from None


def section(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of a section of a tree, empty when it is not there; one word stands for its main key."""
    value = tree.get(name)
    if isinstance(value, str) and name in SHORTHANDS:
        return {SHORTHANDS[name]: value}
    return dict(_mapping(f"`{name}`", value if value is not None else {}))


def options_of(cls: type, values: Mapping[str, Any], name: str) -> Any:
    """An instance of an options dataclass from plain values, checked key by key and type by type.

    `name` is the section of the recipe that they stand in; "" for the whole of it.
    """
    return _from_tree(cls, values, name and name + ".")


def _mapping(what: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{what} must hold keys and values, not `{value}`")
    return value


def _from_tree(cls: type, tree: Mapping[str, Any], prefix: str, extra: tuple[str, ...] = ()) -> Any:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.name != "options"]
    values = {}
    for key, value in _mapping(f"`{prefix.rstrip('.') or 'the recipe'}`", tree).items():
        if key not in names:
            raise unknown("recipe key", f"{prefix}{key}", [prefix + n for n in (*names, *extra)])
        values[key] = _convert(value, hints[key], prefix + str(key))
    return cls(**values)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type `hint`, or a UsageError that names the key."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        if {str, float} <= set(args):  # a schedule: a number where it is one
            with contextlib.suppress(TypeError, ValueError):
                return float(value)
        return _convert(value, next(a for a in args if a is not type(None)), key)
    if dataclasses.is_dataclass(hint):
        main_key = {DataSpec: "source", EvalSpec: "data"}.get(typing.cast(type, hint))
        if isinstance(value, str) and main_key:
            value = {main_key: value}
        return _from_tree(typing.cast(type, hint), value, key + ".")
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        if all(type(i) is args[0] for i in items):
            return tuple(items)
    elif origin is not None and issubclass(origin, Mapping):
        return {str(k): str(v) for k, v in _mapping(f"`{key}`", value).items()}
    elif hint is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):  # YAML 1.1 takes 1e-3 for text
            return float(value)
    elif hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    elif hint in (int, bool) and type(value) is hint:
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        hint, "a list of whole numbers" if args[:1] == (int,) else "a list of text"
    )
    raise UsageError(f"recipe key `{key}` takes {expected}, not `{value}`")
