"""Damaged checkpoints of every format end in one line that says what is wrong: no crash, no hang, no large allocation.

What is damaged: bytes of the file, its length, fields of its header, whole tensors, entries of config.json, the index.
A damaged file may also still be read: that a flipped bit changes a weight nobody can tell.
"""

from __future__ import annotations

import copy
import json
import math
import random
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from qtool.cli import run
from qtool.errors import QtoolError
from qtool.evaluation.describe import describe
from qtool.formats import FORMATS, READ_ONLY, Contents, get_format
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import GGUFCheckpoint, open_checkpoint
from qtool.gguf.tokenizer import tokenizer_of
from qtool.headers import TORCH_NAMES
from qtool.inspection.memory import memory
from qtool.inspection.overview import overview
from qtool.job import describe as describe_job
from qtool.job import prepare
from qtool.numerics.grid import QTensor, grid_of
from qtool.recipe import DataSpec, EvalSpec, build
from qtool.scheme import EXAMPLES, KV_SCHEMES, QuantScheme

FILE, MODULE, BLOCK = "model.safetensors", "model.layers.0.mlp.up_proj", "model.layers.0"
SHAPE = (64, 256)
MOST_SECONDS, MOST_BYTES = 2.0, 200e6
RELAID = ("dense", "gguf", "gptq", "compressed-tensors")  # formats that all damaged sources go through, on paper
SAMPLE = 25  # damages of a kind that are tried of each case, but for one case per format in the slow suite
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
Files = dict[str, bytes]
Damages = Iterator[tuple[str, Files]]


# Sound checkpoints: one packed linear each


def quantized(scheme: QuantScheme, scale_dtype: str) -> QTensor:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    grid = grid_of(scheme, getattr(torch, TORCH_NAMES[scale_dtype]))
    found = grid.nearest(weight, grid.fit(weight, search=False))
    if scheme.activations and scheme.activations.is_static:
        dtype = torch.float32 if scheme.activations.kind == "nvfp4" else grid.scale_dtype
        return replace(found, input_scale=torch.ones(1, dtype=dtype))
    return found


def written_by_us(name: str) -> dict[str, Files]:
    """One checkpoint for each way in which a format lays tensors out."""
    found, seen = {}, set()
    written = get_format(name)
    for text in EXAMPLES:
        scheme = QuantScheme.parse(text)
        if written.problem(scheme, SHAPE):
            continue
        scale_dtype = written.scale_dtype("BF16")
        layout = [(i.name, i.dtype, len(i.shape)) for i in written.layout("m", scheme, SHAPE, scale_dtype)]
        if str(layout) in seen or scheme.kind == "f32":
            continue
        seen.add(str(layout))
        tensors = written.pack(MODULE, quantized(scheme, scale_dtype))
        kv = KV_SCHEMES["fp8"] if name in ("compressed-tensors", "qtool") else None
        if kv:
            tensors |= {f"{BLOCK}.self_attn.{part}_scale": torch.ones(1) for part in "kv"}
        found[f"{name}:{text}"] = files_of(tensors, written.config(Contents({MODULE: scheme}, ["lm_head"], kv)))
    return found


