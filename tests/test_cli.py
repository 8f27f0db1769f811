"""The command line from outside: the whole of stdout, of stderr, and the exit code."""

import errno
import json
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main
from safetensors.torch import load_file, save_file

from qtool import __version__
from qtool.cli import app, main, run, state
from qtool.cli.console import Console
from qtool.cli.reference import reference
from qtool.errors import UsageError
from qtool.recipe import to_yaml
from qtool.scheme import EXAMPLES

ROOT = Path(__file__).parent.parent
HELD = "\x1b"  # begins every escape sequence
COMMON = ["--json", "-q", "--quiet", "-v", "--verbose", "--progress", "--no-progress", "--log-format", "--force",
          "--dry-run", "-o", "--output"]  # fmt: skip
COMMANDS = ["quantize", "calibrate", "distill", "eval-ppl", "inspect"]
RTN = ["--scheme", "int4-g32-sym", "--method", "rtn"]
GPTQ = ["--scheme", "int4-g32-sym", "--data", "c.jsonl", "--seqlen", "32", "--rows", "16"]
SHOW_TRACEBACK = "\nhint: the traceback is shown with -v\n"
EXISTS_HINT = "hint: give another -o/--output, or replace it with --force\n"
MISSED = "error: a quality gate was missed: the output is kept and marked in its manifest\n"


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        """The one JSON object that is all of stdout."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        assert self.out == json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        return value

    @property
    def all(self):
        return self.code, self.out, self.err


@pytest.fixture
def qtool(capsys):
    """`qtool("inspect", "m") -> Result`: a command line in this process."""

    def call(*arguments):
        capsys.readouterr()
        state.console = Console()  # as in a new process
        code = run([str(a) for a in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def here(tmp_path, monkeypatch, make_model, calibration_text):
    """An empty current folder but for a tiny model `m` and a text `c.jsonl`."""
    shutil.copytree(make_model(), tmp_path / "m")
    shutil.copy(calibration_text, tmp_path / "c.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def environment(**extra):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def process(*arguments, cwd, **extra):
    """The same as a process of its own, with pipes."""
    command = [sys.executable, "-m", "qtool", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=120)
    return Result(done.returncode, done.stdout, done.stderr)


def manifest(folder):
    return json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))


def digests(folder):
    """Name and sha256 of every file that the manifest lists."""
    return {f["name"]: f["sha256"] for f in manifest(folder)["files"]}


def change_tensors(folder, change):
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def change_config(folder, **fields):
    file = Path(folder) / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **fields}
    file.write_text(json.dumps(config), encoding="utf-8")


def without_times(text):
    """Durations, memory and rates as letters, since no two runs have the same."""
    text = re.sub(r"\d+(\.\d+)? s\b", "T", text)
    text = re.sub(r"\d+ tokens/s", "R", text)
    return re.sub(r"(peak memory +)\d+\.\d\d [MG]B", r"\1M", text)


# ---- help


def commands():
    return typer.main.get_command(app).commands


def test_there_are_these_commands():
    assert sorted(commands()) == sorted(COMMANDS) == ["calibrate", "distill", "eval-ppl", "inspect", "quantize"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(qtool, command, flag):
    result = qtool(*command, flag)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"Usage: {' '.join(['qtool', *command])} [OPTIONS]")
    assert result.out.count("Usage:") == 1
    known = commands()[command[0]].params if command else []
    for param in known:
        for name in [*param.opts, *param.secondary_opts] if param.param_type_name == "option" else ["MODEL"]:
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", result.out), name
    if not command:
        for name, known_command in commands().items():
            assert re.search(rf"^  {name} +{re.escape(known_command.get_short_help_str(100))}$", result.out, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented_and_the_common_ones_are_there(command):
    params = commands()[command].params
    assert [p.name for p in params if not getattr(p, "help", "")] == []
    names = [name for p in params for name in (*p.opts, *p.secondary_opts)]
    assert [name for name in COMMON if name not in names] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_a_help_text_are_commands_that_parse(command):
    examples = re.findall(rf"qtool {command} .*", commands()[command].help)
    assert examples
    for example in examples:
        parsed = commands()[command].make_context(command, shlex.split(example)[2:])
        assert all(m.startswith("./") for m in parsed.params.get("models") or [parsed.params["model"]]), example


def test_the_reference_holds_every_help_text(qtool):
    page = reference()
    assert re.findall(r"^## (.*)$", page, re.M) == ["qtool", *(f"qtool {name}" for name in sorted(COMMANDS))]
    for name, command in commands().items():
        section = page.partition(f"## qtool {name}\n")[2].partition("\n## ")[0]
        for param in command.params:
            options = param.opts if param.param_type_name == "option" else ["MODEL"]
            assert all(option in section for option in options), param.name


def test_version(qtool):
    assert qtool("--version").all == (0, f"qtool {__version__}\n", "")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_no_arguments_show_the_help_and_not_as_an_error(qtool, command):
    result = qtool(*command)
    assert result.code == 2
    assert (result.out + result.err).startswith(f"Usage: {' '.join(['qtool', *command])} [OPTIONS]")
    assert "error:" not in result.err


# ---- usage errors: exit 2, nothing on stdout, no torch


HINT_HELP = "hint: see `qtool {}--help`\n"
NO_SUCH = "hint: a hub id looks like `org/name` or `org/name@revision`\n"


def said(message, hint=None):
    return f"error: {message}\n" + (f"\nhint: {hint}\n" if hint else "")


def unstorable(scheme, cause, more):
    """What a format says of a scheme that it does not have."""
    of = r"`[\w.]+`"
    return re.compile(
        rf"error: {of} cannot be {scheme} in this output: {re.escape(cause)} \({more} more like it\)\n"
        r"\nhint: .*`--format.*\n"
    )


CANNOT_RUN = re.compile(
    r"error: unknown is of architecture `whoknows`, which qtool cannot run; it runs gemma2, .*, qwen3\n"
    r"\nhint: .*`qtool quantize --method rtn` .*\n"
)
OWN_TEXT = said("rows that a model writes itself say nothing about its perplexity", "give a text")
INTO = ["quantize", "m", "-o", "new"]
KINDS = {
    "scheme": ([*INTO, "--scheme", "int4-g128-syn"], said(
        "unknown part of scheme `int4-g128-syn`: `syn`", "did you mean `sym` or `asym`?")),
    "scheme alias": ([*INTO, "--scheme", "w4a61"], said(
        "unknown scheme `w4a61`", "did you mean `w4a16` or `w4a8`?")),
    "scheme, nothing near": ([*INTO, "--scheme", "zzz"], said(
        "unknown scheme `zzz`", f"known: {', '.join(EXAMPLES)}")),
    "scheme, bits": ([*INTO, "--scheme", "int1-g128-sym"], said(
        "scheme `int1-g128-sym` asks for 1 bits: integer schemes have 2 to 8", "try `int4-g128-sym`")),
    "method": ([*INTO, "--method", "gtpq"], said("unknown method `gtpq`", "did you mean `gptq` or `gptaq`?")),
    "format": ([*INTO, "--format", "compressed-tensor"], said(
        "unknown format `compressed-tensor`", "did you mean `compressed-tensors`?")),
    "protocol": ([*INTO, "--protocol", "windws"], said("unknown protocol `windws`", "did you mean `windows`?")),
    "protocol of eval-ppl": (["eval-ppl", "m", "--protocol", "lama.cpp"], said(
        "unknown protocol `lama.cpp`", "did you mean `llama.cpp`?")),
    "recipe key": ([*INTO, "--set", "methd=rtn"], said("unknown recipe key `methd`", "did you mean `method`?")),
    "recipe key of a section": ([*INTO, "--set", "data.rowz=3"], said(
        "unknown recipe key `data.rowz`", "did you mean `data.rows` or `data.source`?")),
    "recipe key of a method": ([*INTO, "--set", "gptq.dampp=3"], re.compile(
        r"error: unknown recipe key `gptq\.dampp`\n\nhint: did you mean `gptq\.damp`.*\?\n")),
    "recipe key `options`": ([*INTO, "--set", "options.gptq.damp=3"], re.compile(
        r"error: unknown recipe key `options`\n\nhint: .*gptq.*\n")),
    "recipe value": ([*INTO, "--set", "gptq.damp=much"], said(
        "recipe key `gptq.damp` takes a number, not `much`")),
    "recipe value of an integer": ([*INTO, "--set", "data.rows=1.5"], said(
        "recipe key `data.rows` takes a whole number, not `1.5`")),
    "recipe value of a boolean": ([*INTO, "--set", "data.pack=3"], said(
        "recipe key `data.pack` takes true or false, not `3`")),
    "recipe value of a choice": ([*INTO, "--set", "gptq.order=actvation"], said(
        "unknown value of gptq.order: `actvation`", "did you mean `activation`?")),
    "recipe section": ([*INTO, "--set", "gptq=3"], said("gptq must hold keys and values, not `3`")),
    "set without =": ([*INTO, "--set", "gptq.damp"], said(
        "`--set gptq.damp` is not KEY=VALUE", "for example `--set gptq.damp=0.05`")),
    "set without a key": ([*INTO, "--set", "=3"], said(
        "`--set =3` is not KEY=VALUE", "for example `--set gptq.damp=0.05`")),
    "set to no YAML": ([*INTO, "--set", "scheme=[1"], said("`--set scheme=[1`: `[1` is not a YAML value")),
    "layer without =": ([*INTO, "--layer", "*.down_proj"], said(
        "`--layer *.down_proj` is not PATTERN=SCHEME", "for example `--layer '*.down_proj=w8a16'`")),
    "layer without a pattern": ([*INTO, "--layer", "=w8a16"], said(
        "`--layer =w8a16` is not PATTERN=SCHEME", "for example `--layer '*.down_proj=w8a16'`")),
    "layer with no scheme": ([*INTO, "--layer", "*.down_proj=w8a61"], said(
        "unknown scheme `w8a61`", "did you mean `w8a16` or `w8a8`?")),
    "recipe file": ([*INTO, "--recipe", "nope.yaml"], said(
        "cannot read recipe `nope.yaml`: No such file or directory")),
    "recipe file of no YAML": ([*INTO, "--recipe", "bad.yaml"], re.compile(
        r"error: recipe `bad\.yaml` is not YAML: [^\n]*line 1[^\n]*\n")),
    "recipe file of a list": ([*INTO, "--recipe", "list.yaml"], said(
        "recipe `list.yaml` must hold keys and values, not `['a']`")),
    "command": (["quantise", "m"], re.compile(
        r"error: No such command 'quantise'\. Did you mean 'quantize'\?\n\nhint: see `qtool --help`\n")),
    "option": ([*INTO, "--shceme", "w4a16"], re.compile(
        r"error: No such option: --shceme .*--scheme.*\n\nhint: see `qtool quantize --help`\n")),
    "option of no command": (["--quiet", "quantize", "m"], re.compile(
        r"error: No such option: --quiet.*\n\nhint: see `qtool --help`\n")),
    "option without its value": ([*INTO, "--scheme"], re.compile(
        r"error: Option '--scheme' requires an argument\.\n\nhint: see `qtool (quantize )?--help`\n")),
    "another argument": (["quantize", "m", "new", "-o", "new"], re.compile(
        r"error: Got unexpected extra argument.*\(new\)\n\nhint: see `qtool quantize --help`\n")),
    "number": ([*INTO, "--rows", "many"], re.compile(
        r"error: Invalid value for '--rows': .*\n\nhint: see `qtool quantize --help`\n")),
    "number too small": (["eval-ppl", "m", "--seqlen", "1"], re.compile(
        r"error: Invalid value for '--seqlen': .*2.*\n\nhint: see `qtool eval-ppl --help`\n")),
    "log format": ([*INTO, "--log-format", "xml"], said("unknown log format `xml`", "known: text, json")),
    "group size": ([*INTO], re.compile(
        r"error: `model\.layers\.0\.mlp\.gate_proj\.weight` cannot use int4-g128-sym: "
        r"64 inputs are not a multiple of 128 \(11 more like it\)\n"
        r"\nhint: give these layers another scheme: `--layer '[^']*gate_proj[^']*=int8-channel-sym'`, "
        r"or use `--scheme int4-g64-sym`\n")),
    "layer pattern": ([*INTO, *RTN, "--layer", "down_proj=w8a16"], said(
        "--layer pattern `down_proj` matches no layer to quantize (for example `model.layers.0.mlp.down_proj`)",
        "patterns match whole names: try `*down_proj*`")),
    "ignore pattern": ([*INTO, *RTN, "--ignore", "*.c_fc"], said(
        "--ignore pattern `*.c_fc` matches no tensor (for example `model.embed_tokens`)")),
    "no path": (["quantize", "nope", "-o", "new"], said("no such file or folder: nope", NO_SUCH[6:-1])),
    "no path, inspected": (["inspect", "./a/b/nope"], said("no such file or folder: ./a/b/nope", NO_SUCH[6:-1])),
    "no path, evaluated": (["eval-ppl", "nope"], said("no such file or folder: nope", NO_SUCH[6:-1])),
    "no baseline path": (["eval-ppl", "m", "--baseline", "nope"], said(
        "no such file or folder: nope", NO_SUCH[6:-1])),
    "no safetensors": (["quantize", "c.jsonl", "-o", "new"], said(
        "c.jsonl is neither a .safetensors nor a .gguf file", "give a folder, such a file, or a hub id")),
    "an empty folder": (["quantize", "empty", "-o", "new"], said(
        "empty holds no *.safetensors", "give a folder with a model in safetensors, or a hub id")),
    "only .bin": (["quantize", "pickled", "-o", "new"], said(
        "pickled has no safetensors, only pytorch_model.bin: pickle files can run code and are not read",
        'convert it once: `python -c "from transformers import AutoModelForCausalLM as M; '
        "M.from_pretrained('pickled').save_pretrained('pickled-safetensors')\"`")),
    "no output": (["quantize", "m"], said(
        "nowhere to write to", "give a folder with -o/--output, or look only with --dry-run")),
    "gate": ([*INTO, "--max-ppl-increase", "1 percent"], said(
        "--max-ppl-increase `1 percent` is neither a share such as `1%` nor a number such as `0.2`")),
    "gate of eval-ppl": (["eval-ppl", "m", "--baseline", "m", "--max-ppl-increase", "x"], said(
        "--max-ppl-increase `x` is neither a share such as `1%` nor a number such as `0.2`")),
    "gate without a baseline": (["eval-ppl", "m", "--max-kl", "0.1"], said(
        "a gate compares two models, but there is no baseline", "give one with --baseline MODEL")),
    "unknown architecture": (["quantize", "unknown", "-o", "new", "--scheme", "int4-g32-sym"], said(
        "unknown is of architecture `whoknows`, which qtool cannot run; "
        "it runs gemma2, gemma3_text, gpt2, gpt_neox, llama, mistral, opt, phi3, qwen2, qwen3",
        "`qtool quantize --method rtn` without --eval runs no model and works on every safetensors checkpoint")),
    "strict": ([*INTO, *RTN, "--strict", "--ignore", "*.q_proj"], re.compile(
        r"error: `model\.layers\.0\.\*` are served as one layer but have several schemes: .*\n"
        r"\nhint: give them one scheme: .*\n")),
    "rounding of inputs": ([*INTO, "--scheme", "fp8-e4m3-channel+fp8-e4m3-tokn"], said(
        "unknown rounding of inputs in scheme `fp8-e4m3-channel+fp8-e4m3-tokn`: `fp8-e4m3-tokn`",
        "did you mean `fp8-e4m3-token` or `fp8-e4m3-tensor`?")),
    "rounding of inputs twice": ([*INTO, "--scheme", "nvfp4+int8-token"], said(
        "scheme `nvfp4+int8-token`: inputs of nvfp4 are rounded as that, or not at all", "leave `+int8-token` out")),
    "outliers": ([*INTO, "--scheme", "int3-g64-sym+outliers-90%"], said(
        "scheme `int3-g64-sym+outliers-90%`: outliers go with integer weights and are at most 20 % of them",
        "for example `int3-g64-sym+outliers-0.5%`")),
    "transform": ([*INTO, "--transform", "rotatoin"], said(
        "unknown transform `rotatoin`", "did you mean `rotation`?")),
    "several transforms": ([*INTO, "--transform", "smoothquant,awq"], said(
        "`--transform smoothquant,awq` names several transforms",
        "give each its own flag: `--transform smoothquant --transform awq`")),
    "recipe key of a transform": ([*INTO, *RTN, "--transform", "rotation", "--set", "rotation.sede=1"], re.compile(
        r"error: unknown recipe key `rotation\.sede`\n\nhint: did you mean `rotation\.seed`.*\?\n")),
    "recipe key of a transform that is not used": ([*INTO, *RTN, "--set", "awq.gird=1"], re.compile(
        r"error: unknown recipe key `awq\.gird`\n\nhint: did you mean `awq\.grid`.*\?\n")),
    "recipe key of a method that is not used": ([*INTO, *RTN, "--set", "gptq.dampp=1"], re.compile(
        r"error: unknown recipe key `gptq\.dampp`\n\nhint: did you mean `gptq\.damp`.*\?\n")),
    "recipe value out of range": ([*INTO, *RTN, "--transform", "smoothquant", "--set", "smoothquant.strength=2"], said(
        "smoothquant.strength=2.0 is not between 0 and 1", "leave it out to search")),
    "cache": ([*INTO, *RTN, "--kv", "fp9"], said("unknown type of key/value cache `fp9`", "did you mean `fp8`?")),
    "format of nothing known": ([*INTO, "--format", "ggml"], said("unknown format `ggml`", "did you mean `gguf`?")),
    "rotation of gemma2": (["quantize", "gemma2", "-o", "new", *RTN, "--transform", "rotation"], said(
        "gemma2 cannot take `rotation`: `gemma2` is not among the architectures that can be rotated: "
        "llama, mistral, phi3, qwen2, qwen3", "leave `rotation` out")),
    "rotation of gpt2": (["quantize", "gpt2", "-o", "new", *RTN, "--transform", "rotation"], said(
        "gpt2 cannot take `rotation`: `gpt2` is not among the architectures that can be rotated: "
        "llama, mistral, phi3, qwen2, qwen3", "leave `rotation` out")),
    "transform of an unknown architecture": (
        ["quantize", "unknown", "-o", "new", *RTN, "--transform", "awq"], CANNOT_RUN),
    "cache of an unknown architecture": (["quantize", "unknown", "-o", "new", *RTN, "--kv", "fp8"], CANNOT_RUN),
    "static inputs of an unknown architecture": (
        ["quantize", "unknown", "-o", "new", "--method", "rtn", "--scheme", "w8a8-static"], CANNOT_RUN),
    "cache in a format without": ([*INTO, "--method", "rtn", "--scheme", "nf4", "--kv", "fp8"], said(
        "bitsandbytes has no place for how keys and values are rounded",
        "leave --kv out: many programs have a setting of their own for that; or use `--format qtool`")),
    "layers served as one": ([*INTO, *RTN, "--layer", "*.q_proj=w8a16"], said(
        "`model.layers.0.*` are served as one layer but have several schemes: q_proj int8-channel-sym, "
        "k_proj int4-g32-sym, v_proj int4-g32-sym (1 more like it)",
        "give them one scheme: `--layer 're:(q_proj|k_proj|v_proj)$=int8-channel-sym'`")),
    "nf4 in compressed-tensors": ([*INTO, "--method", "rtn", "--scheme", "nf4", "--format", "compressed-tensors"],
        unstorable("nf4", "nf4 is not among the types of compressed-tensors", 13)),
    "fp8-e5m2 in compressed-tensors": (
        [*INTO, "--method", "rtn", "--scheme", "fp8-e5m2", "--format", "compressed-tensors"],
        unstorable("fp8-e5m2-channel", "fp8-e5m2 is not among the types of compressed-tensors", 13)),
    "integers in bitsandbytes": ([*INTO, *RTN, "--format", "bitsandbytes"],
        unstorable("int4-g32-sym", "bitsandbytes stores nf4, nf4-dq, fp4, fp4-dq and llm-int8", 13)),
    "gpt2 in compressed-tensors": (
        ["quantize", "gpt2", "-o", "new", *RTN, "--format", "compressed-tensors"],
        unstorable("int4-g32-sym", "its linears store their weight [in, out], which readers of compressed-tensors do"
                   " not know", 7)),
    "two kinds of bitsandbytes": (
        [*INTO, "--method", "rtn", "--scheme", "nf4", "--layer", "*.down_proj=llm-int8"], said(
        "bitsandbytes holds llm-int8, nf4 or fp4 in one checkpoint, not llm-int8 and nf4",
        "use one of them for all layers, or `--format qtool`")),
    "blocks": ([*INTO, "--method", "rtn", "--scheme", "fp8-block"], re.compile(
        r"error: `model\.layers\.0\.mlp\.gate_proj\.weight` cannot use fp8-e4m3-block\+fp8-e4m3-g128: "
        r"64 inputs are not a multiple of 128 \(11 more like it\)\n\nhint: .*`--\w+ .*`\n")),
    **{f"inputs of {scheme}": (["quantize", "odd", "-o", "new", "--method", "rtn", "--scheme", scheme], re.compile(
        rf"error: `model\.layers\.0\.mlp\.down_proj\.weight` cannot use {scheme}: "
        rf"136 inputs are not a multiple of {multiple} \(1 more like it\)\n\nhint: .*`--\w+ '\*\.down_proj.*'`\n"))
        for scheme, multiple in (("nvfp4a16", 16), ("nvfp4", 16), ("mxfp4", 32), ("mxfp8a16", 32), ("nf4", 64))},
    "statistics for gptaq": ([*INTO, "--scheme", "int4-g32-sym", "--method", "gptaq", "--stats", "stats"], said(
        "`gptaq` compares the float and the rounded model on the same rows: saved statistics do not do",
        "give data instead of --stats, or use `--method gptq`")),
    "statistics and data": ([*INTO, "--stats", "stats", "--data", "c.jsonl"], said(
        "--data means nothing with --stats, which stand for the data", "leave --data or --stats out")),
    "statistics and rows": ([*INTO, "--stats", "stats", "--no-pack"], said(
        "--pack/--no-pack means nothing with --stats, which stand for the data",
        "leave --pack/--no-pack or --stats out")),
    "no statistics": ([*INTO, "--scheme", "int4-g32-sym", "--stats", "nope"], said(
        "no such folder: nope", "make them: `qtool calibrate MODEL -o nope`")),
    "statistics that are none": ([*INTO, "--scheme", "int4-g32-sym", "--stats", "m"], re.compile(
        r"error: m holds no statistics\n\nhint: .*`qtool calibrate MODEL -o .*`\n")),
    "data file for fixed scales": ([*INTO, "--scheme", "w8a8-static", "--method", "rtn", "--data", "nope.jsonl"], said(
        "no such file or folder: nope.jsonl")),
    "data file for a transform": ([*INTO, *RTN, "--transform", "awq", "--data", "nope.jsonl"], said(
        "no such file or folder: nope.jsonl")),
    "data file for a cache": ([*INTO, *RTN, "--kv", "fp8", "--data", "nope.jsonl"], said(
        "no such file or folder: nope.jsonl")),
    "evaluation on the model's own text": (
        [*INTO, "--scheme", "int4-g32-sym", "--data", "self", "--eval", "self"], OWN_TEXT),
    "eval-ppl on the model's own text": (["eval-ppl", "m", "--data", "self"], OWN_TEXT),
    "one row per text of the model's own": (
        [*INTO, "--scheme", "int4-g32-sym", "--data", "self", "--no-pack"], said(
        "--no-pack means nothing with `--data self`", "leave --no-pack out")),
    "recommendation into a folder": (["quantize", "m", "--recommend", "-o", "new"], said(
        "--recommend chooses by itself and writes nothing: -o means nothing with it")),
    "calibrate two models": (["calibrate", "m", "odd", "-o", "new"], said(
        "2 models are given: m, odd", "to add up statistics, use --merge")),
    "calibrate an unknown architecture": (["calibrate", "unknown", "-o", "new"], CANNOT_RUN),
    "calibrate into nothing": (["calibrate", "m"], said(
        "nowhere to write to", "give a folder with -o/--output, or look only with --dry-run")),
    "calibrate into the model": (["calibrate", "m", "-o", "m"], re.compile(
        r"error: \S*m is where the model itself is\n\nhint: give another folder with -o/--output\n")),
    "calibrate with no data file": (["calibrate", "m", "-o", "new", "--data", "nope.txt"], said(
        "no such file or folder: nope.txt")),
    "calibrate into another format": (["calibrate", "m", "-o", "new", "--format", "imtrix"], said(
        "unknown format `imtrix`", "did you mean `imatrix`?")),
    "an imatrix into a folder": (["calibrate", "m", "-o", "new", "--format", "imatrix"], said(
        "an imatrix is one file, not `new`", "give a name that ends in .gguf")),
    "merge what is not there": (["calibrate", "--merge", "nope", "nein", "-o", "new"], said(
        "no such folder: nope", "make them: `qtool calibrate MODEL -o nope`")),
    "merge and data": (["calibrate", "--merge", "a", "b", "-o", "new", "--data", "c.jsonl"], said(
        "--data means nothing with --merge, which reads no data", "leave --data out")),
    "the report exists": (["inspect", "m", "-o", "c.jsonl"], said("c.jsonl exists", EXISTS_HINT[6:-1])),
    "no column of views": (["inspect", "m", "--memory", "--tensor", "x"], said(
        "--memory and --tensor are different views", "ask for one at a time")),
    "stride of another protocol": (["eval-ppl", "m", "--protocol", "rows", "--stride", "4"], said(
        "--stride belongs to the protocol windows, not rows")),
    "data file": ([*INTO, *GPTQ, "--data", "nope.jsonl"], said("no such file or folder: nope.jsonl")),
    "data file to evaluate on": ([*INTO, *RTN, "--eval", "nope.jsonl"], said("no such file or folder: nope.jsonl")),
    "data file of eval-ppl": (["eval-ppl", "m", "--data", "nope.jsonl"], said("no such file or folder: nope.jsonl")),
}  # fmt: skip

RUNNER = """
import contextlib, io, json, sys, time
from qtool.cli import run, state
from qtool.cli.console import Console

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "datasets"):
            heavy.append(name)
            raise ImportError(f"{name} was imported")

