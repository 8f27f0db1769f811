"""`qtool distill`: data, the whole run from the command line and inside, and that it ends the same however it went."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import MakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.calibration.tokens import Tokenizer
from qtool.cli import run, state
from qtool.cli.console import Console
from qtool.distill.job import describe, prepare
from qtool.distill.recipe import Distillation, build, quantized, to_tree, to_yaml
from qtool.distill.run import distill
from qtool.errors import QtoolError, UsageError
from qtool.pipeline import RunOptions
from qtool.recipe import DataSpec, set_key
from qtool.training.data import TrainingRows, training_rows

ROOT = Path(__file__).parent.parent
STEPS = {"steps": 6, "batch": 4, "lr": 0.002, "evaluate_every": 2}
TINY = {"student": {"layers": 1}, "data": {"source": "c.jsonl", "rows": 20, "seqlen": 32}, "training": STEPS}
FLAGS = ["--layers", "1", "--data", "c.jsonl", "--rows", "20", "--seqlen", "32", "--steps", "6", "--batch", "4",
         "--lr", "0.002", "--set", "training.evaluate_every=2"]  # fmt: skip
EVAL = ["--eval", "c.jsonl", "--set", "eval.data.rows=4", "--set", "eval.data.seqlen=32"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: MakeModel, calibration_text: Path) -> Path:
    """An empty current folder but for a tiny model `m` and a text `c.jsonl`."""
    shutil.copytree(make_model("llama", "float32"), tmp_path / "m")
    shutil.copy(calibration_text, tmp_path / "c.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def qtool(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`qtool("distill", "m") -> (exit code, stdout, stderr)`: a command line in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        state.console = Console()  # as in a new process
        code = run([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def quiet(*_: Any) -> None:
    pass


def make(out: str, progress: Any = quiet, force: bool = False, **tree: Any) -> tuple[dict[str, Any], bool]:
    report, up_to_date = distill(prepare("m", build({**TINY, **tree})), Path(out), RunOptions("cpu", force), progress)
    assert report is not None
    return report, up_to_date


def weights(folder: str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def held_out(report: dict[str, Any]) -> list[float]:
    return [loss for _, loss in report["curve"]["held_out"]]


# ---- the rows


@pytest.fixture(scope="module")
def tokenizer(make_model: MakeModel) -> Tokenizer:
    return Tokenizer(make_model(), 320)


def text_of(tmp_path: Path, texts: list[str]) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=2, max_size=40), st.integers(2, 33))
def test_rows_are_the_documents_in_pieces(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seqlen: int
) -> None:
    """Every part of a document starts at 0 and counts on, and its tokens are those of the document in order."""
    texts = [chr(97 + i % 26) + " w" * length for i, length in enumerate(lengths)]
    spec = DataSpec(text_of(tmp_path_factory.mktemp("d"), texts), seqlen=seqlen)
    documents = [tokenizer.encode(text) for text in texts]
    total = sum(map(len, documents))
    try:
        rows = training_rows(spec, 1, tokenizer, 128)
    except QtoolError:
        assert total < 4 * seqlen
        return
    assert all(len(row) == len(positions) == seqlen for row, positions in zip(rows.rows, rows.positions, strict=True))
    assert seqlen * len(rows.rows) <= total
    for row, positions in zip(rows.rows, rows.positions, strict=True):
        starts = (positions == 0).nonzero()[:, 0].tolist()
        assert starts[0] == 0
        for start, end in zip(starts, [*starts[1:], seqlen], strict=True):
            piece = row[start:end].tolist()
            assert positions[start:end].tolist() == list(range(len(piece)))
            assert any(piece == document[i : i + len(piece)] for document in documents for i in range(len(document)))
            if start > 0:
                assert piece[0] == tokenizer.bos[0]


def test_documents_of_held_out_rows_are_not_trained_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [f"{'abcdefgh'[i % 8]} {i} " * 8 for i in range(64)]
    rows = training_rows(DataSpec(text_of(tmp_path, texts), seqlen=16), None, tokenizer, 128)
    assert 0 < len(rows.held_out) <= len(rows.rows) // 16 + 1
    assert sorted(rows.training + rows.held_out) == list(range(len(rows.rows)))
    every16 = [tokenizer.encode(text) for text in texts[15::16]]
    assert rows.rows[rows.held_out[0]][0] == tokenizer.bos[0]
    for index in rows.held_out:
        starts = [*(rows.positions[index] == 0).nonzero()[:, 0].tolist(), 16]
        for start, end in itertools.pairwise(starts):
            piece = rows.rows[index][start:end].tolist()
            assert any(piece == d[i : i + len(piece)] for d in every16 for i in range(len(d)))


def test_of_one_long_text_the_last_rows_are_held_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(" ".join(map(str, range(2000))), encoding="utf-8")
    rows = training_rows(DataSpec(str(tmp_path / "one.txt"), seqlen=16), 3, tokenizer, 128)
    ids = tokenizer.encode((tmp_path / "one.txt").read_text())
    assert (
        torch.cat([rows.rows[i] for i in rows.held_out]).tolist() == ids[len(ids) // 16 * 16 - 48 : len(ids) // 16 * 16]
    )
    assert len(rows.held_out) == 3
    chosen = training_rows(DataSpec(str(tmp_path / "one.txt"), seqlen=16, rows=10), None, tokenizer, 128)
    assert (len(chosen.training), len(chosen.held_out)) == (9, 1)
    other = training_rows(DataSpec(str(tmp_path / "one.txt"), seqlen=16, rows=10, seed=1), None, tokenizer, 128)
    assert other.sha256 != chosen.sha256


def test_one_row_per_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = training_rows(
        DataSpec(text_of(tmp_path, ["a b", "c d e f", "g"] * 11), pack=False, seqlen=5), None, tokenizer, 128
    )
    assert {len(row) for row in rows.rows} > {5}
    assert all(positions.tolist() == list(range(len(positions))) for positions in rows.positions)


def test_of_a_stream_without_end_the_first_rows_are_read(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def texts(*_: Any) -> Any:
        nonlocal read
        while True:
            read += 1
            yield f"text number {read} of very many"

    monkeypatch.setattr("qtool.training.data.read_texts", texts)
    rows = training_rows(DataSpec("org/name", rows=32, seqlen=16), None, tokenizer, 128)
    assert (len(rows.training), len(rows.held_out)) == (30, 2)
    assert read < 64
    monkeypatch.setattr("qtool.training.data.MOST_ROWS", 16)
    assert len(training_rows(DataSpec("org/name", seqlen=16), None, tokenizer, 128).rows) == 16


@pytest.mark.parametrize(("rows", "held_out"), [(1, None), (4, 4), (4, 5)])
def test_of_few_rows_not_all_can_be_held_out(
    tokenizer: Tokenizer, tmp_path: Path, rows: int, held_out: int | None
) -> None:
    """However much text there is."""
    spec = DataSpec(text_of(tmp_path, [f"{i} of many texts that fill some rows" for i in range(64)]), seqlen=8)
    assert len(training_rows(spec, 5, tokenizer, 128).training) > 64
    with pytest.raises(
        QtoolError, match=f"gives {rows} row{'s' * (rows > 1)} of 8 tokens: too few to keep {held_out or 1} "
    ):
        training_rows(replace(spec, rows=rows), held_out, tokenizer, 128)


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3, 4])])
def test_rows_to_measure_on_are_evenly_spaced(count: int, expected: list[int]) -> None:
    rows = [torch.full((4,), i) for i in range(7)]
    found = TrainingRows(rows, [], [0, 1, 2, 3, 4], [5, 6], "x", "").calibration(count)
    assert [int(row[0]) for row in found.rows] == expected


def test_too_little_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match="gives 0 rows of 64 tokens: too few to keep 1"):
        training_rows(DataSpec(text_of(tmp_path, ["a"]), seqlen=64), None, tokenizer, 128)


# ---- the recipe


def test_a_recipe_prints_and_reads_back() -> None:
    recipe = build(
        {**TINY, "student": {"drop_layers": [1, 3], "importance": "cosine"}, "objective": {"alpha": "1:0.5"}}
    )
    assert build(to_tree(recipe)) == recipe
    assert build(yaml.safe_load(to_yaml(recipe))) == recipe


def test_a_schedule_is_no_number_of_base_60() -> None:
    tree: dict[str, Any] = {}
    set_key(tree, "objective.temperature=4:1")
    set_key(tree, "objective.alpha=1:0.5")
    assert tree == {"objective": {"temperature": "4:1", "alpha": "1:0.5"}}
    assert build(tree).objective.temperature_at(0.5) == 2.5


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"teacher": "alive"}, "unknown kind of teacher `alive`"),
        ({"cache_teacher": 4, "objective": {"hidden": 1.0}}, "a cache of .* has no hidden states"),
        ({"cache_teacher": 4, "teacher": "live"}, "a live teacher is not cached"),
        ({"cache_teacher": 4, "objective": {"temperature": "4:1"}}, "for one temperature, not for 4:1"),
        ({"cache_teacher": 4, "objective": {"alpha": 0}}, "where only cross entropy counts"),
        ({"cache_teacher": 4, "objective": {"top_k": 5}}, "--top-k 5 and --cache-teacher 4 differ"),
        ({"cache_teacher": 0}, "cache_teacher is 0"),
        ({"training": {"held_out": 0}}, "held_out is 0"),
        ({"student": {"drop_layers": ["a"]}}, "takes a list of whole numbers"),
        ({"student": {"layer": 3}}, "unknown recipe key `student.layer`"),
        ({"eval": {"data": "x", "protocol": "window"}}, "unknown protocol `window`"),
    ],
)
def test_impossible_recipes(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(tree)


def test_a_quantized_student_is_a_recipe_of_quantize() -> None:
    recipe = quantized({"scheme": "w2a16", "objective": {"alpha": 0.5}, "training": {"steps": 7}, "data": "x.txt"})
    assert (recipe.scheme, recipe.method, recipe.finish) == ("int2-g128-sym", "gptaq", ("scales",))
    assert recipe.options == {"scales": {"alpha": 0.5, "steps": 7}}
    assert recipe.data.source == "x.txt"
    assert quantized({"scheme": "nvfp4", "method": "rtn", "finish": "full"}).finish == ("full",)
    with pytest.raises(UsageError, match="`student` means nothing with --scheme"):
        quantized({"scheme": "w2a16", "student": {"layers": 2}})
    for finish in ("block", [], ["block"]):
        with pytest.raises(UsageError, match="trains nothing that learns from the teacher's distributions"):
            quantized({"scheme": "w2a16", "finish": finish, "training": {"lr": 1e-5}})
    with pytest.raises(UsageError, match="`finish` takes a list of text, not `None`"):
        quantized({"scheme": "w2a16", "finish": None})


# ---- a run


def test_a_run_from_the_command_line(here: Path, qtool: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = qtool("distill", "m", "-o", "out", *FLAGS, *EVAL, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m", "out"]
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(
        ["manifest.json", *(f["name"] for f in manifest["files"])]
    )
    assert report["layers"] == {"teacher": 2, "student": 1}
    assert report["parameters"]["student"] < report["parameters"]["teacher"]
    assert report["curve"]["held_out"][0][0] == 0
    assert min(held_out(report)) < held_out(report)[0]
    before, after = (report["evaluation"][who] for who in ("before", "after"))
    assert after["comparison"]["kl"]["value"] < before["comparison"]["kl"]["value"]
    assert after["comparison"]["perplexity"] == before["comparison"]["perplexity"]
    assert err.count("distill 6/6") == 1

    made = (Path("out/model.safetensors").stat().st_mtime_ns, Path("out/manifest.json").read_bytes())
    code, page, err = qtool("distill", "m", "-o", "out", *FLAGS, *EVAL)
    assert (code, err.splitlines()[-1]) == (0, "out is up to date")
    assert made == (Path("out/model.safetensors").stat().st_mtime_ns, Path("out/manifest.json").read_bytes())
    lines = page.splitlines()
    assert lines[0] == f"measured on c.jsonl: windows, {after['tokens']} tokens"
    assert [line.split("  ")[0] for line in lines[2:5]] == ["teacher", "student before", "student after"]
    assert "the teacher's 1 of 2 layers (layer 0)" in page
    lost = before["perplexity"]["value"] - after["comparison"]["perplexity"]["value"]
    if lost > 0:
        recovered = (before["perplexity"]["value"] - after["perplexity"]["value"]) / lost
        assert f"recovered    {100 * recovered:.1f} % of the perplexity that the student had lost" in page

    code, out, err = qtool("distill", "m", "-o", "out", *FLAGS, "--lr", "0.02")
    assert (code, out) == (2, "")
    assert "out was made otherwise: distill.training.lr was `0.002` and is now `0.02`" in err


def test_another_evaluation_measures_again_and_does_no_other_work(here: Path) -> None:
    """The first student, which is gone by then, is made once more and gives the same figures."""
    spec = {"data": {"source": "c.jsonl", "rows": 4, "seqlen": 32}}
    without, _ = make("out")
    assert without["evaluation"] is None
    time_ns = Path("out/model.safetensors").stat().st_mtime_ns
    measured, up_to_date = make("out", eval=spec)
    assert up_to_date
    assert Path("out/model.safetensors").stat().st_mtime_ns == time_ns
    at_once, _ = make("other", eval=spec)
    for who in ("before", "after"):
        for figure in ("perplexity", "tokens"):
            assert measured["evaluation"][who][figure] == at_once["evaluation"][who][figure]
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m", "other", "out"]


def test_another_evaluation_of_an_interrupted_run(here: Path) -> None:
    """What was measured before the interruption does not count for it."""

    def progress(stage: str, *_: object) -> None:
        if stage == "distill":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("out", progress, eval={"data": {"source": "c.jsonl", "rows": 2, "seqlen": 32}})
    report, _ = make("out", eval={"data": {"source": "c.jsonl", "rows": 3, "seqlen": 32}})
    assert [report["evaluation"][who]["rows"] for who in ("before", "after")] == [3, 3]
    with pytest.raises(KeyboardInterrupt):
        make("out", progress, force=True, eval={"data": {"source": "c.jsonl", "rows": 2, "seqlen": 32}})
    report, _ = make("out", force=True)
    assert report["evaluation"] is None


STOPS = [("student", 1), ("importance", 1), ("evaluate model", 1), ("teacher", 1), ("distill", 2), ("distill", 4),
         ("write", 1), ("write", 2)]  # fmt: skip


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("cached", [None, 8])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    here: Path, stop: tuple[str, int], cached: int | None
) -> None:
    tree = {
        "student": {"layers": 1, "mlp": 64, "importance": "cosine"},
        "eval": {"data": {"source": "c.jsonl", "rows": 2, "seqlen": 32}},
        "cache_teacher": cached,
    }
    whole = expected_bytes(tree)

    def progress(stage: str, done: int, total: int, detail: str) -> None:
        if (stage, done) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("out", progress, **tree)
    assert Path("out.partial").is_dir()
    seen: list[str] = []
    report, up_to_date = make("out", lambda stage, *_: seen.append(stage), **tree)
    assert not up_to_date
    assert Path("out/model.safetensors").read_bytes() == whole
    assert not Path("out.partial").exists()
    if stop[0] == "write":
        assert report["resumed_units"] >= 3
        assert "importance" not in seen


def test_other_rows_than_before_the_interruption(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set may have changed."""
    monkeypatch.setattr("qtool.training.data.is_local", lambda _: False)
    monkeypatch.setattr("qtool.training.data.read_texts", lambda *_: (f"{word} {i} " * 9 for i in range(99)))
    tree = {"data": {"source": "org/name", "rows": 20, "seqlen": 32}}

    def progress(stage: str, *_: object) -> None:
        if stage == "distill":
            raise KeyboardInterrupt

    word = "one"
    with pytest.raises(KeyboardInterrupt):
        make("out", progress, **tree)
    word = "other"
    with pytest.raises(QtoolError, match="`org/name` gives other rows than before the interruption"):
        make("out", **tree)
    word = "one"
    assert make("out", **tree)[0]["resumed_units"] == 1


