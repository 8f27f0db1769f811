"""Statistics that `qtool calibrate` saves: right, resumable, added up, and as llama.cpp takes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.calibration import imatrix, self_data
from qtool.calibration.rows import Rows
from qtool.calibration.saved import SavedStats
from qtool.calibration.stats import LARGE, SECOND, VECTORS
from qtool.calibration.tokens import Tokenizer, calibration_rows
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import StagedOutput, partial_path
from qtool.cli import run
from qtool.errors import QtoolError, UsageError
from qtool.formats.weights import Weights
from qtool.models.architectures import ARCHITECTURES
from qtool.models.blockwise import BlockModel
from qtool.recipe import DataSpec

CPU = torch.device("cpu")
FEW = ["--rows", "12", "--seqlen", "32", "--device", "cpu"]


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads(self.out)
        return tree


Calibrate = Callable[..., Result]


@pytest.fixture
def calibrate(capsys: pytest.CaptureFixture[str]) -> Calibrate:
    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = run(["calibrate", *map(str, arguments)])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def saved(make_model: Any, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the tiny llama in float32, with second moments."""
    out = tmp_path_factory.mktemp("saved") / "stats"
    model = make_model("llama", dtype="float32")
    assert (
        run(["calibrate", str(model), "-o", str(out), "--data", str(calibration_text), "--hessians", "-q", *FEW]) == 0
    )
    return out


def rows_of(model: Path, text: Path, rows: int = 12) -> tuple[BlockModel, Any]:
    block_model = BlockModel(model, Weights(Checkpoint(model)), CPU)
    spec = DataSpec(source=str(text), rows=rows, seqlen=32)
    return block_model, calibration_rows(spec, Tokenizer(model, block_model.config.vocab_size), block_model.context)


def assert_close(name: str, ours: Tensor, theirs: Tensor, relative: float) -> None:
    difference = (ours.double() - theirs.double()).abs()
    scale = theirs.double().abs().max()
    assert difference.max() <= relative * scale, f"{name}: max {difference.max():.3g}, mean {difference.mean():.3g}"