heavy, results = [], []
sys.meta_path.insert(0, Forbidden())
for arguments in json.load(sys.stdin):
    state.console = Console()
    heavy.clear()
    out, err, started = io.StringIO(), io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    results.append([code, out.getvalue(), err.getvalue(), time.perf_counter() - started, list(heavy)])
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def usage_errors(tmp_path_factory, make_model, calibration_text):
    """What every case above answers, from one process that cannot import torch, and what is there afterwards."""
    folder = tmp_path_factory.mktemp("usage")
    for name in ("m", "unknown"):
        shutil.copytree(make_model(), folder / name)
    change_config(folder / "unknown", model_type="whoknows")
    for name, model in (("gemma2", make_model("gemma2")), ("gpt2", make_model("gpt2")),
                        ("odd", make_model(intermediate_size=136))):  # fmt: skip
        shutil.copytree(model, folder / name)
    shutil.copy(calibration_text, folder / "c.jsonl")
    (folder / "pickled").mkdir()
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    (folder / "empty").mkdir()
    (folder / "bad.yaml").write_text("scheme: [w4a16\n", encoding="utf-8")
    (folder / "list.yaml").write_text("- a\n", encoding="utf-8")
    there = sorted(folder.iterdir())
    cases = [arguments for arguments, _ in KINDS.values()]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(cases), cwd=folder, env=environment(), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    answers = dict(zip(KINDS, json.loads(done.stdout), strict=True))
    return answers, there, sorted(folder.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_usage_error(usage_errors, kind):
    code, out, err, wall_s, heavy = usage_errors[0][kind]
    expected = KINDS[kind][1]
    assert heavy == []
    if isinstance(expected, str):
        assert (code, out, err) == (2, "", expected)
    else:
        assert (code, out) == (2, "")
        assert expected.fullmatch(err), err
    assert wall_s < 0.5


def test_a_usage_error_writes_nothing(usage_errors):
    _, before, after = usage_errors
    assert after == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["quantize", "--help"],
        ["calibrate", "--help"],
        ["quantize", "m", "-o", "new", "--scheme", "zzz"],
    ],
)
def test_help_and_usage_errors_start_fast_and_without_torch(here, arguments):
    command = [sys.executable, "-X", "importtime", "-m", "qtool", *arguments]
    done = subprocess.run(command, cwd=here, env=environment(), capture_output=True, text=True, timeout=60)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "qtool.cli" in imported
    assert imported & {"torch", "transformers", "datasets", "numpy", "rich.console"} == set()
    best = 9.0
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process(*arguments, cwd=here)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best < 0.4  # seconds of a core: what it takes on a machine with nothing else to do