BYTES: dict[str, bytes] = {}


def expected_bytes(tree: dict[str, Any]) -> bytes:
    """Of an uninterrupted run, made once."""
    key = json.dumps(tree)
    if key not in BYTES:
        make("whole", **tree)
        BYTES[key] = Path("whole/model.safetensors").read_bytes()
    return BYTES[key]


def test_one_step_is_what_it_says(here: Path) -> None:
    """Against transformers and a loop by hand: KL of the teacher to the student over all tokens but first ones."""
    from transformers import AutoModelForCausalLM

    training = {"steps": 1, "batch": 4, "lr": 0.001, "clip": 0.0, "warmup": 0.0, "held_out": 1}
    data = {"source": "c.jsonl", "rows": 5, "seqlen": 32, "pack": False}
    make("out", training=training, data=data, objective={"temperature": 2.0, "alpha": 0.25})
    rows = training_rows(DataSpec(**data), 1, Tokenizer(Path("m"), 320), 128)
    teacher, student = (AutoModelForCausalLM.from_pretrained("m", dtype=torch.float32) for _ in range(2))
    student.model.layers = student.model.layers[:1]
    student.config.num_hidden_layers = 1
    total, count = torch.zeros(()), 0
    for index in rows.training:
        ids = rows.rows[index][None]
        with torch.no_grad():
            p = (teacher(ids).logits[0, :-1] / 2).softmax(-1)
        logits = student(ids, use_cache=False).logits[0, :-1]
        kl = (p * (p.log() - (logits / 2).log_softmax(-1))).sum()
        ce = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        total, count = total + 0.25 * 4 * kl + 0.75 * ce, count + len(logits)
    (total / count).backward()
    written = weights("out")
    for name, parameter in student.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        expected = parameter.detach() - 0.001 * gradient / (gradient.abs() + 1e-8)
        clear = gradient.abs() > 1e-5  # where the sign of the step is not that of a rounding error
        torch.testing.assert_close(written[name][clear], expected[clear], rtol=0, atol=3e-5, msg=name)
        assert clear.float().mean() > 0.5