def edited(model: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# What is measured


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_statistics_are_those_of_the_whole_model(
    kind: str, make_model: Any, calibration_text: Path, tmp_path: Path, calibrate: Calibrate
) -> None:
    """Against a model of transformers with hooks, in its own words."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = make_model(kind, dtype="float32")
    out = tmp_path / "stats"
    done = calibrate(model, "-o", out, "--data", calibration_text, "--hessians", "--json", "-q", *FEW)
    assert done.code == 0, done.err
    stats = SavedStats(out, Checkpoint(model))
    block_model, rows = rows_of(model, calibration_text)
    whole = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation=block_model.architecture.attention
    ).eval()
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    for name in [linear for x in stats.blocks.values() for source in x for linear in source.linears]:

        def note(_: Any, args: Any, output: Tensor, name: str = name) -> None:
            inputs.setdefault(name, []).append(args[0].flatten(0, -2).double())
            outputs.setdefault(name, []).append(output.flatten())

        whole.get_submodule(name).register_forward_hook(note)
    keys: dict[int, list[Tensor]] = {}
    with torch.no_grad():
        for row in rows.rows:
            cache = DynamicCache()  # not the model's own, which forgets what has left the window
            whole(row[None], past_key_values=cache)
            for index, layer in enumerate(cache.layers):
                keys.setdefault(index, []).append(torch.stack([layer.keys.abs().max(), layer.values.abs().max()]))
    assert len(inputs) == len(stats.blocks) * len(block_model.architecture.linears())
    for name, seen in inputs.items():
        x = torch.cat(seen)
        ours = stats.stats(name, {VECTORS, SECOND})
        assert ours.tokens == len(x) == rows.tokens == 12 * 32
        assert ours.channels is not None
        assert ours.second_II is not None
        assert_close(name, ours.channels.absmax_I, x.abs().amax(0), 1e-4)
        assert_close(name, ours.channels.sum_I, x.sum(0), 1e-4)
        assert_close(name, ours.channels.sum_abs_I, x.abs().sum(0), 1e-4)
        assert_close(name, ours.channels.sum_squares_I, x.square().sum(0), 1e-4)
        assert_close(name, ours.second_II, x.T @ x, 1e-4)
        assert_close(name, ours.channels.large_I, (x.abs() >= LARGE).sum(0), 0)
        assert_close(name, stats.peak_squares(name), x.abs().amax(1).square().sum(), 1e-4)
        assert_close(name, stats.output_absmax(name), torch.cat(outputs[name]).abs().max(), 1e-4)
    for index, block in enumerate(stats.blocks):
        k, v = torch.stack(keys[index]).amax(0)
        ours_k, ours_v = stats.kv(block)
        assert ours_k.shape == ours_v.shape == (1,)
        assert_close(f"keys of {block}", ours_k, k, 1e-4)
        assert_close(f"values of {block}", ours_v, v, 1e-4)


def test_moments_have_the_bits_of_a_run_with_the_data(make_model: Any, calibration_text: Path, saved: Path) -> None:
    model = make_model("llama", dtype="float32")
    block_model, token_rows = rows_of(model, calibration_text)
    rows = Rows(block_model, token_rows, 512, cross=False)
    stats = SavedStats(saved)
    for index, name in enumerate(stats.blocks):
        with block_model.block(index) as block:
            rows.enter(index)
            layers = [source.linears[0] for source in block_model.architecture.inputs]
            measured = rows.measure(block, layers, {VECTORS, SECOND}, advance=True)
        for layer in layers:
            theirs = measured[layer].moments(layer)
            ours = stats.stats(f"{name}.{layer}", {VECTORS, SECOND}, CPU).moments(layer)
            assert ours.tokens == theirs.tokens
            assert ours.vectors
            assert theirs.vectors
            for field in ("second_II", "square_I", "diagonal_I"):
                assert torch.equal(getattr(ours, field), getattr(theirs, field)), (layer, field)
            for field in ("absmax_I", "mean_I", "mean_abs_I"):
                assert torch.equal(getattr(ours.vectors, field), getattr(theirs.vectors, field)), (layer, field)


def test_linears_of_one_input_share_its_statistics_and_only_what_is_wanted_is_read(saved: Path) -> None:
    stats = SavedStats(saved)
    q = stats.stats("model.layers.1.self_attn.q_proj", {SECOND})
    v = stats.stats("model.layers.1.self_attn.v_proj", {SECOND, "kv"})
    assert q.channels is None
    assert torch.equal(q.second_II, v.second_II)
    assert stats.stats("model.layers.1.mlp.down_proj", {VECTORS}).second_II is None
    with pytest.raises(QtoolError, match="no statistics of the inputs of `lm_head`"):
        stats.stats("lm_head", {VECTORS})
    with pytest.raises(QtoolError, match=r"no ranges of keys and values of `model\.layers\.2`"):
        stats.kv("model.layers.2")
    with pytest.raises(QtoolError, match="float model only"):
        stats.stats("model.layers.1.mlp.down_proj", {"cross"})


def test_estimate_of_rounding_a_token(saved: Path, make_model: Any, calibration_text: Path) -> None:
    """Against rounding the inputs themselves to 8 bits with a scale per token."""
    model = make_model("llama", dtype="float32")
    block_model, token_rows = rows_of(model, calibration_text)
    rows = Rows(block_model, token_rows, 512, cross=False)
    seen: list[Tensor] = []
    with block_model.block(0) as block:
        block.mlp.down_proj.register_forward_hook(lambda _, args, __: seen.append(args[0].flatten(0, -2)))
        rows.leave(block)
    x = torch.cat(seen)
    step = x.abs().amax(1, keepdim=True) / 127
    true = float(((x / step).round() * step - x).norm() / x.norm())
    manifest = json.loads((saved / "manifest.json").read_text())
    record = next(r for r in manifest["report"]["inputs"] if r["input"] == "model.layers.0.mlp.down_proj")
    assert record["token_error"]["int8"] == pytest.approx(true, rel=0.05)
    assert record["outlier_ratio"] == pytest.approx(float(x.abs().max() / x.abs().mean()), rel=1e-4)
    assert record["large_channels"] == int((x.abs() >= LARGE).any(0).sum())


# The command


def test_page_and_json(saved: Path, make_model: Any, calibration_text: Path, calibrate: Calibrate) -> None:
    model = make_model("llama", dtype="float32")
    arguments = [model, "-o", saved, "--data", calibration_text, "--hessians", *FEW]
    again = calibrate(*arguments)
    assert again.code == 0
    assert again.err.splitlines()[-1] == f"{saved} is up to date"
    lines = again.out.splitlines()
    assert lines[0] == "largest outliers (8 of 8 inputs; --json has all)"
    assert lines[1].split() == ["input", "of", "max/mean", "max", "|x|>=6", "dead", "8", "bits", "4", "bits"]
    ratios = [float(line.split()[1]) for line in lines[2:10]]
    assert ratios == sorted(ratios, reverse=True)
    assert sum(line.startswith("*.") for line in lines) == 4
    few = "384 calibration tokens are few for layers of 128 inputs: 512 would do (`--rows 16` of 32 tokens)"
    assert again.out.count(few) == 1
    tree = calibrate(*arguments, "--json", "-q")
    assert tree.err == f"warning: {few}\n"
    hurt = sum(x["token_error"]["int8"] > 0.02 for x in tree.tree["inputs"])
    assert f"int8 per token  {hurt} of 8 inputs would lose more than 2 %" in again.out
    assert tree.tree["up_to_date"] is True
    assert tree.tree["tokens"] == 384
    assert [x["linears"] for x in tree.tree["inputs"][:2]] == [
        [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"],
        ["model.layers.0.self_attn.o_proj"],
    ]


def test_too_little_data_is_said(make_model: Any, calibration_text: Path, tmp_path: Path, calibrate: Calibrate) -> None:
    arguments = [make_model(), "--data", calibration_text, "--rows", "2", "--seqlen", "32", "--device", "cpu", "-q"]
    with_matrices = calibrate(*arguments, "-o", tmp_path / "a", "--hessians")
    assert with_matrices.err.startswith("warning: 64 calibration tokens are few for layers of 128 inputs: 512 would do")
    vectors = calibrate(*arguments, "-o", tmp_path / "b")
    assert (vectors.code, vectors.err) == (0, "")
    assert "enough data" in vectors.out
    assert "512 would do" in vectors.out


def test_another_recipe_is_refused_without_force(
    make_model: Any, calibration_text: Path, tmp_path: Path, calibrate: Calibrate
) -> None:
    out, arguments = tmp_path / "out", [make_model(), "--data", calibration_text, *FEW, "-q"]
    assert calibrate(*arguments, "-o", out).code == 0
    before = (out / "stats.safetensors").read_bytes()
    refused = calibrate(*arguments, "-o", out, "--hessians")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == (
        f"error: {out} was made otherwise: hessians was `False` and is now `True`\n\n"
        "hint: give another -o/--output, or replace it with --force\n"
    )
    assert (out / "stats.safetensors").read_bytes() == before
    assert calibrate(*arguments, "-o", out, "--hessians", "--force").code == 0
    assert SavedStats(out).has_hessians
    (out / "notes.txt").write_text("mine")
    foreign = calibrate(*arguments, "-o", out, "--force")
    assert foreign.code == 2
    assert "holds what qtool did not write there, such as notes.txt" in foreign.err


@pytest.mark.parametrize("arguments", [["--hessians"], ["--format", "imatrix"]])
def test_resumed_after_an_interrupt_with_the_same_bytes(
    arguments: list[str],
    make_model: Any,
    calibration_text: Path,
    tmp_path: Path,
    calibrate: Calibrate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "x.gguf" if "imatrix" in arguments else "stats"
    command = [make_model(), "--data", calibration_text, *FEW, *arguments, "-q", "--json"]
    whole, broken = tmp_path / "whole" / name, tmp_path / "broken" / name
    assert calibrate(*command, "-o", whole).code == 0
    finish = StagedOutput.finish_unit

    def interrupted(self: StagedOutput, unit: str, record: dict[str, Any]) -> None:
        finish(self, unit, record)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StagedOutput, "finish_unit", interrupted)
        stopped = calibrate(*command, "-o", broken)
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err == "error: interrupted: the same command goes on from here\n"
    assert not broken.exists()
    assert partial_path(broken).exists()
    other = calibrate(*command, "-o", broken, "--seed", "1")
    assert other.code == 1
    assert "holds an interrupted run of another recipe or source (1 unit done)" in other.err
    resumed = calibrate(*command, "-o", broken)
    assert resumed.code == 0
    assert resumed.tree["resumed_blocks"] == 1
    assert not partial_path(broken).exists()
    if name == "stats":
        assert (whole / "stats.safetensors").read_bytes() == (broken / "stats.safetensors").read_bytes()
        assert SavedStats(whole).sha256 == SavedStats(broken).sha256
    else:
        ours, theirs = entries(whole), entries(broken)
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in ours)


def test_dry_run_says_what_it_would_take(
    make_model: Any, calibration_text: Path, tmp_path: Path, calibrate: Calibrate
) -> None:
    command = [make_model("llama", dtype="float32"), "--data", calibration_text, "--hessians", *FEW]
    shown = calibrate(*command, "--dry-run", "--json", "-o", tmp_path / "out")
    assert (shown.code, shown.err) == (0, "")
    assert not (tmp_path / "out").exists()
    assert {"blocks": 2, "inputs": 8, "tokens": 384, "hessians": True}.items() <= shown.tree.items()
    assert calibrate(*command, "-q", "-o", tmp_path / "out").code == 0
    header = 12000  # at most
    assert 0 < (tmp_path / "out" / "stats.safetensors").stat().st_size - shown.tree["size_bytes"] < header


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A", "B", "-o", "C"], "2 models are given: A, B"),
        (["A", "-o", "C"], "no such file or folder: A"),
        (["A"], "nowhere to write to"),
        (["--merge", "-o", "C"], "Missing argument 'MODEL'"),
        (["--merge", "MODEL", "-o", "C"], "--merge takes two statistics folders or more, not 1"),
        (["--merge", "MODEL", "MODEL", "-o", "C"], "holds no statistics"),
        (["--merge", "A", "B", "-o", "C"], "no such folder: A"),
        (["--merge", "A", "B", "-o", "C", "--data", "x.txt"], "--data means nothing with --merge"),
        (["--merge", "A", "B", "-o", "C", "--rows", "3"], "--rows means nothing with --merge"),
        (["MODEL", "-o", "C", "--format", "csv"], "unknown format `csv`"),
        (["MODEL", "-o", "C", "--format", "imatrix"], "an imatrix is one file, not `C`"),
        (["MODEL", "-o", "C.gguf"], "statistics are a folder, not `C.gguf`"),
        (["MODEL", "-o", "C.gguf", "--format", "imatrix", "--hessians"], "an imatrix has no second moments"),
        (["MODEL", "-o", "C", "--data", "./none.txt"], "no such file or folder: ./none.txt"),
        (["MODEL", "-o", "C", "--data", "self", "--column", "text"], "--column means nothing with `--data self`"),
        (["MODEL", "-o", "MODEL"], "is where the model itself is"),
        (["MODEL", "-o", "C", "--seqlen", "999"], "rows of 999 tokens do not fit the model: its context is 128"),
        (["OPT", "-o", "C.gguf", "--format", "imatrix"], "llama.cpp has no architecture `opt`"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    make_model: Any,
    calibrate: Calibrate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    models = {"MODEL": "llama", "OPT": "opt"}
    wrong = calibrate(*(make_model(models[x]) if x in models else x for x in arguments), "-q")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith("error: ")
    assert message in wrong.err.splitlines()[0]
    assert not list(tmp_path.iterdir())


# What can be wrong with a model


def test_not_finite_inputs_name_the_layer(
    make_model: Any, calibration_text: Path, tmp_path: Path, calibrate: Calibrate
) -> None:
    def overflow(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][5] = 3e38

    model = edited(make_model("llama", dtype="float32"), tmp_path / "model", overflow)
    failed = calibrate(model, "-o", tmp_path / "out", "--data", calibration_text, "-q", *FEW)
    assert (failed.code, failed.out) == (1, "")
    assert "puts of `model.layers.1.mlp." in failed.err
    assert "are not finite on the calibration data" in failed.err
    assert not (tmp_path / "out").exists()
    assert not partial_path(tmp_path / "out").exists()  # nothing to go on from


def test_nan_weights_are_named(make_model: Any, calibration_text: Path, tmp_path: Path, calibrate: Calibrate) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan

    model = edited(make_model(), tmp_path / "model", damage)
    failed = calibrate(model, "-o", tmp_path / "out", "--data", calibration_text, "-q", *FEW)
    assert failed.code == 1
    assert "`model.layers.0.mlp.up_proj.weight` has 1 NaN or infinite values" in failed.err


def test_dead_inputs_are_kept_and_told(
    make_model: Any, calibration_text: Path, tmp_path: Path, calibrate: Calibrate
) -> None:
    """A dead channel is counted; an input that is all zero is a warning here, and an error for who needs it."""

    def silence(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][7] = 0
        tensors["model.layers.1.mlp.up_proj.weight"][:] = 0

    model = edited(make_model(), tmp_path / "model", silence)
    out = tmp_path / "out"
    done = calibrate(model, "-o", out, "--data", calibration_text, "-q", "--json", *FEW)
    assert done.code == 0
    dead = "model.layers.1.mlp.down_proj"
    assert done.err == f"warning: the inputs of `{dead}` are zero for all tokens: give more varied data\n"
    counts = {x["input"]: x["dead_channels"] for x in done.tree["inputs"]}
    assert counts["model.layers.0.self_attn.q_proj"] == 1
    assert counts[dead] == 128
    assert sum(counts.values()) == 129
    with pytest.raises(QtoolError, match="are zero for all 384 tokens"):
        SavedStats(out).stats(dead, {VECTORS}).moments(dead)
    file = tmp_path / "x.gguf"
    assert calibrate("--merge", out, "--format", "imatrix", "-o", file, "-q").code == 0
    assert all((values > 0).all() for name, values in entries(file).items())
    q = entries(file)["blk.0.attn_q.weight.in_sum2"][0]
    assert q[7] == pytest.approx(imatrix.SMALLEST * SavedStats(out).stats(
        "model.layers.0.self_attn.q_proj", {VECTORS}).channels.sum_squares_I.mean().item(), rel=1e-5)  # fmt: skip


# What saved statistics are checked against


def test_other_models_tokenizers_and_damage_are_refused(
    saved: Path, make_model: Any, tmp_path: Path, calibrate: Calibrate
) -> None:
    model = make_model("llama", dtype="float32")
    SavedStats(saved, Checkpoint(model))
    moved = shutil.copytree(model, tmp_path / "moved")
    SavedStats(saved, Checkpoint(moved))  # the same bytes elsewhere
    with pytest.raises(QtoolError, match=r"statistics of another model: model\.safetensors differs") as caught:
        SavedStats(saved, Checkpoint(make_model("llama")))
    assert "qtool calibrate MODEL -o STATS" in str(caught.value.hint)
    (moved / "config.json").write_text((moved / "config.json").read_text().replace('"rms_norm_eps"', '"eps"'))
    with pytest.raises(QtoolError, match=r"config\.json differs"):
        SavedStats(saved, Checkpoint(moved))
    stats = SavedStats(saved)
    identity = Checkpoint(model).identity()
    stats.check(identity)
    stats.check_tokenizer(Tokenizer(model, 320).sha256)
    with pytest.raises(QtoolError, match="statistics of another tokenizer"):
        stats.check_tokenizer("0" * 64)
    damaged = shutil.copytree(saved, tmp_path / "damaged")
    content = bytearray((damaged / "stats.safetensors").read_bytes())
    content[-2] ^= 64
    (damaged / "stats.safetensors").write_bytes(content)
    broken = SavedStats(damaged)
    last = list(broken._file.tensors)[-1]
    with pytest.raises(QtoolError, match="is damaged"):
        broken._read(last)
    with pytest.raises(UsageError, match="holds no statistics"):
        SavedStats(model)
    with pytest.raises(UsageError, match="no such folder"):
        SavedStats(tmp_path / "nothing")


def test_second_moments_that_were_not_saved(
    make_model: Any, calibration_text: Path, tmp_path: Path, calibrate: Calibrate
) -> None:
    out = tmp_path / "out"
    assert calibrate(make_model(), "-o", out, "--data", calibration_text, "-q", *FEW).code == 0
    with pytest.raises(QtoolError, match="no second moments") as caught:
        SavedStats(out).stats("model.layers.0.mlp.down_proj", {SECOND})
    assert caught.value.hint == f"make them: `qtool calibrate MODEL -o {out} --hessians`"


# Adding up


def test_two_halves_add_up_to_the_whole(make_model: Any, tmp_path: Path, calibrate: Calibrate) -> None:
    """Each row by itself in a batch, so that the same rows are the same floats in every run."""
    model = make_model("llama", dtype="float32")
    texts = tmp_path / "texts"
    texts.mkdir()
    words = "weight scale group block column error tensor layer model token".split()  # noqa: SIM905
    for part in range(2):
        lines = [json.dumps({"text": " ".join(words[i % 7 :] + words[: i % 5 + part])}) for i in range(8 + part)]
        (texts / f"{part}.jsonl").write_text("\n".join(lines))
    common = [model, "--no-pack", "--seqlen", "16", "--batch-tokens", "1", "--hessians", "--device", "cpu", "-q"]
    assert calibrate(*common, "--data", texts, "-o", tmp_path / "whole").code == 0
    for part in range(2):
        assert calibrate(*common, "--data", texts / f"{part}.jsonl", "-o", tmp_path / f"{part}").code == 0
    parts = [tmp_path / "0", tmp_path / "1"]
    merged = calibrate("--merge", *parts, "-o", tmp_path / "merged", "--json", "-q")
    assert merged.code == 0
    assert [x["source"] for x in merged.tree["data"]] == [str(texts / "0.jsonl"), str(texts / "1.jsonl")]
    whole, both = SavedStats(tmp_path / "whole"), SavedStats(tmp_path / "merged")
    assert (both.data_record()["rows"], both.data_record()["tokens"]) == (17, whole.data_record()["tokens"])
    for name in [source.name for inputs in whole.blocks.values() for source in inputs]:
        a, b = (stats.stats(name, {VECTORS, SECOND}) for stats in (both, whole))
        assert a.tokens == b.tokens
        for field in ("absmax_I", "large_I"):
            assert torch.equal(getattr(a.channels, field), getattr(b.channels, field))
        for field in ("sum_I", "sum_abs_I", "sum_squares_I"):
            assert_close(f"{name} {field}", getattr(a.channels, field), getattr(b.channels, field), 1e-12)
        assert_close(name, a.second_II, b.second_II, 1e-6)
        assert torch.equal(both.output_absmax(name), whole.output_absmax(name))
        of_a, of_b = a.moments(name), b.moments(name)
        assert torch.equal(of_a.square_I, of_b.square_I)
        assert torch.equal(of_a.vectors.mean_abs_I, of_b.vectors.mean_abs_I)
    for block in whole.blocks:
        assert all(map(torch.equal, both.kv(block), whole.kv(block)))
    again = calibrate("--merge", *parts, "-o", tmp_path / "merged")
    assert again.code == 0
    assert again.err.endswith("is up to date\n")
    other = calibrate("--merge", *parts[::-1], "-o", tmp_path / "merged")
    assert other.code == 2
    twice = calibrate("--merge", *parts, parts[0], "-o", tmp_path / "twice")
    assert twice.code == 2
    assert f"{parts[0]} is the same as {parts[0]}" in twice.err
    inside = calibrate("--merge", *parts, "-o", parts[0], "--force")
    assert inside.code == 2
    assert "is where the model itself is" in inside.err


def test_only_what_belongs_together_is_added(
    saved: Path, make_model: Any, calibration_text: Path, tmp_path: Path, calibrate: Calibrate
) -> None:
    common = ["--data", calibration_text, "-q", *FEW]
    assert calibrate(make_model("llama"), "-o", tmp_path / "bf16", *common).code == 0
    other = calibrate("--merge", saved, tmp_path / "bf16", "-o", tmp_path / "out")
    assert (other.code, other.out) == (1, "")
    assert f"{tmp_path / 'bf16'} is of another model than {saved}: model.safetensors was" in other.err
    vectors = tmp_path / "vectors"
    assert calibrate(make_model("llama", dtype="float32"), "-o", vectors, *common).code == 0
    lacking = calibrate("--merge", saved, vectors, "-o", tmp_path / "out", "-q")
    assert lacking.code == 1
    assert lacking.err.startswith(f"error: {vectors} has no second moments")
    assert calibrate("--merge", saved, vectors, "-o", tmp_path / "out", "-q", "--no-hessians").code == 0
    assert not SavedStats(tmp_path / "out").has_hessians


# For llama.cpp


def entries(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}


def test_imatrix_holds_our_sums(
    saved: Path, make_model: Any, calibration_text: Path, tmp_path: Path, calibrate: Calibrate
) -> None:
    direct, converted = tmp_path / "direct.gguf", tmp_path / "converted.gguf"
    model = make_model("llama", dtype="float32")
    command = [model, "--format", "imatrix", "-o", direct, "--data", calibration_text, *FEW]
    assert calibrate(*command, "-q").code == 0
    assert calibrate("--merge", saved, "--format", "imatrix", "-o", converted, "-q").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted.gguf", "direct.gguf"]
    stats, names = SavedStats(saved), {"self_attn": "attn_", "mlp": "ffn_"}
    expected = {}
    for inputs in stats.blocks.values():
        for source in inputs:
            for linear in source.linears:
                index, part, module = linear.removeprefix("model.layers.").split(".")
                short = names[part] + module.removesuffix("_proj").replace("o", "output" if module == "o_proj" else "o")
                expected[f"blk.{index}.{short}.weight"] = stats.stats(linear, {VECTORS}).channels.sum_squares_I
    for path in (direct, converted):
        reader = GGUFReader(path)
        assert reader.fields["general.type"].contents() == "imatrix"
        assert reader.fields["imatrix.datasets"].contents() == [str(calibration_text)]
        assert reader.fields["imatrix.chunk_count"].contents() == 12
        assert reader.fields["imatrix.chunk_size"].contents() == 32
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        assert tensors.keys() == {f"{name}.{part}" for name in expected for part in ("in_sum2", "counts")}
        for name, sums in expected.items():
            tensor = tensors[f"{name}.in_sum2"]
            assert tensor.tensor_type.name == "F32"
            assert tensor.shape.tolist() == [len(sums), 1]
            assert (tensor.data[0] == sums.float().numpy()).all(), name
            assert tensors[f"{name}.counts"].shape.tolist() == [1, 1]
            assert tensors[f"{name}.counts"].data.tolist() == [[384.0]]
    again = calibrate(*command)
    assert again.code == 0
    assert again.err.endswith("direct.gguf is up to date\n")
    assert calibrate(*command, "--seed", "5").code == 2
    assert calibrate(*command, "--seed", "5", "--force", "-q").code == 0
    (tmp_path / "model.gguf").write_bytes(b"GGUF is not what this is")
    foreign = calibrate(*command[:3], "-o", tmp_path / "model.gguf", "--force", *command[5:])
    assert foreign.code == 2
    assert "is there already and is no imatrix" in foreign.err


@pytest.mark.parametrize("kind", sorted(imatrix.GGUF_NAMES))
def test_every_linear_has_a_name_in_llama_cpp(kind: str) -> None:
    architecture = ARCHITECTURES[kind]
    for blocks in architecture.spellings(f"{architecture.blocks}."):
        linears = [f"{blocks}1.{linear}" for linear in architecture.linears()]
        names = imatrix.gguf_names(linears, kind, 2)
        assert len(set(names.values())) == len(linears)
        assert all(name.startswith("blk.1.") and name.endswith(".weight") for name in names.values())
    with pytest.raises(QtoolError, match="no name for `blk"):
        imatrix.gguf_names(["blk.0.nothing"], kind, 2)


def test_fused_linears_in_llama_cpp() -> None:
    names = imatrix.gguf_names(["model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"], "phi3", 2)
    assert list(names.values()) == ["blk.1.attn_qkv.weight", "blk.1.ffn_up.weight"]


# Rows that the model writes


def test_rows_that_the_model_writes(make_model: Any) -> None:
    """Against a loop without a cache, in its own words."""
    from transformers import AutoModelForCausalLM

    model = make_model("llama", dtype="float32")
    tokenizer = Tokenizer(model, 320)
    spec = DataSpec(source="self", rows=3, seqlen=12, seed=7)
    written = self_data.self_rows(model, spec, tokenizer, CPU)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = torch.stack(written.rows)
    assert rows.shape == (3, 12)
    chance = torch.Generator().manual_seed(7)
    usable = torch.arange(2, 300)  # neither BOS, EOS, nor what only the embedding has
    tokens = torch.cat([torch.zeros(3, 1, dtype=torch.long), usable[torch.randint(298, (3, 1), generator=chance)]], 1)
    for position in range(2, 12):
        with torch.no_grad():
            logits = whole(tokens).logits[:, -1, :]
        choice = torch.full_like(logits, -torch.inf)
        choice[:, usable] = logits[:, usable]
        if position < 6:
            new = choice.argmax(1, keepdim=True)
        else:
            new = torch.multinomial(torch.softmax(choice, 1), 1, generator=chance)
        tokens = torch.cat([tokens, new], 1)
    assert torch.equal(rows, tokens)
    assert written.source == "self"
    assert self_data.self_rows(model, spec, tokenizer, CPU).sha256 == written.sha256
    others = self_data.self_rows(model, DataSpec(source="self", rows=3, seqlen=12, seed=8), tokenizer, CPU)
    assert others.sha256 != written.sha256


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "opt"])
def test_calibrating_on_its_own_words(kind: str, make_model: Any, tmp_path: Path, calibrate: Calibrate) -> None:
    done = calibrate(make_model(kind), "-o", tmp_path / "out", "--data", "self", "--json", "-q", *FEW)
    assert (done.code, done.err) == (0, "")
    assert done.tree["data"][0]["source"] == "self"
    assert done.tree["tokens"] == 384
    again = calibrate(make_model(kind), "-o", tmp_path / "out", "--data", "self", "--json", "-q", *FEW)
    assert again.tree["up_to_date"] is True


def test_a_model_that_does_not_fit_is_not_loaded(
    make_model: Any, tmp_path: Path, calibrate: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_data, "_free_bytes", lambda device: 1000)
    failed = calibrate(make_model(), "-o", tmp_path / "out", "--data", "self", "-q", *FEW)
    assert failed.code == 1
    assert "`--data self` holds the whole model in memory" in failed.err
    assert "hint: give text with --data" in failed.err