# ---- what a hint says to type


@pytest.mark.parametrize("scheme", ["int4-g128-sym", "fp8-block", "nvfp4a16", "mxfp4", "nf4"])
def test_what_the_hint_for_a_shape_says_can_be_typed(qtool, here, make_model, scheme):
    shutil.copytree(make_model(intermediate_size=136), here / "odd")
    model = "m" if scheme in ("int4-g128-sym", "fp8-block") else "odd"
    words = ["quantize", model, "--method", "rtn", "--scheme", scheme, "--dry-run"]
    refused = qtool(*words)
    assert refused.code == 2
    ways = re.findall(r"`(--[^`]+)`", refused.err.partition("\nhint: ")[2])
    answers = [qtool(*words, *shlex.split(way)) for way in ways]
    assert 0 in [answer.code for answer in answers], [answer.err for answer in answers]


# ---- quantize


def test_the_page_of_a_quantized_model(qtool, here):
    result = qtool("quantize", "m", "-o", "out", *RTN)
    report = qtool("quantize", "m", "-o", "out", *RTN, "--json").json
    assert result.code == 0
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    rows = []
    for kind in kinds:
        errors = [layer["weight_error"] for layer in report["layers"] if layer["module"].endswith(kind)]
        assert len(errors) == 2
        rows.append(f"*.{kind:<16}  int4-g32-sym  2  4.500  {50 * sum(errors):.2f} %       -      -  T")
    expected = [
        "mean relative error of weights and outputs, and the worst output",
        "layers              scheme        n   bits  weight  output  worst    time",
        *rows,
        "",
        "left alone            tensors      size",
        "ignored by `*embed*`        1  40.96 kB",
        "ignored by `*norm*`         5     640 B",
        "",
        "model            m (llama)",
        "recipe           rtn int4-g32-sym",
        "output           out",
        "loads in         vLLM, SGLang, transformers",
        "size             189.06 kB -> 83.30 kB (44.1 %)",
        "bits per weight  4.500, scales and zeros included",
    ]
    *page, stages, memory = without_times(result.out).splitlines()
    assert page == expected
    assert re.fullmatch(r"time             T: \w+ T(, \w+ T){3}", stages)
    assert memory == "peak memory      M"
    assert without_times(result.err) == (
        "identify 0/1  m  [T]\n"
        "quantize 1/3  outside the blocks  [T]\n"
        f"quantize 2/3  model.layers.0: 7 layers, relative error {most(report, 0)} at most  [T]\n"
        f"quantize 3/3  model.layers.1: 7 layers, relative error {most(report, 1)} at most  [T]\n"
        "verify 1/3  outside the blocks  [T]\n"
        "verify 2/3  model.layers.0  [T]\n"
        "verify 3/3  model.layers.1  [T]\n"
    )
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m", "out"]


