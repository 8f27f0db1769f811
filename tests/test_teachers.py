"""What teachers say is what the model says, however little of it is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError
from qtool.formats.weights import Weights
from qtool.models.blockwise import BlockModel
from qtool.models.whole import WholeModel
from qtool.training import teacher as teachers
from qtool.training.losses import TopK, top_k
from qtool.training.teacher import Batch, HiddenTeacher, LiveTeacher, Teacher, TopKTeacher
from tests.conftest import MakeModel
from tests.test_blockwise import CPU, assert_close, open_model, random_batches

LENGTHS = [9, 32, 5, 9, 20, 32, 9]
DOCUMENTS = {1: [10, 1, 21], 4: [7, 13]}  # the rows that have several


def make_rows() -> tuple[list[Tensor], list[Tensor]]:
    """Rows of several lengths, and their positions."""
    rows = [batch[0] for batch in random_batches([(1, length) for length in LENGTHS])]
    lengths = [DOCUMENTS.get(index, [len(row)]) for index, row in enumerate(rows)]
    return rows, [torch.cat([torch.arange(count) for count in counts]) for counts in lengths]


def load(path: Path) -> WholeModel:
    return WholeModel(path, Weights(Checkpoint(path)), CPU)


def batch_of(indexes: list[int], rows: list[Tensor], positions: list[Tensor] | None, **states: Any) -> Batch:
    padded = [nn.utils.rnn.pad_sequence([x[i] for i in indexes], True) for x in (rows, positions) if x]
    return Batch(indexes, padded[0], padded[1] if positions else None, **states)


def said(teacher: Teacher, batch: Batch, rows: list[Tensor]) -> list[Any]:
    """What a teacher says at every token of each row of a batch."""
    answer, width = teacher.answer(batch), batch.tokens_BT.shape[1]
    return [answer.distribution(b * width + torch.arange(len(rows[i]))) for b, i in enumerate(batch.indexes)]


def each_alone(path: Path, rows: list[Tensor], positions: list[Tensor] | None) -> list[Tensor]:
    """The logits [T, V] of every row by itself."""
    model = load(path)
    return [model(row[None], None if positions is None else positions[i][None])[0] for i, row in enumerate(rows)]


@contextmanager
def at_most_one_block(monkeypatch: pytest.MonkeyPatch, model: BlockModel) -> Iterator[list[int]]:
    """Fails when the weights of two blocks are in memory; which blocks were loaded."""
    loaded: list[int] = []
    run = model.run

    def watched(block: nn.Module, index: int, *rest: Any) -> Tensor:
        assert [not p.is_meta for b in model.blocks for p in b.parameters()].count(True) == len(
            list(block.parameters())
        )
        loaded.append(index)
        return run(block, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(model, "run", watched)
        yield loaded
    assert loaded
    assert all(p.is_meta for block in model.blocks for p in block.parameters())


@pytest.mark.parametrize("with_positions", [True, False], ids=["documents", "whole rows"])
@pytest.mark.parametrize("in_files", [True, False], ids=["files", "memory"])
def test_hidden_states_give_the_logits_of_the_model(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_positions: bool, in_files: bool
) -> None:
    rows, all_positions = make_rows()
    positions = all_positions if with_positions else None
    path = make_model()
    model = open_model(path)
    with at_most_one_block(monkeypatch, model):
        teacher = HiddenTeacher(model, rows, positions, folder=tmp_path, memory_bytes=0 if in_files else 1 << 20)
    assert bool(list(tmp_path.iterdir())) == in_files
    assert torch.is_grad_enabled()
    expected = each_alone(path, rows, positions)
    for indexes in ([0], [4, 1, 2], [6, 0, 5]):
        for i, found in zip(indexes, said(teacher, batch_of(indexes, rows, positions), rows), strict=True):
            assert_close(found, expected[i], f"row {i}")
    resident = {name for name, p in model.model.named_parameters(remove_duplicate=False) if not p.is_meta}
    assert resident == {"model.norm.weight", "lm_head.weight"}
    teacher.close()
    assert all(p.is_meta for p in model.model.parameters())


def test_portions_change_nothing_but_memory(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, positions = make_rows()
    model = open_model(make_model())
    whole = HiddenTeacher(model, rows, positions)
    monkeypatch.setattr(teachers, "PORTION_BYTES", 40 * (4 * 64 + 32))
    with at_most_one_block(monkeypatch, model) as loaded:
        parts = HiddenTeacher(model, rows, positions, folder=tmp_path, memory_bytes=0)
    assert parts.cache.firsts == [0, 1, 3, 5, 6]
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    assert loaded.count(1) >= 5
    for index in range(len(rows)):
        batch = batch_of([index], rows, positions)
        assert_close(said(parts, batch, rows)[0], said(whole, batch, rows)[0], f"row {index}")


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_top_is_that_of_the_logits(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    rows, positions = make_rows()
    monkeypatch.setattr(teachers, "PORTION_BYTES", 40 * (4 * 64 + 32))
    path = make_model()
    model = open_model(path)
    with at_most_one_block(monkeypatch, model):
        teacher = TopKTeacher(model, rows, positions, k=5, folder=tmp_path, temperature=temperature)
    assert all(p.is_meta for p in model.model.parameters()), "nothing of it stays"
    assert teacher.temperature == temperature
    expected = [top_k(logits, 5, temperature) for logits in each_alone(path, rows, positions)]
    for i, found in zip([4, 1, 2], said(teacher, batch_of([4, 1, 2], rows, positions), rows), strict=True):
        assert isinstance(found, TopK)
        assert (found.ids_SK.dtype, found.vocabulary) == (torch.long, 320)
        assert torch.equal(found.ids_SK, expected[i].ids_SK)
        assert torch.allclose(found.log_p_SK, expected[i].log_p_SK, atol=1e-5)
        assert torch.allclose(found.log_tail_S, expected[i].log_tail_S, atol=1e-5)


def test_the_top_of_what_a_shorter_vocabulary_has(make_model: MakeModel, tmp_path: Path) -> None:
    rows, _ = make_rows()
    path = make_model()
    teacher = TopKTeacher(open_model(path), rows, k=5, folder=tmp_path, vocabulary=300)
    (found,) = said(teacher, batch_of([1], rows, None), rows)
    expected = top_k(each_alone(path, rows, None)[1][:, :300], 5, 1.0)
    assert found.vocabulary == 300
    assert torch.equal(found.ids_SK, expected.ids_SK)
    assert torch.allclose(found.log_tail_S, expected.log_tail_S, atol=1e-5)


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("kind", ["hidden", "top"])
def test_an_interrupted_cache_goes_on(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rows, positions = make_rows()
    monkeypatch.setattr(teachers, "PORTION_BYTES", 40 * (4 * 64 + 32))
    path, steps = make_model(), []
    stop_after = 5  # in the third of five portions

    def progress(stage: str, done: int, total: int, detail: str) -> None:
        steps.append(done)
        assert (stage, total) == ("teacher", 10)
        if len(steps) == stop_after:
            raise Stop

    def make(folder: Path) -> HiddenTeacher | TopKTeacher:
        model = open_model(path)
        if kind == "hidden":
            return HiddenTeacher(model, rows, positions, folder=folder, memory_bytes=0, identity="a", progress=progress)
        return TopKTeacher(model, rows, positions, folder=folder, k=4, identity="a", progress=progress)

    with pytest.raises(Stop):
        make(tmp_path / "stopped")
    (tmp_path / "stopped" / "rows-00000003.partial").write_bytes(b"half")
    stop_after, steps[:] = 100, []
    make(tmp_path / "stopped")
    assert steps == [5, 6, 7, 8, 9, 10]
    steps.clear()
    make(tmp_path / "stopped")
    assert not steps, "what is there is not made again"
    make(tmp_path / "straight")
    assert steps == list(range(1, 11))
    files = sorted(p.name for p in (tmp_path / "straight").iterdir())
    assert sorted(p.name for p in (tmp_path / "stopped").iterdir()) == files
    for name in files:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


def test_a_cache_of_something_else_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    rows, positions = make_rows()
    model = open_model(make_model())
    TopKTeacher(model, rows, positions, folder=tmp_path, k=4, identity="a")
    others: list[dict[str, Any]] = [
        {"k": 5},
        {"identity": "b"},
        {"temperature": 2.0},
        {"rows": rows[:-1], "positions": positions[:-1]},
        {"rows": [row.flip(0) for row in rows]},
        {"positions": None},
        {"vocabulary": 300},
    ]
    for other in others:
        fields = {"rows": rows, "positions": positions, "k": 4, "identity": "a", **other}
        with pytest.raises(QtoolError, match="holds what another teacher says, or of other rows"):
            TopKTeacher(model, folder=tmp_path, **fields)
    with pytest.raises(QtoolError, match="holds what another teacher says"):
        HiddenTeacher(model, rows, positions, folder=tmp_path, memory_bytes=0, identity="a")
    assert json.loads((tmp_path / "cache.json").read_text())["parts"] == [0]


def test_states_that_fit_nowhere(make_model: MakeModel) -> None:
    rows, _ = make_rows()
    with pytest.raises(QtoolError, match=r"the teacher's hidden states take 0\.0 GiB, more than 0\.0"):
        HiddenTeacher(open_model(make_model()), rows, memory_bytes=4 * 64 * sum(LENGTHS) - 1)
    HiddenTeacher(open_model(make_model()), rows, memory_bytes=4 * 64 * sum(LENGTHS))


def test_mixed_precision_does_not_reach_the_head(make_model: MakeModel) -> None:
    rows, _ = make_rows()
    teacher = HiddenTeacher(open_model(make_model()), rows)
    batch = batch_of([1, 2], rows, None)
    expected = said(teacher, batch, rows)
    with torch.autocast("cpu", torch.bfloat16):
        found = said(teacher, batch, rows)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_teacher_in_memory_shows_its_states(make_model: MakeModel) -> None:
    rows, positions = make_rows()
    path = make_model()
    model = load(path).requires_grad_(True)
    teacher = LiveTeacher(model)
    assert not any(p.requires_grad for p in model.parameters())
    batch = batch_of([4, 1], rows, positions, hidden=[1], attention=[0, 1])
    expected = each_alone(path, rows, positions)
    for i, found in zip([4, 1], said(teacher, batch, rows), strict=True):
        assert_close(found, expected[i], f"row {i}")
    states = teacher.answer(batch).states
    assert states is not None
    assert (len(states.hidden), len(states.attention)) == (1, 2)
    with model.watch(attention=[0]) as alone:
        model.hidden(rows[4][None], positions[4][None])
    assert_close(states.attention[0][0, : len(rows[4])] + 1, alone.attention[0][0] + 1, "attention")