def test_fewer_losses_and_other_teachers(here: Path) -> None:
    """All tokens cached as the top of them give the same; a live teacher too. Cross entropy alone needs none."""
    cached, _ = make("a")
    live, _ = make("b", teacher="live")
    top, _ = make("c", cache_teacher=320)
    assert held_out(live) == pytest.approx(held_out(cached), rel=1e-4)
    assert held_out(top) == pytest.approx(held_out(cached), rel=1e-4)
    alone, _ = make("d", objective={"alpha": 0.0})
    assert alone["teacher_is"] == "not asked: cross entropy alone"
    assert held_out(alone)[0] > held_out(cached)[0]
    states, _ = make("e", objective={"hidden": 1.0, "attention": 0.5}, student={"hidden": 32, "heads": 2})
    assert states["teacher_is"] == "in memory beside the student"
    assert min(held_out(states)) < held_out(states)[0]
    assert not any("project" in name for name in weights("e"))


def test_a_student_of_its_own(here: Path, make_model: MakeModel) -> None:
    shutil.copytree(make_model("llama", "bfloat16", False, num_hidden_layers=1), "s")
    report, _ = make("out", student={"path": "s"})
    assert report["student"] == "s"
    assert {t.dtype for t in weights("out").values()} == {torch.bfloat16}
    before, after = weights("s"), weights("out")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert json.loads(Path("out/config.json").read_text()) == json.loads(Path("s/config.json").read_text())
    tokenizer = json.loads(Path("s/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    Path("s/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="different tokenizers"):
        make("out2", student={"path": "s"})
    assert not Path("out2.partial").exists()
    shutil.copytree(make_model("llama", "bfloat16", vocab_size=384), "v")
    with pytest.raises(UsageError, match="v predicts 384 tokens, m 320"):
        make("out2", student={"path": "v"})


def test_what_does_not_decide_the_bytes_is_not_compared(here: Path, make_model: MakeModel) -> None:
    """How a student's folder is spelled, rows that nothing is measured on, layers named twice, what saves memory."""
    shutil.copytree(make_model("llama", "float32", num_hidden_layers=1), "s")
    assert not make("a", student={"path": "s"})[1]
    assert make("a", student={"path": str(here / "s")}, training={**STEPS, "accumulate": 2, "recompute": False})[1]
    assert not make("b", student={"drop_layers": [1, 1]})[1]
    assert make("b", student={"drop_layers": [1], "rows": 3})[1]
    assert not make("c", student={"mlp": 64, "rows": 2})[1]
    with pytest.raises(UsageError, match=r"distill\.student\.rows was `2` and is now `3`"):
        make("c", student={"mlp": 64, "rows": 3})
    with pytest.raises(UsageError, match=r"b was made otherwise: distill\.student\.drop_layers was `\[1\]`"):
        make("b", student={"drop_layers": [0]})


def test_outputs_of_other_commands_are_refused(here: Path, qtool: Callable[..., tuple[int, str, str]]) -> None:
    """And replaced with --force, either by the other."""
    quantize = ["quantize", "m", "-o", "out", "--scheme", "int4-g32-sym", "--method", "rtn"]
    for command in (["distill", "m", "-o", "out", *FLAGS], quantize):
        assert qtool(*quantize, "--force")[0] == 0
        if command is quantize:
            make("out", force=True)
        code, out, err = qtool(*command)
        assert (code, out) == (2, "")
        assert "error: out was made otherwise: " in err
        assert qtool(*command, "--force")[0] == 0


def test_packed_models(here: Path, qtool: Callable[..., tuple[int, str, str]]) -> None:
    """A packed teacher teaches, and what is cut out of it is dense; as a student it is refused."""
    rtn = ["--scheme", "int4-g32-sym", "--method", "rtn"]
    assert qtool("quantize", "m", "-o", "q", *rtn)[0] == 0
    code, _, err = qtool("distill", "q", "-o", "out", *FLAGS)
    assert code == 0, err
    assert "quantization_config" not in json.loads(Path("out/config.json").read_text())
    assert {t.dtype for t in weights("out").values()} == {torch.float32}
    code, out, err = qtool("distill", "m", "--student", "q", "-o", "o2")
    assert (code, out) == (2, "")
    assert err.startswith("error: q is quantized: a student is trained, and written, in 16 or 32 bits\n")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_types_that_nothing_is_trained_in(here: Path, dtype: torch.dtype) -> None:
    """Of a teacher the student is bfloat16; a student of its own is refused, before any work."""
    floats = {name: tensor.to(dtype) for name, tensor in weights("m").items()}
    save_file(floats, "m/model.safetensors", metadata={"format": "pt"})
    make("out")
    assert {tensor.dtype for tensor in weights("out").values()} == {torch.bfloat16}
    with pytest.raises(UsageError, match=r"of m is F.*: a student is trained, and written, in 16 or 32 bits"):
        make("out2", student={"path": "m"})


def test_a_diverging_run_keeps_what_it_had(here: Path, qtool: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = qtool("distill", "m", "-o", "out", *FLAGS, "--lr", "1e38", "--steps", "40", "--set",
                           "training.clip=0")  # fmt: skip
    assert (code, out) == (1, "")
    assert "error: training stopped at step" in err
    assert Path("out.partial/scratch/training").is_dir()
    code, _, err = qtool("distill", "m", "-o", "out", *FLAGS)
    assert code == 1
    assert "holds an interrupted run of another recipe" in err
    assert qtool("distill", "m", "-o", "out", *FLAGS, "--force")[0] == 0


def test_a_missed_gate(here: Path, qtool: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = qtool("distill", "m", "-o", "out", *FLAGS, *EVAL, "--max-kl", "0.0001", "-q")
    assert code == 3
    assert "gate max_kl 0.0001: MISSED" in out
    assert err == "error: a quality gate was missed: the output is kept and marked in its manifest\n"
    assert qtool("distill", "m", "-o", "out", *FLAGS, *EVAL, "--max-kl", "1000", "-q")[0] == 0


def test_a_dry_run_writes_nothing(here: Path, qtool: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = qtool("distill", "m", "--mlp", "32", "--steps", "3", "--alpha", "0.5", "--dry-run")
    assert (code, err) == (0, "")
    assert "the teacher's 32 of 128 MLP channels" in out
    assert "0.5 x kl at temperature 1.0 + cross entropy with the rest" in out
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m"]
    code, out, _ = qtool("distill", "m", "--layers", "1", "--dry-run", "--json")
    assert json.loads(out)["parameters"][1] < json.loads(out)["parameters"][0]


def test_what_is_expected_is_what_comes(here: Path) -> None:
    job = prepare("m", build(TINY))
    report, _ = make("out")
    plan = describe(job)
    assert plan["parameters"] == [report["parameters"]["teacher"], report["parameters"]["student"]]
    assert plan["size_bytes"] == [report["size_bytes"]["teacher"], report["size_bytes"]["student"]]
    assert plan["steps"] == report["curve"]["steps"] == 6
    assert plan["rows"] == report["data"]["rows"] + report["data"]["held_out_rows"]


WRONG = {
    "typo": (["--layer", "1"], "error: No such option: --layer"),
    "no student": ([], "error: there is no student\n"),
    "of quantize": (["--recipe", ROOT / "recipes/w4a16-gptq.yaml", "--layers", "1"],
                    f"error: {ROOT / 'recipes/w4a16-gptq.yaml'} is a recipe of `qtool quantize`\n"),
    "importance": (["--mlp", "32", "--importance", "cosine"], "error: importance `cosine` chooses layers, but"),
    "block": (["--scheme", "w8a16", "--finish", "block", "--lr", "1"], "error: finish ['block'] trains nothing that"),
    "all layers": (["--layers", "2"], "error: the student would be the teacher itself: nothing is left out\n"),
    "more layers": (["--layers", "3"], "error: --layers 3: the teacher has 2"),
    "numbers": (["--drop-layers", "1,x"], "error: `--drop-layers 1,x` takes whole numbers with commas between them\n"),
    "both": (["--student", "m", "--layers", "1"], "error: --student names a model as it is"),
    "no text": (["--layers", "1", "--data", "x.txt"], "error: no such file or folder: x.txt\n"),
    "self": (["--layers", "1", "--data", "self"], "error: distillation takes texts, not what the model writes"),
    "divergence": (["--layers", "1", "--divergence", "kll"], "error: unknown divergence `kll`\n"),
    "alpha": (["--layers", "1", "--alpha", "2"], "error: alpha is 2, but must be a number from 0 to 1\n"),
    "key": (["--layers", "1", "--set", "training.lrr=1"], "error: unknown recipe key `training.lrr`\n"),
    "on itself": (["--layers", "1", "-o", "m"], "error: m is where the model itself is\n"),
    "a file": (["--layers", "1", "-o", "x.gguf"], "error: x.gguf is the name of a file, but the output is a folder\n"),
    "finish": (["--layers", "1", "--finish", "full"], "error: --finish means nothing without --scheme\n"),
    "scheme": (["--layers", "1", "--scheme", "w2a16"], "error: `student` means nothing with --scheme"),
    "gate": (["--layers", "1", "--eval", "c.jsonl", "--max-ppl-increase", "x"], "error: --max-ppl-increase `x`"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_usage(here: Path, qtool: Callable[..., tuple[int, str, str]], kind: str) -> None:
    flags, message = WRONG[kind]
    code, out, err = qtool("distill", "m", "-o", "out", *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith(message) or kind == "on itself"
    assert sorted(p.name for p in here.iterdir()) == ["c.jsonl", "m"]


@pytest.mark.slow
def test_two_processes_train_the_same_student(here: Path) -> None:
    """And both may be asked again: it is up to date. Only the first speaks."""
    make("one", cache_teacher=None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qtool",
               "distill", "m", "-o", "two", *FLAGS, "--device", "cpu"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("student after") == 1
    assert done.stderr.count("two is up to date") == 1
    one, two = weights("one"), weights("two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3, msg=name)
    reports = [json.loads(Path(f"{name}/manifest.json").read_text())["report"] for name in ("one", "two")]
    assert held_out(reports[1]) == pytest.approx(held_out(reports[0]), rel=1e-3)


def test_the_default_recipe_is_complete() -> None:
    assert build({}) == Distillation()