def most(report, block, key="weight_error"):
    layers = [layer for layer in report["layers"] if layer["module"].startswith(f"model.layers.{block}.")]
    return f"{max(layer[key] for layer in layers):.4f}"


PLAN = """\
quantized           scheme            layers  bits/weight
*.mlp.down_proj     int8-channel-sym       2        8.125
*.mlp.gate_proj     int4-g32-sym           2        4.500
*.mlp.up_proj       int4-g32-sym           2        4.500
*.self_attn.k_proj  int4-g32-sym           2        4.500
*.self_attn.o_proj  int4-g32-sym           2        4.500
*.self_attn.q_proj  int4-g32-sym           2        4.500
*.self_attn.v_proj  int4-g32-sym           2        4.500

left alone            tensors      size
ignored by `*embed*`        1  40.96 kB
ignored by `*norm*`         5     640 B

model            m (llama)
method           rtn
format           compressed-tensors: vLLM, SGLang, transformers
size             189.06 kB -> 90.72 kB
bits per weight  5.306
memory           about 350.13 MB
time             about 0.00 s on two CPU cores
"""


def test_a_dry_run_shows_the_plan_and_writes_nothing(qtool, here):
    before = sorted(here.rglob("*"))
    arguments = ["quantize", "m", "-o", "out", *RTN, "--layer", "*.down_proj=w8a16", "--dry-run"]
    assert qtool(*arguments).all == (0, PLAN, "")
    tree = qtool(*arguments, "--json").json
    assert [(x["kind"], x["scheme"], x["layers"]) for x in tree["layers"]][:2] == [
        ("*.mlp.down_proj", "int8-channel-sym", 2),
        ("*.mlp.gate_proj", "int4-g32-sym", 2),
    ]
    assert tree["bytes_after"] == 90720
    assert qtool(*arguments[:2], *arguments[4:]).all == (0, PLAN, "")  # without -o as well
    assert sorted(here.rglob("*")) == before


def test_the_size_that_a_dry_run_foretells_is_that_of_the_output(qtool, here):
    foretold = qtool("quantize", "m", *RTN, "--dry-run", "--json").json
    report = qtool("quantize", "m", "-o", "out", *RTN, "--json").json
    tensors = load_file(here / "out" / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == foretold["bytes_after"]
    assert report["bytes_after"] == foretold["bytes_after"]
    assert report["bits_per_weight"] == foretold["bits_per_weight"]


def test_json_is_one_object_and_nothing_else_is_on_stdout(qtool, here):
    result = qtool("quantize", "m", "-o", "out", *GPTQ, "--eval", "c.jsonl", "--json")
    report = result.json
    assert result.code == 0
    assert result.err.startswith("identify 0/1  m  [")
    assert report["up_to_date"] is False
    assert (report["method"], report["scheme"], len(report["layers"])) == ("gptq", "int4-g32-sym", 14)
    assert report["data"]["tokens"] == 16 * 32
    assert all(0 < layer["output_error"] < layer["weight_error"] for layer in report["layers"])
    assert report["evaluation"]["comparison"]["baseline"] == "m"
    assert {key: value for key, value in report.items() if key != "up_to_date"} == manifest("out")["report"]


def test_quiet_leaves_stderr_empty(qtool, here):
    loud = qtool("quantize", "m", "-o", "loud", *GPTQ)
    quiet = qtool("quantize", "m", "-o", "quiet", *GPTQ, "-q")
    assert (quiet.code, quiet.err) == (0, "")
    pages = [without_times(result.out).partition("\nsize ")[2] for result in (quiet, loud)]
    assert [page.partition("\ntime ")[0] for page in pages] == 2 * [pages[0].partition("\ntime ")[0]]
    assert pages[0].startswith("            189.06 kB -> 83.30 kB")
    assert loud.err
    assert qtool("quantize", "m", "-o", "quiet", *GPTQ, "--quiet").err == ""  # nor that it is up to date
    assert qtool("eval-ppl", "m", "--data", "c.jsonl", "-q").err == ""


def test_no_progress_leaves_stderr_empty_but_for_messages(qtool, here):
    assert qtool("quantize", "m", "-o", "out", *RTN, "--no-progress").err == ""
    assert qtool("quantize", "m", "-o", "out", *RTN, "--no-progress").err == "out is up to date\n"


def test_a_warning_is_told_with_quiet_too(qtool, here):
    arguments = ["quantize", "m", "-o", "out", "--scheme", "int4-g32-sym", "--data", "c.jsonl", "--seqlen", "32"]
    result = qtool(*arguments, "--rows", "2", "-q")
    note = "64 calibration tokens are few for layers of 128 inputs: 512 would do (`--rows 16` of 32 tokens)"
    assert (result.code, result.err) == (0, f"warning: {note}\n")
    assert f"note             {note}\n" in result.out


def test_logs_as_json_are_one_object_per_line(qtool, here):
    result = qtool("quantize", "m", "-o", "out", *GPTQ, "--log-format", "json")
    lines = [json.loads(line) for line in result.err.splitlines()]
    assert result.code == 0
    assert [(x["stage"], x["done"], x["total"], x["message"].split(":")[0]) for x in lines] == [
        ("identify", 0, 1, "m"),
        ("quantize", 1, 3, "model.layers.0"),
        ("quantize", 2, 3, "model.layers.1"),
        ("quantize", 3, 3, "outside the blocks"),
        ("verify", 1, 3, "outside the blocks"),
        ("verify", 2, 3, "model.layers.0"),
        ("verify", 3, 3, "model.layers.1"),
    ]
    assert {x["level"] for x in lines} == {"info"}
    elapsed = [x["elapsed_s"] for x in lines]
    assert elapsed == sorted(elapsed)
    again = qtool("quantize", "m", "-o", "out", *GPTQ, "--log-format", "json")
    assert [json.loads(line)["message"] for line in again.err.splitlines()] == ["m", "out is up to date"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*INTO, "--scheme", "zzz"], "unknown scheme `zzz`"),
        ([*INTO, "--rows", "many"], "Invalid value for '--rows'"),
        ([*INTO, "--shceme", "x"], "No such option: --shceme"),
        (["eval-ppl", "m", "-o", "c.jsonl"], "c.jsonl exists"),
        ([*INTO, "--scheme", "zzz", "-v"], "unknown scheme `zzz`"),
    ],
)
def test_errors_as_json_are_one_object_per_line(qtool, here, arguments, message):
    result = qtool(*arguments, "--log-format", "json")
    assert (result.code, result.out) == (2, "")
    lines = [json.loads(line) for line in result.err.splitlines()]
    (error,) = [line for line in lines if line["level"] == "error"]
    assert error["message"].startswith(message)


@pytest.mark.parametrize("flags", [["-q"], ["-q", "--log-format", "json"]])
def test_quiet_does_not_garble_an_error(qtool, here, flags):
    result = qtool(*INTO, "--method", "rtm", *flags)
    assert (result.code, result.out) == (2, "")
    if len(flags) == 1:
        assert result.err in ("error: unknown method `rtm`\n", said("unknown method `rtm`", "did you mean `rtn`?"))
    else:
        assert {json.loads(line)["level"] for line in result.err.splitlines()} <= {"error", "info", "hint"}


# ---- outputs


def test_the_second_run_is_up_to_date(qtool, here):
    first = qtool("quantize", "m", "-o", "out", *GPTQ)
    files = {p: p.stat().st_mtime_ns for p in (here / "out").iterdir()}
    second = qtool("quantize", "m", "-o", "out", *GPTQ)
    assert (second.code, second.out) == (0, first.out)
    assert without_times(second.err) == "identify 0/1  m  [T]\nout is up to date\n"
    assert {p: p.stat().st_mtime_ns for p in (here / "out").iterdir()} == files
    assert qtool("quantize", "m", "-o", "out", *GPTQ, "--json").json["up_to_date"] is True


def test_another_recipe_on_an_output_is_refused_and_force_replaces_it(qtool, here):
    assert qtool("quantize", "m", "-o", "out", *GPTQ, "-q").code == 0
    before = digests("out")
    result = qtool("quantize", "m", "-o", "out", *GPTQ, "--seed", "1", "-q")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: out was made otherwise: recipe.data.seed was `0` and is now `1`\n")
    assert digests("out") == before
    assert qtool("quantize", "m", "-o", "out", *GPTQ, "--seed", "1", "-q", "--force").code == 0
    assert digests("out") != before
    assert manifest("out")["identity"]["recipe"]["data"]["seed"] == 1
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m", "out"]


def test_what_another_recipe_on_an_output_says(qtool, here):
    qtool("quantize", "m", "-o", "out", *RTN)
    result = qtool("quantize", "m", "-o", "out", "--method", "rtn", "--scheme", "w8a16", "--no-progress")
    difference = "recipe.scheme was `int4-g32-sym` and is now `int8-channel-sym`"
    assert result.all == (2, "", f"error: out was made otherwise: {difference}\n\n{EXISTS_HINT}")


def test_options_that_decide_no_bytes_do_not_make_another_recipe(qtool, here):
    assert qtool("quantize", "m", "-o", "out", *RTN, "-q").code == 0
    for same in (["--seed", "5"], ["--data", "c.jsonl"], ["--strict"], ["--device", "cpu"], ["--set", "gptq.damp=0.1"]):
        assert qtool("quantize", "m", "-o", "out", *RTN, *same, "--no-progress").err == "out is up to date\n", same


def test_a_changed_source_is_another_run(qtool, here):
    assert qtool("quantize", "m", "-o", "out", *RTN, "-q").code == 0
    change_tensors("m", lambda tensors: tensors["model.norm.weight"].add_(1))
    result = qtool("quantize", "m", "-o", "out", *RTN, "-q")
    assert (result.code, result.out) == (2, "")
    assert re.match(
        r"error: out was made otherwise: source\.model\.safetensors was `[0-9a-f]{64}` and is now `[0-9a-f]{64}`\n",
        result.err,
    )