def written_by_others() -> dict[str, Files]:
    scale, codes = torch.ones(1, 2), torch.ones(SHAPE).to(torch.float8_e4m3fn)
    blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    fixed = {f"{MODULE}.weight_scale": torch.ones(()), f"{MODULE}.input_scale": torch.ones(())}
    static = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    pairs, exponents = torch.ones(2, 32, 4, 16).byte(), torch.full((2, 32, 4), 127).byte()
    experts = {f"{BLOCK}.mlp.experts.up_proj_blocks": pairs, f"{BLOCK}.mlp.experts.up_proj_scales": exponents}
    experts |= {f"{MODULE}.weight_blocks": pairs[0].clone(), f"{MODULE}.weight_scales": exponents[0].clone()}
    return {
        "fp8:blocks": files_of({f"{MODULE}.weight": codes, f"{MODULE}.weight_scale_inv": scale}, blocks),
        "fp8:static": files_of({f"{MODULE}.weight": codes, **fixed}, static),
        "mxfp4:experts": files_of(experts, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
    }


def files_of(tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> Files:
    dense = {"model.norm.weight": torch.ones(256), "model.embed_tokens.weight": torch.ones(8, 256)}
    config = {**CONFIG, **({"quantization_config": quantization} if quantization else {})}
    return {FILE: save({**dense, **tensors}), "config.json": json.dumps(config).encode()}


def sound() -> dict[str, Files]:
    found = {"dense": files_of({f"{MODULE}.weight": torch.ones(SHAPE)}, None), **written_by_others()}
    for name in FORMATS:
        if get_format(name).container == "safetensors" and name != "dense":
            found |= written_by_us(name)
    return found


SOUND = sound()


def one_of_each_format() -> list[str]:
    return list({case.partition(":")[0]: case for case in SOUND}.values())


def put(folder: Path, files: Files) -> Path:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# What must hold


def probe(path: Path) -> list[str]:
    """What is said of a checkpoint by all that reads one; an error that no user should see is raised."""
    said = []

    def values() -> None:
        weights = Weights(open_checkpoint(path))
        weights.roundings(BLOCK)
        weights.kv_scales(BLOCK)
        for name in weights.shapes:
            with suppress_said(said):
                weights.read([name])

    def tokenizer() -> None:
        checkpoint = open_checkpoint(path)
        if isinstance(checkpoint, GGUFCheckpoint):
            tokenizer_of(checkpoint.metadata)

    steps: list[Callable[[], object]] = [
        values,
        tokenizer,
        lambda: overview(open_checkpoint(path)).to_tree(),
        lambda: memory(open_checkpoint(path), 4096, 1).to_tree(),
        lambda: describe(path, None, EvalSpec(DataSpec())),
    ]
    for step in steps:
        with suppress_said(said):
            step()
    for name in RELAID:
        with suppress_said([], "\n"):  # not every format can hold it; a plan lists all that is wrong with it
            describe_job(prepare(str(path), build({"format": name}, ())))
    return said


class suppress_said(suppress):  # noqa: N801 (as contextlib's own)
    """Expected errors are noted, and must be one line, or several with this between them."""

    def __init__(self, said: list[str], between: str | None = None) -> None:
        super().__init__(QtoolError)
        self.said, self.between = said, between

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if isinstance(error, QtoolError):
            lines = error.message.split(self.between) if self.between else [error.message]
            assert all(map(str.isprintable, lines)), repr(error.message)
            self.said.append(error.message)
        return super().__exit__(kind, error, trace)


def check(folder: Path, damages: Damages, thorough: bool, seed: int = 0) -> None:
    chosen = list(damages)
    if not thorough and len(chosen) > SAMPLE:
        chosen = random.Random(seed).sample(chosen, SAMPLE)
    wrong = []
    probe(put(folder, SOUND["dense"]))  # imports count for no damage
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for what, files in chosen:
        start = time.perf_counter()
        put(folder, files)
        try:
            probe(folder)
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {str(error)[:200]} {origin(error)}")
        if time.perf_counter() - start > MOST_SECONDS:
            wrong.append(f"{what}: took {time.perf_counter() - start:.1f} s")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert not wrong, f"{len(wrong)} of {len(chosen)}:\n" + "\n".join(wrong[:40])
    assert grown < MOST_BYTES, f"{grown / 1e6:.0f} MB"


def origin(error: BaseException) -> str:
    """Where in our code it came from."""
    trace, found = error.__traceback__, ""
    while trace:
        code = trace.tb_frame.f_code
        if "qtool" in code.co_filename and "tests" not in code.co_filename:
            found = f"{Path(code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


# Damages


def changed_bytes(files: Files) -> Damages:
    data, chance = files[FILE], random.Random(1)
    header = 8 + int.from_bytes(data[:8], "little")
    lengths = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, (header + len(data)) // 2, len(data) - 1}
    for length in sorted(lengths):
        yield f"{length} of {len(data)} bytes", {**files, FILE: data[:length]}
    yield "a byte more", {**files, FILE: data + b"\0"}
    for claimed in (0, 1, header, len(data), 10**8, 10**8 + 1, 2**31, 2**63 - 1, 2**64 - 1):
        yield f"a header of {claimed} bytes", {**files, FILE: struct.pack("<Q", claimed) + data[8:]}
    for _ in range(200):
        place, flipped = chance.randrange(header), bytearray(data)
        flipped[place] ^= 1 << chance.randrange(8)
        yield f"bit at {place}", {**files, FILE: bytes(flipped)}
    for text in (b"", b"[]", b"null", b"[" * 10000, b'{"a":' * 2000, b'"x"', b'{"a": {}}', b"\xff" * 40):
        yield f"header {text[:9]!r}", {**files, FILE: struct.pack("<Q", len(text)) + text}


def changed_fields(files: Files) -> Damages:
    data = files[FILE]
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        fields: dict[str, list[Any]] = {
            "dtype": ["F64", "F4", "BOOL", "C64", "X9", "", None, 7, []],
            "shape": [[], [0], [-1], [2**62, 4], [2**64], [1.5], ["x"], "x", None, [1] * 70, [0, 2**63]],
            "data_offsets": [[0, 0], [stop, begin], [-1, stop], [begin, 2**63], [0, 2**64], [begin], "x", None,
                             [begin + 1, stop + 1], [begin, stop - 1], [0, stop]],
        }  # fmt: skip
        for field, values in fields.items():
            for value in values:
                changed = {**header, name: {**entry, field: value}}
                yield f"{name} {field} {value}", {**files, FILE: assembled(changed, data[end:])}
        for odd in ("../../etc/passwd", "a\nb", "x" * 5000, "", "é\u202e", name + " "):
            renamed = {(odd if key == name else key): value for key, value in header.items()}
            yield f"{name} named {odd[:20]!r}", {**files, FILE: assembled(renamed, data[end:])}


def assembled(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def changed_tensors(files: Files) -> Damages:
    tensors = load(files[FILE])
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "as bytes": lambda t: t.reshape(-1).view(torch.uint8),
        "as signed bytes": lambda t: torch.zeros(t.shape).char(),
        "as floats": lambda t: torch.zeros(t.shape),
        "as doubles": lambda t: torch.zeros(t.shape).double(),
        "as fp8": lambda t: torch.zeros(t.shape).to(torch.float8_e4m3fn),
        "as e8m0": lambda t: torch.ones(t.shape).to(torch.float8_e8m0fnu),
        "as long": lambda t: torch.full(t.shape, -1),
        "as bools": lambda t: torch.zeros(t.shape).bool(),
        "flat": lambda t: t.reshape(-1),
        "empty": lambda t: t.reshape(-1)[:0],
        "no rows": lambda t: t[:0] if t.dim() else t.reshape(1)[:0],
        "no columns": lambda t: t[..., :0] if t.dim() else t.reshape(1)[:0],
        "a row": lambda t: t[:1] if t.dim() else t,
        "a row less": lambda t: t[:-1] if t.dim() else t,
        "a column less": lambda t: t[..., :-1] if t.dim() else t,
        "twice": lambda t: torch.cat([t, t]) if t.dim() else t.repeat(2),
        "turned": lambda t: t.transpose(0, -1) if t.dim() else t,
        "deeper": lambda t: t[None],
        "a number": lambda t: t.reshape(-1)[0],
        "all bits": lambda t: filled(t, 255),
        "no bits": lambda t: filled(t, 0),
        "signs": lambda t: filled(t, 128),
        "noise": noise,
    }
    for name, tensor in tensors.items():
        yield f"no {name}", {**files, FILE: save({n: t for n, t in tensors.items() if n != name})}
        for what, change in changes.items():
            changed = {**tensors, name: change(tensor).contiguous().clone()}
            yield f"{name} {what}", {**files, FILE: save(changed)}
    yield "nothing", {**files, FILE: save({})}


def filled(tensor: Tensor, byte: int) -> Tensor:
    return torch.full((tensor.numel() * tensor.element_size(),), byte).byte().view(tensor.dtype).view(tensor.shape)


def noise(tensor: Tensor) -> Tensor:
    size = tensor.numel() * tensor.element_size()
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (size,), generator=generator).byte().view(tensor.dtype).view(tensor.shape)


ABSENT = object()
ODD: list[Any] = [
    ABSENT, None, True, False, 0, -5, 1, 3, 10**9, 2**64, 10**400, 0.5, math.nan, math.inf, "", "x", "re:(", "a\nb",
    "../../etc/passwd", "x" * 5000, [], {}, [[]], [None], ["re:("], {"a": {"b": []}}, [1, "x"], [10**9, 10**9],
]  # fmt: skip


def changed_config(files: Files) -> Damages:
    config = json.loads(files["config.json"])
    whole = not config.get("quantization_config")
    for path in paths(config):
        if not whole and path[0] != "quantization_config":
            continue
        for value in ODD:
            changed = copy.deepcopy(config)
            place = changed
            for key in path[:-1]:
                place = place[key]
            if value is ABSENT:
                del place[path[-1]]
            else:
                place[path[-1]] = value
            what = f"{'.'.join(map(str, path))} = {'nothing' if value is ABSENT else repr(value)[:40]}"
            yield what, {**files, "config.json": json.dumps(changed).encode()}
    for text in (b"", b"[]", b"null", b"7", b"[" * 100000, b'{"a":' * 50000, b"\xff\xfe", b"{" + b" " * 10, b"NaN"):
        yield f"config.json {text[:9]!r}", {**files, "config.json": text}


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


INDEX = "model.safetensors.index.json"
MAPS: list[Any] = [
    {"weight_map": {"a": "../../etc/passwd"}}, {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": FILE}},
    {"weight_map": {"a": "."}}, {"weight_map": {"a": ""}}, {"weight_map": {"a": "a\0b.safetensors"}},
    {"weight_map": {"a": "x.safetensors"}}, {"weight_map": {"a": 7}}, {"weight_map": []}, {"weight_map": None}, {}, [],
    {"weight_map": {"a": "a\nb.safetensors"}}, {"weight_map": {"a": "config.json"}}, {"weight_map": {}}, 7, "x",
    {"weight_map": {"a": "x" * 5000 + ".safetensors"}}, {"weight_map": {"a": "..\\..\\x.safetensors"}},
    {"weight_map": {str(i): f"{i}.safetensors" for i in range(1000)}},
]  # fmt: skip


def changed_index(files: Files) -> Damages:
    for tree in MAPS:
        yield f"index {str(tree)[:60]}", {**files, INDEX: json.dumps(tree).encode()}
    for text in (b"", b"[" * 100000, b"\xff\xfe"):
        yield f"index {text[:9]!r}", {**files, INDEX: text}


def changed_gguf(files: Files, name: str) -> Damages:
    data, chance = files[name], random.Random(2)
    for length in (0, 3, 4, 8, 23, 24, 100, 5000, len(data) // 2, len(data) - 1):
        yield f"{length} of {len(data)} bytes", {name: data[:length]}
    for count in (2**31, 2**32, 2**63 - 1, 2**64 - 1):
        for place in (8, 16):  # tensors and metadata
            yield f"{count} at {place}", {name: data[:place] + struct.pack("<Q", count) + data[place + 8 :]}
    for _ in range(300):
        place, flipped = chance.randrange(min(20000, len(data))), bytearray(data)
        flipped[place] ^= 1 << chance.randrange(8)
        yield f"bit at {place}", {name: bytes(flipped)}


FILE_DAMAGES = {"bytes": changed_bytes, "fields": changed_fields, "tensors": changed_tensors, "config": changed_config}


@pytest.mark.parametrize("case", SOUND)
def test_what_is_damaged_was_sound(tmp_path: Path, case: str) -> None:
    assert probe(put(tmp_path / "m", SOUND[case])) == []


def test_safetensors_that_say_gguf(tmp_path: Path) -> None:
    tensors = {f"{MODULE}.weight": torch.ones(SHAPE)}
    said = probe(put(tmp_path / "m", files_of(tensors, {"quant_method": "gguf"})))
    assert set(said) == {f"{tmp_path / 'm'} has safetensors, but its config.json says `quant_method`: gguf"}


def test_every_format_is_among_them() -> None:
    in_safetensors = {name for name in FORMATS if get_format(name).container == "safetensors"} | set(READ_ONLY)
    assert {case.partition(":")[0] for case in SOUND} == in_safetensors


@pytest.mark.parametrize("kind", FILE_DAMAGES)
@pytest.mark.parametrize("case", one_of_each_format())
def test_damage(tmp_path: Path, case: str, kind: str) -> None:
    check(tmp_path / "m", FILE_DAMAGES[kind](SOUND[case]), thorough=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILE_DAMAGES)
@pytest.mark.parametrize("case", SOUND)
def test_damage_thoroughly(tmp_path: Path, case: str, kind: str) -> None:
    check(tmp_path / "m", FILE_DAMAGES[kind](SOUND[case]), thorough=case in one_of_each_format(), seed=1)


def test_damaged_gguf(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    scheme = ["--format", "gguf", "--method", "rtn", "--scheme", "q8_0"]
    assert run(["quantize", str(make_model()), "-o", str(out), *scheme, "-q"]) == 0
    (path,) = out.glob("*.gguf")
    files = {path.name: path.read_bytes()}
    assert probe(put(tmp_path / "m", files)) == []
    check(tmp_path / "m", changed_gguf(files, path.name), thorough=False)


@pytest.mark.parametrize("case", one_of_each_format())
def test_the_command_line_says_it_in_one_line(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    files, text = SOUND[case], tmp_path / "text.txt"
    text.write_text("a text")
    tensors = load(files[FILE])
    packed = max((name for name in tensors if name.startswith(MODULE)), key=lambda name: tensors[name].numel())
    damaged = {
        "half": {**files, FILE: files[FILE][: len(files[FILE]) // 2]},
        "long": {**files, FILE: struct.pack("<Q", 2**63) + files[FILE][8:]},
        "flat": {**files, FILE: save({**tensors, packed: tensors[packed].reshape(-1)[:5].clone()})},
        "words": {**files, "config.json": json.dumps({**CONFIG, "quantization_config": "x"}).encode()},
        "deep": {**files, "config.json": b"[" * 100000},
    }
    if case == "dense":
        del damaged["flat"]
    for what, changed in damaged.items():
        path = put(tmp_path / "m", changed)
        relay = ["quantize", path, "--format", "dense", "--dry-run"]
        for command in (["inspect", path], ["eval-ppl", path, "--dry-run", "--data", text], relay):
            capsys.readouterr()
            code = run([str(argument) for argument in command])
            out, err = capsys.readouterr()
            said = [line for line in err.splitlines() if line and not line.startswith("hint: ")]
            assert (out, code in (1, 2), len(said)) == ("", True, 1), f"{what}: {code}, {out[:80]}, {err}"
            assert said[0].startswith("error: "), what
            assert "the traceback is shown with -v" not in err, what


OPEN = """
import resource, sys, time
from pathlib import Path
import numpy, safetensors
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError

for path in map(Path, sys.argv[1:]):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        Checkpoint(path)
    except QtoolError as error:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        print(error.message, time.perf_counter() - start, grown, sep="|")
"""


def test_headers_of_90_megabytes(tmp_path: Path) -> None:
    size = 90_000_000
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    junk = {
        "brackets": b"[" * size,
        "text": b'{"a":"' + b"x" * size + b'"}',
        "shape": b'{"a":' + entry.replace(b"[0]", b"[" + b"1," * (size // 2) + b"0]") + b"}",
        "tensors": b"{" + b",".join(b'"%d":%b' % (i, entry) for i in range(size // 60)) + b"}",
    }
    files = []
    for what, header in junk.items():
        files.append(tmp_path / f"{what}.safetensors")
        files[-1].write_bytes(struct.pack("<Q", len(header)) + header)
    command = [sys.executable, "-c", OPEN, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(junk), done.stderr
    for line in lines:
        message, seconds, grown = line.split("|")
        assert "safetensors" in message
        assert float(seconds) < MOST_SECONDS, line
        assert float(grown) < MOST_BYTES, line


def test_damaged_indices(tmp_path: Path) -> None:
    check(tmp_path / "m", changed_index(SOUND["dense"]), thorough=True)