def test_a_changed_text_is_another_run(qtool, here):
    assert qtool("quantize", "m", "-o", "out", *GPTQ, "-q").code == 0
    with (here / "c.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "more"}\n')
    result = qtool("quantize", "m", "-o", "out", *GPTQ, "-q")
    assert result.code == 2
    assert result.err.startswith("error: out was made otherwise: data_files.c.jsonl was `")


NOT_OURS = {
    "folder of other things": "holds what qtool did not write there, such as thesis.txt",
    "manifest of another program": "holds what qtool did not write there, such as thesis.txt",
    "file": "is a file, not a folder",
    "another model": "holds what qtool did not write there, such as config.json",
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_an_output_that_qtool_did_not_make_is_refused(qtool, here, what):
    out, message = here / "out", NOT_OURS[what]
    if what == "file":
        out.write_text("mine", encoding="utf-8")
    elif what == "another model":
        shutil.copytree("m", out)
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine", encoding="utf-8")
        if what == "manifest of another program":
            (out / "manifest.json").write_text('{"name": "my app"}', encoding="utf-8")

    def content():
        return {p: p.read_bytes() for p in sorted(here.rglob("*")) if p.is_file()}

    before = content()
    hint = "hint: give another -o/--output\n" if what == "file" else "hint: give another -o/--output, or move it away\n"
    result = qtool("quantize", "m", "-o", "out", *RTN, "--no-progress")
    assert result.all == (2, "", f"error: out {message}\n\n{hint}")
    assert content() == before
    forced = qtool("quantize", "m", "-o", "out", *RTN, "--no-progress", "--force")
    assert forced.all == result.all
    assert content() == before


def test_an_empty_folder_becomes_the_output(qtool, here):
    (here / "out").mkdir()
    assert qtool("quantize", "m", "-o", "out", *RTN, "-q").code == 0
    assert manifest("out")["report"]["model"] == "m"
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m", "out"]


@pytest.mark.parametrize("name", ["src.partial", "src.replaced"])
def test_a_source_that_is_named_like_a_staging_folder_is_safe(qtool, here, name):
    shutil.copytree("m", here / name)
    before = {p.name: p.read_bytes() for p in (here / name).iterdir()}
    result = qtool("quantize", name, "-o", "src", *RTN, "-q", "--force")
    assert (result.code, result.out) == (2, "")
    assert "is where the model itself is" in result.err
    assert {p.name: p.read_bytes() for p in (here / name).iterdir()} == before


def test_options_of_the_evaluation_survive_its_flag(qtool, here):
    arguments = ["quantize", "m", *RTN, "--eval", "c.jsonl", "--set", "eval.data.seqlen=16", "--print-recipe", "--json"]
    assert (
        qtool(*arguments).json["eval"]["data"] | {"source": "c.jsonl", "seqlen": 16}
        == qtool(*arguments).json["eval"]["data"]
    )


@pytest.mark.parametrize("out", ["m", "./m", "m/", "link", "."])
@pytest.mark.parametrize("source", ["m", "m/model.safetensors"])
def test_force_never_destroys_the_source(qtool, here, source, out):
    (here / "link").symlink_to("m")
    before = {p: p.read_bytes() for p in sorted((here / "m").iterdir())}
    result = qtool("quantize", source, "-o", out, *RTN, "--force", "--no-progress")
    assert {p: p.read_bytes() for p in sorted((here / "m").iterdir())} == before
    assert (here / "c.jsonl").is_file()
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")


def test_an_output_with_a_missing_file_is_damaged(qtool, here):
    qtool("quantize", "m", "-o", "out", *RTN)
    (here / "out" / "tokenizer.json").unlink()
    result = qtool("quantize", "m", "-o", "out", *RTN, "--no-progress")
    assert result.all == (
        2,
        "",
        "error: out is damaged: tokenizer.json is missing or has changed\n\nhint: make it again with --force\n",
    )
    assert qtool("quantize", "m", "-o", "out", *RTN, "--force", "-q").code == 0


def test_a_folder_for_the_output_is_made(qtool, here):
    assert qtool("quantize", "m", "-o", "a/b/out", *RTN, "-q").code == 0
    assert (here / "a" / "b" / "out" / "config.json").is_file()


def test_brackets_in_names_survive(qtool, here):
    (here / "m").rename("m[int4]")
    result = qtool("quantize", "m[int4]", "-o", "[bold]out[/bold]", *RTN)
    assert result.code == 0
    assert "model            m[int4] (llama)\n" in result.out
    assert "output           [bold]out[/bold]\n" in result.out
    assert result.err.startswith("identify 0/1  m[int4]  [")
    assert qtool("quantize", "m[int4]", "-o", "[bold]out[/bold]", *RTN, "--no-progress").err == (
        "[bold]out[/bold] is up to date\n"
    )
    assert qtool("inspect", "m[red]").err == said("no such file or folder: m[red]", NO_SUCH[6:-1])
    assert qtool("inspect", "m[int4]").out.startswith("m[int4]\n")


# ---- recipes


def test_a_printed_recipe_gives_the_same_run(qtool, here):
    flags = [*GPTQ, "--layer", "*.down_proj=w8a16", "--ignore", "*.1.mlp.*", "--set", "gptq.damp=0.05", "--seed", "3"]
    printed = qtool("quantize", "m", *flags, "--print-recipe")
    assert (printed.code, printed.err) == (0, "")
    Path("r.yaml").write_text(printed.out, encoding="utf-8")
    assert qtool("quantize", "m", "--recipe", "r.yaml", "--print-recipe").all == printed.all
    assert qtool("quantize", "m", "-o", "flags", *flags, "-q").code == 0
    assert qtool("quantize", "m", "-o", "file", "--recipe", "r.yaml", "-q").code == 0
    assert manifest("flags")["identity"] == manifest("file")["identity"]
    assert digests("flags") == digests("file")
    assert qtool("quantize", "m", "-o", "flags", "--recipe", "r.yaml", "--no-progress").err == "flags is up to date\n"


def test_a_printed_recipe_with_an_evaluation_comes_back(qtool, here):
    flags = [*RTN, "--eval", "c.jsonl", "--protocol", "rows", "--max-ppl-increase", "5%", "--max-kl", "0.5"]
    printed = qtool("quantize", "m", *flags, "--print-recipe").out
    Path("r.yaml").write_text(printed, encoding="utf-8")
    assert qtool("quantize", "m", "--recipe", "r.yaml", "--print-recipe").out == printed
    tree = qtool("quantize", "m", "--recipe", "r.yaml", "--print-recipe", "--json").json
    assert tree["eval"]["data"]["source"] == "c.jsonl"
    assert (tree["eval"]["protocol"], tree["eval"]["max_ppl_increase"], tree["eval"]["max_kl"]) == ("rows", "5%", 0.5)


def test_the_whole_of_a_printed_recipe(qtool, here):
    from qtool.recipe import Recipe

    assert qtool("quantize", "m", "--print-recipe").all == (0, to_yaml(Recipe()), "")
    assert not (here / "m.partial").exists()


def resolved(qtool, *arguments):
    result = qtool("quantize", "m", *arguments, "--print-recipe", "--json")
    assert (result.code, result.err) == (0, "")
    return result.json


def test_a_flag_goes_before_set_and_set_before_the_recipe(qtool, here):
    Path("r.yaml").write_text(
        "scheme: w2a16\nmethod: rtn\nstrict: true\nlayers: {'*.q_proj': w8a16}\nignore: ['*lm_head', '*norm*']\n"
        "data: {source: a.txt, rows: 1, seed: 1, pack: false}\ngptq: {damp: 0.1, order: natural}\neval: e.txt\n",
        encoding="utf-8",
    )
    file = ["--recipe", "r.yaml"]
    tree = resolved(qtool, *file)
    assert (tree["scheme"], tree["method"], tree["strict"]) == ("int2-g128-sym", "rtn", True)
    assert (tree["data"]["rows"], tree["data"]["pack"], tree["gptq"]["damp"]) == (1, False, 0.1)
    sets = ["--set", "scheme=w3a16", "--set", "data.rows=2", "--set", "gptq.damp=0.2", "--set", "strict=false"]
    tree = resolved(qtool, *file, *sets)
    assert (tree["scheme"], tree["data"]["rows"], tree["data"]["seed"]) == ("int3-g128-sym", 2, 1)
    assert tree["gptq"] == {"damp": 0.2, "order": "natural"}
    assert tree["strict"] is False
    flags = ["--scheme", "w4a16", "--rows", "3", "--strict", "--pack", "--method", "gptq", "--data", "c.jsonl"]
    tree = resolved(qtool, *flags, *file, *sets)  # the order on the command line is not what counts
    assert (tree["scheme"], tree["method"], tree["strict"]) == ("int4-g128-sym", "gptq", True)
    assert (tree["data"]["source"], tree["data"]["rows"], tree["data"]["pack"]) == ("c.jsonl", 3, True)
    assert resolved(qtool, *file, "--no-strict")["strict"] is False


def test_the_last_set_counts(qtool, here):
    assert resolved(qtool, "--set", "data.rows=2", "--set", "data.rows=4")["data"]["rows"] == 4


def test_layers_and_ignored_patterns_are_added_to_those_of_the_recipe(qtool, here):
    Path("r.yaml").write_text("layers: {'*.q_proj': w8a16, '*.o_proj': w8a16}\nignore: ['*norm*']\n", encoding="utf-8")
    file = ["--recipe", "r.yaml"]
    tree = resolved(qtool, *file, "--layer", "*.q_proj=w3a16", "--layer", "re:(k|v)=x$=w2a16", "--ignore", "*.1.*")
    assert tree["layers"] == {
        "*.q_proj": "int3-g128-sym",
        "*.o_proj": "int8-channel-sym",
        "re:(k|v)=x$": "int2-g128-sym",
    }
    assert tree["ignore"] == ["*norm*", "*.1.*"]
    assert resolved(qtool, "--ignore", "*.1.*")["ignore"][-2:] == ["*.gate", "*.1.*"]  # after the usual ones
    assert resolved(qtool, "--set", "layers={'*.up_proj': w8a16}")["layers"] == {"*.up_proj": "int8-channel-sym"}


def test_an_evaluation_flag_keeps_what_the_recipe_says_of_the_evaluation(qtool, here):
    Path("r.yaml").write_text("eval: {data: e.txt, protocol: rows, max_kl: 0.5}\n", encoding="utf-8")
    tree = resolved(qtool, "--recipe", "r.yaml", "--max-kl", "0.1")["eval"]
    assert (tree["data"]["source"], tree["protocol"], tree["max_kl"]) == ("e.txt", "rows", 0.1)
    Path("r.yaml").write_text("eval: e.txt\n", encoding="utf-8")
    result = qtool("quantize", "m", "--recipe", "r.yaml", "--max-kl", "0.1", "--print-recipe", "--json")
    assert (result.code, result.err) in ((0, ""), (2, said("`eval` must hold keys and values, not `e.txt`")))
    if result.code == 0:
        assert result.json["eval"]["data"]["source"] == "e.txt"


# ---- exit code 1


def failed(result, message, hint=None, before=""):
    """Exit code 1, nothing on stdout, no traceback, and these lines."""
    assert (result.code, result.out) == (1, "")
    assert without_times(result.err) == before + said(message, hint)


def test_a_truncated_shard(qtool, here, make_model):
    shutil.copytree(make_model(tied=False, shards=True), here / "s")
    file = here / "s" / "model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:20000])
    for command in (["quantize", "s", "-o", "out", *RTN], ["inspect", "s"], ["eval-ppl", "s", "--data", "c.jsonl"]):
        result = qtool(*command)
        assert (result.code, result.out) == (1, "")
        assert re.fullmatch(
            r"error: s/model-00002-of-00004\.safetensors is truncated or not a safetensors file "
            r"\(20000 bytes\): [^\n]+\n\nhint: download the file again\n",
            result.err,
        )


def test_an_index_with_a_missing_file(qtool, here, make_model):
    shutil.copytree(make_model(tied=False, shards=True), here / "s")
    (here / "s" / "model-00003-of-00004.safetensors").unlink()
    for command in (["quantize", "s", "-o", "out", *RTN], ["inspect", "s"]):
        failed(
            qtool(*command),
            "s/model.safetensors.index.json names 1 of 4 files that are missing: model-00003-of-00004.safetensors",
            "download the checkpoint again",
        )


NAN = "`model.layers.1.mlp.up_proj.weight` has 1 NaN or infinite values of 8192"
NAN_HINT = "the checkpoint is damaged: download it again, or leave the layer alone with --ignore if that is intended"


@pytest.fixture
def with_nan(here):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")

    change_tensors("m", spoil)


@pytest.mark.parametrize("command", [["quantize", "m", "-o", "out", *RTN], ["quantize", "m", "-o", "out", *GPTQ],
                                     ["eval-ppl", "m", "--data", "c.jsonl"]])  # fmt: skip
def test_a_nan_is_named(qtool, here, with_nan, command):
    failed(qtool(*command, "--no-progress"), NAN, NAN_HINT)
    assert not (here / "out").exists()


def test_what_the_hint_for_a_nan_says_works(qtool, here, with_nan):
    assert qtool("quantize", "m", "-o", "out", *RTN).code == 1
    result = qtool("quantize", "m", "-o", "out", *RTN, "--ignore", "*.1.mlp.*", "--no-progress")
    assert (result.code, result.err) == (0, "")


@pytest.mark.parametrize("command", [["quantize", "m", "-o", "out", *GPTQ], ["eval-ppl", "m", "--data", "c.jsonl"]])
def test_a_tokenizer_that_does_not_fit(qtool, here, command):
    change_config("m", vocab_size=256)

    def cut(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:256].contiguous()

    change_tensors("m", cut)
    failed(
        qtool(*command, "--no-progress"),
        "the tokenizer in m has 300 tokens, but the model's embedding 256 rows",
        "copy the tokenizer files that came with the model",
    )


def test_no_tokenizer(qtool, here):
    for file in (here / "m").glob("tokenizer*"):
        file.unlink()
    result = qtool("eval-ppl", "m", "--data", "c.jsonl", "--no-progress")
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(
        r"error: m has no tokenizer that transformers can load: [^\n]+\n"
        r"\nhint: copy the model's tokenizer files beside its weights\n",
        result.err,
    )


def test_empty_data(qtool, here):
    (here / "empty.txt").write_text("", encoding="utf-8")
    arguments = ["--scheme", "int4-g32-sym", "--data", "empty.txt", "--seqlen", "16", "--no-progress"]
    failed(
        qtool("quantize", "m", "-o", "out", *arguments),
        "`empty.txt` gives no row of 16 tokens: it is empty or too short",
        "give more text, shorter rows (`--seqlen 4`), or one row per text (`--no-pack`)",
    )
    failed(
        qtool("eval-ppl", "m", "--data", "empty.txt", "--no-progress"),
        "`empty.txt` gives nothing to score in windows of 128 tokens: it is empty or too short",
        "give more text or shorter rows (`--seqlen 32`)",
    )


MISTAKES = {
    "data": ["--data", "nope.jsonl"],
    "column": ["--set", "data.column=content"],
    "empty data": ["--data", "empty.txt"],
    "length": ["--seqlen", "999"],
    "device": ["--device", "abacus"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_can_be_mended_without_force(qtool, here, mistake):
    """A wrong flag that is found late must not leave behind what then refuses the right one."""
    (here / "empty.txt").write_text("", encoding="utf-8")
    assert qtool("quantize", "m", "-o", "out", *GPTQ, *MISTAKES[mistake]).code == (1 if "empty" in mistake else 2)
    result = qtool("quantize", "m", "-o", "out", *GPTQ, "--no-progress")
    assert (result.code, result.err) == (0, "")


def test_rtn_works_on_an_architecture_that_gptq_does_not_know(qtool, here):
    change_config("m", model_type="whoknows")
    refused = qtool("quantize", "m", "-o", "out", *GPTQ, "--no-progress")
    assert (refused.code, refused.out) == (2, "")
    assert "`qtool quantize --method rtn` without --eval" in refused.err
    result = qtool("quantize", "m", "-o", "out", *GPTQ, "--method", "rtn", "--no-progress")
    assert (result.code, result.err) == (0, "")
    assert "model            m (whoknows)\n" in result.out


def test_an_unknown_architecture_cannot_be_evaluated(qtool, here):
    change_config("m", model_type="whoknows")
    result = qtool("eval-ppl", "m", "--data", "c.jsonl")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: m is of architecture `whoknows`, which qtool cannot run; it runs gemma2, ")


@pytest.mark.parametrize(
    "command", [["quantize", "org/none", "-o", "out"], ["eval-ppl", "org/none"], ["inspect", "org/none"]]
)
def test_a_hub_id_offline(qtool, here, command):
    failed(
        qtool(*command),
        "`org/none` is no local folder and is not in the cache: HF_HUB_OFFLINE is set",
        "download it where there is a network (`hf download ORG/NAME`) and give the folder",
    )


def test_what_is_quantized_is_not_quantized_again(qtool, here):
    qtool("quantize", "m", "-o", "out", *RTN)
    assert qtool("quantize", "out", "-o", "twice", *RTN).all == (
        2,
        "",
        said(
            "out is already quantized, and --scheme would round it a second time",
            "`--format NAME` alone lays it out anew as it is; --requantize rounds again, from what it is worth now",
        ),
    )


def test_a_device_that_is_not_there(qtool, here):
    result = qtool("eval-ppl", "m", "--data", "c.jsonl", "--device", "abacus")
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"error: device `abacus` is not available; here there is: .*cpu\n", result.err)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("boom [int4]"), "error: RuntimeError: boom [int4]\n" + SHOW_TRACEBACK),
        (PermissionError(13, "Permission denied", "x"),
         "error: PermissionError: [Errno 13] Permission denied: 'x'\n" + SHOW_TRACEBACK),
        (OSError(errno.ENOSPC, "No space left on device", "out.partial/model.safetensors"),
         said("no space left on the device while writing out.partial/model.safetensors",
              "free some space and run the same command again: it goes on where it stopped")),
    ],
)  # fmt: skip
def test_an_unforeseen_error(qtool, here, monkeypatch, error, expected):
    def fail(*_):
        raise error

    monkeypatch.setattr("qtool.job.prepare", fail)
    assert qtool("quantize", "m", "-o", "out", *RTN).all == (1, "", expected)


def test_a_traceback_is_shown_with_v_only(qtool, here, monkeypatch):
    plain = qtool(*INTO, "--scheme", "zzz")
    assert plain.err == KINDS["scheme, nothing near"][1]
    for flag in ("-v", "--verbose"):
        verbose = qtool(*INTO, "--scheme", "zzz", flag)
        assert (verbose.code, verbose.out) == (2, "")
        assert verbose.err.startswith("Traceback (most recent call last):\n")
        assert verbose.err.endswith(f"qtool.errors.UsageError: unknown scheme `zzz`\n{plain.err}")

    def fail(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr("qtool.job.prepare", fail)
    verbose = qtool("quantize", "m", "-o", "out", *RTN, "-v")
    assert verbose.err.startswith("Traceback (most recent call last):\n")
    assert verbose.err.endswith("RuntimeError: boom\nerror: RuntimeError: boom\n")


# ---- statistics that were saved before


USING = {"gptq": ["--method", "gptq"], "awq": ["--method", "rtn", "--transform", "awq"],
         "smoothquant": ["--method", "rtn", "--transform", "smoothquant"]}  # fmt: skip
FROM_STATS = ["-o", "out", "--scheme", "int4-g32-sym", "--stats", "stats", "--no-progress"]


@pytest.fixture
def saved(qtool, here):
    """`saved("--hessians")`: statistics of `m` in `stats`."""

    def save(*arguments):
        rows = ["--data", "c.jsonl", "--seqlen", "32", "--rows", "16", "-q"]
        assert qtool("calibrate", "m", "-o", "stats", *rows, *arguments).code == 0

    return save


def test_statistics_of_another_model(qtool, here, saved):
    saved("--hessians")
    shutil.copytree("m", "other")
    change_tensors("other", lambda tensors: tensors["model.norm.weight"].mul_(2))
    for words in USING.values():
        failed(
            qtool("quantize", "other", *FROM_STATS, *words),
            "stats has statistics of another model: model.safetensors differs",
            "`qtool calibrate MODEL -o STATS` makes those of this one",
        )
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m", "other", "stats"]


@pytest.mark.parametrize("what", USING)
def test_statistics_of_another_tokenizer(qtool, here, saved, what):
    saved("--hessians")
    shutil.copytree("m", "other")
    file = here / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"]
    (a, x), (b, y) = sorted(ids.items(), key=lambda item: item[1])[-2:]
    ids.update({a: y, b: x})
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    result = qtool("quantize", "other", *FROM_STATS, *USING[what])
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(
        r"error: stats has statistics of another tokenizer: [^\n]+\n\nhint: [^\n]*`qtool calibrate MODEL -o [^\n]+\n",
        result.err,
    )
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m", "other", "stats"]


@pytest.mark.parametrize("what", USING)
def test_statistics_without_second_moments(qtool, here, saved, what):
    saved()
    result = qtool("quantize", "m", *FROM_STATS, *USING[what])
    failed(result, "stats has no second moments", "make them: `qtool calibrate MODEL -o stats --hessians`")
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m", "stats"]


def test_what_vectors_alone_do_for(qtool, here, saved):
    saved()
    for words in (["--scheme", "w8a8-static"], ["--kv", "fp8"]):
        out = words[1]
        result = qtool("quantize", "m", *FROM_STATS, "--method", "rtn", *words, "-o", out)
        assert (result.code, result.err) == (0, "")
        assert "calibration      c.jsonl, 16 rows, 512 tokens\n" in result.out
        assert qtool("quantize", "m", *FROM_STATS, "--method", "rtn", *words, "-o", out).err == f"{out} is up to date\n"


def test_statistics_of_the_model_before_its_rotation(qtool, here, saved):
    saved("--hessians")
    result = qtool("quantize", "m", *FROM_STATS, "--transform", "rotation")
    assert result.all == (2, "", said(
        "statistics of the model as it is do not fit it after `rotation`", "give data instead of --stats"
    ))  # fmt: skip


# ---- models that calibration cannot use


READ_BY = {
    "gptq": GPTQ,
    "gptaq": [*GPTQ, "--method", "gptaq"],
    "awq": [*GPTQ, "--method", "rtn", "--transform", "awq", "--transform", "smoothquant"],
    "static": [*GPTQ, "--method", "rtn", "--scheme", "w8a8-static"],
    "nvfp4": [*GPTQ, "--method", "rtn", "--scheme", "nvfp4", "--kv", "fp8"],
}


@pytest.mark.parametrize("what", READ_BY)
def test_inputs_that_are_all_zero(qtool, here, what):
    """Norm weights of zero: nothing can be said of the linears behind them."""
    change_tensors("m", lambda tensors: tensors["model.layers.0.input_layernorm.weight"].zero_())
    result = qtool("quantize", "m", "-o", "out", *READ_BY[what], "--no-progress")
    assert (result.code, result.out) == (1, "")
    zero = "error: the inputs of `model.layers.0.self_attn.q_proj` are zero for all 512 tokens of the calibration data"
    assert re.fullmatch(re.escape(zero) + r"\n\nhint: .*`--ignore '.*'`\n", result.err)
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m"]


def test_what_the_hint_for_zero_inputs_says_works(qtool, here):
    change_tensors("m", lambda tensors: tensors["model.layers.1.post_attention_layernorm.weight"].zero_())
    refused = qtool("quantize", "m", "-o", "out", *GPTQ, "--no-progress")
    assert refused.code == 1
    way = re.search(r"`(--ignore '[^`]+')`", refused.err)[1]
    result = qtool("quantize", "m", "-o", "out", *GPTQ, *shlex.split(way), "--no-progress")
    assert (result.code, result.err) == (0, "")


@pytest.mark.parametrize("what", READ_BY)
def test_inputs_that_are_not_finite(qtool, here, what):
    change_tensors("m", lambda tensors: tensors["model.layers.1.input_layernorm.weight"].fill_(3e38))
    result = qtool("quantize", "m", "-o", "out", *READ_BY[what], "--no-progress")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(
        "error: the inputs of `model.layers.1.self_attn.q_proj` are not finite on the calibration data\n"
    )
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m"]


@pytest.mark.parametrize("what", READ_BY)
def test_a_norm_that_is_not_finite(qtool, here, what):
    change_tensors("m", lambda tensors: tensors["model.layers.1.input_layernorm.weight"].fill_(float("inf")))
    result = qtool("quantize", "m", "-o", "out", *READ_BY[what], "--no-progress")
    failed(result, "`model.layers.1.input_layernorm.weight` has 64 NaN or infinite values of 64", NAN_HINT)
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m"]


# ---- gates


GATED = [*GPTQ, "--eval", "c.jsonl", "--max-kl"]


def test_a_missed_gate_is_exit_3_and_the_output_is_kept_and_marked(qtool, here):
    result = qtool("quantize", "m", "-o", "out", *GATED, "1e-9", "--no-progress")
    assert (result.code, result.err) == (3, MISSED)
    (gate,) = manifest("out")["report"]["gates"]
    assert gate["passed"] is False
    assert (gate["gate"], gate["asked"], gate["limit"]) == ("max_kl", "1e-09", 1e-9)
    assert result.out.endswith(f"\n\ngate max_kl 1e-09: MISSED, measured {gate['measured']:.5g} (limit 1e-09)\n")
    assert (here / "out" / "model.safetensors").is_file()

    again = qtool("quantize", "m", "-o", "out", *GATED, "1e-9", "--no-progress")
    assert again.all == (3, result.out, "out is up to date\n" + MISSED)
    assert qtool("quantize", "m", "-o", "out", *GATED, "1e-9", "-q", "--json").json["gates"] == [gate]

    looser = qtool("quantize", "m", "-o", "out", *GATED, "9", "--no-progress")
    assert (looser.code, looser.err) == (0, "out is up to date\n")
    assert looser.out.endswith(f"\n\ngate max_kl 9: passed, measured {gate['measured']:.5g} (limit 9)\n")
    assert manifest("out")["report"]["gates"][0]["passed"] is True


def test_a_gate_on_perplexity(qtool, here):
    arguments = ["quantize", "m", "-o", "out", *GPTQ, "--eval", "c.jsonl", "-q", "--max-ppl-increase"]
    passed = qtool(*arguments, "400%")
    assert (passed.code, passed.err) == (0, "")
    assert re.search(r"\n\ngate max_ppl_increase 400%: passed, measured \S+ \(limit 4\)\n\Z", passed.out)
    missed = qtool(*arguments, "-99%")
    assert (missed.code, missed.err) == (3, MISSED)
    assert re.search(r"\n\ngate max_ppl_increase -99%: MISSED, measured \S+ \(limit -0\.99\)\n\Z", missed.out)


def test_a_gate_without_an_evaluation_is_measured_on_python_docs(qtool, here):
    assert resolved(qtool, "--max-kl", "0.1")["eval"]["data"]["source"] == "python-docs"


def test_the_page_of_an_evaluation_in_a_quantize_run(qtool, here):
    page = qtool("quantize", "m", "-o", "out", *GPTQ, "--eval", "c.jsonl").out.splitlines()
    evaluation = manifest("out")["report"]["evaluation"]
    at = next(i for i, line in enumerate(page) if line.startswith("calibration"))
    assert page[at] == "calibration      c.jsonl, 16 rows, 512 tokens"
    assert page[at + 1] == f"evaluation       c.jsonl, windows, {evaluation['tokens']} tokens"
    assert page[at + 2 : at + 9] == [f"{name:<15}  {value}" for name, value in comparison_lines(evaluation)]
    assert page[at + 9].startswith("time ")


# ---- eval-ppl


def estimate(value, digits=4):
    return f"{value['value']:.{digits}f} ± {value['standard_error']:.{digits}f}"


def comparison_lines(tree):
    comparison = tree["comparison"]
    delta, spread = comparison["delta"], comparison["kl_percentiles"]
    sign = "+" if delta["value"] >= 0 else ""
    return [
        ("perplexity", estimate(tree["perplexity"])),
        *([("bits per byte", f"{tree['bits_per_byte']:.4f}")] if "bits per byte" in tree.get("show", "") else []),
        ("baseline", f"{estimate(comparison['perplexity'])}  {comparison['baseline']}"),
        ("delta", f"{sign}{estimate(delta)} ({100 * comparison['relative_increase']['value']:+.2f} %), "
                  f"95 % interval {delta['low']:+.4f} .. {delta['high']:+.4f}"),
        ("KL divergence", f"{estimate(comparison['kl'], 5)} nats"),
        ("KL percentiles", f"median {spread['median']:.4f}, p90 {spread['p90']:.4f}, p99 {spread['p99']:.4f}, "
                           f"p99.9 {spread['p99_9']:.4f}, max {spread['max']:.4f}"),
        ("same top token", f"{100 * comparison['top1_agreement']['value']:.2f} %"),
        ("RMS change of p", f"{100 * comparison['rms_delta_p']:.2f} %"),
    ]  # fmt: skip


EVALUATE = ["eval-ppl", "out", "--data", "c.jsonl", "--seqlen", "32", "--rows", "20"]


@pytest.fixture
def packed(here, qtool):
    assert qtool("quantize", "m", "-o", "out", *GPTQ).code == 0


def test_the_page_of_a_model_alone(qtool, packed):
    result = qtool(*EVALUATE)
    tree = qtool(*EVALUATE, "--json").json
    assert result.code == 0
    assert without_times(result.out) == (
        "out\n"
        f"data           c.jsonl, 620 tokens in 20 rows (sha256 {tree['data_sha256'][:12]})\n"
        "protocol       windows, context 32\n"
        "tokenizer      TokenizersBackend (300 tokens)\n"
        f"perplexity     {estimate(tree['perplexity'])}\n"
        f"bits per byte  {tree['bits_per_byte']:.4f}\n"
        "speed          R\n"
        "time           T\n"
        "peak memory    M\n"
    )
    assert without_times(result.err) == (
        "evaluate model 1/2  model.layers.0  [T]\nevaluate model 2/2  model.layers.1  [T]\n"
    )
    assert tree["comparison"] is None
    assert tree["gates"] == []


def test_the_page_beside_a_baseline(qtool, packed):
    gated = [*EVALUATE, "--baseline", "m", "--stride", "16", "--max-kl", "5"]
    result, tree = qtool(*gated), qtool(*gated, "--json").json
    comparison = tree["comparison"]
    facts = [
        ("data", f"c.jsonl, {tree['tokens']} tokens in 20 rows (sha256 {tree['data_sha256'][:12]})"),
        ("protocol", "windows, context 32, stride 16"),
        ("tokenizer", "TokenizersBackend (300 tokens)"),
        *comparison_lines({**tree, "show": "bits per byte"}),
        ("speed", "R"),
        ("time", "T"),
        ("peak memory", "M"),
    ]
    places = [(f"{w['kl']:.3f}", f"{w['row']}:{w['position']}", repr(w["context"][-48:]), repr(w["token"]))
              for w in comparison["worst"]]  # fmt: skip
    heads = ("KL", "row:token", "after", "token")
    wide = [max(len(row[i]) for row in [heads, *places]) for i in range(4)]
    table = [f"{a:>{wide[0]}}  {b:>{wide[1]}}  {c:<{wide[2]}}  {d}".rstrip() for a, b, c, d in [heads, *places]]
    assert len(places) == 10
    assert (result.code, without_times(result.out).splitlines()) == (
        0,
        [
            "out",
            *(f"{name:<15}  {value}" for name, value in facts),
            "",
            "where the distribution changed most",
            *table,
            "",
            f"gate max_kl 5: passed, measured {comparison['kl']['value']:.5g} (limit 5)",
        ],
    )
    assert tree["gates"] == [
        {"gate": "max_kl", "asked": "5", "limit": 5.0, "measured": comparison["kl"]["value"], "passed": True}
    ]


def test_eval_ppl_misses_a_gate(qtool, packed):
    result = qtool(*EVALUATE, "--baseline", "m", "--max-kl", "0", "-q", "-o", "r.json")
    assert (result.code, result.err) == (3, "error: a quality gate was missed\n")
    assert re.search(r"\n\ngate max_kl 0: MISSED, measured \S+ \(limit 0\)\n\Z", result.out)
    assert json.loads(Path("r.json").read_text(encoding="utf-8"))["gates"][0]["passed"] is False


def test_a_model_beside_itself(qtool, here):
    tree = qtool("eval-ppl", "m", "--baseline", "m", "--data", "c.jsonl", "--rows", "5", "--max-kl", "0", "--json").json
    assert tree["comparison"]["delta"]["value"] == tree["comparison"]["kl"]["value"] == 0
    assert tree["gates"][0]["passed"] is True


def test_quantize_and_eval_ppl_measure_the_same(qtool, here):
    report = qtool("quantize", "m", "-o", "out", *GPTQ, "--eval", "c.jsonl", "--json").json["evaluation"]
    alone = qtool("eval-ppl", "out", "--baseline", "m", "--data", "c.jsonl", "--json").json
    for key in ("perplexity", "bits_per_byte", "tokens", "data_sha256"):
        assert report[key] == alone[key]
    for key in ("kl", "delta", "worst"):
        assert report["comparison"][key] == alone["comparison"][key]
    assert alone["model"] == "out"
    assert report["model"] == "out"


def test_a_report_file_appears_whole_and_is_not_overwritten(qtool, here, monkeypatch):
    steps = []
    replace = Path.replace

    def watched(self, target):
        steps.append((self.name, Path(target).exists(), json.loads(self.read_text(encoding="utf-8"))))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    arguments = ["eval-ppl", "m", "--data", "c.jsonl", "--rows", "3", "-o", "sub/r.json", "--no-progress"]
    result = qtool(*arguments, "--json")
    written = (here / "sub" / "r.json").read_text(encoding="utf-8")
    assert (result.code, result.err) == (0, "")
    assert written == result.out
    assert steps == [("r.json.partial", False, result.json)]
    assert [p.name for p in (here / "sub").iterdir()] == ["r.json"]

    assert qtool(*arguments).all == (2, "", "error: sub/r.json exists\n\n" + EXISTS_HINT)
    assert (here / "sub" / "r.json").read_text(encoding="utf-8") == written
    table = qtool(*arguments, "--force")
    assert table.code == 0
    assert table.out.startswith("m\n")
    assert (here / "sub" / "r.json").read_text(encoding="utf-8") != written  # other times
    assert json.loads((here / "sub" / "r.json").read_text(encoding="utf-8"))["rows"] == 3


def test_a_report_file_cannot_replace_a_folder(qtool, here):
    (here / "reports").mkdir()
    result = qtool("inspect", "m", "-o", "reports", "--force")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: reports ")
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m", "reports"]


@pytest.mark.parametrize("command", [["eval-ppl", "m", "--data", "c.jsonl"], ["inspect", "m"]])
def test_a_dry_run_writes_no_report(qtool, here, command):
    result = qtool(*command, "--dry-run", "-o", "r.json")
    assert (result.code, result.err) == (0, "")
    assert not (here / "r.json").exists()


def test_the_dry_run_of_an_evaluation(qtool, packed):
    arguments = ["eval-ppl", "out", "--baseline", "m", "--data", "c.jsonl", "--dry-run"]
    assert qtool(*arguments).all == (
        0,
        "model     out (llama, int4-g32-sym)\n"
        "baseline  m (llama, dense)\n"
        "data      c.jsonl\n"
        "protocol  windows\n"
        "context   the model's, at most 2048\n",
        "",
    )
    assert list(qtool(*arguments, "--json").json) == ["model", "baseline", "data", "protocol", "context"]


@pytest.mark.parametrize("limit", [["--max-kl", "nan"], ["--max-ppl-increase", "nan"], ["--max-ppl-increase", "inf"]])
def test_a_gate_that_can_never_be_held_or_missed_is_refused(qtool, here, limit):
    result = qtool("eval-ppl", "m", "--baseline", "m", "--data", "c.jsonl", *limit)
    assert (result.code, result.out) == (2, "")


def test_a_broken_baseline_is_an_error_and_not_a_crash(qtool, here):
    shutil.copytree("m", "broken")
    change_tensors("broken", lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    result = qtool("eval-ppl", "m", "--baseline", "broken", "--data", "c.jsonl", "--json", "--no-progress")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: the baseline's loss is not finite for ")


# ---- inspect


def test_inspect(qtool, packed):
    page = qtool("inspect", "out")
    assert (page.code, page.err) == (0, "")
    assert page.out.startswith("out\n\narchitecture  LlamaForCausalLM (llama)\n")
    assert "scheme        int4-g32-sym, 14 layers, read by vLLM, SGLang, transformers\n" in page.out
    assert "made by       qtool 0.1.0: gptq, int4-g32-sym, from m\n".replace("0.1.0", __version__) in page.out
    tree = qtool("inspect", "out", "--json").json
    assert tree["parameters"] == 94528
    for view in (["--memory"], ["--against", "m"], ["--tensor", "model.layers.0.mlp.up_proj.weight"]):
        shown, json_tree = qtool("inspect", "out", *view, "-q"), qtool("inspect", "out", *view, "-q", "--json")
        assert (shown.code, shown.err, json_tree.code, json_tree.err) == (0, "", 0, "")
        assert shown.out
        assert json_tree.json


# ---- processes


@pytest.mark.slow
def test_a_pipe_gets_plain_lines_whatever_the_environment_says(here):
    forced = {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "TERM": "xterm-256color", "COLUMNS": "40", "PY_COLORS": "1"}
    result = process("quantize", "m", "-o", "out", *GPTQ, "--eval", "c.jsonl", cwd=here, **forced)
    assert result.code == 0
    assert HELD not in result.out + result.err
    assert "\r" not in result.out + result.err
    assert [line.split()[0] for line in result.err.splitlines()] == (
        ["identify"] + 3 * ["quantize"] + 3 * ["verify"] + 4 * ["evaluate"] + ["score"]
    )
    assert max(map(len, result.out.splitlines())) > 80  # nothing is wrapped
    for arguments in (["--help"], ["quantize", "--help"], ["inspect", "m"], ["inspect", "nope"]):
        result = process(*arguments, cwd=here, **forced)
        assert HELD not in result.out + result.err, arguments


def terminal(*arguments, cwd, **extra):
    """Exit code, stdout and stderr of a process whose stderr is a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qtool", *map(str, arguments)]
    env = environment(TERM="xterm-256color", COLUMNS="200", **extra)
    with subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=theirs) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux says so at the end
                break
            if not part:
                break
            shown += part
        out = child.stdout.read()
    os.close(ours)
    return Result(child.returncode, out.decode(), shown.decode().replace("\r\n", "\n"))


@pytest.mark.slow
def test_a_terminal_gets_a_bar_and_the_pipe_beside_it_plain_lines(here):
    (here / "m").rename(here / "m[int4]")
    result = terminal("quantize", "m[int4]", "-o", "out", *RTN, cwd=here)
    assert result.code == 0
    assert HELD in result.err
    assert HELD not in result.out
    assert "model            m[int4] (llama)\n" in result.out
    assert "verify 3/3" in re.sub(r"\x1b\[[\d;?]*\w", "", result.err)
    quiet = terminal("quantize", "m[int4]", "-o", "out2", *RTN, "-q", cwd=here)
    assert (quiet.code, quiet.err) == (0, "")


def interrupted(arguments, cwd, after):
    """A process that gets Ctrl-C once it has said a line that begins with `after`."""
    command = [sys.executable, "-m", "qtool", *arguments]
    with subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        err = ""
        for line in child.stderr:
            err += line
            if line.startswith(after):
                child.send_signal(signal.SIGINT)
                break
        out, rest = child.communicate(timeout=60)
    return Result(child.returncode, out, err + rest)


@pytest.mark.slow
@pytest.mark.parametrize("after", ["identify 0/1", "quantize 1/3"])
def test_ctrl_c_is_130_and_the_same_command_then_completes(qtool, here, after):
    arguments = ["quantize", "m", "-o", "out", *GPTQ]
    result = interrupted(arguments, here, after)
    assert (result.code, result.out) == (130, "")
    assert result.err.endswith("\nerror: interrupted: the same command goes on from here\n")
    assert "Traceback" not in result.err
    assert not (here / "out").exists()
    again = qtool(*arguments, "--json")
    assert again.code == 0
    assert again.json["resumed_units"] == (0 if after.startswith("identify") else 1)
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m", "out"]
    assert qtool("quantize", "m", "-o", "undisturbed", *GPTQ).code == 0
    assert digests("out") == digests("undisturbed")


def test_ctrl_c_that_comes_out_as_another_exception_is_130_too(here, monkeypatch, capsys):
    """As out of safetensors 0.8 while it asks torch 2.13 for a tensor."""

    def turned(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type") from None

    monkeypatch.setattr("qtool.job.prepare", turned)
    monkeypatch.setattr(sys, "argv", ["qtool", "quantize", "m", "-o", "out", *RTN])
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "error: interrupted: the same command goes on from here\n"
    monkeypatch.setattr("qtool.job.prepare", lambda *_: 1 / 0)
    assert run(["quantize", "m", "-o", "out", *RTN]) == 1  # nothing is remembered


def test_ctrl_c_in_a_command_that_does_not_resume_promises_nothing(qtool, here, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qtool.evaluation.evaluate.evaluate", interrupt)
    result = qtool("eval-ppl", "m", "--data", "c.jsonl")
    assert (result.code, result.out) == (130, "")
    assert result.err.startswith("error: interrupted")
    assert "goes on from here" not in result.err


def test_a_reader_that_stops_reading_is_no_crash(here):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "qtool", "inspect", "m"],
        cwd=here, env=environment(), stdout=write, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_unknown_log_format_is_a_usage_error():
    with pytest.raises(UsageError, match="unknown log format `yaml`"):
        Console(log_format="yaml").check()
